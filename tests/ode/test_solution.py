"""The front door: answers within the tolerance, sentences for what cannot be solved."""

from __future__ import annotations

import functools
import math
import time

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import nn

import cnf
from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.solution import GRADIENTS, solve
from cnf.ode.tableau import TABLEAUS, Tableau

F64 = torch.float64
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
STEPS = {
    "fixed": dict(method="rk4", step_size=0.05),
    "adaptive": dict(method="dopri5", rtol=1e-8, atol=1e-10),
    "implicit": dict(method="kvaerno5", rtol=1e-7, atol=1e-9),
}
EACH_STEPS = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
EACH_GRADIENT = pytest.mark.parametrize("gradient", GRADIENTS)


def fitting(gradient, steps):
    """The gradient, but where the method does not go back: then it reads the solution off."""
    goes_back = steps["method"] != "kvaerno5" or gradient not in ("adjoint", "reversible")
    return gradient if goes_back else Adjoint(interpolate=True)


def decay(t, y):
    return -y


# accuracy ------------------------------------------------------------------------------------


def lotka_volterra(t, y):
    prey, fox = y.unbind(-1)
    return torch.stack([1.5 * prey - prey * fox, prey * fox - 3.0 * fox], -1)


def brusselator(t, y):
    a, b = y.unbind(-1)
    return torch.stack([1 + a * a * b - 4 * a, 3 * a - a * a * b], -1)


def driven_linear(t, y):
    wave = torch.stack([torch.cos(3 * t), -t * torch.sin(t)])
    return y.flip(-1) * torch.tensor([1.0, -2.0], dtype=y.dtype) - 0.1 * t * y + wave


def pendulum(t, y):
    angle, speed = y.unbind(-1)
    return torch.stack([speed, -torch.sin(angle)], -1)


PROBLEMS = {
    "lotka-volterra": (lotka_volterra, (1.0, 1.0), (0.0, 5.0)),
    "brusselator": (brusselator, (1.5, 3.0), (0.0, 6.0)),
    "driven linear": (driven_linear, (1.0, 0.0), (-1.0, 4.0)),
    "pendulum": (pendulum, (1.5, 0.0), (0.0, 8.0)),
}


@pytest.fixture(scope="module", params=[(p, d) for p in PROBLEMS for d in "+-"], ids=" ".join)
def problem(request):
    """(field, start, times, states there), the states by SciPy; "-" runs the same ways backward."""
    name, direction = request.param
    ahead, start, (t0, t1) = PROBLEMS[name]
    sign = 1 if direction == "+" else -1
    times = sign * np.linspace(t0, t1, 4)

    def field(t, y):
        return sign * ahead(sign * t, y)

    def right(t, y):
        return field(torch.tensor(t), torch.tensor(y)).numpy()

    exact = solve_ivp(right, times[[0, -1]], start, "DOP853", times, rtol=1e-12, atol=1e-12)
    return field, torch.tensor(start, dtype=F64), torch.tensor(times), torch.tensor(exact.y.T)


TOLERANCES = {  # low orders are slow where high ones are at home
    "adaptive_heun": (1e-3, 1e-4, 1e-5),
    "fehlberg2": (1e-4, 1e-5, 1e-7),
    "bosh3": (1e-4, 1e-7, 1e-8),
    "kvaerno3": (1e-4,),
    "kvaerno5": (1e-4, 1e-7),
    "dopri8": (1e-4, 1e-7, 1e-9, 1e-11),
}


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(method, tol) for method in ADAPTIVE for tol in TOLERANCES.get(method, (1e-4, 1e-7, 1e-9))],
)
def test_the_solution_meets_its_tolerance(method, tolerance, problem):
    field, start, times, exact = problem
    sol = solve(field, start, times, method=method, rtol=tolerance, atol=tolerance)
    # fehlberg2 estimates 1/512 of Euler's error, which its second-order solution soon exceeds;
    # kvaerno5's embedded error is small beside its own too, where the problem is not stiff
    margin = {"fehlberg2": 600, "kvaerno5": 100}.get(method, 30)
    allowed = margin * tolerance * (1 + exact.abs().amax(0))
    assert ((sol.y - exact).abs() <= allowed).all()


def test_other_output_times_leave_the_result_within_the_tolerance(problem):
    field, start, times, exact = problem
    settings = dict(rtol=1e-7, atol=1e-7)
    for t in (times[[0, -1]], torch.linspace(times[0], times[-1], 101, dtype=F64)):
        end = solve(field, start, t, **settings).y[-1]
        assert torch.allclose(end, exact[-1], rtol=3e-6, atol=3e-6)


def test_there_and_back_is_where_one_started():
    y0 = torch.randn(5, 2, dtype=F64)
    there = solve(pendulum, y0, [0.0, 3.0], rtol=1e-10, atol=1e-10).y[-1]
    back = solve(pendulum, there, [3.0, 0.0], rtol=1e-10, atol=1e-10).y[-1]
    assert torch.allclose(back, y0, atol=1e-7)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_single_precision_meets_a_loose_tolerance(tolerance):
    y0 = torch.tensor([1.5, 0.0])
    sol = solve(pendulum, y0, [0.0, 8.0], rtol=tolerance, atol=tolerance)
    exact = solve(pendulum, y0.double(), [0.0, 8.0], rtol=1e-11, atol=1e-11)
    assert sol.y.dtype == torch.float32
    assert torch.allclose(sol.y.double(), exact.y, atol=100 * tolerance)


@pytest.mark.parametrize("method", TABLEAUS)
def test_a_time_only_field_is_integrated_as_a_quadrature(method):
    order = TABLEAUS[method].order
    sol = solve(
        lambda t, y: torch.cos(5 * t) + 0 * y,
        torch.zeros(1, dtype=F64),
        [0.0, 0.5],
        method=method,
        step_size=1e-3 if order < 3 else 5e-3,
    )
    wanted = quad(lambda t: math.cos(5 * t), 0, 0.5)[0]
    assert sol.y[-1].item() == pytest.approx(wanted, abs=5e-3 if order == 1 else 2e-6)


# what comes back -----------------------------------------------------------------------------


@EACH_STEPS
@pytest.mark.parametrize(
    "y0",
    [
        torch.tensor(1.0),
        torch.ones(3),
        torch.ones(2, 3, 4),
        torch.empty(0, 2),
        torch.ones(2, 0),
        torch.ones(4, 3, dtype=F64).T,
        torch.ones(1, 2).expand(3, 2),
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=lambda y: f"{tuple(y.shape)}-{y.dtype}",
)
def test_the_states_are_stacked_along_the_times(steps, y0):
    copy = y0.clone()
    sol = solve(decay, y0, [0.0, 0.5, 1.0], **steps)
    assert sol.y.shape == (3, *y0.shape) and sol.y.dtype == y0.dtype
    assert torch.equal(sol.y[0], copy) and torch.equal(y0, copy)
    assert torch.allclose(sol.y[-1], copy * math.exp(-1), rtol=1e-5)
    assert sol.y.data_ptr() != y0.data_ptr() or y0.numel() == 0
    assert sol.t.tolist() == [0.0, 0.5, 1.0] and sol.integral is None


@EACH_STEPS
def test_a_structured_state_comes_back_in_its_structure(steps):
    y0 = {"x": torch.ones(3, 2), "v": (torch.tensor(2.0), [torch.ones(1, dtype=F64)])}

    def field(t, state):
        assert isinstance(state["v"], tuple)
        x, (v, (w,)) = state["x"], state["v"]
        return {"v": (-v, (-w,)), "x": x * 0 + v}  # keys in another order

    sol = solve(field, y0, [0.0, 1.0], **steps)
    assert list(sol.y) == ["x", "v"]
    assert sol.y["x"].shape == (2, 3, 2) and sol.y["v"][0].shape == (2,)
    assert sol.y["v"][1][0].dtype == F64
    assert torch.allclose(sol.y["x"][-1], torch.tensor(1 + 2 * (1 - math.exp(-1))))


@EACH_STEPS
def test_a_tuple_state_is_solved_as_its_parts_are(steps):
    parts = torch.randn(2, 3, dtype=F64), torch.randn(4, dtype=F64)
    whole = solve(lambda t, y: (torch.sin(y[0]), -t * y[1]), parts, [0.0, 2.0], **steps)
    first = solve(lambda t, y: torch.sin(y), parts[0], [0.0, 2.0], **steps)
    assert torch.allclose(whole.y[0][-1], first.y[-1], atol=1e-7)
    exact = parts[1] * math.exp(-2.0)
    assert torch.allclose(whole.y[1][-1], exact, atol=1e-5)


def test_a_complex_state_turns():
    y0 = torch.tensor([1.0, 1j], dtype=torch.complex128)
    sol = solve(lambda t, y: 1j * y, y0, [0.0, math.pi], rtol=1e-9, atol=1e-9)
    assert torch.allclose(sol.y[-1], -y0, atol=1e-7)
    assert sol.t.dtype == F64


TIMES = {
    "list": [0, 0.25, 1],
    "tuple": (0.0, 0.25, 1.0),
    "array": np.array([0.0, 0.25, 1.0]),
    "tensor": torch.tensor([0.0, 0.25, 1.0]),
    "double tensor": torch.tensor([0.0, 0.25, 1.0], dtype=F64),
    "list of tensors": [torch.tensor(0.0), torch.tensor(0.25), torch.tensor(1.0)],
}


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
def test_times_may_be_given_in_any_form(t):
    sol = solve(decay, torch.ones(2, dtype=F64), t, rtol=1e-9, atol=1e-9)
    assert isinstance(sol.t, torch.Tensor) and sol.t.tolist() == [0.0, 0.25, 1.0]
    assert torch.allclose(sol.y[:, 0], torch.exp(-sol.t.double()), atol=1e-8)


def test_whole_numbers_may_be_times():
    sol = solve(decay, torch.ones(1), torch.tensor([2, 1, 0]), rtol=1e-6)
    assert sol.y[-1].item() == pytest.approx(math.exp(2), rel=1e-4)


def test_the_field_sees_the_time_in_the_states_precision():
    for y0, dtype in ((torch.ones(1), torch.float32), (torch.ones(1) * 1j, torch.float32)):
        seen = []
        solve(lambda t, y: seen.append(t) or -y, y0, torch.tensor([0.0, 1.0], dtype=F64))  # noqa: B023
        assert {t.dtype for t in seen} == {dtype} and {t.shape for t in seen} == {()}


# the field -----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.layer(y)) * torch.cos(t)

    def method(self, t, y):
        return self(t, y)


def test_every_kind_of_callable_is_a_field():
    net, y0 = Net(), torch.randn(3, 2, dtype=F64)
    fields = [
        net,
        net.method,
        lambda t, y: net(t, y),
        functools.partial(lambda scale, t, y: scale * net(t, y), 1.0),
        torch.no_grad()(net),
    ]
    ends = [solve(field, y0, [0.0, 1.0]).y[-1] for field in fields]
    assert all(torch.equal(end, ends[0]) for end in ends)


@EACH_STEPS
@EACH_GRADIENT
def test_what_the_field_returns_is_never_written_to(steps, gradient):
    y0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    kept = torch.randn(1, 2, dtype=F64)
    copies = y0.detach().clone(), kept.clone()
    fields = [
        lambda t, y: y,
        lambda t, y: y.view(3, 2),
        lambda t, y: kept.expand(3, 2),
        lambda t, y: y.flip(0).flip(0)[:],
        lambda t, y: kept.broadcast_to(y.shape) if t > 0.5 else y,
    ]
    for field in fields:
        both = functools.partial(lambda field, t, y: (field(t, y), field(t, y)[:, 0]), field)
        # coupled by little: else y is pulled towards z as well, by as much as the steps' own error
        how = fitting(gradient, steps)
        how = cnf.Reversible(0.999) if how == "reversible" else how
        sol = solve(both, y0, [0.0, 1.0], gradient=how, quadrature=True, **steps)
        (sol.y[-1].sum() + sol.integral[-1].sum()).backward()
        assert torch.equal(y0, copies[0]) and torch.equal(kept, copies[1])
        moved = sol.y[-1] - sol.y[0]
        assert torch.allclose(moved[:, 0], sol.integral[-1], atol=1e-8)
    grown = solve(fields[0], y0, [0.0, 1.0], **steps).y[-1]
    assert torch.allclose(grown, y0 * math.e, rtol=1e-5)


@EACH_STEPS
@EACH_GRADIENT
@pytest.mark.parametrize("timed", [False, True])
def test_the_count_of_evaluations_is_the_number_of_calls(steps, gradient, timed):
    calls = []

    def field(t, y):
        calls.append(t)
        return torch.sin(t) * y

    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64, requires_grad=timed)
    sol = solve(field, y0, t, gradient=fitting(gradient, steps), **steps)
    stats = sol.stats
    assert stats.nfe + stats.jacobians == len(calls) and stats.nfe_backward == 0
    forward = stats.nfe
    sol.y.sum().backward()
    assert stats.nfe == forward
    assert stats.nfe + stats.nfe_backward + stats.jacobians == len(calls)
    assert (stats.jacobians > 0) == (steps["method"] == "kvaerno5")


def test_nothing_is_built_where_no_gradient_is_wanted():
    net, y0 = Net(), torch.randn(3, 2, dtype=F64, requires_grad=True)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            sol = solve(lambda t, y: (net(t, y), y[:, 0]), y0, [0.0, 1.0], quadrature=True)
        assert not sol.y.requires_grad and not sol.integral.requires_grad
    net.requires_grad_(False)
    sol = solve(net, y0.detach(), [0.0, 1.0])
    assert not sol.y.requires_grad


def test_leaves_made_inside_the_field_ask_for_no_gradient():
    def by_energy(t, y):
        with torch.enable_grad():
            y, t = y.requires_grad_(), t.requires_grad_()
            energy = (y**2).sum() * torch.cos(t)
            return torch.autograd.grad(energy, y, create_graph=True)[0]

    y0 = torch.ones(2)
    assert not solve(by_energy, y0, [0.0, 1.0]).y.requires_grad
    assert not y0.requires_grad


def test_inference_tensors_may_be_solved():
    with torch.inference_mode():
        y0 = torch.ones(2)
        assert torch.allclose(solve(decay, y0, [0.0, 1.0]).y[-1], y0 * math.exp(-1), atol=1e-4)


def test_two_solves_in_one_autocast_region_read_the_same_weights():
    net = nn.Linear(2, 2)
    y0 = torch.randn(3, 2)
    for gradient in GRADIENTS:
        with torch.autocast("cpu", torch.bfloat16):
            sums = [
                solve(lambda t, y: net(y).float(), y0, [0.0, 1.0], gradient=gradient).y[-1].sum()
                for _ in range(2)
            ]
        one, two = (torch.autograd.grad(x, net.weight)[0] for x in sums)
        assert torch.equal(one, two) and one.dtype == torch.float32


@pytest.mark.parametrize("steps", [dict(rtol=1e-6, atol=1e-6), dict(step_size=0.05)], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_times_far_from_zero_keep_their_steps_whatever_the_states_precision(steps, per_sample):
    """In single precision the time could not move by less than 8 there."""
    t = torch.tensor([1e8, 1e8 + 0.5, 1e8 + 1], dtype=F64)
    kind = FixedStep if "step_size" in steps else Adaptive
    sol = solve(
        decay, torch.ones(2, 1), t, control=kind(**steps, per_sample=per_sample), dense=True
    )
    assert sol.y[:, 0, 0].tolist() == pytest.approx([1, math.exp(-0.5), math.exp(-1)], abs=1e-5)
    inside = sol(t[:1] + 0.25)[0, 0, 0].item()
    assert inside == pytest.approx(math.exp(-0.25), abs=1e-5)


@EACH_GRADIENT
def test_gradients_reach_the_parts_that_ask_for_them_alone(gradient):
    x, v = torch.ones(2, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64)
    field = lambda t, y: {"x": -y["x"] * y["v"].sum(), "v": y["v"] * t}  # noqa: E731
    sol = solve(field, {"x": x, "v": v}, [0.0, 1.0], gradient=gradient, rtol=1e-9, atol=1e-9)
    (by_x,) = torch.autograd.grad(sol.y["x"][-1].sum(), x)
    rise = quad(lambda t: 3 * math.exp(t * t / 2), 0, 1)[0]
    assert by_x.tolist() == pytest.approx([math.exp(-rise)] * 2, rel=1e-6)
    assert not v.requires_grad


HALF = {
    "fixed": FixedStep(0.1),
    "adaptive": Adaptive(2e-2, 2e-2),
    "fixed of rows": FixedStep(0.1, per_sample=True),
    "adaptive of rows": Adaptive(2e-2, 2e-2, per_sample=True),
}


@pytest.mark.parametrize("gradient", [name for name in GRADIENTS if name != "reversible"])
@pytest.mark.parametrize("control", HALF.values(), ids=HALF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_solved_to_what_it_can_hold(gradient, control, dtype):
    y0 = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    sol = solve(lambda t, y: (-y, y[:, 0]), y0, [0.0, 1.0], control=control, gradient=gradient,
                quadrature=True)  # fmt: skip
    assert sol.y.dtype == dtype and sol.integral.dtype == F64
    (by_y,) = torch.autograd.grad(sol.y[-1].sum(), y0)
    for found in (sol.y[-1], by_y):
        assert found.flatten().tolist() == pytest.approx([math.exp(-1)] * 2, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tolerance_that_half_precision_cannot_meet_is_refused(dtype):
    for y0 in (torch.ones(2, dtype=dtype), (torch.ones(2), torch.ones(2, dtype=dtype))):
        with pytest.raises(InputError, match="cannot be met; solve in float32"):
            solve(lambda t, y: y, y0, [0.0, 1.0])


# quadrature ----------------------------------------------------------------------------------


@EACH_STEPS
@pytest.mark.parametrize("direction", [1, -1])
def test_an_integral_equals_the_quadrature_along_the_exact_solution(steps, direction):
    t = direction * torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    sol = solve(
        lambda t, y: (-y, {"a": y**2, "b": torch.sin(t) * y.sum()}),
        torch.tensor([1.0, 2.0], dtype=F64),
        t,
        quadrature=True,
        **steps,
    )
    for i, end in enumerate(t.tolist()):
        squares = quad(lambda s: math.exp(-2 * s), 0, end)[0]
        waves = quad(lambda s: math.sin(s) * 3 * math.exp(-s), 0, end)[0]
        assert sol.integral["a"][i].tolist() == pytest.approx([squares, 4 * squares], abs=1e-5)
        assert sol.integral["b"][i].item() == pytest.approx(waves, abs=1e-5)


def test_integrals_are_kept_in_double_precision():
    def field(t, y):
        return -y, (y.sum(-1), 1j * y)

    sol = solve(field, torch.ones(3, 2), [0.0, 1.0], quadrature=True)
    assert [x.dtype for x in sol.integral] == [F64, torch.complex128]
    assert [x.shape for x in sol.integral] == [(2, 3), (2, 3, 2)]
    assert sol.y.dtype == torch.float32


def test_rates_change_neither_the_steps_nor_the_states():
    y0 = torch.randn(4, 2, dtype=F64)
    alone = solve(pendulum, y0, [0.0, 5.0])
    rough = solve(
        lambda t, y: (pendulum(t, y), 1e6 * torch.sin(100 * t) * y), y0, [0.0, 5.0], quadrature=True
    )
    assert torch.equal(alone.y, rough.y) and alone.stats == rough.stats
    control = Adaptive(quadrature_atol=1e-5)
    steered = solve(
        lambda t, y: (pendulum(t, y), torch.sin(100 * t) * y[:, 0]),
        y0,
        [0.0, 1.0],
        quadrature=True,
        control=control,
    )
    assert steered.stats.accepted > 3 * alone.stats.accepted


# what is refused -----------------------------------------------------------------------------

Y = torch.ones(3, 2)
REFUSED = {
    "whole numbers as a state": (dict(y0=torch.ones(2, dtype=torch.long)), "y0.float()"),
    "no tensor as a state": (dict(y0=1.0), "must be a tensor"),
    "an array as a state": (dict(y0=np.ones(2)), "must be a tensor"),
    "an empty tuple as a state": (dict(y0=()), "must be a tensor"),
    "one time": (dict(t=[0.0]), "at least one end"),
    "no time": (dict(t=[]), "at least one end"),
    "a number for times": (dict(t=1.0), "sequence of times"),
    "None for times": (dict(t=None), "sequence of times"),
    "times in two dimensions": (dict(t=torch.zeros(2, 2)), "gives every row its own times"),
    "a time without dimension": (dict(t=torch.tensor(1.0)), "one dimension"),
    "times that repeat": (dict(t=[0.0, 1.0, 1.0]), r"t\[1\]=1 is followed by t\[2\]=1"),
    "times that turn": (dict(t=torch.tensor([0.0, 1.0, 0.5])), "strictly increasing"),
    "times that stand still": (dict(t=[1.0, 1.0]), "strictly"),
    "a time that is no number": (dict(t=[0.0, math.nan]), "finite"),
    "an infinite time": (dict(t=torch.tensor([0.0, math.inf])), "finite"),
    "complex times": (dict(t=torch.tensor([0j, 1j])), "real"),
    "times with gradients in a list": (
        dict(t=[0.0, torch.tensor(1.0, requires_grad=True)]),
        "torch.stack",
    ),
    "an unknown method": (dict(method="dorpi5"), ", ".join(TABLEAUS)),
    "a class for a method": (dict(method=3), "got int"),
    "an unknown gradient": (dict(gradient="ajoint"), "backprop, checkpoint, adjoint"),
    "a gradient that is none": (dict(gradient=3), "gradient"),
    "a control and a tolerance": (dict(control=Adaptive(), rtol=1e-3), "not both"),
    "a control and a step size": (dict(control=FixedStep(1.0), step_size=1.0), "not both"),
    "a step size and a tolerance": (dict(step_size=0.1, atol=1e-3), "not both"),
    "no step size for rk4": (dict(method="rk4"), "step_size="),
    "adaptive euler": (dict(method="euler", control=Adaptive()), "step_size="),
    "a control that is none": (dict(control=0.1), "FixedStep or Adaptive"),
    "a negative step size": (dict(step_size=-0.1), "step_size"),
    "a negative tolerance": (dict(rtol=-1.0), "rtol"),
    "no tolerance at all": (dict(rtol=0.0, atol=0.0), "both 0"),
    "no steps": (dict(max_steps=0), "max_steps"),
    "fewer steps than fixed ones need": (dict(step_size=0.1, max_steps=9), "needs 10 steps"),
    "a wrong shape": (dict(field=lambda t, y: y.sum(-1)), r"shape \(3,\) at t=0, expected"),
    "a wrong precision": (dict(field=lambda t, y: y.double()), "float64.*float32"),
    "a wrong device": (dict(field=lambda t, y: y.to("meta")), "on meta .* but y is .* on cpu"),
    "parts on two devices": (dict(y0=(Y, Y.to("meta"))), "on cpu and meta; move one"),
    "a number for a state of rows": (
        dict(y0=torch.tensor(1.0), control=Adaptive(per_sample=True)),
        "first dimension of rows",
    ),
    "a tuple for a tensor": (dict(field=lambda t, y: (y, y)), "hold a tensor"),
    "a number for a tensor": (dict(field=lambda t, y: 0.0), "hold a tensor"),
    "nothing for a tensor": (dict(field=lambda t, y: None), "NoneType"),
    "a tensor for a tuple": (dict(y0=(Y, Y), field=lambda t, y: y[0]), "2 parts"),
    "a wrong part": (dict(y0=(Y, Y), field=lambda t, y: (y[0], y[1][:1])), "part 1"),
    "a wrong key": (dict(y0={"x": Y}, field=lambda t, y: {"v": Y}), "keys"),
    "no rates": (dict(quadrature=True), "dy/dt, rates"),
    "rates that are no tensor": (
        dict(quadrature=True, field=lambda t, y: (y, 1.0)),
        "rates must be a tensor",
    ),
    "one tensor for rows": (dict(rows=Y), "list of tensors"),
    "one tensor for params": (dict(params=Y), "list of tensors"),
}


@pytest.mark.parametrize(("given", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_solved_is_refused_with_a_sentence(given, says):
    with pytest.raises(InputError, match=says) as caught:
        solve(**{"field": decay, "y0": Y, "t": [0.0, 1.0], **given})
    assert isinstance(caught.value, ValueError)


class Worsening:
    """Fields whose solution cannot be continued."""

    nan = staticmethod(lambda t, y: y * math.nan)
    explosion = staticmethod(lambda t, y: y * y)
    late_nan = staticmethod(lambda t, y: y * torch.where(t > 0.75, math.nan, 1.0))


@EACH_STEPS
@EACH_GRADIENT
@pytest.mark.parametrize("name", ["nan", "explosion", "late_nan"])
def test_a_solution_that_cannot_be_continued_says_where(steps, gradient, name):
    y0 = torch.ones(2, 2, requires_grad=True)
    began = time.monotonic()
    with pytest.raises(IntegrationError, match="try") as caught:
        solve(
            getattr(Worsening, name),
            y0,
            [0.0, 0.5, 4.0],
            gradient=fitting(gradient, steps),
            **steps,
        )
    error = caught.value
    assert isinstance(error, RuntimeError) and time.monotonic() - began < 5
    assert error.t < 4.0 and error.step > 0 and error.nfe > 0
    reached = 1 if name == "nan" else 2
    assert error.partial.shape == (reached, 2, 2) and not error.partial.requires_grad
    assert torch.equal(error.partial[0], y0)


def test_what_was_reached_has_the_states_structure():
    y0 = {"x": torch.ones(2), "v": (torch.ones(1),)}
    with pytest.raises(IntegrationError) as caught:
        solve(lambda t, y: {"x": y["x"] ** 2, "v": y["v"]}, y0, [0.0, 0.5, 4.0])
    assert caught.value.partial["x"].shape == (2, 2)
    assert caught.value.partial["v"][0].shape == (2, 1)


NEAR_THE_EDGE = {
    "shared": Adaptive(1e-6, 1e-8),
    "with a bold first step": Adaptive(1e-6, 1e-8, first_step=5.0),
    "of rows": Adaptive(1e-6, 1e-8, per_sample=True),
    "bold rows": Adaptive(1e-6, 1e-8, first_step=5.0, per_sample=True),
}


@pytest.mark.parametrize("control", NEAR_THE_EDGE.values(), ids=NEAR_THE_EDGE)
def test_a_step_into_where_the_field_is_no_number_is_tried_shorter(control):
    """dy/dt = −√y: y = (√y0 − t/2)², and beyond 0 there is nothing."""
    y0 = torch.tensor([[1.0], [4.0]], dtype=F64)
    inside = solve(lambda t, y: -torch.sqrt(y), y0, [0.0, 1.9], control=control)
    assert inside.y[-1].flatten().tolist() == pytest.approx([0.05**2, 1.05**2], abs=1e-5)
    assert torch.as_tensor(inside.stats.rejected).sum() > 0
    with pytest.raises(
        IntegrationError, match=r"vanished before a non-finite value \(rows 0\)"
    ) as c:
        solve(lambda t, y: -torch.sqrt(y), y0, [0.0, 1.0, 2.5], control=control)
    assert c.value.t == pytest.approx(2.0, abs=1e-4)


def test_too_few_steps_are_reported():
    with pytest.raises(IntegrationError, match="max_steps=5"):
        solve(decay, Y, [0.0, 10.0], rtol=1e-9, atol=1e-9, max_steps=5)
    assert solve(decay, Y, [0.0, 1.0], step_size=0.1, max_steps=10).stats.accepted == 10


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("settings", [{}, dict(method="rk4", step_size=0.1)])
def test_a_field_that_writes_where_the_solve_reads_is_refused(settings, graph):
    kept = torch.empty(3)

    def reuses(t, y):
        return torch.neg(y, out=kept)

    with torch.set_grad_enabled(graph):
        with pytest.raises(InputError, match=r"changes y in place.*-y for y.neg_"):
            solve(lambda t, y: y.neg_(), torch.ones(3), [0.0, 1.0], **settings)
        with pytest.raises(InputError, match="writes to the tensor that it returned before"):
            solve(reuses, torch.ones(3), [0.0, 1.0], **settings)


def test_a_field_may_return_what_it_has():
    slope = torch.full((3,), 2.0)
    assert torch.allclose(solve(lambda t, y: slope, torch.zeros(3), [0.0, 1.0]).y[-1], slope)
    grown = solve(lambda t, y: y, torch.ones(3), [0.0, 1.0]).y[-1]
    assert torch.allclose(grown, torch.full((3,), math.e), rtol=1e-4)
    with torch.inference_mode():  # whose tensors count no changes
        solve(lambda t, y: y, torch.ones(3), [0.0, 1.0])


# the public face -----------------------------------------------------------------------------


def test_a_users_own_tableau_is_a_method():
    ralston = Tableau("ralston2", 2, c=(0, 2 / 3), a=((), (2 / 3,)), b=(1 / 4, 3 / 4))
    sol = solve(decay, torch.ones(1, dtype=F64), [0.0, 1.0], method=ralston, step_size=0.01)
    assert sol.y[-1].item() == pytest.approx(math.exp(-1), abs=1e-5)


def test_a_control_says_what_its_shorthands_say():
    y0 = torch.randn(3, 2)
    for control, short in (
        (FixedStep(0.1), dict(step_size=0.1)),
        (Adaptive(1e-4, 1e-7), dict(rtol=1e-4, atol=1e-7)),
        (Adaptive(), {}),
    ):
        assert torch.equal(
            solve(pendulum, y0, [0.0, 1.0], control=control).y,
            solve(pendulum, y0, [0.0, 1.0], **short).y,
        )


def test_the_public_names_are_the_cores():
    assert cnf.solve is solve
    for name in ("Adaptive", "FixedStep", "Tableau", "Backprop", "Checkpoint", "Adjoint"):
        assert getattr(cnf, name).__name__ == name
    assert issubclass(cnf.IntegrationError, RuntimeError)


def test_a_second_derivative_leaves_the_autocast_cache_as_it_was():
    net = torch.nn.Linear(2, 2)
    y0 = torch.ones(3, 2, requires_grad=True)
    assert torch.is_autocast_cache_enabled()
    y = solve(lambda t, y: torch.tanh(net(y)), y0, [0.0, 1.0], gradient="adjoint").y[-1]
    (first,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
    torch.autograd.grad(first.sum(), y0)
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint", "reversible"])
def test_a_field_that_draws_random_numbers_is_warned_of(gradient):
    def field(t, y):
        return w * nn.functional.dropout(torch.ones_like(y), 0.5)

    def solved(gradient):
        return solve(field, torch.zeros(4), [0.0, 1.0], method="euler", step_size=0.25,
                     gradient=gradient).y[-1].sum()  # fmt: skip

    w = torch.ones((), requires_grad=True)
    with pytest.warns(UserWarning, match="the field draws random numbers"):
        solved(gradient)
    end = solved("backprop")
    (found,) = torch.autograd.grad(end, w)
    assert found == end
    with torch.no_grad():
        solved(gradient)
