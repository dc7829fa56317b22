"""Random numbers that are the same every time, and leave the rest of the program's alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cnf.error import InputError, whole_number

LARGEST = 2**63 - 1


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of `device`, seeded for as long as the context lasts and
    put back after it; None leaves them alone.  Raises InputError for a seed outside 0 … 2^63 − 1.
    """
    if seed is None:
        yield
        return
    seed = whole_number("seed", seed, 0)
    if seed > LARGEST:
        raise InputError(f"seed must be at most 2^63 − 1, got {seed}")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:  # torch.manual_seed would seed every other device as well
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
