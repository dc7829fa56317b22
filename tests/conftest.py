"""Random numbers are the same in every run, and small tensors do not wait for threads."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _validated():
    """Distributions check what they are given: once something was compiled, torch stops it."""
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
