"""Leapfrog keeps the energy for ever, goes back where it came from, and takes pairs alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad, gradcheck

from cnf.error import InputError
from cnf.ode.control import FixedStep
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.solution import solve

F64 = torch.float64


def pendulum(t, y):
    return y[1], -torch.sin(y[0])


def driven(t, y):
    """Separable, nonlinear in both parts, and it depends on time."""
    return {
        "q": torch.tanh(y["p"]) * (1 + 0.3 * torch.sin(2 * t)),
        "p": -torch.sin(y["q"]) + torch.cos(t),
    }


def pair(size=3):
    return tuple(torch.randn(size, 2, dtype=F64, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("rows", [False, True])
def test_error_shrinks_at_order_2(direction, rows):
    q, p = (leaf.detach() for leaf in pair())

    def rated(t, y):
        return driven(t.reshape(-1, 1), y), (y["q"] * y["p"]).sum(1)

    times = [0.0, direction * 2.0]
    exact = solve(rated, {"q": q, "p": p}, times, rtol=1e-11, atol=1e-11, quadrature=True)
    errors = []
    for count in (32, 128):
        control = FixedStep(2 / count, per_sample=rows)
        sol = solve(
            rated, {"q": q, "p": p}, times, method="leapfrog", control=control, quadrature=True
        )
        parts = (
            (sol.y["q"], exact.y["q"]),
            (sol.y["p"], exact.y["p"]),
            (sol.integral, exact.integral),
        )
        errors.append([(got[-1] - wanted[-1]).norm().item() for got, wanted in parts])
    for coarse, fine in zip(*errors, strict=True):
        assert math.log(coarse / fine, 4) == pytest.approx(2.0, abs=0.2)


def test_the_energy_errs_no_more_after_a_long_time_than_after_a_short_one():
    def energy(y):
        return y[1] ** 2 / 2 - torch.cos(y[0])

    y0 = (torch.tensor([2.0], dtype=F64), torch.tensor([0.0], dtype=F64))
    t = torch.arange(0, 401, dtype=F64)
    sol = solve(pendulum, y0, t, method="leapfrog", step_size=0.1)
    drift = (energy(sol.y) - energy(y0)).abs()
    assert drift[-100:].max() < 1.2 * drift[:100].max() < 0.01
    other = solve(pendulum, y0, t, method="heun2", step_size=0.1)
    assert (energy(other.y) - energy(y0)).abs()[-1] > 5 * drift.max()


def test_there_and_back_is_where_one_started():
    y0 = tuple(leaf.detach() for leaf in pair())
    there = solve(pendulum, y0, [0.0, 7.2], method="leapfrog", step_size=0.3).y
    end = tuple(leaf[-1] for leaf in there)
    back = solve(pendulum, end, [7.2, 0.0], method="leapfrog", step_size=0.3).y
    for leaf, start in zip(back, y0, strict=True):
        assert torch.allclose(leaf[-1], start, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradients_agree_with_differences(gradient):
    w = torch.randn(2, 2, dtype=F64, requires_grad=True)

    def outputs(q, p, w):
        def turned(t, y):
            return (torch.tanh(y[1] @ w) * torch.cos(t), -torch.sin(y[0] @ w.T)), (
                y[0] * y[1]
            ).sum()

        sol = solve(
            turned, (q, p), [0.0, 0.5, 1.0], method="leapfrog", step_size=0.2, params=[w],
            gradient=gradient, quadrature=True,
        )  # fmt: skip
        return *sol.y, sol.integral

    assert gradcheck(outputs, (*pair(), w), fast_mode=True)


def test_the_adjoint_solved_back_by_the_same_steps_is_exact_for_the_state():
    """Its equation is separable too, and the way back is the way there."""
    w = torch.randn(2, 2, dtype=F64, requires_grad=True)

    def turned(t, y, w):
        return torch.tanh(y[1] @ w) * torch.cos(t), -torch.sin(y[0] @ w.T)

    found = []
    for gradient in ("backprop", "adjoint", Adjoint(interpolate=True)):
        torch.manual_seed(0)
        y0 = pair()
        settings = dict(method="leapfrog", step_size=0.1, params=[w], gradient=gradient)
        sol = solve(turned, y0, [0.0, 1.0, 2.0], **settings)
        found.append(grad((sol.y[0] * sol.y[1]).sum(), (*y0, w)))
    exact, solved_back, read_off = found
    for a, b in zip(solved_back[:2], exact[:2], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert torch.allclose(solved_back[2], exact[2], rtol=1e-2, atol=1e-2)
    for a, b in zip(read_off, exact, strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-2)


def test_the_adjoint_with_rates_is_refused():
    settings = dict(method="leapfrog", step_size=0.1, gradient="adjoint", quadrature=True)
    with pytest.raises(InputError, match=r"not separable.*'checkpoint'"):
        solve(lambda t, y: (pendulum(t, y), y[0].sum()), pair(), [0.0, 1.0], **settings)


REFUSED = {
    "one tensor": (lambda t, y: y, torch.ones(3, 2), "two parts of one shape"),
    "three parts": (lambda t, y: y, (torch.ones(2),) * 3, "two parts"),
    "parts of two shapes": (lambda t, y: y, (torch.ones(2), torch.ones(3)), r"\(2,\), \(3,\)"),
    "a friction": (lambda t, y: (y[1], -y[0] - 0.1 * y[1]), None, "dp/dt changes with p"),
    "a drift": (lambda t, y: (y[1] + torch.sin(y[0]), -y[0]), None, "dq/dt changes with q"),
}


@pytest.mark.parametrize(("field", "y0", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_separable_is_refused(field, y0, says):
    y0 = pair() if y0 is None else y0
    with pytest.raises(InputError, match=says):
        solve(field, y0, [0.0, 1.0], method="leapfrog", step_size=0.1)


def test_its_steps_are_fixed():
    with pytest.raises(InputError, match="'leapfrog' does not estimate its error"):
        solve(pendulum, pair(), [0.0, 1.0], method="leapfrog")


def test_rounding_does_not_pass_for_a_dependence():
    """In single precision, with parts that are 0 and large ones."""
    y0 = torch.tensor([[0.0, 1e4]]), torch.tensor([[1e-4, 0.0]])
    w = torch.randn(2, 2)
    field = lambda t, y: (y[1] @ w, torch.sin(y[0] @ w))  # noqa: E731
    sol = solve(field, y0, [0.0, 1.0], method="leapfrog", step_size=0.1)
    assert sol.stats.nfe == 1 + 3 + 29  # at the door, to look at the field, and three a step


def test_a_dense_solution_has_order_2_between_the_steps():
    y0 = tuple(leaf.detach() for leaf in pair())
    inside, errors = torch.linspace(0.1, 1.9, 7, dtype=F64), []
    exact = solve(pendulum, y0, [0.0, *inside.tolist()], rtol=1e-11, atol=1e-11)
    for count in (20, 80):
        sol = solve(pendulum, y0, [0.0, 2.0], method="leapfrog", step_size=2 / count, dense=True)
        errors.append((sol(inside)[0] - exact.y[0][1:]).abs().max().item())
    assert math.log(errors[0] / errors[1], 4) > 1.8
