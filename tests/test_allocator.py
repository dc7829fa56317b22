"""Freed memory stays with the process, so that a solve does not map its intermediates again."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from cnf.allocator import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux does")
def test_large_tensors_come_from_memory_that_was_freed_before():
    keep_freed_memory()

    def allocate_and_free() -> None:
        for _ in range(50):
            a = torch.ones(2**18)  # 1 MiB, touched
            b = torch.ones(2**18)
            del a, b

    allocate_and_free()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate_and_free()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 5000  # 50 × 2 × 256 pages = 25,600 if every block were mapped anew
