"""A training on disk, from which it can go on as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from cnf.error import InputError
from cnf.replace import replacing
from cnf.training.ranks import current

FORMAT = 1  # of the file; raised when an older reader would misread it
_DAMAGES = (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def write_snapshot(
    path: str | os.PathLike[str], state: dict[str, Any], device: torch.device
) -> None:
    """Write a training's state and torch's random state, whole or not at all.

    Of ranks that train together the first one writes: state and random numbers are those of all.
    state: tensors and plain values, nested; device: whose random numbers the training uses besides
    the CPU's.
    """
    if not current().is_first:
        return
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    with replacing(path) as file:
        torch.save({"format": FORMAT, "random": random, "state": state}, file)


def read_snapshot(path: str | os.PathLike[str], device: torch.device) -> dict[str, Any]:
    """The state that was written; torch's random state is put back.  No code is run.

    Raises InputError for a file that is missing, damaged or none of `write_snapshot`.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no {path} to resume from; start the run anew")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        form, random, state = kept["format"], kept["random"], kept["state"]
    except _DAMAGES as error:
        raise InputError(f"{path} is damaged or no snapshot; start the run anew") from error
    if form != FORMAT:
        raise InputError(
            f"{path} has format {form!r}, this version reads format {FORMAT}; install the version "
            "that wrote it"
        )
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)
    return state


class Interval:
    """Says when `seconds` have passed since it last said so."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def is_over(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


@contextmanager
def postponed_signals() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C or SIGTERM has come since the block began.

    So a step is finished, and its snapshot whole, before the program ends; a second signal raises
    KeyboardInterrupt at once.  Outside the main thread signals are not its own, and none is told.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
