"""What a fit with its defaults is worth, on toy sets whose density is known."""

from __future__ import annotations

import math

import pytest
import torch

import cnf


@pytest.fixture(scope="module")
def eight() -> cnf.Flow:
    """A flow fitted to eight Gaussians in so many steps, on all threads: seconds would ask less of
    a slow machine.
    """
    torch.manual_seed(0)
    x = cnf.data.toy("8gaussians").sample((100_000,))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    flow = cnf.Flow(2, seed=0).fit(x, steps=800, seed=0, progress=False)
    torch.set_num_threads(threads)
    return flow


@pytest.mark.slow
def test_the_density_is_close_to_the_true_one(eight):
    law = cnf.data.toy("8gaussians")
    x = law.sample((10_000,))
    with torch.no_grad():
        gap = (law.log_prob(x) - eight.log_prob(x)).mean().item()
    assert -0.01 < gap < 0.04


@pytest.mark.slow
def test_every_mode_holds_its_share_of_the_samples(eight):
    angles = math.pi / 4 * torch.arange(8)
    modes = torch.stack([angles.cos(), angles.sin()], -1) * (4 / 1.414)
    nearest = torch.cdist(eight.sample(50_000, seed=0), modes).argmin(1)
    shares = torch.bincount(nearest, minlength=8) / 50_000
    assert shares.min() > 0.11 and shares.max() < 0.14
