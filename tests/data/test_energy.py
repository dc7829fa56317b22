"""The energies are densities up to a constant: finite, smooth, of known mass and shape."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.data.energy import ENERGIES, Energy

EACH = pytest.mark.parametrize("energy", ENERGIES.values(), ids=ENERGIES)


def test_the_integral_of_a_normal_is_its_constant() -> None:
    normal = Energy("normal", lambda x: 0.5 * x.square().sum(-1))
    assert normal.log_integral() == pytest.approx(math.log(2 * math.pi), abs=1e-9)


@EACH
def test_the_mass_does_not_depend_on_the_grid(energy: Energy) -> None:
    coarse = energy.log_integral(10.0, 500)
    assert coarse == pytest.approx(energy.log_integral(14.0, 900), abs=1e-4)


@EACH
def test_gradients_are_finite_everywhere(energy: Energy) -> None:
    x = (20 * torch.rand(200, 2) - 10).requires_grad_()
    log_prob = energy.log_prob(x)
    assert log_prob.shape == (200,) and torch.isfinite(log_prob).all()
    (slope,) = torch.autograd.grad(log_prob.sum(), x)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("ring", [[2.0, 0.0], [-2.0, 0.0]], [[0.0, 0.0], [0.0, 2.0], [4.0, 0.0]]),
        ("wave", [[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [0.0, 2.0], [6.0, 0.0]]),
        ("split wave", [[1.0, 1.0], [1.0, -2.0], [-2.0, 0.0]], [[1.0, -0.5], [-2.0, -3.0]]),
        ("forked wave", [[3.0, -1.0], [3.0, -4.0], [-2.0, 0.0]], [[3.0, -2.5], [-2.0, -3.0]]),
    ],
)
def test_mass_lies_where_it_should(name: str, inside: list, outside: list) -> None:
    log_prob = ENERGIES[name].log_prob
    assert log_prob(torch.tensor(inside)).min() > log_prob(torch.tensor(outside)).max() + 2
