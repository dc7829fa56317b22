"""The processes that torchrun started as one program: they meet, speak with one voice and part."""

from __future__ import annotations

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cnf.error import InputError, IntegrationError, TrainingError
from cnf.training.ranks import leave

SHARED = (
    "fit",
    "sample",
    "logprob",
    "mnist classify",
    "mnist generate",
)  # commands that ranks share
TIMEOUT = timedelta(minutes=10)  # in which a rank must answer the others
FAILED, INTERRUPTED = 1, 130
GRACE = 3.0  # seconds; torchrun gives 30 after SIGTERM
PERHAPS = "if that was torchrun, another rank has died: see its report"
TOLD = "cnf/told"  # how many ranks have failed


@contextmanager
def joined(arguments: Namespace) -> Iterator[None]:
    """The ranks' process group for as long as the block lasts; only the first rank prints.

    An error is told once, by the rank that it came to first; the others leave in silence.  SIGTERM,
    which torchrun sends to all when one has died, is an interrupt like Ctrl-C.
    Raises InputError for a command that is one process's alone.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        refuse_unshared(arguments, world)
        with _silent(rank > 0):
            yield
    except (InputError, IntegrationError, TrainingError, OSError):
        if store.add(TOLD, 1) > 1:
            raise SystemExit(FAILED) from None
        raise
    except KeyboardInterrupt:
        time.sleep(GRACE if rank > 0 else 0)  # the first rank, if it lives, says what is kept
        if store.add(TOLD, 1) > 1:
            raise SystemExit(INTERRUPTED) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    leave()  # not after an error: the others may be gone


def refuse_unshared(arguments: Namespace, world: int) -> None:
    """Raises InputError for a command that ranks do not share."""
    command = f"{arguments.verb} {getattr(arguments, 'task', None) or ''}".strip()
    if command not in SHARED:
        raise InputError(
            f"`cnf {command}` is one process's work, not that of {world} ranks; leave torchrun out"
        )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(PERHAPS)


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Nothing is printed inside, if that is wanted."""
    with ExitStack() as stack:
        if wanted:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield
        sys.stdout.flush()
