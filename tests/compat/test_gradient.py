"""Gradients by y0, t and parameters are those of the computed solution."""

from __future__ import annotations

import pytest
import torch

from cnf.compat.torchdiffeq import odeint, odeint_dense

ADAPTIVE = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams")
COARSE = {"step_size": 0.11}


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


def gradcheck(solve, *inputs, second=False):
    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    return check(solve, tuple(x.detach().clone().requires_grad_() for x in inputs))


def solve_with(pendulum, method, **settings):
    def solve(y0, t, damping):
        def field(t, y):
            angle, speed = y[..., 0], y[..., 1]
            pull = -torch.sin(angle) - damping * angle * speed + torch.cos(2 * t)
            return torch.stack([speed, pull], -1)

        return odeint(field, y0, t, method=method, **settings)

    return solve


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [0.75, -0.75])
def test_adaptive_steps_pass_gradcheck_by_everything(method, end, pendulum, start):
    # steps of one length, so that finite differences do not see them change
    size = {"adaptive_heun": 0.005, "fehlberg2": 0.01, "bosh3": 0.03}.get(method, 0.1)
    options = {"min_step": size, "max_step": size}
    t = end * times(0.25, 0.5, 0.6, 1.0)
    assert gradcheck(solve_with(pendulum, method, options=options), start, t, pendulum.damping)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", [*FIXED, *ADAMS])
def test_fixed_steps_pass_gradcheck_by_everything(method, interp, pendulum, start):
    # by t too: exactly, however coarse the steps, since the grid moves with t
    t = times(0.1, 0.36, 0.4, 0.99)
    for options in ({**COARSE, "interp": interp}, {"interp": interp, "perturb": True}):
        solve = solve_with(pendulum, method, options=options, rtol=1e-12, atol=1e-12)
        if method == "implicit_adams":
            options["max_iters"] = 60
        assert gradcheck(solve, start, t, pendulum.damping)


@pytest.mark.parametrize("method", ADAMS)
def test_adams_steps_on_the_requested_times_pass_gradcheck(method, pendulum, start):
    t = times(0, 0.1, 0.15, 0.3, 0.36, 0.44, 0.6, 0.7)
    options = {"max_iters": 60} if method == "implicit_adams" else {}
    solve = solve_with(pendulum, method, options=options, rtol=1e-13, atol=1e-13)
    assert gradcheck(solve, start, t, pendulum.damping)


@pytest.mark.parametrize(
    ("method", "settings"),
    {
        "dopri5": {"rtol": 1e-9, "atol": 1e-9, "options": {"first_step": 0.05}},
        "rk4": {"options": COARSE},
        "explicit_adams": {"options": COARSE},
    }.items(),
)
def test_second_derivatives_go_through_the_steps(method, settings, pendulum, start):
    def solve(y0, damping):
        return solve_with(pendulum, method, **settings)(y0, times(0.1, 0.5, 0.6), damping)

    assert gradcheck(solve, start, pendulum.damping, second=True)


def test_second_derivatives_by_the_times_are_those_of_the_solution(pendulum, start):
    def last(t):
        return odeint(pendulum, start, t, rtol=1e-10, atol=1e-10)[-1, 1]

    t = times(0.2, 0.5, 1.1)
    found = torch.autograd.functional.hessian(last, t)
    # the start and the end move the solution as the solution moves
    step = 1e-3
    for i in (0, 2):
        shift = step * torch.eye(3, dtype=torch.float64)[i]
        expected = (last(t + shift) - 2 * last(t) + last(t - shift)) / step**2
        assert found[i, i].item() == pytest.approx(expected.item(), abs=1e-3)
    assert found[1].abs().max() < 1e-6


def test_gradients_reach_the_parts_of_a_tuple():
    def solve(a, b, t):
        return odeint(lambda t, y: (-y[0] * y[1], t * y[1].mean() * y[1]), (a, b), t, rtol=1e-10)

    a, b = torch.rand(2, 1, dtype=torch.float64), torch.rand(3, dtype=torch.float64)[:1]
    assert gradcheck(solve, a, b, times(0, 0.4, 0.7))


def test_what_the_field_computed_before_is_differentiated_through():
    weight = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    matrix = torch.matrix_exp(weight)  # computed, captured, and named to nobody
    y = odeint(lambda t, y: torch.tanh(y @ matrix), torch.ones(1, 2).double(), times(0, 1))
    (found,) = torch.autograd.grad(y[-1].sum(), weight)

    def loss(weight):
        matrix = torch.matrix_exp(weight)
        return odeint(lambda t, y: torch.tanh(y @ matrix), torch.ones(1, 2).double(), times(0, 1))

    assert gradcheck(loss, weight) and found.abs().max() > 0


def test_a_solution_of_complex_numbers_passes_gradcheck():
    def solve(y0, t):
        return odeint(lambda t, y: 1j * t * y - 0.1 * y**2, y0, t, rtol=1e-10, atol=1e-10)

    y0 = torch.tensor([1.0 + 0.5j, 0.3 - 0.2j], dtype=torch.complex128)
    assert gradcheck(solve, y0, times(0.1, 0.6, 0.9))


def test_the_time_gradient_is_the_slope_at_every_requested_time(pendulum, start):
    t = torch.linspace(0, 2, 7, dtype=torch.float64, requires_grad=True)
    y = odeint(pendulum, start, t)
    (found,) = torch.autograd.grad(y[1:].sum(), t)
    with torch.no_grad():
        slopes = torch.stack([pendulum(moment, at) for moment, at in zip(t, y, strict=True)])
    torch.testing.assert_close(found[1:], slopes[1:].sum(-1), rtol=0, atol=3e-5)


def test_times_that_need_no_gradient_cost_no_evaluation(pendulum, start):
    counts = []
    for needs in (False, True):
        pendulum.nfe = 0
        t = torch.linspace(0, 2, 50, dtype=torch.float64, requires_grad=needs)
        odeint(pendulum, start, t)
        counts.append(pendulum.nfe)
    assert counts[1] == counts[0] + 2  # for the start, which does not move


def test_a_dense_solution_passes_gradcheck():
    def solve(y0, t):
        return odeint_dense(lambda t, y: t * y, y0, 0.0, 1.0, rtol=1e-9, atol=1e-9)(t)

    assert gradcheck(solve, torch.rand(2, dtype=torch.float64), times(0.2, 0.77))


def test_without_gradients_no_graph_is_kept(pendulum, start):
    t = times(0, 0.5, 1).requires_grad_()
    for method in ("dopri5", "rk4", "implicit_adams"):
        with torch.no_grad():
            assert not odeint(pendulum, start, t, method=method, rtol=1e-3).requires_grad
