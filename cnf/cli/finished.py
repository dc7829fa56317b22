"""The trained classifiers that a figure or a table is made of: read if finished, else trained."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from cnf.cli.folder import CONFIG, FIGURES, MODEL, SNAPSHOT, read_json
from cnf.cli.mnist import classify
from cnf.cli.mnist.classifier import settings_of
from cnf.cli.parser import parse
from cnf.cli.training import given_settings, tell
from cnf.error import InputError
from cnf.odenet.settings import Settings, chosen
from cnf.training.snapshot import Snapshots

# arguments of `cnf mnist classify`
FULL = ("--width", "64", "--stem", "residual", "--epochs", "8", "--lr", "4e-3")
SOLVER = ("--method", "dopri5", "--rtol", "1e-3")  # of the nets with an ODE
QUICK = (
    "--dataset", "digits", "--width", "8", "--stem", "fine", "--epochs", "8", "--batch-size", "64",
)  # fmt: skip


def given(arguments: Namespace, *more: str) -> tuple[str, ...]:
    """What `cnf mnist classify` is to be told for a net: what all share, and `more`."""
    found = QUICK if arguments.quick else FULL
    for name in ("dataset", "data", "epochs", "threads"):
        if (value := getattr(arguments, name)) is not None:
            found = (*found, f"--{name}", str(value))
    return (*found, "--device", arguments.device, *more)


def settings_for(told: tuple[str, ...]) -> Settings:
    """The settings that these arguments mean."""
    wanted = _parsed(Path(), told)
    return chosen(wanted.preset, given_settings(wanted, Settings))


def figures_of(folder: Path, told: tuple[str, ...]) -> dict[str, Any] | None:
    """The figures of the run in that folder, None where none is finished there.

    Raises InputError for a run of other settings.
    """
    if not ((folder / FIGURES).is_file() and (folder / MODEL).is_file()):
        return None
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("settings"), dict):
        raise InputError(f"{folder} holds no run of a classifier; choose another --out")
    if settings_of(config["settings"]) != settings_for(told):
        raise InputError(f"{folder} holds a run of other settings; choose another --out")
    return read_json(folder / FIGURES)


def finished(folder: Path, told: tuple[str, ...], arguments: Namespace) -> dict[str, Any]:
    """The same, trained now unless it is finished; what was stopped goes on."""
    known = figures_of(folder, told)
    if known is not None:
        return known
    wanted = _parsed(folder, told)
    wanted.resume = (folder / CONFIG).is_file() and Snapshots(folder / SNAPSHOT).exist
    wanted.overwrite = not wanted.resume  # one that was killed before its first snapshot
    tell(arguments, f"{'going on with' if wanted.resume else 'training'} {folder}")
    return classify.classified(wanted)


def _parsed(folder: Path, told: tuple[str, ...]) -> Namespace:
    return parse(["mnist", "classify", *told, "--out", str(folder), "--quiet"], "")
