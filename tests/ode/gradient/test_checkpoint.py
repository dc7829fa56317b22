"""Whatever is kept of the steps, the gradient is the same; what is kept is what was asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad

from cnf.error import InputError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import Event
from cnf.ode.gradient.checkpoint import Checkpoint, Record, as_bytes
from cnf.ode.method import ExplicitRungeKutta
from cnf.ode.solution import solve
from cnf.ode.tableau import TABLEAUS
from cnf.ode.trajectory import Accepted

F64 = torch.float64
KEEPING = {
    "stages": Checkpoint(keep="stages"),
    "sqrt": Checkpoint(keep="sqrt"),
    "in 200 bytes": Checkpoint(memory=200),
    "in plenty": Checkpoint(memory="1GB"),
}
EACH_KEEPING = pytest.mark.parametrize("gradient", KEEPING.values(), ids=KEEPING)


def field(t, y, w):
    """Nonlinear and non-autonomous, a tuple state of two shapes, with rates."""
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
    return sol, grad(loss, tensors)


def assert_equal_gradients(got, wanted, near=1e-12):
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=near, atol=near / 10)


@EACH_KEEPING
@pytest.mark.parametrize("method", TABLEAUS)
def test_what_is_kept_does_not_change_the_gradient(gradient, method):
    t = (0.0, 0.4, 1.0) if method in ("rk4", "bosh3", "dopri5") else (0.5, 0.1, -0.2)
    controls = [FixedStep(0.13)]
    if TABLEAUS[method].adaptive:
        controls.append(Adaptive(1e-3, 1e-4))
    implicit = TABLEAUS[method].implicit
    if implicit and gradient.keep == "stages":
        with pytest.raises(InputError, match=r"needs an explicit"):
            gradients(gradient, method=method, control=controls[0])
        return
    for control in controls:
        plain, wanted = gradients("backprop", t, method=method, control=control)
        sol, got = gradients(gradient, t, method=method, control=control)
        assert torch.equal(sol.y[0], plain.y[0]) and torch.equal(sol.y[1], plain.y[1])
        # adaptive implicit steps are repeated to what Newton's iteration may leave over
        near = 1e-3 if implicit and isinstance(control, Adaptive) else 1e-12
        assert_equal_gradients(got, wanted, near)


@EACH_KEEPING
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "dopri8"])
def test_nor_does_it_with_rejected_steps_events_jumps_and_dense_output(gradient, method):
    tolerance = 1e-10 if method == "dopri8" else 1e-5
    control = Adaptive(tolerance, tolerance, first_step=1.0, jumps=(0.25,), land_on=(0.6,))
    event = Event(lambda t, y: t - 0.7 + 0.1 * (y[0][0, 0] - y[0][0, 0].detach()))
    more = Event(lambda t, y: t - 0.33, terminal=False)
    settings = dict(method=method, control=control, event=[event, more], dense=True)
    plain, wanted = gradients("backprop", **settings)
    assert plain.stats.rejected > 0 and plain.event_time.item() == pytest.approx(0.7)
    _, got = gradients(gradient, **settings)
    assert_equal_gradients(got, wanted)


@pytest.mark.parametrize("gradient", ["checkpoint", *KEEPING.values()], ids=str)
def test_a_jacobian_may_be_pulled_back_in_one_go(gradient):
    y0 = torch.randn(3, 2, dtype=F64)

    def end(y0, gradient=gradient):
        return solve(lambda t, y: torch.sin(y.flip(0)) * t, y0, [0.0, 1.0], gradient=gradient).y[-1]

    wanted = torch.autograd.functional.jacobian(end, y0)
    got = torch.autograd.functional.jacobian(end, y0, vectorize=True)
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-13)
    with pytest.raises(InputError, match="leave out vectorize=True"):
        torch.autograd.functional.jacobian(lambda y: end(y, "adjoint"), y0, vectorize=True)


# how much is kept --------------------------------------------------------------------------------


def kept(gradient, steps):
    """How many numbers a solve saves for backward, and what backward evaluates."""
    y0 = torch.ones(50, dtype=F64, requires_grad=True)
    sizes = []

    def note(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        sol = solve(lambda t, y: torch.sin(y), y0, [0.0, 1.0], method="rk4", step_size=1 / steps,
                    gradient=gradient)  # fmt: skip
    sol.y[-1].sum().backward()
    assert sol.stats.accepted == steps
    return (sum(sizes) - 50) / 50, sol.stats.nfe_backward  # y0 is saved besides


def test_steps_keeps_a_state_for_each_and_evaluates_each_stage_once_more():
    assert kept(Checkpoint(keep="steps"), 40) == (40, 160)
    assert kept(Checkpoint(), 40) == (40, 160)  # the default


def test_stages_keeps_a_state_for_each_stage_and_evaluates_it_once_more():
    assert kept(Checkpoint(keep="stages"), 40) == (160, 160)


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 400])
def test_sqrt_keeps_about_the_root_and_takes_each_step_twice_more_at_most(steps):
    states, evaluations = kept(Checkpoint(keep="sqrt"), steps)
    assert math.sqrt(steps) / 2 <= states <= 2 * math.sqrt(steps) + 1
    assert 4 * steps <= evaluations <= 8 * steps


@pytest.mark.parametrize("most", [2, 3, 7, 40, 41])
def test_memory_is_the_most_that_is_kept(most):
    states, evaluations = kept(Checkpoint(memory=most * 50 * 8), 40)
    assert most / 2 <= states <= most
    assert evaluations <= 320 and (most < 40 or evaluations == 160)


def test_less_memory_than_two_states_keeps_two():
    assert kept(Checkpoint(memory=1), 40)[0] <= 2


@pytest.mark.parametrize("most", [None, 2, 3, 8])
def test_a_record_keeps_every_nth_state_the_first_always(most):
    record = Record(most)
    for i in range(1, 200):
        record.append(Accepted(None, float(i), 0.1, (torch.zeros(1),)))
        places = [k for k, one in enumerate(record) if one.y]
        assert places == list(range(0, i, record.stride))
        assert len(places) <= (2 * record.stride if most is None else most)
    assert [one.t for one in record] == list(range(1, 200))


@pytest.mark.parametrize(
    ("memory", "count"),
    {"1": 1, "256MB": 256e6, " 2 gb": 2e9, "64kB": 64e3, "1.5MiB": 1.5 * 2**20, 4096: 4096}.items(),
)
def test_memory_is_a_number_of_bytes_or_says_its_unit(memory, count):
    assert as_bytes(memory) == count


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["", "much", "3 XB", 0, -1, True, None, [1]], ids=str)
def test_memory_without_a_meaning_is_refused(memory):
    with pytest.raises(InputError, match="number of bytes"):
        as_bytes(memory)


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(InputError, match="stages, steps, sqrt"):
        Checkpoint(keep="some")
    with pytest.raises(InputError, match="not both"):
        Checkpoint(keep="sqrt", memory="1MB")
    with pytest.raises(InputError, match="number of bytes"):
        Checkpoint(memory="lots")


def test_rows_with_their_own_steps_are_kept_whole():
    y0 = torch.ones(2, 2, requires_grad=True)
    for gradient in KEEPING.values():
        with pytest.raises(InputError, match=r"Checkpoint\(\)"):
            solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient,
                  control=Adaptive(per_sample=True))  # fmt: skip


def test_stages_are_those_of_an_explicit_method():
    class Wrapped(ExplicitRungeKutta):
        pass

    class Other:
        name, order, adaptive = "other", 4, False

        def step(self, *args):
            return ExplicitRungeKutta(TABLEAUS["rk4"]).step(*args)

    y0 = torch.ones(2, requires_grad=True)
    with pytest.raises(InputError, match="explicit Runge–Kutta method, and other is none"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], method=Other(), step_size=0.1,
              gradient=Checkpoint(keep="stages"))  # fmt: skip
    sol = solve(lambda t, y: -y, y0, [0.0, 1.0], method=Other(), step_size=0.1)
    assert torch.allclose(grad(sol.y[-1].sum(), y0)[0], torch.tensor(math.exp(-1)))


# a field that knows its own vector-Jacobian product ----------------------------------------------


class Pulled:
    """dy/dt = tanh(y W) s and a rate, with their cotangents by hand; counts how they are asked."""

    def __init__(self, *, covers=True, applies=True):
        self.weight = torch.linspace(-1, 1, 9, dtype=F64).reshape(3, 3).requires_grad_()
        self.covers, self.applies = covers, applies
        self.calls = self.pulls = 0

    def __call__(self, t, y, scale):
        self.calls += 1
        return torch.tanh(y @ self.weight) * scale, (y.square() * (1 + t)).sum(-1)

    def pull(self, t, y, scale, slope_bar, rate_bar):
        if not self.applies:
            return None
        self.pulls += 1
        h = torch.tanh(y @ self.weight)
        inner = slope_bar * scale * (1 - h * h)
        y_bar = inner @ self.weight.T + 2 * (1 + t) * y * rate_bar[:, None]
        known = {self.weight: y.T @ inner} if self.covers else {}
        return y_bar, ((slope_bar * h).sum(0),), known


def gradients_of(field, gradient):
    y0 = torch.linspace(0.1, 1.2, 6, dtype=F64).reshape(2, 3).requires_grad_()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    sol = solve(field, y0, [0.0, 0.3, 1.0], params=[scale * 1.5], quadrature=True,
                gradient=gradient, rtol=1e-5)  # fmt: skip
    loss = sol.y.sin().sum() + sol.integral.sum()
    return torch.autograd.grad(loss, (y0, scale, field.weight)), sol.stats


def test_its_own_formula_stands_for_the_graph():
    field = Pulled()
    found, stats = gradients_of(field, Checkpoint())
    expected, _ = gradients_of(Pulled(), "backprop")
    assert all(map(torch.allclose, found, expected))
    assert field.pulls == stats.nfe_backward and field.calls == stats.nfe


@pytest.mark.parametrize("how", [dict(covers=False), dict(applies=False)])
def test_a_formula_that_leaves_something_out_is_not_used(how):
    field = Pulled(**how)
    found, stats = gradients_of(field, Checkpoint())
    expected, _ = gradients_of(Pulled(), "backprop")
    assert all(map(torch.allclose, found, expected))
    assert field.calls == stats.nfe + stats.nfe_backward


def test_second_derivatives_leave_the_formula_alone():
    field = Pulled()
    y0 = torch.ones(2, 3, dtype=F64, requires_grad=True)
    sol = solve(field, y0, [0.0, 1.0], params=[torch.ones(3, dtype=F64)], quadrature=True)
    (first,) = torch.autograd.grad(sol.y[-1].sum(), y0, create_graph=True)
    torch.autograd.grad(first.sum(), y0)
    assert field.pulls == 0
