"""A training on disk, from which it can go on as if nothing had happened."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from cnf.error import InputError
from cnf.replace import replacing
from cnf.training.loop import Progress
from cnf.training.ranks import current

FORMAT = 2  # of the file; raised when an older reader would misread it
MAGIC = b"cnf snapshot "  # a file is: magic, format, digest of the rest, and the rest by torch.save
BARE = b"PK"  # files of format 1 are what torch.save wrote, and have no digest
SECONDS = 60.0  # between snapshots
_DAMAGES = (
    OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, pickle.UnpicklingError
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Resumable(Protocol):
    """A training that can be put down between two records, such as `Training`."""

    @property
    def is_done(self) -> bool: ...
    def __iter__(self) -> Generator[Progress]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False)
class Kept:
    """What a snapshot holds: a training's state, and torch's random state when it was written.

    random: by the device's kind; warning: a sentence where it is not the newest snapshot.
    """

    state: dict[str, Any]
    random: dict[str, torch.Tensor]
    warning: str | None = None

    def restore_random(self, device: torch.device) -> None:
        """Put torch's random state back, of the CPU and of `device`."""
        torch.set_rng_state(self.random["cpu"])
        if device.type == "cuda" and "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"], device)


@dataclass(frozen=True, eq=False)
class Snapshots:
    """Where a training is kept: the newest snapshot, and beside it the one before.

    path: of the newest; every: seconds between two; begun: what the training goes on from.
    """

    path: Path
    every: float = SECONDS
    begun: Kept | None = None

    @property
    def before(self) -> Path:
        """The snapshot before the newest, for when that is damaged."""
        return self.path.with_name(f"{self.path.stem}-before{self.path.suffix}")

    @property
    def exist(self) -> bool:
        return self.path.is_file() or self.before.is_file()

    @property
    def written(self) -> float:
        """When the newest was written, in seconds; 0 where there is none."""
        times = (path.stat().st_mtime for path in (self.path, self.before) if path.is_file())
        return max(times, default=0.0)

    def write(self, state: dict[str, Any], device: torch.device) -> None:
        """Write a state and torch's random state, whole or not at all; the newest becomes the one
        before.

        state: tensors and plain values, nested; device: whose random numbers are used besides the
        CPU's.  Raises OSError where it cannot be written; what was there stays.
        Of ranks that train together the first one writes: all have the same state.
        """
        if not current().is_first:
            return
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        content = io.BytesIO()
        torch.save({"random": random, "state": state}, content)
        try:
            with replacing(self.path) as file:
                file.write(_sealed(content.getvalue()))
                file.flush()
                os.fsync(file.fileno())  # before the newest one moves aside
                if self.path.is_file():
                    os.replace(self.path, self.before)
        except OSError as error:
            reason = f"{error.strerror or error}; what was there before it is kept"
            raise OSError(error.errno or errno.EIO, reason, str(self.path)) from error

    def read(self) -> Kept:
        """The newest snapshot, or where that is damaged the one before, which its warning tells.

        No code is run.  Raises InputError where there is none, none can be read, or the newest is
        of a version that this one cannot read.
        """
        if not self.exist:
            raise InputError(f"there is no {self.path} to resume from; start the run anew")
        if not self.path.is_file():  # stopped between two renames
            return _read(self.before)
        try:
            return _read(self.path)
        except _Damaged:
            if not self.before.is_file():
                raise
        try:
            kept = _read(self.before)
        except _Damaged as error:
            raise InputError(
                f"{self.path} and the snapshot before it are damaged; start the run anew"
            ) from error
        return replace(kept, warning=f"{self.path} is damaged; going on from the one before it")

    def remove(self) -> None:
        """Remove all of them."""
        for path in (self.path, self.before):
            path.unlink(missing_ok=True)

    def follow(self, training: Resumable, device: torch.device) -> Generator[Progress]:
        """The records of a training, from where it was put down; once each was used a snapshot is
        written where it is time.

        It is time after the first and the last record, at the interval, and on Ctrl-C and SIGTERM,
        which then raise KeyboardInterrupt.  Raises InputError where what was kept is of another
        training.
        """
        self.take_up(training, device)
        due, is_new = Interval(self.every), self.begun is None
        with postponed_signals() as is_asked_to_stop, closing(iter(training)) as records:
            for record in records:
                yield record
                stops = current().any(is_asked_to_stop())
                if is_new or stops or training.is_done or due.is_over():
                    self.write(training.state_dict(), device)
                    is_new = False
                if stops:
                    raise KeyboardInterrupt

    def take_up(self, training: Resumable, device: torch.device) -> None:
        """Let the training go on from what was kept, if there is anything, with the random state of
        then.  Raises InputError where it is of another training.
        """
        if self.begun is None:
            return
        try:
            training.load_state_dict(self.begun.state)
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path} is not of this run; begin a new one, without it"
            ) from error
        self.begun.restore_random(device)


def opened(snapshot: str | os.PathLike[str] | Snapshots | None) -> Snapshots | None:
    """Snapshots at a path, to go on from where there are some; a warning tells of a damaged one.

    Raises InputError where none can be read, or the path can be none of a snapshot.
    """
    if snapshot is None or isinstance(snapshot, Snapshots):
        return snapshot
    found = Snapshots(Path(snapshot))
    if not found.path.parent.is_dir() or found.path.is_dir():
        raise InputError(f"snapshot {found.path} is no file in a folder that exists; name another")
    if not found.exist:
        return found
    kept = found.read()
    if kept.warning is not None:
        warnings.warn(kept.warning, stacklevel=4)
    return replace(found, begun=kept)


class _Damaged(InputError):
    """The file is no snapshot, or is one no longer."""


def _sealed(content: bytes) -> bytes:
    """The content of a file, with a head that tells its format and whether it is whole."""
    return MAGIC + f"{FORMAT} {hashlib.sha256(content).hexdigest()}\n".encode() + content


def _read(path: Path) -> Kept:
    try:
        content = _opened(path)
        kept = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return Kept(kept["state"], {**kept["random"]})
    except InputError:
        raise
    except _DAMAGES as error:
        raise _Damaged(f"{path} is damaged or no snapshot; start the run anew") from error


def _opened(path: Path) -> bytes:
    """What torch.save wrote, of a file that is whole; raises ValueError for any other."""
    content = path.read_bytes()
    if content.startswith(BARE):
        return content
    head, _, rest = content.partition(b"\n")
    if not head.startswith(MAGIC):
        raise ValueError("no snapshot")
    form, digest = head.removeprefix(MAGIC).decode().split()
    if form != str(FORMAT):
        raise InputError(
            f"{path} has format {form}, this version reads format {FORMAT} and older; install the "
            "version that wrote it"
        )
    if digest != hashlib.sha256(rest).hexdigest():
        raise ValueError("torn")
    return rest


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
