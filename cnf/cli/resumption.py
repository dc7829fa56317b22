"""What runs that go on have in common, whatever they train."""

from __future__ import annotations

import errno
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cnf.cli.folder import SNAPSHOT, RunFolder
from cnf.error import InputError
from cnf.training.snapshot import Snapshots

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def snapshots_of(folder: RunFolder, arguments: Namespace) -> Snapshots:
    """Where the run's snapshots go; of a run that goes on, with what it goes on from.

    A damaged one, in whose place the one before is taken, is told on stderr.
    """
    path = folder.path / SNAPSHOT
    if not arguments.resume:
        return Snapshots(path, arguments.save_every)
    kept = Snapshots(path).read()
    if kept.warning is not None:
        print(f"cnf: warning: {kept.warning}", file=sys.stderr)
    return Snapshots(path, arguments.save_every, kept)


def other_setting(out: str, name: str, kept: Any, given: Any) -> InputError:
    """What is said of a setting that is not the run's own."""
    return InputError(
        f"the run in {out} has {name} {kept!r}, not {given!r}; leave that out, or begin a new run "
        "without --resume"
    )


@contextmanager
def resumable(verb: str, folder: RunFolder) -> Iterator[None]:
    """Says how the run goes on where it is stopped, or can no longer be written."""
    command = f"`cnf {verb} --resume --out {folder.path}`"
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not folder.has_begun:
            raise
        raise KeyboardInterrupt(*interrupt.args, f"{command} goes on from here") from None
    except OSError as error:
        if not folder.has_begun:
            raise
        remedy = "make room" if error.errno in FULL else "see to that"
        reason = f"{error.strerror or error}; {remedy}, then {command} goes on"
        raise OSError(error.errno or errno.EIO, reason, error.filename) from error
