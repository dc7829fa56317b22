"""Adams' methods keep their order on any grid, and count their corrections."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from cnf.compat.adams import adams_weights
from cnf.compat.torchdiffeq import odeint


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


@pytest.mark.parametrize(
    ("nodes", "known"),
    [
        ([0.0, -1.0, -2.0, -3.0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
        ([1.0, 0.0, -1.0, -2.0], [9 / 24, 19 / 24, -5 / 24, 1 / 24]),
        ([0.0, -1.0], [3 / 2, -1 / 2]),
    ],
)
def test_on_an_even_grid_the_weights_are_the_classical_ones(nodes, known):
    assert adams_weights(nodes) == pytest.approx(known, abs=1e-14)


@pytest.mark.parametrize("count", [3, 8, 12])
def test_the_weights_integrate_every_polynomial_they_can(count):
    nodes = [1.0, *(-0.3 * i - 0.02 * i * i for i in range(count - 1))]
    weights = adams_weights(nodes)
    for power in range(count):
        total = math.fsum(w * s**power for w, s in zip(weights, nodes, strict=True))
        size = math.fsum(abs(w * s**power) for w, s in zip(weights, nodes, strict=True))
        assert abs(total - 1 / (power + 1)) < 1e-13 * max(size, 1.0)


def test_the_weights_follow_tensor_nodes():
    nodes = times(1.0, 0.0, -0.9, -2.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: torch.stack(adams_weights(list(s.unbind()))), nodes)
    plain = adams_weights(nodes.tolist())
    assert torch.stack(adams_weights(list(nodes.unbind()))).tolist() == pytest.approx(plain)


@pytest.mark.parametrize("grid", ["even", "uneven"])
@pytest.mark.parametrize(
    ("method", "most", "order"),
    [("explicit_adams", 4, 3), ("explicit_adams", 5, 4), ("implicit_adams", 4, 4)],
)
def test_adams_methods_reach_the_order_they_are_allowed(method, most, order, grid, pendulum, start):
    t = times(0, 2)
    exact = pendulum.exact(t)[-1]
    errors = []
    for count in (40, 80):
        s = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        points = 2 * (s if grid == "even" else s + 0.15 * torch.sin(2 * math.pi * s) / math.pi)
        options = {"max_order": most, "grid_constructor": lambda f, y, t, points=points: points}
        options |= {"max_iters": 20} if method == "implicit_adams" else {}
        y = odeint(pendulum, start, t, method=method, options=options)[-1]
        errors.append((y - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > order - 0.35


def test_an_adams_step_asks_once_and_once_for_each_correction(pendulum, start):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    odeint(pendulum, start, t, method="explicit_adams")
    assert pendulum.nfe == 2 * 4 + 38
    pendulum.nfe = 0
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        odeint(pendulum, start, t, method="implicit_adams", rtol=0, atol=0,
               options={"max_iters": 2})  # fmt: skip
    assert pendulum.nfe == 2 * 4 + 38 * 3


def test_fixed_adams_is_another_name_of_implicit_adams(pendulum, start):
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    one, other = (odeint(pendulum, start, t, method=m) for m in ("fixed_adams", "implicit_adams"))
    assert torch.equal(one, other)


def test_a_low_order_of_adams_is_the_three_eighths_rule(pendulum, start):
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match="max_order is below 4.*rk4"):
        y = odeint(pendulum, start, t, method="explicit_adams", options={"max_order": 3})
    torch.testing.assert_close(y, odeint(pendulum, start, t, method="rk4"), rtol=0, atol=1e-15)
    with pytest.raises(AssertionError, match="max_order must be at most 12"):
        odeint(pendulum, start, t, method="explicit_adams", options={"max_order": 13})


@pytest.mark.filterwarnings("ignore:Functional iteration")
def test_a_corrector_that_does_not_settle_keeps_the_order_low(pendulum, start):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    low, high = (
        odeint(pendulum, start, t, method="implicit_adams", rtol=0, atol=0,
               options={"max_iters": 1, "max_order": order})
        for order in (4, 12)
    )  # fmt: skip
    torch.testing.assert_close(high, low, rtol=0, atol=0)


def test_a_corrector_that_does_not_settle_warns():
    t = torch.linspace(0, 2, 11)
    with pytest.warns(UserWarning, match="Functional iteration did not converge"):
        odeint(lambda t, y: -4 * y, torch.ones(1), t, method="implicit_adams")
