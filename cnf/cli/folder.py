"""Run folders: claimed without overwriting any, written file by file, and read back."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from cnf import __version__
from cnf.cli.board import Board
from cnf.cli.lock import LOCK, is_locked, locked
from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.replace import replacing
from cnf.training.loop import Progress
from cnf.training.ranks import here
from cnf.training.snapshot import Snapshots

MODEL, CONFIG, FIGURES, STEPS = "model.safetensors", "config.json", "metrics.json", "metrics.jsonl"
DENSITY, SAMPLES, TRAINING = "density.png", "samples.png", "training.png"
CONFUSION, SNAPSHOT = "confusion.png", "snapshot.pt"
CLASSES, BETWEEN, NEIGHBOURS = "classes.png", "interpolation.png", "neighbours.png"  # of images
EVENTS = "tensorboard"  # a folder in the run's
CLASSIFIER = "classifier"  # another, of the net that judges samples of images
PROGRAMS = "model-nfe*.pt2"  # what `cnf export` writes beside the net
FORMAT = 1  # of the folder; raised when an older reader would misread it
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

    Every file is written whole or not at all, but for the record of steps, which grows by whole
    lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._steps: FileIO | None = None
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
        for name in (*FILES, *DRAWN, CONFUSION, CLASSES, BETWEEN, NEIGHBOURS):
            if name != STEPS:  # it holds our claim to the folder, and is emptied below
                (self.path / name).unlink(missing_ok=True)
        for program in self.path.glob(PROGRAMS):
            program.unlink()
        for name in (EVENTS, CLASSIFIER):
            shutil.rmtree(self.path / name, ignore_errors=True)
        _sweep(self.path)
        Snapshots(self.path / SNAPSHOT).remove()
        self.write_config(config)
        self._steps = FileIO(self.path / STEPS, "w")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json with the format of the folder."""
        self.write_json(CONFIG, {"format": FORMAT, **config})

    def go_on(self, steps: int) -> list[Progress]:
        """Open the record of steps after so many of them, where there were more they are cut off;
        the records that stay.
        """
        kept = _recorded(self.path / STEPS)[:steps]
        with replacing(self.path / STEPS) as file:
            file.writelines(f"{line}\n".encode() for line, _ in kept)
        self._steps = FileIO(self.path / STEPS, "a")
        self._taken = len(kept)
        return [record for _, record in kept]

    def add_step(self, record: Mapping[str, Any]) -> None:
        """Append a line to the record of steps, whole or not at all.

        It is with the system when this returns.
        """
        assert self._steps is not None, "begin() comes first"
        end, line = self._steps.tell(), f"{json_text(record)}\n".encode()
        try:
            if self._steps.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                self._steps.truncate(end)
            raise OSError(error.errno, error.strerror, str(self.path / STEPS)) from error
        self._taken += 1
        for board in self._boards:
            board.add(self._taken, record)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        with replacing(self.path / name) as file:
            file.write(f"{json_text(value, indent=2)}\n".encode())

    def save(self, flow: Flow) -> None:
        """Write the model."""
        flow.save(self.path / MODEL)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
        for board in self._boards:
            board.close()


class OthersFolder(RunFolder):
    """The first rank's folder as the others see it: they write nothing."""

    def begin(self, config: Mapping[str, Any]) -> None:
        pass

    def go_on(self, steps: int) -> list[Progress]:
        return []

    def add_step(self, record: Mapping[str, Any]) -> None:
        pass

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        pass

    def save(self, flow: Flow) -> None:
        pass


def records_in(folder: Path) -> list[Progress]:
    """The records of a run whose training has ended."""
    return [record for _, record in _recorded(folder / STEPS)]


def _recorded(path: Path) -> list[tuple[str, Progress]]:
    """The lines and records in a file of steps, as far as it can be read."""
    found: list[tuple[str, Progress]] = []
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        for line in path.read_text(encoding="utf-8").splitlines():
            found.append((line, progress_of(json.loads(line))))
    return found


def progress_of(line: Mapping[str, Any]) -> Progress:
    """A record of steps as it was; null was no finite number.

    Raises TypeError or KeyError for a line that is no such record.
    """
    known = {field.name for field in fields(Progress)}
    kept = {name: value for name, value in line.items() if name in known}
    numbers = (value for name, value in kept.items() if name != "phase")
    if not (
        isinstance(kept["phase"], str) and all(isinstance(x, int | float | None) for x in numbers)
    ):
        raise TypeError("a record of a step has a phase and numbers")
    return Progress(**{**kept, "loss": math.nan if kept["loss"] is None else kept["loss"]})


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
    what was made is removed again.  Of several ranks the first one claims it.
    Raises InputError where no folder can be made, or another process works in it.
    """
    if not here().is_first:
        yield OthersFolder(Path(out))
        return
    made: list[Path] = []
    with ExitStack() as stack:
        try:
            folder = RunFolder(_claim(_folder_path(out), overwrite, made))
            stack.callback(lambda: None if folder.has_begun else _remove(made))
            stack.enter_context(locked(folder.path))
        except OSError as error:
            _remove(made)
            raise InputError(
                f"the run folder {out} cannot be made or written ({error.strerror}); choose "
                "another --out"
            ) from error
        stack.callback(folder.close)
        yield folder


@contextmanager
def resumed_folder(out: str) -> Iterator[RunFolder]:
    """The folder of a run that was interrupted; `go_on` opens its record of steps.

    Raises InputError where there is no such run, nothing is left to do, the folder cannot be
    written, or another process works in it.
    """
    folder = _folder_path(out)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no run to resume; leave --resume out to begin one")
    if not here().is_first:
        yield OthersFolder(folder)
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}), so its run cannot go on; make it "
                "yours to write, or copy it and name the copy with --out"
            ) from error
        if not Snapshots(folder / SNAPSHOT).exist:
            done = (folder / FIGURES).is_file()
            why = "the run has finished" if done else "the run stopped before its first snapshot"
            raise InputError(
                f"nothing is left to resume in {folder}: {why}; leave --resume out to begin one"
            )
        _sweep(folder)
        kept = RunFolder(folder)
        stack.callback(kept.close)
        yield kept


def unfinished(out: str) -> str:
    """The newest run that can go on, of those that `claimed_folder` may have called `out`; `out`
    itself where there is none.  Of several ranks the first one looks.
    """
    wanted = _folder_path(out)
    name = re.compile(re.escape(wanted.name) + r"(-\d+)?")
    near = wanted.parent.iterdir() if wanted.parent.is_dir() else ()
    runs = [path for path in near if name.fullmatch(path.name) and (path / CONFIG).is_file()]
    snapshots = {path: Snapshots(path / SNAPSHOT) for path in runs if not is_locked(path)}
    times = {path: one.written for path, one in snapshots.items() if one.exist}
    return here().told(str(max(times, key=lambda path: times[path], default=wanted)))


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says of a run, of this or an older version of the format.

    Raises InputError where it cannot be read, or is of a newer version.
    """
    config = read_json(folder / CONFIG)
    form = config.get("format", FORMAT)  # the first ones did not say so
    if not isinstance(form, int) or form > FORMAT:
        by = config.get("versions")
        maker = by.get("cnf") if isinstance(by, dict) else None
        raise InputError(
            f"{folder} is a run of format {form!r}, written by cnf {maker}; this version reads "
            f"format {FORMAT}: install that one, or a newer"
        )
    return config


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
        names = {path.name for path in wanted.iterdir()} - {path.name for path in _torn(wanted)}
        if CONFIG not in names and names - {STEPS, LOCK}:  # these a run leaves that never began
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


def _torn(folder: Path) -> list[Path]:
    """What is left of files that were being written when a process was killed."""
    return list(folder.glob(".*.tmp"))


def _sweep(folder: Path) -> None:
    for path in _torn(folder):
        path.unlink(missing_ok=True)


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


def _other(folder: Path, config: Mapping[str, Any]) -> InputError:
    """What is said of a run of `cnf mnist`, which is of no table."""
    arguments = config.get("arguments")
    if isinstance(arguments, Mapping) and arguments.get("task") == "generate":
        return InputError(
            f"{folder} holds a flow over images, not over a table; see `cnf mnist sample --help` "
            "and `cnf mnist bpd --help`"
        )
    return InputError(f"{folder} holds a classifier, which has no density; name a flow's run")


def _stored_data(config: Path) -> dict[str, Any]:
    """What config.json says of the data."""
    if not config.exists():
        raise InputError(
            f"{config.parent} holds no {CONFIG}, so it is no run folder; name one that `cnf fit` "
            "wrote"
        )
    found = read_config(config.parent)
    if "settings" in found:
        raise _other(config.parent, found)
    data = found.get("data")
    if isinstance(data, dict) and isinstance(data.get("columns"), list):
        lists = [data["columns"], data.get("context") or []]
        noise = data.get("dequantized") or {}
        if (
            all(isinstance(names, list) and set(map(type, names)) <= {str} for names in lists)
            and isinstance(noise, dict)
            and all(isinstance(width, int | float) for width in noise.values())
        ):
            return data
    raise InputError(f"{config} is damaged; restore it or fit again")
