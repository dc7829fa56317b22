"""The C library's allocator, told once to keep what is freed."""

from __future__ import annotations

import torch

LARGEST = 31 * 2**20  # bytes; glibc learns from freed blocks of up to 32 MiB


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for the next request rather than return them to the system.

    It raises its thresholds to the size of the largest mapped block that was ever freed, so one
    block, never touched, is enough.  Without it the large intermediates of every evaluation are
    mapped, cleared and unmapped again: up to a third of a solve's time on the CPU.  Up to 64 MiB
    then stay with the process; other allocators do not care.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
