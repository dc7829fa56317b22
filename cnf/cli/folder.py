"""Run folders: claimed without overwriting any, written file by file, and read back."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from cnf import __version__
from cnf.cli.board import Board
from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.replace import replacing

MODEL, CONFIG, FIGURES, STEPS = "model.safetensors", "config.json", "metrics.json", "metrics.jsonl"
DENSITY, SAMPLES, TRAINING = "density.png", "samples.png", "training.png"
CONFUSION, SNAPSHOT = "confusion.png", "snapshot.pt"
EVENTS = "tensorboard"  # a folder in the run's
FILES = (MODEL, CONFIG, FIGURES, STEPS, DENSITY, SAMPLES, TRAINING)
# what `cnf plot` may add
DRAWN = ("pairs.png", "trajectories.png", "field.png", "animation.gif", "tradeoff.png")


def versions() -> dict[str, str]:
    """What a run was made with, for its config.json."""
    return {
        "cnf": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


class RunFolder:
    """The folder of one run; nothing in it is touched before `begin`.

    Every file is written whole or not at all, but for the record of steps, which grows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._steps: TextIO | None = None
        self._taken = 0  # records of steps
        self._boards: list[Board] = []

    def show_on_board(self) -> None:
        """Write the records of steps for TensorBoard too; InputError where it is missing."""
        self._boards.append(Board(self.path / EVENTS))

    @property
    def has_begun(self) -> bool:
        return self._steps is not None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write config.json and open the record of steps, once what an older run left is gone."""
        for name in (*FILES, *DRAWN, CONFUSION, SNAPSHOT):
            if name != STEPS:  # it holds our claim to the folder, and is emptied below
                (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / EVENTS, ignore_errors=True)
        self.write_json(CONFIG, config)
        self._steps = (self.path / STEPS).open("w", encoding="utf-8")

    def go_on(self, step: int) -> list[dict[str, Any]]:
        """Open the record of steps after `step` of them, where there were more they are cut off;
        the records that stay.
        """
        lines = (self.path / STEPS).read_text(encoding="utf-8").splitlines()[:step]
        with replacing(self.path / STEPS) as file:
            file.writelines(f"{line}\n".encode() for line in lines)
        self._steps = (self.path / STEPS).open("a", encoding="utf-8")
        self._taken = len(lines)
        return [json.loads(line) for line in lines]

    def add_step(self, record: Mapping[str, Any]) -> None:
        """Append a line to the record of steps; it is on disk when this returns."""
        assert self._steps is not None, "begin() comes first"
        self._steps.write(json_text(record) + "\n")
        self._steps.flush()
        self._taken += 1
        for board in self._boards:
            board.add(self._taken, record)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        with replacing(self.path / name) as file:
            file.write(f"{json_text(value, indent=2)}\n".encode())

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
        for board in self._boards:
            board.close()


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON with null where a number is not finite: NaN is no JSON."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- claiming a folder ----------------------------------------------------------------------------


@contextmanager
def claimed_folder(out: str, overwrite: bool) -> Iterator[RunFolder]:
    """A folder of one's own: `out`, or out-2, out-3, … where that is taken.

    overwrite: take `out` even where it holds a run.  If the block ends before the run has begun,
    what was made is removed again.  Raises InputError where no folder can be made.
    """
    made: list[Path] = []
    try:
        folder = RunFolder(_claim(_folder_path(out), overwrite, made))
    except OSError as error:
        _remove(made)
        raise InputError(
            f"the run folder {out} cannot be made ({error.strerror}); choose another --out"
        ) from error
    try:
        yield folder
    finally:
        folder.close()
        if not folder.has_begun:
            _remove(made)


@contextmanager
def resumed_folder(out: str) -> Iterator[RunFolder]:
    """The folder of a run that was interrupted; `go_on` opens its record of steps.

    Raises InputError where there is no such run, or nothing is left to do.
    """
    folder = _folder_path(out)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no run to resume; leave --resume out to begin one")
    if not (folder / SNAPSHOT).is_file():
        done = (folder / FIGURES).is_file()
        why = "the run has finished" if done else "the run stopped before its first snapshot"
        raise InputError(f"there is no {folder / SNAPSHOT}, {why}; leave --resume out to begin one")
    kept = RunFolder(folder)
    try:
        yield kept
    finally:
        kept.close()


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run holds.  Raises InputError where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged; restore it or start anew") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged; restore it or start anew")
    return value


def _folder_path(out: str) -> Path:
    path = Path(out)
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    if not path.name:
        raise InputError(f"--out {out} names no folder for a run; try --out runs/NAME")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder for a run; choose another --out")
    return path


def _claim(wanted: Path, overwrite: bool, made: list[Path]) -> Path:
    """The folder that is now ours; made: gets the paths to remove if it comes to nothing."""
    if overwrite and wanted.is_dir():
        if any(wanted.iterdir()) and not (wanted / CONFIG).exists():
            raise InputError(f"{wanted} holds other files and no run; choose another --out")
        return wanted
    numbered = (wanted.with_name(f"{wanted.name}-{i}") for i in itertools.count(2))
    return next(path for path in itertools.chain([wanted], numbered) if _claims(path, made))


def _claims(path: Path, made: list[Path]) -> bool:
    """Whether the folder was free; its empty record of steps then tells others that it is not."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        return False
    made[:0] = missing
    path.mkdir(parents=True, exist_ok=True)
    try:
        (path / STEPS).open("x").close()
    except FileExistsError:
        return False
    made.insert(0, path / STEPS)
    return True


def _remove(made: list[Path]) -> None:
    """Files and folders, the deepest first; a folder that somebody else has used since stays."""
    for path in made:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


# --- reading a run --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its flow, and the columns it was trained on; named: by a file's header;
    context: the columns that the density is conditional on.
    """

    path: Path
    flow: Flow
    columns: tuple[str, ...]
    named: bool
    dequantized: tuple[str, ...]
    context: tuple[str, ...] = ()


def read_run(path: str, device: torch.device) -> Run:
    """The run in a folder.  Raises InputError if it is missing, unfinished or damaged."""
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"there is no run folder {folder}; `cnf fit` makes one")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name the run folder, such as runs/moons")
    data = _stored_data(folder / CONFIG)
    if not (folder / MODEL).exists():
        raise InputError(f"{folder} holds no {MODEL}; its training has not ended, fit again")
    flow = Flow.load(folder / MODEL).to(device)
    context = tuple(data.get("context") or ())
    for names, width in ((data["columns"], flow.dim), (context, flow.context)):
        if len(names) != width:
            raise InputError(
                f"{folder / CONFIG} names {len(names)} columns, but the flow in {MODEL} "
                f"has {width}; they are of different runs, fit again"
            )
    dequantized = tuple(data.get("dequantized") or ())
    return Run(folder, flow, tuple(data["columns"]), bool(data.get("named")), dequantized, context)


def _stored_data(config: Path) -> dict[str, Any]:
    """What config.json says of the data."""
    damaged = InputError(f"{config} is damaged; restore it or fit again")
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "settings" in found:
            raise InputError(
                f"{config.parent} holds a classifier, which has no density; name a flow's run"
            )
        data = found["data"]
        columns = data["columns"]
    except FileNotFoundError as error:
        raise InputError(
            f"{config.parent} holds no {CONFIG}, so it is no run folder; name one that `cnf fit` "
            "wrote"
        ) from error
    except OSError as error:
        raise InputError(f"{config} cannot be read ({error.strerror}); fit again") from error
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged from error
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise damaged
    return data
