"""The lock of a run folder, which its process holds for as long as it lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cnf.error import InputError

try:
    import fcntl
except ImportError:  # no such locks on this system: runs are then kept apart by their names alone
    fcntl = None

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder to oneself; the lock's file tells others which process it is.

    The system drops the lock of a process that ends, however it ends: what a dead one left keeps
    nobody out.  Raises InputError where another process works in the folder, OSError where it
    cannot be written.
    """
    held = _acquired(folder / LOCK)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is held: nobody else's is removed
        os.close(held)


def is_locked(folder: Path) -> bool:
    """Whether another process works in the folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _locks(descriptor)
    finally:
        os.close(descriptor)


def _acquired(path: Path) -> int:
    """A descriptor of the file that is there, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locks(descriptor):
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise InputError(
                f"{path.parent} is in use by {holder or 'another process'}; wait until it has "
                "ended, or choose another --out"
            )
        if _is_at(descriptor, path):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # whoever held it has just removed it


def _locks(descriptor: int) -> bool:
    """Whether the file is now locked by us; a file system without locks has nothing to say."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
