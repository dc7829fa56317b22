"""A training in a run folder: begun or gone on with, shown, put down when it is asked to stop."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from cnf.cli.folder import (
    CONFIG,
    MODEL,
    SNAPSHOT,
    STEPS,
    RunFolder,
    claimed_folder,
    read_json,
    resumed_folder,
    versions,
)
from cnf.error import InputError
from cnf.training.loop import Progress
from cnf.training.snapshot import Interval, postponed_signals, read_snapshot, write_snapshot

Told = Callable[[Progress], str]  # a record in words
Chosen = TypeVar("Chosen")


class Resumable(Protocol):
    """What is trained: see `cnf.training.loop.Training`."""

    @property
    def step(self) -> int: ...
    @property
    def is_done(self) -> bool: ...
    def __iter__(self) -> Iterator[Progress]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def tell(arguments: Namespace, message: str) -> None:
    """Say on stderr what is going on, unless that is not wanted."""
    if not arguments.quiet:
        print(message, file=sys.stderr)


def out_of(arguments: Namespace, name: str) -> str:
    """The folder that was asked for, else runs/NAME."""
    return str(Path("runs", name)) if arguments.out is None else arguments.out


def given_settings(arguments: Namespace, kind: type[Any]) -> dict[str, Any]:
    """The settings that were given, of a dataclass of settings."""
    values = ((one.name, getattr(arguments, one.name, None)) for one in fields(kind))
    return {name: value for name, value in values if value is not None}


def is_trained(out: str | Path) -> bool:
    """Whether a folder holds a run whose training has ended, and its report with it."""
    folder = Path(out)
    return (folder / MODEL).is_file() and not (folder / SNAPSHOT).is_file()


def stopped_config(out: str) -> dict[str, Any]:
    """The config.json of a run that was stopped.  Raises InputError where there is no such run."""
    with resumed_folder(out) as folder:
        return read_json(folder.path / CONFIG)


def settings_kept(
    out: str,
    config: Mapping[str, Any],
    given: Mapping[str, Any],
    read: Callable[[dict[str, Any]], Chosen],
    what: str,
) -> tuple[Chosen, int]:
    """The settings of the run in a folder, and its threads.

    config: its config.json; given: settings that were given again; read: makes settings of what is
    stored; what: is trained.
    Raises InputError for a run of something else, and for a setting that is not the run's.
    """
    if not isinstance(config.get("settings"), dict):
        raise InputError(f"{out} holds no {what} to resume; leave --resume out to begin one")
    kept = read(config["settings"])
    for name, value in given.items():
        if getattr(kept, name) != value:
            raise InputError(
                f"the run in {out} has {name} {getattr(kept, name)!r}, not {value!r}; leave that "
                "out, or begin a new run without --resume"
            )
    return kept, config["threads"]


def config_of(settings: Any, arguments: Namespace) -> dict[str, Any]:
    """What it takes to repeat the run, or to go on with it; settings: a dataclass."""
    return {
        "arguments": vars(arguments),
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


@contextmanager
def opened_folder(arguments: Namespace, name: str) -> Iterator[RunFolder]:
    """The folder of the run that goes on, or one for a new run; name: of the run."""
    out = out_of(arguments, name)
    opened = resumed_folder(out) if arguments.resume else claimed_folder(out, arguments.overwrite)
    with opened as folder:
        yield folder


def begun(
    training: Resumable,
    folder: RunFolder,
    config: Mapping[str, Any],
    device: torch.device,
    arguments: Namespace,
) -> list[Progress]:
    """The records so far: none, or those of the run that goes on.

    config: what it takes to repeat the run, or to go on with it.
    Raises InputError for a snapshot of another training.
    """
    path = folder.path / SNAPSHOT
    if not arguments.resume:
        folder.begin(config)
        write_snapshot(path, training.state_dict(), device)
        return []
    state = read_snapshot(path, device)
    try:
        training.load_state_dict(state)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not of this run; begin a new one without --resume") from error
    return [_record(line) for line in folder.go_on(training.step)]


def records_in(folder: Path) -> list[Progress]:
    """The records of a run whose training has ended."""
    lines = (folder / STEPS).read_text(encoding="utf-8").splitlines()
    return [_record(json.loads(line)) for line in lines]


def _record(line: dict[str, Any]) -> Progress:
    """A record of steps as it was; null was no finite number."""
    return Progress(**{**line, "loss": math.nan if line["loss"] is None else line["loss"]})


def train_on(
    training: Resumable,
    folder: RunFolder,
    history: list[Progress],
    device: torch.device,
    arguments: Namespace,
    told: Told,
) -> None:
    """Train to the end; every record goes into the history and the folder.

    A snapshot is kept at an interval and, before the program ends, on Ctrl-C and SIGTERM.
    """
    path, due = folder.path / SNAPSHOT, Interval(arguments.save_every)
    with postponed_signals() as is_asked_to_stop, _shown(arguments, told) as show:
        for record in training:
            folder.add_step(asdict(record))
            history.append(record)
            show(record)
            stops = is_asked_to_stop()
            if stops or due.is_over() or training.is_done:
                write_snapshot(path, training.state_dict(), device)
            if stops:
                raise KeyboardInterrupt(
                    f"`cnf mnist {arguments.task} --resume --out {folder.path}` goes on from here"
                )


@contextmanager
def _shown(arguments: Namespace, told: Told) -> Iterator[Callable[[Progress], None]]:
    """A function that shows a record: a bar on stderr where that is a terminal, and a line whenever
    the data held back were judged.
    """
    is_drawn = sys.stderr.isatty() and not arguments.quiet
    with tqdm(
        file=sys.stderr, disable=not is_drawn, leave=False,
        bar_format="{percentage:3.0f}% |{bar}| {desc}",
    ) as bar:  # fmt: skip

        def show(record: Progress) -> None:
            if arguments.quiet:
                return
            text = told(record)
            if record.validation is not None:
                line = f"step {record.step:,} of {record.steps:,} · {text}"
                tqdm.write(line, file=sys.stderr)
            bar.total, bar.n = record.steps, record.step
            bar.set_description_str(text, refresh=False)
            bar.update(0)

        yield show


def costs_told(record: Progress) -> list[str]:
    """What a step cost, what was left out and what is left, in words."""
    parts = [] if record.nfe is None else [f"NFE {record.nfe} + {record.nfe_backward or 0}"]
    parts += [f"{record.skipped} batches skipped"] if record.skipped else []
    return [*parts, f"{record.remaining:.0f} s left"]
