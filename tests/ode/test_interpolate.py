"""Inside a step the solution is a polynomial of the stated order, from what the step kept."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.compat.pair import DOPRI8
from cnf.ode.choice import choose_method
from cnf.ode.control import Adaptive
from cnf.ode.field import Evaluation
from cnf.ode.interpolate import hermite, interpolant, interpolation_order
from cnf.ode.solution import solve
from cnf.ode.tableau import TABLEAUS

# and one whose weights take the field at the step's end
METHODS = {**TABLEAUS, "dopri8 with weights": DOPRI8}
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
START = 0.3


class Counted:
    """A nonlinear, non-autonomous field of two leaves that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, t, y):
        self.calls += 1
        a, b = y
        return Evaluation((math.cos(3 * t) * b - 0.3 * a * b, -a + math.sin(2 * t) * b**2), ())


def state():
    return torch.tensor([1.0, 0.2]).double(), torch.tensor([0.7, -0.4]).double()


def solution_at(times):
    field = Counted()

    def slope(t, y):
        return field(t, y).slope

    return solve(slope, state(), times, method="dopri8", rtol=1e-13, atol=1e-15).y


def step_by(name, h):
    """(field, method, y, first, step) of one step from START by h."""
    field, method, y = Counted(), choose_method(METHODS[name]), state()
    first = field(START, y)
    return field, method, y, first, method.step(field, START, h, y, first, method.adaptive)


@EVERY_METHOD
def test_the_error_inside_a_step_shrinks_at_the_stated_order(name):
    sizes = (0.4, 0.2) if name.startswith("dopri8") else (0.04, 0.02)
    thetas = [0.2, 0.37, 0.61, 0.85]
    errors = []
    for h in sizes:
        field, method, y, first, step = step_by(name, h)
        inside = interpolant(method, field, START, h, y, first, step)
        times = [START, *(START + theta * h for theta in thetas)]
        exact = solution_at(times)
        found = [torch.stack(leaf) for leaf in zip(*map(inside, thetas), strict=True)]
        errors.append(max((a - b[1:]).abs().max() for a, b in zip(found, exact, strict=True)))
    order = math.log2(errors[0] / errors[1]) - 1
    # a method of a lower order than its interpolation's does no better than its own
    assert order > min(interpolation_order(method), method.order) - 0.5


@EVERY_METHOD
def test_the_polynomial_meets_the_step_at_both_ends(name):
    field, method, y, first, step = step_by(name, 0.1)
    inside = interpolant(method, field, START, 0.1, y, first, step)
    for leaf, at_start, end, at_end in zip(y, inside(0.0), step.y, inside(1.0), strict=True):
        assert torch.equal(at_start, leaf)
        torch.testing.assert_close(at_end, end, rtol=0, atol=1e-12)


@EVERY_METHOD
def test_a_step_that_was_taken_is_not_evaluated_again(name):
    h = 0.1
    field, method, y, first, step = step_by(name, h)
    calls = field.calls
    inside = interpolant(method, field, START, h, y, first, step)
    needed, calls = field.calls - calls, field.calls
    anew = interpolant(method, field, START, h, y, first)
    stages = METHODS[name].stages - 1  # the first is given
    if METHODS[name].implicit:
        assert needed < field.calls - calls
    else:
        assert needed == field.calls - calls - stages
        parts = name == "dopri8"  # which takes steps of a third and of two thirds as well
        assert parts or needed == (step.last is None)
    for one, other in zip(inside(0.4), anew(0.4), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_known_slope_at_the_end_saves_its_evaluation():
    field, method, y, first, step = step_by("dopri8 with weights", 0.1)
    step = step._replace(last=field(START + 0.1, step.y))
    taken = field.calls
    interpolant(method, field, START, 0.1, y, first, step)
    assert field.calls == taken


def test_the_cubic_agrees_with_values_and_slopes_at_both_ends():
    field, _, y, first, step = step_by("rk4", 0.1)
    last = field(START + 0.1, step.y)
    length = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    inside = hermite(length, y, first, step.y, last)
    for leaf, end in zip(inside(1.0), step.y, strict=True):
        torch.testing.assert_close(leaf, end)
    for theta, value in ((0.0, first), (1.0, last)):
        at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        for leaf, slope in zip(inside(at), value.slope, strict=True):
            for entry, expected in zip(leaf, slope, strict=True):
                (found,) = torch.autograd.grad(entry, at, retain_graph=True)
                torch.testing.assert_close(found, expected * 0.1)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dopri8"])
def test_next_to_a_jump_the_solution_is_read_from_inside_the_step(name, gradient):
    def field(t, y):
        return torch.where(t < 1.0, 1.0, -2.0) * torch.ones_like(y)

    y0 = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    control = Adaptive(1e-8, 1e-8, jumps=(1.0,))
    solution = solve(
        field, y0, [0.0, 2.0], method=name, control=control, dense=True, gradient=gradient
    )
    times = torch.linspace(0, 2, 41, dtype=torch.float64)
    expected = torch.where(times < 1.0, times, 3.0 - 2.0 * times)
    torch.testing.assert_close(solution(times)[:, 0], expected, rtol=0, atol=1e-11)
