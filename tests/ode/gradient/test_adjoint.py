"""The adjoint equation gives the gradient to the tolerance, in memory that no step fills."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.autograd import grad

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.solution import solve
from cnf.ode.tableau import TABLEAUS

F64 = torch.float64
KINDS = {"solved back": Adjoint(), "interpolated": Adjoint(interpolate=True)}
EACH_KIND = pytest.mark.parametrize("gradient", KINDS.values(), ids=KINDS)


def field(t, y, w):
    x, v = y
    slope = torch.tanh(x @ w) * torch.cos(t), -v * x.sum() * torch.sin(t)
    return slope, ((x**2).sum(-1) * t, v * w.sum())


def gradients(gradient, t=(0.0, 0.4, 1.0), **settings):
    torch.manual_seed(0)
    x, v, w = torch.randn(3, 2, dtype=F64), torch.rand(2, dtype=F64), torch.randn(2, 2, dtype=F64)
    tensors = [z.requires_grad_() for z in (x, v, w)]
    sol = solve(field, (x * 1, v * 1), t, params=[w * 1], quadrature=True, gradient=gradient,
                **settings)  # fmt: skip
    values = (*sol.y, *sol.integral)
    loss = sum((torch.sin(3 * z) * torch.linspace(1, 2, z.numel()).view(z.shape)).sum()
               for z in values)  # fmt: skip
    return grad(loss, tensors)


@EACH_KIND
@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri8"])
@pytest.mark.parametrize(("tolerance", "t"), [(1e-5, (0.7, 0.1, -0.2)), (1e-7, (0.0, 0.4, 1.0))])
def test_the_gradient_is_exact_to_the_tolerance(gradient, method, tolerance, t):
    wanted = gradients("checkpoint", t, rtol=1e-11, atol=1e-11)
    control = Adaptive(tolerance, tolerance, quadrature_atol=tolerance)
    got = gradients(gradient, t, method=method, control=control)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=30 * tolerance, atol=30 * tolerance)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_larger_size_makes_the_adjoint_finer_where_it_jumps(per_sample):
    y0, weight = torch.randn(6, 8, dtype=F64), torch.randn(8, 8, dtype=F64)

    def kinked(t, y):
        return torch.relu(y @ weight) - 0.5 * y

    def solved(gradient, tolerance):
        y = y0.clone().requires_grad_()
        control = Adaptive(tolerance, tolerance, per_sample=per_sample)
        sol = solve(kinked, y, (0.0, 1.0), gradient=gradient, control=control)
        return grad(sol.y[-1].square().sum(), y)[0], sol.stats.nfe_backward

    exact, _ = solved("checkpoint", 1e-9)
    found = {size: solved(Adjoint(size=size), 1e-3) for size in (1, None)}
    assert found[1][1] > 1.3 * found[None][1]
    for by_state, _ in found.values():
        assert (by_state - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("size", [0.0, -1.0, math.inf, math.nan, "small"])
def test_a_size_without_a_meaning_is_refused(size):
    with pytest.raises(InputError, match="size must be a number > 0 or None"):
        Adjoint(size=size)


@EACH_KIND
@pytest.mark.parametrize("method", ["midpoint", "bosh3", "rk4", "dopri5"])
def test_the_error_shrinks_with_the_step_at_the_methods_order(gradient, method):
    order = TABLEAUS[method].order
    wanted = gradients("checkpoint", method="dopri8", step_size=0.02)
    counts = {1: (32, 128), 2: (16, 64)}.get(order, (5, 15))
    errors = []
    for count in counts:
        got = gradients(gradient, method=method, step_size=1 / count)
        errors.append(max((a - b).abs().max().item() for a, b in zip(got, wanted, strict=True)))
    assert errors[1] < errors[0] * (counts[0] / counts[1]) ** (order - 0.6) + 1e-11


def test_interpolation_serves_where_the_solution_cannot_be_followed_backward():
    """x falls on cos t, and backward leaves it like e^(100 t); z adds up what x was."""
    w = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y0 = torch.tensor([1.5, 0.0], dtype=F64, requires_grad=True)

    def stiff(t, y, w):
        return torch.stack([-100 * (y[0] - torch.cos(t)), w * y[0] ** 2])

    def gradients(gradient):
        sol = solve(stiff, y0, [0.0, 0.5], params=[w], gradient=gradient, rtol=1e-8, atol=1e-8)
        return torch.cat([x.flatten() for x in grad(sol.y[-1, 1], (y0, w))])

    wanted = gradients("checkpoint")
    assert torch.allclose(gradients(Adjoint(interpolate=True)), wanted, atol=1e-6)
    with suppress(IntegrationError):  # which is as good an answer
        assert not torch.allclose(gradients(Adjoint()), wanted, atol=1e-2)


@EACH_KIND
def test_evaluations_in_backward_are_counted(gradient):
    calls = []

    def counted(t, y, w):
        calls.append(t)
        return torch.sin(w * y)

    y0, w = (torch.rand(3, dtype=F64, requires_grad=True) for _ in range(2))
    sol = solve(counted, y0, [0.0, 0.5, 1.0], params=[w], gradient=gradient)
    forward = len(calls)
    sol.y.sum().backward()
    assert forward == sol.stats.nfe
    assert 0 < sol.stats.nfe_backward == len(calls) - forward


def kept(gradient, steps):
    net, y0 = nn.Linear(2, 2).double(), torch.randn(3, 2, dtype=F64, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        sol = solve(lambda t, y: net(y), y0, [0.0, 1.0], step_size=1 / steps, gradient=gradient)
        sol.y.sum()
    return sum(sizes)


def test_interpolation_keeps_one_state_for_a_step_and_the_adjoint_none():
    assert kept(KINDS["solved back"], 40) == kept(KINDS["solved back"], 10)
    assert kept(KINDS["interpolated"], 40) - kept(KINDS["interpolated"], 10) == 30 * 6


def test_with_steps_of_each_row_the_solution_is_solved_back_and_kept_at_its_times():
    y0 = torch.ones(2, 2, requires_grad=True)
    settings = dict(control=Adaptive(per_sample=True))
    for gradient, dense in ((Adjoint(interpolate=True), False), (Adjoint(), True)):
        with pytest.raises(InputError, match="gradient='checkpoint'"):
            solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient, dense=dense, **settings)
