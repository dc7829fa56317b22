"""A solve may be differentiated forward, and transformed by torch.func, or says why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from cnf.error import InputError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import Event
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.solution import solve
from cnf.ode.tangent import carries_tangent, is_mapped, is_transformed

# of torch, where its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
F64 = torch.float64
FIXED = dict(method="rk4", step_size=0.1, gradient="backprop")
STEPS = {
    "fixed": FIXED,
    "adaptive": dict(rtol=1e-6, atol=1e-8, gradient="backprop"),
    "fixed of rows": dict(control=FixedStep(0.1, per_sample=True), gradient="backprop"),
    "adaptive of rows": dict(control=Adaptive(1e-6, 1e-8, per_sample=True), gradient="backprop"),
}
LEAN = {
    "checkpoint": "checkpoint",
    "stages": Checkpoint(keep="stages"),
    "adjoint": "adjoint",
    "interpolated": Adjoint(interpolate=True),
}
EACH_LEAN = pytest.mark.parametrize("gradient", LEAN.values(), ids=LEAN)


def field(t, y, w):
    """A tuple state, so that one part moves before what transforms the other reaches it."""
    x, v = y
    t = t.reshape(-1, 1) if t.ndim else t
    return (v, -torch.tanh(x @ w) * torch.cos(t)), (x**2).sum(-1)


def outputs(x, w, times=(0.0, 0.3, 0.8), **settings):
    """Both parts and their integral, all together."""
    sol = solve(field, (x, 0.5 * x.detach()), times, params=[w], quadrature=True, **settings)
    return torch.cat([*sol.y, sol.integral[..., None]], -1)


def tensors():
    return torch.randn(3, 2, dtype=F64), torch.randn(2, 2, dtype=F64)


def jacobians(x, w, **settings):
    """By backward, which other tests prove."""
    return torch.autograd.functional.jacobian(lambda *z: outputs(*z, **settings), (x, w))


# forward mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("quiet", [False, True], ids=["with grad", "no grad"])
def test_a_tangent_comes_out_as_backward_says(settings, quiet):
    x, w = tensors()
    dx, dw = tensors()
    by_x, by_w = jacobians(x, w, **settings)
    wanted = torch.tensordot(by_x, dx, 2) + torch.tensordot(by_w, dw, 2)
    with forward_ad.dual_level(), torch.set_grad_enabled(not quiet):
        duals = forward_ad.make_dual(x, dx), forward_ad.make_dual(w, dw)
        tangent = forward_ad.unpack_dual(outputs(*duals, **settings)).tangent
    assert torch.allclose(tangent, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [FIXED, STEPS["fixed of rows"]], ids=["shared", "rows"])
def test_a_tangent_goes_through_times_dense_output_and_captured_tensors(settings):
    x, w = tensors()
    t = torch.tensor([0.0, 0.3, 0.8], dtype=F64)

    def value(scale):
        captured = w * scale
        sol = solve(
            lambda t, y: field(t, y, captured)[0], (x, x), t * scale, dense=True, **settings
        )
        return torch.cat([*sol.y, sol(0.41 * scale)[0][None]])

    scale = torch.tensor(1.0, dtype=F64)
    with forward_ad.dual_level():
        dual = value(forward_ad.make_dual(scale, torch.ones_like(scale)))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(tangent, torch.autograd.functional.jacobian(value, scale), atol=1e-11)


def test_a_tangent_goes_through_an_event():
    def value(scale):
        event = Event(lambda t, y: y[0] - 0.4 * scale)
        y0 = torch.ones(1, dtype=F64) * scale
        sol = solve(lambda t, y: -y, y0, [0.0, 5.0], event=event, **FIXED)
        return torch.cat([sol.event_time[None], sol.y[-1]])

    scale = torch.tensor(1.3, dtype=F64)
    with forward_ad.dual_level():
        dual = value(forward_ad.make_dual(scale, torch.ones_like(scale)))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(tangent, torch.tensor([0.0, 0.4], dtype=F64), atol=1e-6)


@EACH_LEAN
@pytest.mark.parametrize("where", ["y0", "params", "t", "captured"])
def test_a_tangent_that_a_gradient_would_lose_is_refused(gradient, where):
    x, w = tensors()
    t = torch.tensor([0.0, 1.0], dtype=F64)
    with forward_ad.dual_level():
        given = {"y0": x, "params": w, "t": t, "captured": w.clone()}
        given[where] = forward_ad.make_dual(given[where], torch.ones_like(given[where]))
        with pytest.raises(InputError, match="gradient='backprop'"):
            solve(
                lambda t, y, w: torch.tanh(y @ w) + y @ given["captured"],
                given["y0"],
                given["t"],
                params=[given["params"]],
                gradient=gradient,
            )


# transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["euler", "rk4", "bosh3", "dopri5"])
def test_jacobians_by_transforms_are_those_of_backward(method):
    x, w = tensors()
    settings = dict(FIXED, method=method)
    wanted = jacobians(x, w, **settings)
    for transform in (jacrev, jacfwd):
        got = transform(lambda *z: outputs(*z, **settings), (0, 1))(x, w)
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["fixed", "adaptive"])
def test_what_maps_nothing_goes_with_any_steps(name):
    x, w = tensors()
    settings = STEPS[name]
    weights = torch.randn(3, 3, 5, dtype=F64)

    def loss(x, w):
        return (outputs(x, w, **settings) * weights).sum()

    wanted = torch.autograd.functional.jacobian(loss, (x, w))
    pulled = vjp(loss, x, w)[1](torch.ones((), dtype=F64))
    for got in (grad(loss, (0, 1))(x, w), jacrev(loss, (0, 1))(x, w), pulled):
        assert all(map(torch.allclose, got, wanted))
    dx, dw = tensors()
    _, tangent = jvp(loss, (x, w), (dx, dw))
    assert torch.allclose(tangent, (wanted[0] * dx).sum() + (wanted[1] * dw).sum())


def test_second_derivatives_by_transforms_are_those_of_backward():
    x, w = tensors()

    def loss(w):
        return outputs(x, w, **FIXED).sin().sum()

    wanted = torch.autograd.functional.hessian(loss, w)
    for second in (hessian(loss), jacrev(jacrev(loss)), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))):
        assert torch.allclose(second(w), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)], ids=["y0", "params", "both"])
def test_a_map_is_a_loop(mapped):
    xs, ws = torch.randn(4, 3, 2, dtype=F64), torch.randn(4, 2, 2, dtype=F64)
    x, w = (z if way == 0 else z[0] for z, way in zip((xs, ws), mapped, strict=True))

    def value(x, w):
        sol = solve(field, (x, x), [0.0, 0.8], params=[w], quadrature=True, dense=True, **FIXED)
        return torch.cat([sol.y[0][-1], sol(0.37)[1], sol.integral[-1][:, None]], -1)

    got = vmap(value, mapped)(x, w)
    of_each = vmap(grad(lambda x, w: value(x, w).sin().sum(), (0, 1)), mapped)(x, w)
    for i in range(4):
        one = [z[i] if way == 0 else z for z, way in zip((x, w), mapped, strict=True)]
        assert torch.allclose(got[i], value(*one), rtol=1e-12, atol=1e-13)
        wanted = grad(lambda x, w: value(x, w).sin().sum(), (0, 1))(*one)
        assert all(
            torch.allclose(a[i], b, atol=1e-12) for a, b in zip(of_each, wanted, strict=True)
        )


def test_a_net_may_be_called_with_parameters_as_inputs():
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    y0 = torch.randn(5, 2, dtype=F64)
    parameters = dict(net.named_parameters())

    def loss(parameters, y0):
        sol = solve(
            lambda t, y: functional_call(net, parameters, (y,)) * t, y0, [0.0, 1.0], **FIXED
        )
        return sol.y[-1].pow(2).sum()

    got = grad(loss)(parameters, y0)
    loss(parameters, y0).backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-12)
    of_rows = vmap(grad(loss), (None, 0))(parameters, y0[:, None])
    for name, part in of_rows.items():
        assert torch.allclose(part.sum(0), got[name], rtol=1e-10)


def test_ensembles_of_nets_are_mapped_over():
    nets = [nn.Linear(2, 2).double() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(nets)
    y0 = torch.randn(5, 2, dtype=F64)

    def end(parameters):
        field = lambda t, y: torch.tanh(functional_call(nets[0], parameters, (y,)))  # noqa: E731
        return solve(field, y0, [0.0, 1.0], **FIXED).y[-1]

    for got, net in zip(vmap(end)(stacked), nets, strict=True):
        wanted = solve(lambda t, y, net=net: torch.tanh(net(y)), y0, [0.0, 1.0], **FIXED).y[-1]
        assert torch.allclose(got, wanted, rtol=1e-12)


def test_times_are_differentiated_by_transforms():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)

    def loss(t):
        y0 = torch.ones(2, dtype=F64)
        return solve(lambda t, y: torch.sin(y) * t.cos(), y0, t, **FIXED).y[1:].sum()

    wanted = torch.autograd.functional.jacobian(loss, t)
    for transform in (grad, jacrev, jacfwd):
        assert torch.allclose(transform(loss)(t), wanted)
    second = torch.autograd.functional.hessian(loss, t)
    assert torch.allclose(hessian(loss)(t), second)


def test_a_field_may_transform_itself_whatever_the_gradient():
    def divergence(t, y):
        _, tangent = jvp(torch.sin, (y,), (torch.ones_like(y),))
        return torch.sin(y), tangent.sum(-1)

    y0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    found = []
    for gradient in ("backprop", *LEAN.values()):
        sol = solve(divergence, y0, [0.0, 1.0], quadrature=True, gradient=gradient,
                    rtol=1e-9, atol=1e-9)  # fmt: skip
        found.append(torch.autograd.grad(sol.integral[-1].sum(), y0)[0])
    assert all(torch.allclose(one, found[0], atol=1e-7) for one in found)


def test_what_is_not_finite_is_not_looked_for_under_a_map():
    def end(y0):
        return solve(lambda t, y: y * y, y0, [0.0, 5.0], **FIXED).y[-1]

    found = vmap(end)(torch.tensor([[0.1], [9.0]], dtype=F64))
    assert found.isfinite().flatten().tolist() == [True, False]


# what is refused ---------------------------------------------------------------------------------

X = torch.ones(2, 2)
REFUSED = {
    "checkpoint": (dict(gradient="checkpoint", step_size=0.1), grad, "gradient='backprop'"),
    "the adjoint": (dict(gradient="adjoint", step_size=0.1), jvp, "gradient='backprop'"),
    "checkpoint under a map": (dict(step_size=0.1), vmap, "gradient='backprop'"),
    "adaptive steps under a map": (dict(gradient="backprop"), vmap, "give step_size="),
    "adaptive steps in jacfwd": (dict(gradient="backprop"), jacfwd, "give step_size="),
    "steps of rows": (
        dict(gradient="backprop", control=FixedStep(0.1, per_sample=True)),
        grad,
        "leave out per_sample=True",
    ),
    "an event": (dict(FIXED, event=Event(lambda t, y: y.sum())), grad, "without event="),
}


@pytest.mark.parametrize(("settings", "transform", "says"), REFUSED.values(), ids=REFUSED)
def test_what_no_transform_goes_through_is_refused_with_a_sentence(settings, transform, says):
    def loss(y0):
        return solve(lambda t, y: -y, y0, [0.0, 1.0], **settings).y[-1].sum()

    with pytest.raises(InputError, match=says):
        if transform is jvp:
            jvp(loss, (X,), (X,))
        else:
            transform(loss)(X)


def test_times_are_not_mapped_over():
    def end(t):
        return solve(lambda t, y: -y, torch.ones(2), t, **FIXED).y[-1]

    with pytest.raises(InputError, match="times must be the same for all that is mapped"):
        vmap(end)(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))


def test_what_goes_on_outside_is_known():
    seen = []

    def look(x):
        seen.append((is_transformed(), is_mapped(), carries_tangent((X, x))))
        return x.sum()

    look(X)
    grad(look)(X)
    vmap(look)(X)
    jvp(look, (X,), (X,))
    jacfwd(look)(X)
    with forward_ad.dual_level():
        look(X)
        look(forward_ad.make_dual(X, X))
    assert seen == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (True, True, True),
        (False, False, False),
        (False, False, True),
    ]
