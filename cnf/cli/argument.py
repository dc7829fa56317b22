"""What the arguments of all verbs are made of: a page, values read from text, the device."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from cnf.error import InputError
from cnf.odenet.settings import DATASETS


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def page(make: Callable[..., Any], *names: str, **texts: str) -> Any:
    """A parser made by `make`, whose texts keep their lines."""
    wide = argparse.RawDescriptionHelpFormatter
    return make(*names, formatter_class=wide, allow_abbrev=False, **texts)


def device_argument(verb: Any) -> None:
    """Add --device."""
    verb.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, mps (cpu)")


def board_argument(place: Any) -> None:
    """Add --tensorboard."""
    place.add_argument(
        "--tensorboard", action="store_true", help="curves for TensorBoard as well, in RUN"
    )


def again_arguments(place: Any) -> None:
    """Add --overwrite and --resume: what becomes of a run that is there already."""
    again = place.add_mutually_exclusive_group()
    again.add_argument(
        "--overwrite", action="store_true", help="replace the run in that folder, if there is one"
    )
    again.add_argument(
        "--resume", action="store_true", help="go on with the run in that folder where it stopped"
    )


def running_arguments(training: Any) -> None:
    """Add what a run that goes on may change: --threads, --save-every and --device."""
    training.add_argument(
        "--threads", metavar="N", type=count, default=None, help="of torch on the CPU"
    )
    training.add_argument(
        "--save-every", metavar="S", type=positive, default=60.0,
        help="seconds between snapshots (60)",
    )  # fmt: skip
    training.add_argument("--device", metavar="NAME", default=None, help="cpu, cuda, mps (cpu)")


def place_arguments(task: Any, out: str) -> None:
    """Add where the run folder is, by default `out`, and what is printed."""
    place = task.add_argument_group("where the results go")
    place.add_argument("--out", metavar="RUN", help=f"the run folder (default: {out})")
    again_arguments(place)
    place.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    board_argument(place)
    place.add_argument("--quiet", action="store_true", help="no progress, nothing but warnings")


def files_arguments(data: Any, default: str) -> None:
    """Add which images, and where they are found; default: in words."""
    data.add_argument("--dataset", choices=DATASETS, help=f"which images {default}")
    data.add_argument("--data", metavar="FOLDER", help="the folder that holds the IDX files")
    data.add_argument(
        "--no-download", action="store_true", help="fail where the files are not found"
    )


def run_arguments(training: Any) -> None:
    """Add what any training takes that can be resumed."""
    training.add_argument("--seed", metavar="K", type=seed, help="of weights and batches (0)")
    running_arguments(training)


# --- values ---------------------------------------------------------------------------------------


def count(text: str) -> int:
    return _whole(text, 1, "a whole number above 0")


def seed(text: str) -> int:
    return _whole(text, 0, "a whole number from 0 to 2^63 - 1")


def _whole(text: str, least: int, kind: str) -> int:
    value = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not least <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind}")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def weight(text: str) -> float:
    return 0.0 if text.strip("0.") == "" and "0" in text else positive(text)


def band(text: str) -> tuple[float, ...] | str | None:
    if text in ("none", "auto"):
        return None if text == "none" else text
    ends = tuple(positive(end.strip()) for end in text.split(","))
    if len(ends) != 2 or ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH such as 0.5,6, nor none")
    return ends


def widths(text: str) -> tuple[int, ...]:
    return tuple(count(width.strip()) for width in text.split(","))


def numbers(text: str) -> list[float]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.5,2")
    return values


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def labels(text: str) -> list[int]:
    return [seed(part.strip()) for part in text.split(",")]


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",")]
    if "" in found:
        raise argparse.ArgumentTypeError(f"{text!r} leaves a name empty")
    return found


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def shares(text: str) -> tuple[float, ...]:
    return () if text == "none" else tuple(share(part.strip()) for part in text.split(","))
