"""Every way to differentiate a solution agrees with backpropagation and with differences."""

from __future__ import annotations

import functools
import gc
import math
import weakref

import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.autograd import grad, gradcheck

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.solution import GRADIENTS, solve

F64 = torch.float64
EACH_GRADIENT = pytest.mark.parametrize("gradient", GRADIENTS)
LEAN = [name for name in GRADIENTS if name != "backprop"]
FINE = dict(method="dopri5", step_size=0.07)  # so fine that the continuous gradient is exact too
COARSE = dict(method="rk4", step_size=0.3)
STEPS = {
    "fixed": dict(method="rk4", step_size=0.13),
    "adaptive": dict(method="tsit5", rtol=1e-5, atol=1e-7),
    "midpoint": dict(method="midpoint", step_size=0.2),
    "implicit": dict(method="kvaerno3", step_size=0.2),
}
EACH_STEPS = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)


def flow(t, x, w):
    """A nonlinear, non-autonomous field of a tensor (batch, 2)."""
    return torch.tanh(x @ w) * torch.cos(t) + 0.3 * t * x


# states: a field of the tensor x is a field of x in a structure, with a part that follows it -----


def as_tensor(g):
    return g


def as_tuple(g):
    @functools.wraps(g)  # with its signature
    def field(t, y, *rest):
        return g(t, y[0], *rest), -y[1] * y[0].sum(-1) * torch.sin(t)

    return field


def as_dict(g):
    @functools.wraps(g)
    def field(t, y, *rest):
        return {
            "v": -0.5 * y["v"] * y["x"].sum(-1),
            "x": g(t, y["x"], *rest) * (1 + 0.1 * y["v"][:, None]),
        }

    return field


STATES = {
    "tensor": (as_tensor, lambda x, v: x),
    "tuple": (as_tuple, lambda x, v: (x, v)),
    "dict": (as_dict, lambda x, v: {"x": x, "v": v}),
}
EACH_STATE = pytest.mark.parametrize("state", STATES)


def parts(state):
    if isinstance(state, torch.Tensor):
        return (state,)
    return tuple(state.values() if isinstance(state, dict) else state)


def with_rates(field):
    """The same field with rates that read the state, the time and whatever is passed."""

    @functools.wraps(field)
    def rated(t, y, *rest):
        x = parts(y)[0]
        extra = sum(r.sum() for r in rest)
        return field(t, y, *rest), ((x**2).sum(-1) * torch.cos(t), (x * (1 + t) + extra).mean())

    return rated


def exact_for(gradient):
    """Settings under which a gradient agrees with differences of the computed solution."""
    if gradient == "reversible":  # whose two states part in steps too long for the problem
        return {"gradient": gradient, **COARSE, "step_size": 0.05}
    return {"gradient": gradient, **(FINE if gradient == "adjoint" else COARSE)}


def values(sol):
    """Everything that a loss may read, at all times: states and integrals."""
    return (*parts(sol.y), *(sol.integral or ()))


def loss(sol):
    return sum(
        (torch.sin(3 * x) * torch.linspace(1, 2, len(x)).view(-1, *[1] * (x.ndim - 1))).sum()
        for x in values(sol)
    )


def start(dtype=F64):
    x = torch.randn(3, 2, dtype=dtype, requires_grad=True)
    v = torch.rand(3, dtype=dtype, requires_grad=True)
    return x, v


# ways: how a field comes to its tensors; each gives leaves, and a field and settings from them ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2, dtype=F64))
        self.unused = nn.Parameter(torch.randn(2, dtype=F64))

    def forward(self, t, x):
        return flow(t, x, self.w)


def weight():
    return (0.5 * torch.randn(2, 2, dtype=F64)).requires_grad_()


def by_module(net, w):
    return lambda t, x: net(t, x), {}


def by_captured_leaf(net, w):
    return lambda t, x: flow(t, x, w), {}


def by_named_leaf(net, w):
    return lambda t, x: flow(t, x, w), {"params": [w]}


def by_passed_leaf(net, w):
    return flow, {"params": [w]}


def by_passed_tensor(net, w):
    return flow, {"params": [torch.sin(w) * 2]}


def by_named_tensor(net, w):
    computed = torch.sin(w) * 2
    return lambda t, x: flow(t, x, computed), {"params": [computed]}


def by_named_tensor_and_its_source(net, w):
    computed = torch.exp(w) * w
    return lambda t, x: flow(t, x, computed) + flow(t, x, w), {"params": [computed]}


def by_passed_tensor_and_its_source(net, w):
    return lambda t, x, m: flow(t, x, m) + flow(t, x, w), {"params": [w.exp() * w]}


def by_a_leaf_passed_and_captured(net, w):
    return lambda t, x, v: flow(t, x, v) + torch.sin(x @ w), {"params": [w]}


def by_two_of_one_node(net, w):
    one, two = torch.cat([w, w.exp()]).chunk(2)
    return lambda t, x: flow(t, x, one) + flow(t, x, two), {"params": [one, two]}


def by_a_constant(net, w):
    drift = (w**3).sum(0).expand(3, 2)
    return lambda t, x: drift, {"params": [drift]}


def by_rows(net, w):
    rows = torch.stack([w.sum(0), w[0], w[1] ** 2])
    return lambda t, x, row: torch.tanh(x * row) + torch.cos(t) * row, {"rows": [rows]}


def by_rows_and_params(net, w):
    rows = torch.arange(3.0, dtype=F64), torch.tensor([True, False, True])
    return (
        lambda t, x, row, gate, m: flow(t, x, m) * row[:, None] * gate[:, None],
        {"rows": rows, "params": [w.cos()]},
    )


def by_branch(net, w):
    return lambda t, x: net(t, x) if t > 0.5 else -x, {}


def by_branch_over_leaf(net, w):
    return lambda t, x: flow(t, x, w) if t > 0.5 else -x, {}


def by_branch_over_list(net, w):
    nets = [nn.Identity(), net]
    return lambda t, x: nets[1](t, x) if t > 0.5 else -nets[0](x), {}


WAYS = {name[3:].replace("_", " "): way for name, way in globals().items() if name[:3] == "by_"}
WAYS_AND_STATES = {
    **{name: (way, "tensor") for name, way in WAYS.items()},
    **{f"{state} state": (by_passed_tensor_and_its_source, state) for state in STATES},
}
EACH_WAY_AND_STATE = pytest.mark.parametrize(
    ("way", "state"), WAYS_AND_STATES.values(), ids=WAYS_AND_STATES
)
BRANCHING = {name: way for name, way in WAYS.items() if "branch" in name}


def solved(way, net, w, x, v, state="tensor", t=(0.0, 0.4, 1.0), **settings):
    call, named = way(net, w)
    wrap, pack = STATES[state]
    return solve(with_rates(wrap(call)), pack(x, v), t, quadrature=True, **named, **settings)


def gradients(way, gradient, state="tensor", **settings):
    torch.manual_seed(1)
    net, w = Net(), weight()
    leaves = (*start(), w, *net.parameters())
    sol = solved(way, net, w, *leaves[:2], state, gradient=gradient, **settings)
    return sol, grad(loss(sol), leaves, allow_unused=True)


@EACH_WAY_AND_STATE
@EACH_STEPS
def test_checkpoint_equals_backprop_on_the_same_steps(way, state, steps):
    plain, wanted = gradients(way, "backprop", state, **steps)
    sol, got = gradients(way, "checkpoint", state, **steps)
    assert (sol.stats.accepted, sol.stats.rejected) == (plain.stats.accepted, plain.stats.rejected)
    for a, b in zip(values(sol), values(plain), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@EACH_WAY_AND_STATE
def test_the_adjoint_comes_close_to_backprop(way, state):
    settings = dict(control=Adaptive(1e-10, 1e-10, quadrature_atol=1e-10))
    near = 1e-6
    if way in BRANCHING.values():  # not smooth: the tolerance cannot be met across the branch
        settings, near = dict(method="rk4", step_size=0.02), 0.05
    _, wanted = gradients(way, "backprop", state, **settings)
    _, got = gradients(way, "adjoint", state, **settings)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=near, atol=near)


@EACH_GRADIENT
@pytest.mark.parametrize(
    "way",
    [way for way in WAYS.values() if way not in BRANCHING.values()],
    ids=[name for name in WAYS if name not in BRANCHING],
)
def test_gradients_agree_with_differences(way, gradient):
    net, w = Net(), weight()
    x, v = start()

    def outputs(*_):
        return values(solved(way, net, w, x, v, t=(0.0, 0.3, 1.0), **exact_for(gradient)))

    assert gradcheck(outputs, (x, w, net.w), atol=5e-6, fast_mode=True)


@EACH_STATE
@EACH_GRADIENT
@pytest.mark.parametrize("t", [(0.0, 0.3, 0.9), (0.8, 0.5, 0.1)], ids=["on", "back"])
def test_gradients_by_everything_agree_with_differences_for_every_state(state, gradient, t):
    def outputs(x, v, w):
        way = by_passed_tensor_and_its_source
        return values(solved(way, None, w, x, v, state, t, **exact_for(gradient)))

    assert gradcheck(outputs, (*start(), weight()), atol=5e-6, fast_mode=True)


@pytest.mark.parametrize("state", ["tensor", "dict"])
@EACH_GRADIENT
@pytest.mark.parametrize("t", [(0.0, 0.3, 0.9), (0.8, 0.5, 0.1)], ids=["on", "back"])
def test_gradients_by_the_times_agree_with_differences(state, gradient, t):
    x, v = start()
    w = weight().detach()

    def outputs(t):
        return values(solved(by_passed_leaf, None, w, x, v, state, t, gradient=gradient, **FINE))

    assert gradcheck(
        outputs, (torch.tensor(t, dtype=F64, requires_grad=True),), atol=5e-6, fast_mode=True
    )


def test_the_start_does_not_depend_on_the_times():
    for gradient in GRADIENTS:
        t = torch.tensor([0.0, 1.0], requires_grad=True)
        sol = solve(lambda t, y: (-y, y), torch.ones(2), t, gradient=gradient, quadrature=True)
        (by_t,) = grad(sol.y[0].sum() + sol.integral[0].sum(), t)
        assert by_t.tolist() == [0.0, 0.0]


@EACH_GRADIENT
def test_time_gradients_are_the_continuous_ones_in_single_precision_too(gradient):
    t = torch.tensor([0.0, 1.0], requires_grad=True)
    sol = solve(lambda t, y: -y, torch.ones(1), t, gradient=gradient)
    (by_t,) = grad(sol.y[-1].sum(), t)
    assert by_t.dtype == torch.float32
    assert by_t.tolist() == pytest.approx([math.exp(-1), -math.exp(-1)], rel=1e-3)


@EACH_GRADIENT
def test_an_integrals_gradient_is_the_integral_of_the_gradient(gradient):
    a = torch.tensor(0.7, dtype=F64, requires_grad=True)
    settings = dict(rtol=1e-10, atol=1e-12, quadrature=True, gradient=gradient)
    sol = solve(lambda t, y: (-a * y, y**2), torch.ones((), dtype=F64), [0.0, 1.0, 2.0], **settings)
    (got,) = grad(sol.integral[1] + 3 * sol.integral[2], a)
    wanted = sum(
        c * quad(lambda t: -2 * t * math.exp(-2 * 0.7 * t), 0, end)[0]
        for c, end in ((1, 1), (3, 2))
    )
    assert got.item() == pytest.approx(wanted, rel=1e-7)


@EACH_GRADIENT
def test_complex_states_have_gradients(gradient):
    x = torch.randn(2, dtype=torch.complex128, requires_grad=True)
    w = torch.randn(2, 2, dtype=torch.complex128, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64, requires_grad=True)

    def outputs(x, w, t):
        def field(t, y, w):
            return torch.sin(w @ y) * torch.exp(1j * t), (y.abs() ** 2).sum()

        sol = solve(field, x, t, params=[w], gradient=gradient, quadrature=True, **FINE)
        return sol.y, sol.integral

    assert gradcheck(outputs, (x, w, t), atol=5e-6, fast_mode=True)


@EACH_GRADIENT
@pytest.mark.parametrize("shape", [(), (0, 2), (1,), (2, 2, 2)])
def test_states_of_any_shape_have_gradients(gradient, shape):
    y0 = torch.rand(shape, dtype=F64, requires_grad=True)
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)
    sol = solve(lambda t, y: -w * y, y0, [0.0, 1.0, 2.0], gradient=gradient, rtol=1e-9, atol=1e-9)
    by_y, by_w = grad(sol.y[-1].sum(), (y0, w))
    assert torch.allclose(by_y, torch.full(shape, math.exp(-1.0), dtype=F64))
    assert by_w.item() == pytest.approx(-2 * math.exp(-1.0) * y0.sum().item(), abs=1e-7)


@EACH_GRADIENT
@pytest.mark.parametrize("form", ["transposed", "expanded", "computed", "sliced"])
def test_gradients_reach_a_start_of_any_form(gradient, form):
    base = torch.randn(3, 2, dtype=F64, requires_grad=True)
    forms = {
        "transposed": lambda: base.T,
        "expanded": lambda: base[:1].expand(4, 2),
        "computed": lambda: torch.exp(base),
        "sliced": lambda: base[::2, 1:],
    }
    ends = [
        solve(
            lambda t, y: torch.sin(y), forms[form](), [0.0, 1.0], gradient=g, rtol=1e-9, atol=1e-9
        )
        for g in (gradient, "backprop")
    ]
    got, wanted = (grad((sol.y[-1] ** 2).sum(), base)[0] for sol in ends)
    assert torch.allclose(got, wanted, atol=1e-7)


@EACH_GRADIENT
def test_single_precision_gradients_are_of_single_precision(gradient):
    net = nn.Linear(2, 2)
    y0 = torch.randn(5, 2, requires_grad=True)
    sol = solve(lambda t, y: torch.tanh(net(y)), y0, [0.0, 1.0], gradient=gradient)
    got = grad(sol.y[-1].pow(2).sum(), (y0, net.weight, net.bias))
    net.double()
    twin = y0.detach().double().requires_grad_()
    sol = solve(lambda t, y: torch.tanh(net(y)), twin, [0.0, 1.0], rtol=1e-10, atol=1e-10)
    wanted = grad(sol.y[-1].pow(2).sum(), (twin, net.weight, net.bias))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", BRANCHING.values(), ids=BRANCHING)
@EACH_GRADIENT
def test_gradients_reach_what_the_field_reads_only_later(way, gradient):
    _, (*_, by_w, by_net_w, by_unused) = gradients(way, gradient, method="rk4", step_size=0.1)
    reached = by_w if way is by_branch_over_leaf else by_net_w
    assert reached.abs().sum() > 0 and by_unused is None


@EACH_GRADIENT
def test_what_the_field_never_reads_has_no_gradient(gradient):
    net, unread = Net(), weight()
    y0 = torch.randn(3, 2, dtype=F64)
    sol = solve(lambda t, y, m: net(t, y), y0, [0.0, 1.0], params=[unread], gradient=gradient)
    by_w, *none = grad(sol.y[-1].sum(), (net.w, net.unused, unread), allow_unused=True)
    assert by_w is not None and none == [None, None]


@EACH_GRADIENT
def test_the_field_may_read_the_state_it_left_from(gradient):
    def outputs(x):
        left = torch.exp(x)
        return solve(
            lambda t, y: torch.sin(y) - left * x * y,
            left,
            [0.0, 1.0],
            params=[left],
            **exact_for(gradient),
        ).y

    x = 0.5 * torch.randn(3, dtype=F64)
    assert gradcheck(outputs, (x.requires_grad_(),), atol=5e-6)


@EACH_GRADIENT
def test_one_tensor_may_be_two_parts_of_the_state(gradient):
    def outputs(x):
        return solve(lambda t, y: (y[1], -y[0]), (x, x), [0.0, 1.0], **exact_for(gradient)).y

    assert gradcheck(outputs, (torch.randn(3, dtype=F64, requires_grad=True),), atol=5e-6)


@EACH_GRADIENT
def test_a_field_may_be_a_gradient_itself(gradient):
    energy = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def field(t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            return grad(energy(y).sum(), y, create_graph=True)[0].flip(-1)

    y0 = torch.randn(3, 2, dtype=F64, requires_grad=True)

    def outputs(*_):
        return solve(field, y0, [0.0, 1.0], **exact_for(gradient)).y

    tensors = (y0, energy[0].weight, energy[0].bias, energy[2].weight)
    assert gradcheck(outputs, tensors, atol=5e-6, fast_mode=True)


@EACH_GRADIENT
def test_a_field_may_solve_an_equation_of_its_own(gradient):
    settings = dict(step_size=0.25, gradient=gradient)

    def outer(t, y):
        inner = solve(lambda s, z: torch.sin(z) * y, y * t, [0.0, 0.5], params=[y], **settings)
        return inner.y[-1]

    def outputs(y0):
        return solve(outer, y0, [0.0, 1.0], **settings).y

    assert gradcheck(outputs, (torch.randn(3, dtype=F64, requires_grad=True),), atol=1e-5)


# how backward behaves ------------------------------------------------------------------------


@EACH_GRADIENT
def test_backward_may_run_twice_where_the_graph_is_retained(gradient):
    w = weight()
    computed = torch.exp(w)
    y0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    sol = solve(
        lambda t, y: flow(t, y, computed), y0, [0.0, 1.0], params=[computed], gradient=gradient
    )
    first = grad(sol.y[-1].sum(), (w, y0), retain_graph=True)
    again = grad(sol.y[-1].sum(), (w, y0), retain_graph=True)
    assert all(map(torch.equal, first, again))
    two = grad(computed.sum() + sol.y[-1].sum(), w)[0]  # its history serves others too
    assert torch.allclose(two, first[0] + torch.exp(w))


@EACH_GRADIENT
def test_two_solves_share_a_computed_tensor(gradient):
    w = weight()
    computed = torch.exp(w)
    y0 = torch.randn(3, 2, dtype=F64)
    field = functools.partial(lambda m, t, y: flow(t, y, m), computed)
    one = solve(field, y0, [0.0, 1.0], params=[computed], gradient=gradient).y[-1]
    two = solve(field, one, [1.0, 2.0], params=[computed], gradient=gradient).y[-1]
    (split,) = grad(two.sum(), w)
    whole = solve(lambda t, y, m: flow(t, y, m), y0, [0.0, 1.0, 2.0], params=[torch.exp(w)])
    assert torch.allclose(split, grad(whole.y[-1].sum(), w)[0], rtol=1e-3, atol=1e-3)


@EACH_GRADIENT
def test_hooks_on_a_parameter_see_its_whole_gradient_once(gradient):
    net, y0 = Net(), torch.randn(3, 2, dtype=F64)

    def backward():
        net.zero_grad()
        solve(net, y0, [0.0, 1.0], gradient=gradient, rtol=1e-8, atol=1e-8).y[-1].sum().backward()
        return net.w.grad.clone()

    plain, seen, accumulated = backward(), [], []
    net.w.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    net.w.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    assert torch.allclose(backward(), 2 * plain)
    assert len(seen) == len(accumulated) == 1
    assert torch.allclose(seen[0], plain)


@pytest.mark.parametrize("gradient", LEAN)
def test_a_computed_tensor_that_nobody_named_is_refused(gradient):
    matrix = torch.exp(weight())
    y0 = torch.randn(3, 2, dtype=F64)
    with pytest.raises(InputError, match=r"captures matrix, .* params=\[matrix\]"):
        solve(lambda t, y: flow(t, y, matrix), y0, [0.0, 1.0], gradient=gradient)
    with torch.no_grad():
        solve(lambda t, y: flow(t, y, matrix), y0, [0.0, 1.0], gradient=gradient)
    solve(lambda t, y: flow(t, y, matrix), y0, [0.0, 1.0], gradient="backprop")


@EACH_GRADIENT
@pytest.mark.parametrize("changed", ["parameter", "passed"])
def test_a_tensor_changed_in_place_before_backward_is_noticed(gradient, changed):
    net, w = Net(), torch.sin(weight())
    y0 = torch.randn(3, 2, dtype=F64)
    field = lambda t, y, w: net(t, y) * y @ w  # noqa: E731
    sol = solve(field, y0, [0.0, 1.0], params=[w], gradient=gradient)
    with torch.no_grad():
        {"parameter": net.w, "passed": w}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sol.y[-1].sum().backward()


@EACH_GRADIENT
def test_a_gradient_that_is_no_number_stays_one_and_raises_nothing(gradient):
    net, y0 = Net(), torch.randn(3, 2, dtype=F64)
    for bad in (math.nan, math.inf):
        sol = solve(net, y0, [0.0, 1.0], gradient=gradient)
        (by_w,) = grad((sol.y[-1] * bad).sum(), net.w)
        assert not by_w.isfinite().any()


@EACH_GRADIENT
def test_a_loss_that_does_not_read_the_solution_has_gradient_zero(gradient):
    net, y0 = Net(), torch.randn(3, 2, dtype=F64, requires_grad=True)
    sol = solve(net, y0, [0.0, 0.5, 1.0], gradient=gradient)
    by_y, by_w = grad(0 * sol.y.sum() + sol.y[0].sum(), (y0, net.w))
    assert torch.equal(by_y, torch.ones(3, 2, dtype=F64)) and by_w.abs().sum() == 0


def test_the_adjoint_says_so_where_it_cannot_go_back():
    def one_way(t, y):
        return torch.where(back[0] & (t < 0.5), y * math.nan, -y)

    back = [torch.tensor(False)]
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    sol = solve(one_way, y0, [0.0, 1.0], gradient="adjoint")
    back[0] = torch.tensor(True)
    with pytest.raises(IntegrationError, match="try"):
        sol.y[-1].sum().backward()
    assert sol.stats.nfe_backward > 0


def test_the_adjoints_steps_do_not_follow_the_parameter_gradient():
    net, y0 = Net(), torch.randn(3, 2, dtype=F64)
    counts = []
    for tolerance in (None, 1e-9):
        control = Adaptive(quadrature_atol=tolerance)
        sol = solve(net, y0, [0.0, 1.0], gradient="adjoint", control=control)
        sol.y[-1].sum().backward()
        counts.append(sol.stats.nfe_backward)
    assert counts[0] == counts[1]


@EACH_GRADIENT
@pytest.mark.parametrize("inside", [False, True])
def test_casts_in_backward_are_those_of_the_solve(gradient, inside):
    net, y0, seen = nn.Linear(2, 2), torch.randn(3, 2), set()

    def field(t, y):
        out = net(y)
        seen.add(out.dtype)
        return out.float()

    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        end = solve(field, y0, [0.0, 1.0], gradient=gradient, step_size=0.5).y[-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        end.sum().backward()
    assert seen == {torch.bfloat16 if inside else torch.float32}


# memory --------------------------------------------------------------------------------------


def test_backprop_keeps_every_stage():
    """What the others keep is said in files of their own."""

    def kept(steps):
        net, y0 = Net(), torch.randn(3, 2, dtype=F64, requires_grad=True)
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            solve(net, y0, [0.0, 1.0], step_size=1 / steps, gradient="backprop")
        return sum(sizes)

    assert kept(40) - kept(10) > 30 * 6 * 6


@EACH_GRADIENT
def test_a_solution_that_is_dropped_frees_its_tensors(gradient):
    net = Net()
    y0 = torch.randn(3, 2, dtype=F64, requires_grad=True) * 1
    gc.collect()
    gc.disable()
    try:
        sol = solve(net, y0, [0.0, 1.0], gradient=gradient)
        watched = weakref.ref(y0)
        sol.y.sum().backward(retain_graph=True)
        del sol, y0
        assert watched() is None  # without the collector: nothing holds itself
    finally:
        gc.enable()


def test_a_gradient_is_a_value_that_may_be_passed():
    y0 = torch.randn(3, dtype=F64, requires_grad=True)
    by_value = solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=Checkpoint()).y
    by_name = solve(lambda t, y: -y, y0, [0.0, 1.0]).y
    assert torch.equal(by_value, by_name) and by_value.requires_grad
