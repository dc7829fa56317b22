"""Fixed steps: where they go, what lies between them, and how exact they are."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.compat.torchdiffeq import odeint

FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
EVERY_GRID = pytest.mark.parametrize("method", [*FIXED, *ADAMS])
BOTH_WAYS = pytest.mark.parametrize("end", [2.0, -2.0])


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


@pytest.mark.parametrize(("method", "order"), FIXED.items())
@BOTH_WAYS
def test_fixed_steps_keep_their_order(method, order, end, pendulum, start):
    t, count = times(0, end), 40 if order > 2 else 80
    exact = pendulum.exact(t)[-1]
    errors = []
    for steps in (count, 2 * count):
        y = odeint(pendulum, start, t, method=method, options={"step_size": 2.0 / steps})[-1]
        errors.append((y - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > order - 0.25


@EVERY_GRID
def test_without_a_step_size_the_steps_go_from_time_to_time(method):
    seen = []

    def func(t, y):
        seen.append(t.item())
        return -y

    t = times(0.0, 0.1, 0.4, 0.5)
    odeint(func, torch.ones(1), t.float(), method=method, rtol=1e-2, atol=1e-2)
    assert {round(moment, 6) for moment in (0.0, 0.1, 0.4)} <= {round(x, 6) for x in seen}
    assert min(seen) == 0.0 and max(seen) <= 0.5


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_a_step_size_is_kept_but_for_the_last_step(direction):
    steps = []

    class Watched:
        def __call__(self, t, y):
            return -y

        def callback_step(self, t0, y0, dt):
            steps.append((round(t0.item(), 9), round(dt.item(), 9)))

    t = direction * times(0.0, 0.1, 1.1)
    odeint(Watched(), torch.ones(1), t, method="midpoint", options={"step_size": 0.25})
    assert [dt for _, dt in steps] == [0.25] * 4 + [0.1]
    assert [t0 for t0, _ in steps] == [direction * 0.25 * i for i in range(5)]


def test_a_step_size_that_divides_the_way_costs_no_sliver():
    calls = []
    t = torch.tensor([0.0, 0.3])  # 0.3 / 0.1 is above 3 in single precision
    odeint(lambda t, y: calls.append(1) or -y, torch.ones(1), t, method="euler",
           options={"step_size": 0.1})  # fmt: skip
    assert len(calls) == 3


def test_a_grid_is_made_by_the_caller_from_what_was_asked():
    seen = []

    def func(t, y):
        seen.append(t.item())
        return -y

    def grid(given, y0, t):
        assert given is func and isinstance(y0, tuple) and t.shape == (2,)
        return torch.tensor([1.0, 0.9, 0.5, 0.0])

    def pair(t, y):
        return (func(t, y[0]),)

    def grid_of_pair(given, y0, t):
        assert given is pair
        return grid(func, y0, t)

    options = {"grid_constructor": grid_of_pair}
    (y,) = odeint(pair, (torch.ones(1),), torch.tensor([1.0, 0.0]), method="euler", options=options)
    assert seen == pytest.approx([1.0, 0.9, 0.5])
    assert y[-1].item() == pytest.approx(1.1 * 1.4 * 1.5)


def test_between_steps_the_solution_is_a_chord_or_a_cubic(pendulum, start):
    t, coarse = times(0, 0.13, 0.2, 0.25, 1.0), {"step_size": 0.2}
    knots = odeint(pendulum, start, times(0, 0.2, 0.4), method="rk4")
    chord = odeint(pendulum, start, t, method="rk4", options=coarse)
    linear = odeint(pendulum, start, t, method="rk4", options={**coarse, "interp": "linear"})
    assert torch.equal(chord, linear) and torch.equal(chord[2], knots[1])
    torch.testing.assert_close(chord[1], start + (knots[1] - start) * 0.65)
    torch.testing.assert_close(chord[3], knots[1] + (knots[2] - knots[1]) * 0.25)
    cubic = odeint(pendulum, start, t, method="rk4", options={**coarse, "interp": "cubic"})
    exact = pendulum.exact(t)
    assert (cubic - exact).abs().max() < 2e-4 < (chord - exact).abs().max()


def test_a_cubic_costs_one_evaluation_at_most(pendulum, start):
    t = torch.linspace(0, 1, 77, dtype=torch.float64)
    odeint(pendulum, start, t, method="rk4", options={"step_size": 0.1, "interp": "cubic"})
    assert pendulum.nfe <= 41


@EVERY_GRID
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_perturbed_ends_keep_to_the_inside_of_the_step(method, end):
    seen = []

    def func(t, y):
        seen.append(t.item())
        return -y

    for perturb in (True, False):
        seen.clear()
        options = {"step_size": 0.5, "perturb": perturb}
        odeint(func, torch.ones(2), torch.tensor([0.0, end]), method=method, options=options)
        assert (0.0 in seen) == (0.5 * end in seen) == (not perturb)
        assert min(seen) >= min(0.0, end) and max(seen) <= max(0.0, end)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_a_field_that_jumps_at_the_grid_keeps_its_order_where_it_is_perturbed(interp):
    def func(t, y):
        return torch.where(t < 0.5, -y, y + t)

    t, y0 = times(0, 0.47, 1), torch.ones(1, dtype=torch.float64)
    exact = (math.exp(-0.5) + 1.5) * math.exp(0.5) - 2.0
    options = {"step_size": 0.125, "interp": interp}
    rough, good = (
        odeint(func, y0, t, method="rk4", options={**options, "perturb": perturb})
        for perturb in (False, True)
    )
    assert abs(good[-1].item() - exact) < 2e-5 < 1e-2 < abs(rough[-1].item() - exact)
    if interp == "cubic":
        assert good[1].item() == pytest.approx(math.exp(-0.47), abs=1e-5)
