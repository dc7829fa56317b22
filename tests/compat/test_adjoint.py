"""The adjoint equation: its gradients, its settings, and what is told of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnf.compat.torchdiffeq import odeint, odeint_adjoint

ADAPTIVE = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


class Net(nn.Module):
    """A small field of a vector, or of a tuple of two, that counts its calls."""

    def __init__(self, width=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).double()
        self.unused = nn.Linear(2, 2).double()
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        if isinstance(y, tuple):
            a, b = y
            return self.net(a) * torch.cos(t), -b * a.sum()
        return self.net(y) * torch.cos(3 * t)


def gradients(interface, func, y0, t, **settings):
    """(solution, gradients by y0's parts, t and the net's parameters)."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    parts = tuple(part.detach().clone().requires_grad_() for part in parts)
    t = t.detach().clone().requires_grad_()
    solution = interface(func, parts if isinstance(y0, tuple) else parts[0], t, **settings)
    leaves = solution if isinstance(solution, tuple) else (solution,)
    loss = sum(
        (leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in leaves
    )
    return solution, torch.autograd.grad(loss, (*parts, t, *func.net.parameters()))


@pytest.mark.parametrize("t", [times(0, 0.3, 1), times(1, 0.4, -0.2)], ids=["forward", "backward"])
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_gradients_are_those_through_the_steps(method, t):
    func, y0 = Net(), torch.randn(4, 2, dtype=torch.float64)
    rough = method in ("fehlberg2", "adaptive_heun", "bosh3")
    settings = {"rtol": 1e-5, "atol": 1e-5} if rough else dict(TIGHT)
    if method in FIXED:
        settings["options"] = {"step_size": 0.002 if method == "euler" else 0.02, "interp": "cubic"}
    if "adams" in method:
        settings["options"]["max_order"] = 5
    solution, by_steps = gradients(odeint, func, y0, t, method=method, **settings)
    same, by_adjoint = gradients(odeint_adjoint, func, y0, t, method=method, **settings)
    torch.testing.assert_close(same, solution, rtol=0, atol=1e-13)
    limit = {"euler": 3e-2, "midpoint": 3e-3, "heun2": 3e-3, "fehlberg2": 1e-2}.get(method, 5e-4)
    for one, other in zip(by_adjoint, by_steps, strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)


def test_the_adjoint_passes_gradcheck_by_start_times_and_parameters():
    func = Net()

    def solve(a, b, t, weight):
        func.net[0].weight.data = weight.detach()
        params = (weight, func.net[0].bias)

        def field(t, y):
            hidden = torch.tanh(y[0] @ weight.T + func.net[0].bias)
            return func.net[2](hidden) * torch.cos(t), -y[1] * y[0].sum()

        return odeint_adjoint(field, (a, b), t, adjoint_params=params, **TIGHT)

    inputs = (torch.rand(2), torch.rand(3, 1), times(0.1, 0.5, 0.9), func.net[0].weight)
    inputs = tuple(x.detach().double().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(solve, inputs, atol=1e-5)


def test_parts_of_a_tuple_get_their_gradients():
    func = Net()
    y0 = (torch.randn(2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64))
    _, by_steps = gradients(odeint, func, y0, times(0, 0.5, 1), **TIGHT)
    solution, by_adjoint = gradients(odeint_adjoint, func, y0, times(0, 0.5, 1), **TIGHT)
    assert [part.shape for part in solution] == [(3, 2), (3, 3, 1)]
    for one, other in zip(by_adjoint, by_steps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_other_dtypes_are_differentiated(dtype):
    a = torch.nn.Parameter(torch.tensor(0.3))
    factor = 1j if dtype.is_complex else 1.0

    def func(t, y):
        return factor * a * t * y

    y0 = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    settings = {"rtol": 1e-6, "atol": 1e-6}
    t = torch.tensor([0.2, 1.0], requires_grad=True)
    found = []
    for y in (odeint(func, y0, t, **settings),
              odeint_adjoint(func, y0, t, adjoint_params=(a,), **settings)):  # fmt: skip
        assert y.dtype == dtype
        loss = (y[-1] * (1 + factor)).real.sum()
        found.append(torch.autograd.grad(loss, (y0, a, t)))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_parameters_that_the_field_does_not_read_get_zeros():
    func = Net()
    odeint_adjoint(func, torch.ones(2).double(), times(0, 1)).sum().backward()
    assert not func.unused.weight.grad.any() and func.net[0].weight.grad.any()


def test_parameters_are_named_where_the_field_is_no_module():
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    log_scale = scale.log()  # computed before the solve

    def func(t, y):
        return -log_scale.exp() * y

    y0 = torch.ones(2, dtype=torch.float64)
    for params in ((log_scale,), (scale,)):
        y = odeint_adjoint(func, y0, times(0, 1), adjoint_params=iter(params))
        (found,) = torch.autograd.grad(y[-1].sum(), scale, retain_graph=True)
        torch.testing.assert_close(found, -2 * torch.exp(-scale.detach()), rtol=0, atol=1e-6)
    y = odeint_adjoint(func, y0.requires_grad_(), times(0, 1), adjoint_params=())
    assert torch.autograd.grad(y[-1].sum(), scale, allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="adjoint_params"):
        odeint_adjoint(func, y0, times(0, 1))


def test_a_replica_keeps_its_parameters_as_attributes():
    func = Net()
    for part in func.modules():
        for name, param in list(part._parameters.items()):
            del part._parameters[name]
            setattr(part, name, param.detach().requires_grad_())
    func._is_replica = True
    odeint_adjoint(func, torch.ones(2).double(), times(0, 1)).sum().backward()
    assert func.net[0].weight.grad.any()


def test_the_way_back_has_settings_of_its_own():
    func, y0 = Net(), torch.ones(3, 2, dtype=torch.float64)
    t = times(0, 1)
    _, exact = gradients(odeint_adjoint, func, y0, t, rtol=1e-11, atol=1e-11)
    counts = []
    for back in ({}, {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-3},
                 {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.05}},
                 {"adjoint_method": "scipy_solver", "adjoint_options": {"solver": "RK45"}},
                 {"method": "scipy_solver"}):  # fmt: skip
        y = odeint_adjoint(func, y0.clone().requires_grad_(), t, **TIGHT, **back)
        func.nfe = 0
        func.zero_grad()
        loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        loss.backward()
        counts.append(func.nfe)
        weight = exact[2]
        torch.testing.assert_close(func.net[0].weight.grad, weight, rtol=0, atol=1e-3)
    assert counts[1] < counts[0] / 2 and counts[2] == 80


def test_options_serve_both_ways_unless_they_cannot():
    func, y0 = Net(), torch.ones(2, dtype=torch.float64)
    options = {"norm": lambda state: state.abs().max(), "first_step": 0.1}
    y = odeint_adjoint(func, y0, times(0, 1), options=options)
    assert set(y.grad_fn.adjoint_options) == {"norm", "first_step"}
    assert y.grad_fn.adjoint_options["norm"] is not options["norm"]
    with pytest.raises(ValueError, match="adjoint_options"):
        odeint_adjoint(func, y0, times(0, 1), options=options, adjoint_method="bosh3")
    given = {"norm": "seminorm"}
    odeint_adjoint(func, y0, times(0, 1), adjoint_method="bosh3", options=options,
                   adjoint_options=given)  # fmt: skip
    assert given == {"norm": "seminorm"}


def test_unequal_tolerances_of_the_parts_serve_the_way_back_too():
    func = Net()
    y0 = (torch.randn(2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64))
    _, exact = gradients(odeint, func, y0, times(0, 1), **TIGHT)
    settings = {"rtol": (1e-8, 1e-7), "atol": (1e-9, 1e-8)}
    _, found = gradients(odeint_adjoint, func, y0, times(0, 1), **settings)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_seminorm_leaves_the_parameters_out_and_saves_evaluations():
    func, y0 = Net(400), torch.ones(2, dtype=torch.float64, requires_grad=True)
    counts, found = [], []
    for options in ({}, {"norm": "seminorm"}):
        y = odeint_adjoint(func, y0, times(0, 3), rtol=1e-8, atol=1e-8, adjoint_options=options)
        func.nfe = 0
        found.append(torch.autograd.grad(y[-1].sum(), (y0, *func.net.parameters())))
        counts.append(func.nfe)
    assert counts[1] < counts[0]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_norm_of_the_way_back_sees_time_state_adjoint_and_parameters():
    shapes = set()

    def norm(state):
        shapes.add(tuple(tuple(part.shape) for part in state))
        return max(part.abs().max() for part in state)

    params = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))
    settings = {"adjoint_params": params, "adjoint_options": {"norm": norm}}
    y = odeint_adjoint(lambda t, y: y, torch.ones(3), torch.tensor([0.0, 1.0]), **settings)
    y.sum().backward()
    assert shapes == {((), (3,), (3,), (7,), ())}
    shapes.clear()
    pair = (torch.tensor(1.0), torch.ones(2, 2))
    a, _ = odeint_adjoint(lambda t, y: y, pair, torch.tensor([0.0, 1.0]), **settings)
    a.sum().backward()
    assert shapes == {((), (), (2, 2), (), (2, 2), (7,), ())}


@pytest.mark.parametrize("seminorm", [False, True])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_settings_are_open_until_backward(as_tuple, seminorm):
    func = Net()
    y0 = torch.ones(2, dtype=torch.float64)
    back = {"adjoint_options": {"norm": "seminorm"}} if seminorm else {}
    if as_tuple:
        y, _ = odeint_adjoint(func, (y0, y0.view(2, 1)), times(0, 1), **back)
        node = y.grad_fn.next_functions[0][0].next_functions[0][0]
    else:
        y = odeint_adjoint(func, y0, times(0, 1), **back)
        node = y.grad_fn
    assert (node.adjoint_rtol, node.adjoint_atol, node.adjoint_method) == (1e-7, 1e-9, None)
    default, seen = node.adjoint_options["norm"], []

    def spy(state):
        seen.append(default(state))
        t, y, a, *params = state
        flat = 4 if as_tuple else 2
        assert y.shape == a.shape == (flat,) and len(params) == 6 and t.shape == ()
        halves = [part for x in (y, a) for part in (x.split(2) if as_tuple else [x])]
        sizes = [*halves, *([] if seminorm else params)]
        expected = max(part.square().mean().sqrt() for part in sizes)
        assert seen[-1].item() == pytest.approx(expected.item())
        return seen[-1]

    node.adjoint_options["norm"] = spy
    y[-1].sum().backward()
    assert seen


def test_parameters_without_a_gradient_are_left_out_with_a_warning_where_a_norm_counts_them():
    func = Net()
    func.unused.weight.requires_grad_(False)
    lengths = set()

    def norm(state):
        lengths.add(len(state))
        return state[1].abs().max()

    y0 = torch.ones(2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="left out of the adjoint"):
        y = odeint_adjoint(func, y0, times(0, 1), adjoint_options={"norm": norm})
    y.sum().backward()
    assert lengths == {3 + 5}
    odeint_adjoint(func, y0, times(0, 1))  # nobody counts them


def test_a_second_derivative_is_refused():
    func, y0 = Net(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = odeint_adjoint(func, y0, times(0, 1)).square().sum()
    (first,) = torch.autograd.grad(loss, y0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_nothing_is_kept_of_the_way_there_but_the_states_asked_for():
    func, saved = Net(), []
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, id):
        odeint_adjoint(func, y0, times(0, 1), **TIGHT)
    assert sum(saved) == 2 + 4 + sum(p.numel() for p in func.parameters())


def test_a_net_of_single_precision_learns_beside_a_double_clock():
    net = nn.Linear(2, 2)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y)

    t = times(0, 1).requires_grad_()
    odeint_adjoint(Field(), torch.ones(2), t, rtol=1e-4, atol=1e-4).sum().backward()
    assert net.weight.grad.dtype == torch.float32 and t.grad.dtype == torch.float64


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_callbacks_of_the_way_back_are_told_of_its_steps(method):
    calls = {"step": [], "accept_step": [], "reject_step": []}
    func = Net()
    for name, seen in calls.items():
        if method == "dopri5" or name == "step":

            def note(t0, y0, dt, seen=seen):
                seen.append((t0.item(), y0, dt.item()))

            setattr(func, f"callback_{name}_adjoint", note)
    settings = {"rtol": 1e-3, "atol": 1e-3}
    settings["options"] = {} if method == "dopri5" else {"step_size": 0.1}
    y = odeint_adjoint(func, torch.ones(2).double(), times(0, 1), method=method, **settings)
    assert not any(calls.values())
    y.sum().backward()
    steps = calls["step"]
    assert steps[0][0] == 1.0 and all(dt > 0 for _, _, dt in steps)
    assert [tuple(part.shape) for part in steps[0][1]][:3] == [(), (2,), (2,)]
    if method == "dopri5":
        assert len(calls["accept_step"]) + len(calls["reject_step"]) == len(steps)
    else:
        assert len(steps) == 10
