"""A gradient can be differentiated again, and as often as one likes, or says why not."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from cnf.error import InputError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.solution import solve

F64 = torch.float64
MEMBERS = {
    "backprop": ("backprop", False),
    "checkpoint": ("checkpoint", False),
    "stages": (Checkpoint(keep="stages"), False),
    "sqrt": (Checkpoint(keep="sqrt"), False),
    "little memory": (Checkpoint(memory=100), False),
    "adjoint": ("adjoint", False),
    "backprop of rows": ("backprop", True),
    "checkpoint of rows": ("checkpoint", True),
}
EACH_MEMBER = pytest.mark.parametrize(("gradient", "per_sample"), MEMBERS.values(), ids=MEMBERS)
FINE = 0.15


def field(t, y, row, w):
    """Nonlinear and non-autonomous, with rates of each row; t 0-d or (rows,)."""
    x, v = y["x"], y["v"]
    t = t.reshape(-1, 1)
    slope = torch.tanh(x @ w) * torch.cos(t) + 0.3 * row[:, None] * x
    return {"x": slope, "v": -v * x.sum(-1)}, ((x**2).sum(-1) * torch.sin(t[:, 0]), v * row)


def outputs(x, v, row, w, t, gradient, per_sample, **settings):
    """States and integrals, from tensors that were computed and depend on each other."""
    settings = settings or dict(control=FixedStep(FINE, per_sample=per_sample))
    sol = solve(field, {"x": x.sin(), "v": v * w.sum()}, t, rows=[row * 1], params=[w.exp() * w],
                quadrature=True, gradient=gradient, **settings)  # fmt: skip
    return (*sol.y.values(), *sol.integral)


def tensors(*times):
    shapes = (3, 2), (3,), (3,), (2, 2)
    found = [0.5 * torch.randn(shape, dtype=F64) for shape in shapes]
    return [x.requires_grad_() for x in (*found, torch.tensor(times, dtype=F64))]


@pytest.mark.parametrize("name", MEMBERS)
def test_second_derivatives_by_everything_agree_with_differences(name):
    gradient, per_sample = MEMBERS[name]
    on = name in ("checkpoint", "sqrt", "adjoint", "backprop of rows")
    given = tensors(*((0.0, 0.15, 0.45) if on else (0.3, 0.1)))  # on, or back
    assert gradgradcheck(
        lambda *x: outputs(*x, gradient, per_sample), given, atol=1e-5, fast_mode=True
    )


@EACH_MEMBER
def test_a_gradient_that_can_be_differentiated_is_the_gradient(gradient, per_sample):
    given = tensors(0.0, 0.3, 0.7)
    loss = sum(x.sin().sum() for x in outputs(*given, gradient, per_sample))
    plain = grad(loss, given, retain_graph=True)
    again = grad(loss, given, create_graph=True)
    for a, b in zip(plain, again, strict=True):
        assert b.requires_grad and torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@EACH_MEMBER
def test_adaptive_steps_have_second_derivatives_too(gradient, per_sample):
    def second(gradient, **settings):
        torch.manual_seed(0)
        given = tensors(0.0, 0.3, 0.7)
        loss = sum(x.sin().sum() for x in outputs(*given, gradient, per_sample, **settings))
        first = grad(loss, given, create_graph=True)
        return grad(sum((x**2).sum() for x in first), given)

    exact = second("backprop", control=FixedStep(0.02, per_sample=per_sample))
    got = second(gradient, control=Adaptive(1e-8, 1e-8, per_sample=per_sample))
    for a, b in zip(got, exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_third_derivatives_are_those_of_the_solution(gradient):
    """y' = y²: y(1) = y0 / (1 − y0)."""
    y0 = torch.tensor([0.1, 0.3], dtype=F64, requires_grad=True)
    value = solve(lambda t, y: y * y, y0, [0.0, 1.0], rtol=1e-10, atol=1e-10, gradient=gradient)
    wanted = [y0 / (1 - y0), *(math.factorial(n) / (1 - y0) ** (n + 1) for n in (1, 2, 3))]
    found = value.y[-1]
    for order in range(4):
        assert torch.allclose(found, wanted[order], rtol=1e-6)
        if order < 3:
            (found,) = grad(found.sum(), y0, create_graph=True)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_net_that_is_captured_is_differentiated_twice(gradient):
    """As a penalty on the gradient by the input does in training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    y0 = torch.randn(4, 2, dtype=F64, requires_grad=True)

    def penalty(*_):
        end = solve(lambda t, y: net(y), y0, [0.0, 1.0], step_size=0.1, gradient=gradient).y[-1]
        (by_y,) = grad(end.pow(2).sum(), y0, create_graph=True)
        return by_y.pow(2).sum()

    assert gradcheck(penalty, (net[0].weight, net[2].bias, y0), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_leaf_that_the_start_depends_on_too_is_counted_once(gradient, hooked):
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)
    seen = []
    if hooked:
        w.register_hook(lambda g: seen.append(g))
    y0 = w.exp()  # depends on what the field captures
    end = solve(lambda t, y: w * torch.sin(y), y0, [0.0, 1.0], gradient=gradient, rtol=1e-10,
                atol=1e-10).y[-1]  # fmt: skip
    (first,) = grad(end, w, create_graph=True)
    (second,) = grad(first, w)
    assert len(seen) == 2 * hooked

    def value(w):
        return solve(lambda t, y: w * torch.sin(y), w.exp(), [0.0, 1.0], gradient="backprop",
                     step_size=0.05).y[-1]  # fmt: skip

    wanted = torch.autograd.functional.hessian(value, w.detach())
    assert second.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_complex_states_have_second_derivatives(gradient):
    x = torch.randn(2, dtype=torch.complex128, requires_grad=True)
    w = torch.randn(2, 2, dtype=torch.complex128, requires_grad=True)

    def value(x, w):
        return solve(lambda t, y, w: torch.sin(w @ y) * torch.exp(1j * t), x, [0.0, 0.5],
                     params=[w], gradient=gradient, step_size=0.1).y[-1]  # fmt: skip

    assert gradgradcheck(value, (x, w), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_a_solve_without_a_second_derivative_keeps_no_graph_of_its_steps(gradient):
    y0 = torch.ones(3, dtype=F64, requires_grad=True)
    sol = solve(lambda t, y: torch.sin(y), y0, [0.0, 1.0], gradient=gradient)
    (first,) = grad(sol.y[-1].sum(), y0)
    assert not first.requires_grad


def test_the_adjoints_second_derivative_keeps_nothing_for_a_step():
    def kept(steps):
        y0, w = (torch.ones(3, dtype=F64, requires_grad=True) for _ in range(2))
        live = weakref.WeakSet()

        class Saved:
            def __init__(self, x):
                self.x = x
                live.add(self)

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
            sol = solve(lambda t, y, w: torch.sin(w * y), y0, [0.0, 1.0], params=[w],
                        gradient="adjoint", step_size=1 / steps)  # fmt: skip
            (first,) = grad(sol.y[-1].sum(), y0, create_graph=True)
        held = sum(saved.x.numel() for saved in live)
        before = sol.stats.nfe_backward
        grad(first.sum(), w)
        assert sol.stats.nfe_backward > 2 * before  # counted too
        return held

    assert kept(5) == kept(20)


REFUSED = {
    "rows": (Adjoint(), dict(control=Adaptive(per_sample=True))),
    "interpolated": (Adjoint(interpolate=True), {}),
}


@pytest.mark.parametrize(("gradient", "settings"), REFUSED.values(), ids=REFUSED)
def test_where_it_is_not_differentiated_again_it_says_so_and_is_never_wrong(gradient, settings):
    y0 = torch.ones(3, 1, dtype=F64, requires_grad=True)
    sol = solve(lambda t, y: torch.sin(y), y0, [0.0, 1.0], gradient=gradient, **settings)
    plain = grad(sol.y[-1].sum(), y0, retain_graph=True)[0]
    (first,) = grad(sol.y[-1].sum(), y0, create_graph=True)
    assert torch.equal(plain, first)  # a graph that nobody uses is no error
    with pytest.raises(InputError, match="gradient='checkpoint'"):
        grad(first.sum(), y0)
