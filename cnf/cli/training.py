"""A training in a run folder: begun or gone on with, shown, put down when it is asked to stop."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from cnf.cli.device import hardware, usable_device
from cnf.cli.folder import (
    MODEL,
    SNAPSHOT,
    RunFolder,
    claimed_folder,
    read_config,
    resumed_folder,
    versions,
)
from cnf.cli.resumption import other_setting, resumable, snapshots_of
from cnf.error import InputError
from cnf.training.loop import Progress
from cnf.training.ranks import here
from cnf.training.snapshot import Resumable, Snapshots

Told = Callable[[Progress], str]  # a record in words
Chosen = TypeVar("Chosen")


class Stepping(Resumable, Protocol):
    """A training that tells how many steps it has taken."""

    @property
    def step(self) -> int: ...


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
    return (folder / MODEL).is_file() and not Snapshots(folder / SNAPSHOT).exist


def stopped_config(out: str) -> dict[str, Any]:
    """The config.json of a run that was stopped.  Raises InputError where there is no such run."""
    with resumed_folder(out) as folder:
        return read_config(folder.path)


def settings_kept(
    arguments: Namespace,
    config: Mapping[str, Any],
    given: Mapping[str, Any],
    read: Callable[[dict[str, Any]], Chosen],
    what: str,
) -> Chosen:
    """The settings of the run in the folder `arguments.out`; where the arguments name no threads,
    device or data they take over the run's.

    config: its config.json; given: settings that were given again; read: makes settings of what is
    stored; what: is trained.
    Raises InputError for a run of something else, and for a setting that is not the run's.
    """
    out = arguments.out
    if not isinstance(config.get("settings"), dict):
        raise InputError(f"{out} holds no {what} to resume; leave --resume out to begin one")
    kept = read(config["settings"])
    for name, value in given.items():
        if getattr(kept, name) != value:
            raise other_setting(out, name, getattr(kept, name), value)
    then = config.get("arguments") or {}
    arguments.threads = arguments.threads or config.get("threads")
    arguments.device = arguments.device or then.get("device")
    arguments.data = arguments.data or then.get("data")
    arguments.no_download = arguments.no_download or bool(then.get("no_download"))
    return kept


def config_of(settings: Any, arguments: Namespace) -> dict[str, Any]:
    """What it takes to repeat the run, or to go on with it; settings: a dataclass."""
    folder = None if arguments.data is None else os.path.abspath(arguments.data)
    return {
        "arguments": {**vars(arguments), "data": folder},  # it may go on from elsewhere
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "ranks": here().world,
        "versions": versions(),
        "hardware": hardware(usable_device(arguments.device)),
    }


@contextmanager
def opened_folder(arguments: Namespace, name: str) -> Iterator[RunFolder]:
    """The folder of the run that goes on, or one for a new run; name: of the run."""
    out = out_of(arguments, name)
    opened = resumed_folder(out) if arguments.resume else claimed_folder(out, arguments.overwrite)
    with opened as folder, resumable(f"mnist {arguments.task}", folder):
        if arguments.tensorboard:
            folder.show_on_board()
        yield folder


def begun(
    training: Stepping,
    folder: RunFolder,
    config: Mapping[str, Any],
    device: torch.device,
    arguments: Namespace,
) -> list[Progress]:
    """The records so far: none, or those of the run that goes on.

    config: what it takes to repeat the run, or to go on with it.
    Raises InputError for a snapshot of another training.
    """
    snapshots = snapshots_of(folder, arguments)
    if snapshots.begun is None:
        folder.begin(config)
        snapshots.write(training.state_dict(), device)
        return []
    snapshots.take_up(training, device)
    return folder.go_on(training.step)


def train_on(
    training: Stepping,
    folder: RunFolder,
    history: list[Progress],
    device: torch.device,
    arguments: Namespace,
    told: Told,
) -> None:
    """Train to the end; every record goes into the history and the folder, and snapshots are kept
    at an interval and, before the program ends, on Ctrl-C and SIGTERM.
    """
    snapshots = Snapshots(folder.path / SNAPSHOT, arguments.save_every)
    with (
        _shown(arguments, told) as show,
        closing(snapshots.follow(training, device)) as records,
    ):
        for record in records:
            folder.add_step(asdict(record))
            history.append(record)
            show(record)


@contextmanager
def _shown(arguments: Namespace, told: Told) -> Iterator[Callable[[Progress], None]]:
    """A function that shows a record where stderr is a terminal: a bar, and a line whenever there
    was a judgement.  Elsewhere metrics.jsonl tells as much.
    """
    is_drawn = sys.stderr.isatty() and not arguments.quiet
    with tqdm(
        file=sys.stderr, disable=not is_drawn, leave=False,
        bar_format="{percentage:3.0f}% |{bar}| {desc}",
    ) as bar:  # fmt: skip

        def show(record: Progress) -> None:
            if not is_drawn:
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
