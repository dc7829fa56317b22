"""`cnf plot`: a picture of a run.

A kind of picture is one entry of KINDS: a function that draws a run, and what it returns is saved.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf.cli.check import checked_rows
from cnf.cli.device import usable_device
from cnf.cli.folder import (
    CONFIG,
    FIGURES,
    STEPS,
    Run,
    json_text,
    progress_of,
    read_config,
    read_run,
)
from cnf.cli.picture import (
    animation_frames,
    density_picture,
    field_picture,
    pairs_picture,
    samples_picture,
    tradeoff_picture,
    training_picture,
    trajectories_picture,
)
from cnf.cli.source import Source, read_source
from cnf.cli.trained import context_of
from cnf.data.rows import listed
from cnf.error import InputError
from cnf.flow.budget import Tradeoff
from cnf.flow.flow import Flow
from cnf.plot import save_animation, save_figure
from cnf.training.loop import Progress


class Subject:
    """The run that is drawn; what is not in its model is found where a picture asks for it."""

    def __init__(self, run: Run, arguments: Namespace) -> None:
        self.run, self.seed, self._arguments = run, arguments.seed, arguments
        self._values = None
        if arguments.context is not None:
            self._values = context_of(arguments.context, run)

    @property
    def flow(self) -> Flow:
        return self.run.flow

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def context(self) -> Tensor | None:
        """The context that was named, (columns,)."""
        if self._values is None:
            return None
        return torch.tensor(self._values, dtype=self.flow.dtype, device=self.flow.device)

    @property
    def given(self) -> str:
        """The context that was named as the end of a title, "" without one."""
        if self._values is None:
            return ""
        pairs = zip(self.run.context, self._values, strict=True)
        return f" given {', '.join(f'{name} = {value:g}' for name, value in pairs)}"

    @property
    def title(self) -> str:
        """The run's name, with the context that was named."""
        return self.name + self.given

    @cached_property
    def source(self) -> Source:
        """The data of the run, read or drawn again as its config.json says."""
        config = read_config(self.run.path)
        try:
            given, data = config["arguments"], config["data"]
            name, settings = given["data"], {"seed": given["seed"], "rows": given["rows"]}
            columns, dequantized = given["columns"], given["dequantize"]
            context = given.get("context") or ()
        except (KeyError, TypeError) as error:
            raise _damaged(self.run.path / CONFIG) from error
        return read_source(
            data.get("file", name),
            **settings,
            columns=columns,
            context=context,
            dequantized=dequantized,
        )

    @cached_property
    def history(self) -> list[Progress]:
        """The records of all training steps."""
        path = self.run.path / STEPS
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            records = [progress_of(json.loads(line)) for line in lines]
        except FileNotFoundError as error:
            raise InputError(f"{self.run.path} holds no {STEPS}; fit again") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _damaged(path) from error
        if not records:
            raise InputError(f"{path} records no step, so there is no training to draw; fit again")
        return records

    @property
    def entropy(self) -> float | None:
        """The entropy of the data, where the run's figures know it."""
        path = self.run.path / FIGURES
        found = _json_of(path).get("entropy") if path.exists() else None
        return float(found) if isinstance(found, int | float) else None

    @cached_property
    def tradeoff(self) -> Tradeoff:
        """Errors and times against evaluations, on the rows of the file or of the flow."""
        return self.flow.tradeoff(*checked_rows(self.run, self._arguments))


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path) from error
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged; restore it or fit again")


@dataclass(frozen=True)
class Kind:
    """A kind of picture: how it is drawn and saved, the suffixes its file may have, the numbers
    that are printed with it, and whether it shows one density, and so, of a conditional run, that
    of one context: it takes a context, or needs it; whether it is drawn of the rows of a file.
    """

    draw: Callable[[Subject], Any]
    save: Callable[[Any, Path], Path] = save_figure
    suffixes: tuple[str, ...] = (".png", ".pdf", ".svg")
    numbers: Callable[[Subject], Any] = lambda subject: None
    takes_context: bool = False
    needs_context: bool = False
    takes_rows: bool = False


KINDS = {
    "density": Kind(
        lambda subject: density_picture(
            subject.flow, subject.source, subject.context, subject.given, subject.seed
        ),
        takes_context=True,
    ),
    "samples": Kind(lambda subject: samples_picture(subject.flow, subject.source, subject.seed)),
    "pairs": Kind(lambda subject: pairs_picture(subject.flow, subject.source, subject.seed)),
    "trajectories": Kind(
        lambda subject: trajectories_picture(
            subject.flow, subject.run.columns, subject.title, subject.seed, subject.context
        ),
        needs_context=True,
    ),
    "field": Kind(
        lambda subject: field_picture(subject.flow, subject.title, subject.seed, subject.context),
        needs_context=True,
    ),
    "animation": Kind(
        lambda subject: animation_frames(
            subject.flow, subject.title, subject.seed, subject.context
        ),
        save_animation,
        (".gif",),
        needs_context=True,
    ),
    "training": Kind(
        lambda subject: training_picture(subject.history, subject.name, subject.entropy)
    ),
    "tradeoff": Kind(
        lambda subject: tradeoff_picture(subject.tradeoff, subject.name),
        numbers=lambda subject: subject.tradeoff,
        takes_context=True,
        takes_rows=True,
    ),
}


@torch.no_grad()
def run(arguments: Namespace) -> None:
    """Draw the picture and write it, by default into the run folder."""
    kind = KINDS.get(arguments.what)
    if kind is None:
        raise InputError(
            f"--what {arguments.what} is no kind of picture; known are {', '.join(KINDS)}"
        )
    trained = read_run(arguments.run_folder, usable_device(arguments.device))
    _check_rows(arguments, kind)
    _check_context(arguments, kind, trained)
    output = _output(arguments, kind, trained)
    subject = Subject(trained, arguments)
    path = kind.save(kind.draw(subject), output)
    numbers = kind.numbers(subject)
    if arguments.json:
        found = {} if numbers is None else numbers.as_dict()
        print(json_text({"file": str(path), "what": arguments.what, **found}))
    elif numbers is None:
        print(f"{arguments.what} of {trained.path} in {path}")
    else:
        print(f"{numbers}\n{path}")


def _check_rows(arguments: Namespace, kind: Kind) -> None:
    """Raises InputError for rows of a file, or columns of it, that would not be looked at."""
    if kind.takes_rows:
        return
    named = arguments.file or ("--columns" if arguments.columns else None)
    if named is not None:
        wanted = ", ".join(name for name, one in KINDS.items() if one.takes_rows)
        raise InputError(
            f"{named} is for --what {wanted}; --what {arguments.what} draws the run's own data: "
            "leave it out"
        )


def _check_context(arguments: Namespace, kind: Kind, trained: Run) -> None:
    """Raises InputError for a context that is missing, or of no use."""
    what = f"--what {arguments.what}"
    if arguments.context is None:
        if trained.context and kind.needs_context:
            raise InputError(
                f"{what} draws one density, and {trained.path} has one for each context; give "
                f"values of {listed(trained.context)}: --context X,Y"
            )
        return
    if not (kind.takes_context or kind.needs_context):
        wanted = [name for name, one in KINDS.items() if one.takes_context or one.needs_context]
        raise InputError(
            f"--context is for {', '.join(wanted)}, and {what} draws no single one; leave it out"
        )


def _output(arguments: Namespace, kind: Kind, trained: Run) -> Path:
    """Where the picture goes: into the run folder, where it can be drawn again at any time, or to
    a file that the user named, which is not replaced unasked.
    """
    if arguments.output is None:
        return trained.path / f"{arguments.what}{kind.suffixes[0]}"
    output = Path(arguments.output)
    if output.suffix.lower() not in kind.suffixes:
        raise InputError(
            f"-o {output} is no file for {arguments.what}; give it the suffix "
            f"{' or '.join(kind.suffixes)}"
        )
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent} to write {output.name} to; make it")
    if output.exists() and not arguments.overwrite:
        raise InputError(f"{output} exists; give another name, or --overwrite to replace it")
    return output
