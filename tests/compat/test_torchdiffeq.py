"""torchdiffeq's interface: what it returns, how often it asks, and what it refuses."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import cnf
import cnf.compat.torchdiffeq as torchdiffeq
from cnf.compat.torchdiffeq import odeint, odeint_adjoint

ADAPTIVE = {"dopri8": 8, "dopri5": 5, "tsit5": 5, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
EVERY_METHOD = pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED, *ADAMS, "scipy_solver"])
EVERY_ADAPTIVE = pytest.mark.parametrize("method", ADAPTIVE)
EVERY_GRID = pytest.mark.parametrize("method", [*FIXED, *ADAMS])
BOTH_WAYS = pytest.mark.parametrize("end", [2.0, -2.0])

FINE = {
    **{name: {"step_size": 0.01} for name in (*FIXED, *ADAMS)},
    "euler": {"step_size": 1e-3},
    "explicit_adams": {"step_size": 0.01, "max_order": 5},  # of order 12 it is hardly stable
}


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


def decay(t, y):
    return -y


# what comes back ------------------------------------------------------------------------------


def test_it_is_within_reach_of_the_package():
    assert cnf.compat.torchdiffeq is torchdiffeq
    assert torchdiffeq.__all__ == ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
    with pytest.raises(AttributeError, match=r"cnf\.compat.*torchdifeq"):
        cnf.compat.torchdifeq  # noqa: B018


def test_scipy_is_not_loaded_before_it_is_asked_for():
    code = "import sys, cnf.compat.torchdiffeq; print('scipy.integrate' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@EVERY_METHOD
@BOTH_WAYS
def test_the_solution_is_right_at_every_requested_time(method, end, pendulum, start):
    t = torch.linspace(0.0, end, 9, dtype=torch.float64)
    accuracy = {"rtol": 1e-5, "atol": 1e-5} if method == "adaptive_heun" else {"rtol": 1e-6}
    y = odeint(pendulum, start, t, method=method, options=FINE.get(method), **accuracy)
    limit = {"euler": 3e-3, "midpoint": 1e-4, "heun2": 1e-4, "fehlberg2": 1e-3}.get(method, 3e-5)
    assert y.shape == (9, 2) and torch.equal(y[0], start)
    assert (y - pendulum.exact(t)).abs().max() < limit


@EVERY_ADAPTIVE
def test_a_tighter_tolerance_is_a_smaller_error_at_the_times_between_too(method, pendulum, start):
    t = torch.linspace(0, 3, 50, dtype=torch.float64)
    exact = pendulum.exact(t)
    errors = []
    for tolerance in (1e-3, 1e-5):
        y = odeint(pendulum, start, t, method=method, rtol=tolerance, atol=tolerance)
        errors.append((y - exact).abs().max().item())
    assert errors[1] < errors[0] / 5
    assert errors[1] < (2e-2 if method == "fehlberg2" else 1e-3)


@EVERY_ADAPTIVE
def test_requested_times_cost_no_evaluation(method, pendulum, start):
    counts = []
    for number in (2, 400):
        pendulum.nfe = 0
        t = torch.linspace(0, 5, number, dtype=torch.float64)
        odeint(pendulum, start, t, method=method, rtol=1e-3, atol=1e-3)
        counts.append(pendulum.nfe)
    # the field at the very end, where the method does not come by it anyway
    assert counts[1] - counts[0] <= (0 if method in ("dopri5", "tsit5", "bosh3") else 1)


def test_times_next_to_each_other_are_all_there():
    for end in torch.linspace(0.1, 3, 60, dtype=torch.float64):
        for sign in (1, -1):
            t = sign * torch.stack([0 * end, torch.nextafter(end, 0 * end), end])
            assert odeint(decay, torch.ones(1), t, rtol=1e-3, atol=1e-3).shape == (3, 1)


def test_a_step_of_dopri5_costs_six_evaluations(pendulum, start):
    attempts = []
    pendulum.callback_step = lambda t0, y0, dt: attempts.append(float(t0))
    odeint(pendulum, start, times(0, 5))
    assert pendulum.nfe == 2 + 6 * len(attempts)


def test_between_its_long_steps_dopri8_is_as_good_as_its_tolerance(pendulum, start):
    t = torch.linspace(0, 8, 300, dtype=torch.float64)
    y = odeint(pendulum, start, t, method="dopri8", rtol=1e-8, atol=1e-8)
    assert (y - pendulum.exact(t)).abs().max() < 1e-6


@EVERY_METHOD
def test_one_time_is_the_start(method, start):
    y = odeint(decay, start, times(0.5), method=method)
    assert torch.equal(y, start[None])


@EVERY_METHOD
def test_tuples_of_any_shapes_come_back_as_tuples(method):
    y0 = (torch.ones(2, 3), torch.tensor(2.0), torch.ones(1))

    def func(t, y):
        a, b, c = y
        return [-a * b, -b, (t * c).reshape(1, 1)]  # a list, and a part of another shape

    ys = odeint(func, y0, torch.tensor([0.0, 1.0, 2.0]), method=method, rtol=1e-6, atol=1e-6)
    assert isinstance(ys, tuple)
    assert [part.shape for part in ys] == [(3, 2, 3), (3,), (3, 1)]
    assert all(torch.equal(part[0], at) for part, at in zip(ys, y0, strict=True))
    if method in ADAPTIVE or method == "scipy_solver":
        assert ys[1][-1].item() == pytest.approx(2 * math.exp(-2), rel=1e-2)
        assert ys[2][-1].item() == pytest.approx(math.exp(2), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "implicit_adams"])
def test_a_state_keeps_its_dtype_and_the_field_gets_the_time_in_its_precision(dtype, method):
    seen = set()

    def func(t, y):
        seen.add((t.dtype, t.shape, y.dtype))
        return (1j if dtype.is_complex else -1.0) * y

    y0 = torch.tensor([[1.0, 2.0]], dtype=dtype)
    loose = {"rtol": 1e-4, "atol": 1e-4, "options": FINE.get(method)}
    y = odeint(func, y0, times(0, 1), method=method, **loose)
    factor = complex(math.cos(1), math.sin(1)) if dtype.is_complex else math.exp(-1)
    assert y.dtype == dtype and seen == {(y0.real.dtype, (), dtype)}
    torch.testing.assert_close(y[-1], y0 * factor, rtol=1e-3, atol=1e-3)


def test_parts_of_mixed_precision_take_the_wider_one():
    y0 = (torch.ones(2), torch.ones(1, dtype=torch.float64))
    single, double = odeint(lambda t, y: (-y[0], y[1]), y0, times(0, 1))
    assert single.dtype == double.dtype == torch.float64


def test_states_without_dimensions_or_entries_are_solved():
    assert odeint(decay, torch.tensor(1.0), times(0, 1)).shape == (2,)
    assert odeint(decay, torch.ones(0, 3), times(0, 1)).shape == (2, 0, 3)
    for method in FIXED:
        assert odeint(decay, torch.tensor(1.0), times(0, 1), method=method).dtype == torch.float32


def test_a_slope_of_another_dtype_or_of_fewer_dimensions_is_taken_as_it_is_meant():
    y = odeint(lambda t, y: torch.ones((), dtype=torch.float64), torch.zeros(2, 3), times(0, 2))
    torch.testing.assert_close(y[-1], torch.full((2, 3), 2.0))


def test_lambdas_methods_partials_and_modules_are_fields():
    class Holder:
        rate = 2.0

        def slope(self, t, y):
            return -self.rate * y

    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, -2.0)

    class Net(nn.Module):
        def forward(self, t, y):
            return net(y)

    def scaled(t, y, rate):
        return rate * y

    for func in (lambda t, y: -2 * y, Holder().slope, partial(scaled, rate=-2.0), Net()):
        y = odeint(func, torch.ones(3, 1), torch.tensor([0.0, 1.0]))
        torch.testing.assert_close(y[-1], torch.full((3, 1), math.exp(-2.0)))


def test_solutions_can_be_changed_in_place():
    y0 = (torch.ones(2, requires_grad=True), torch.ones(1))
    first, _ = odeint(lambda t, y: (-y[0], y[1]), y0, times(0, 1))
    first[-1].mul_(2.0)
    first.sum().backward()
    torch.testing.assert_close(y0[0].grad, torch.full((2,), 1 + 2 * math.exp(-1)))


def test_the_sampler_of_a_flow_is_stepped_as_it_asks():
    visited = []

    def velocity(t, x):
        visited.append(round(t.item(), 6))
        return x * t

    grid = torch.linspace(0, 1, 3)
    with torch.no_grad():
        x = odeint(velocity, torch.ones(4, 2), grid, method="euler", options={"step_size": 0.25})
    assert visited == [0.0, 0.25, 0.5, 0.75] and x.shape == (3, 4, 2)
    expected = 1.0
    for t in (0.0, 0.25, 0.5, 0.75):
        expected *= 1 + 0.25 * t
    torch.testing.assert_close(x[-1], torch.full((4, 2), expected))


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_a_density_and_its_regularizers_travel_in_a_tuple(interface):
    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, t, states):
            z = states[0]
            with torch.set_grad_enabled(True):
                z.requires_grad_(True)
                dz = torch.tanh(self.net(z)) * (1 + t)
                rows = [
                    torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i]
                    for i in range(2)
                ]
            return dz, -sum(rows).unsqueeze(1), dz.pow(2).mean(1, keepdim=True)

    func = Augmented().double()
    x = torch.randn(5, 2, dtype=torch.float64)
    zeros = torch.zeros(5, 1, dtype=torch.float64)
    z, logp, energy = interface(func, (x, zeros, zeros), times(1, 0), rtol=1e-7, atol=1e-9)
    assert [part.shape for part in (z, logp, energy)] == [(2, 5, 2), (2, 5, 1), (2, 5, 1)]
    (0.5 * z[-1].pow(2).sum() + logp[-1].sum() + energy[-1].sum()).backward()

    def flow(x):
        return odeint(lambda t, y: torch.tanh(func.net(y)) * (1 + t), x, times(1, 0), rtol=1e-9)[-1]

    jacobian = torch.autograd.functional.jacobian(flow, x[:1])[0, :, 0]
    torch.testing.assert_close(logp[-1, 0, 0], -torch.logdet(jacobian), rtol=0, atol=1e-6)
    assert func.net.weight.grad.abs().max() > 0


def test_the_page_for_those_who_come_from_torchdiffeq_runs():
    page = Path(__file__).parents[2] / "docs" / "torchdiffeq.md"
    if not page.exists():
        pytest.skip("the documentation is not part of the package")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["level"].grad.item() == pytest.approx(-2.0, abs=1e-4)
    assert names["func"].A.grad.abs().max() > 0 and len(blocks) > 4
