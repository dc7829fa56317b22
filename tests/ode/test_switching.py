"""Auto is dopri5 where nothing is stiff, kvaerno5 where something is, and says which when."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad

from cnf.error import InputError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import Event
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.solution import solve

F64 = torch.float64


def pendulum(t, y):
    angle, speed = y.unbind(-1)
    return torch.stack([speed, -torch.sin(angle)], -1)


def van_der_pol(t, y, k):
    x, v = y.unbind(-1)
    return torch.stack([v, k * (1 - x * x) * v - x], -1)


def pulsed(t, y):
    """Drawn to a moving state: hard between t = 1 and t = 2, softly before and after."""
    rate = torch.where((t > 1) & (t < 2), 1e5, 1.0).to(y.dtype)
    return -rate * (y - torch.sin(3 * t))


def by(method, direction=1, **settings):
    field = lambda t, y: direction * pulsed(direction * t, y)  # noqa: E731
    control = Adaptive(1e-6, 1e-6, jumps=(direction * 1.0, direction * 2.0))
    times = [0.0, direction * 1.5, direction * 5.0]
    return solve(
        field, torch.zeros(2, dtype=F64), times, method=method, control=control, **settings
    )


def test_where_nothing_is_stiff_it_is_dopri5():
    y0 = torch.tensor([[1.0, 0.0], [0.3, 0.5]], dtype=F64)
    auto = solve(pendulum, y0, [0.0, 10.0], method="auto")
    plain = solve(pendulum, y0, [0.0, 10.0], method="dopri5")
    assert torch.equal(auto.y, plain.y)
    assert auto.stats.methods == [(0.0, "dopri5")] and plain.stats.methods == []
    assert auto.stats.nfe == plain.stats.nfe and auto.stats.jacobians == 0


@pytest.mark.parametrize("direction", [1, -1])
def test_it_goes_over_to_kvaerno5_where_it_is_stiff_and_back(direction):
    sol = by("auto", direction)
    assert [name for _, name in sol.stats.methods] == ["dopri5", "kvaerno5", "dopri5"]
    begun, over = (direction * t for t, _ in sol.stats.methods[1:])
    assert 1.0 < begun < 1.01 and 2.0 < over < 3.5
    assert torch.allclose(sol.y, by("kvaerno5", direction).y, atol=2e-5)
    assert sol.stats.accepted + sol.stats.rejected < 300
    assert sol.stats.jacobians > 0


def test_a_stiff_problem_costs_little_more_than_by_kvaerno5():
    y0, k = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor(1000.0, dtype=F64)
    settings = dict(params=[k], rtol=1e-5, atol=1e-5)
    auto = solve(van_der_pol, y0, [0.0, 700.0], method="auto", **settings)
    plain = solve(van_der_pol, y0, [0.0, 700.0], method="kvaerno5", **settings)
    assert torch.allclose(auto.y[-1], plain.y[-1], atol=1e-3)
    assert auto.stats.nfe < plain.stats.nfe + 300
    assert [name for _, name in auto.stats.methods] == ["dopri5", "kvaerno5"]


@pytest.mark.parametrize(
    "gradient",
    ["checkpoint", Checkpoint("sqrt"), Checkpoint(memory=100), Adjoint(interpolate=True)],
    ids=str,
)
def test_gradients_go_through_both_methods(gradient):
    found = []
    for how in ("backprop", gradient):
        y0 = torch.tensor([2.0, 0.0], dtype=F64, requires_grad=True)
        k = torch.tensor(100.0, dtype=F64, requires_grad=True)
        sol = solve(
            van_der_pol, y0, [0.0, 30.0, 60.0], method="auto", params=[k], rtol=1e-6, atol=1e-6,
            gradient=how,
        )  # fmt: skip
        assert [name for _, name in sol.stats.methods] == ["dopri5", "kvaerno5"]
        found.append((sol.y, *grad(sol.y[-1].sum(), (y0, k))))
    (wanted_y, *wanted), (y, *got) = found
    assert torch.equal(y, wanted_y)
    near = 1e-3 if isinstance(gradient, Adjoint) else 1e-5
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=near, atol=1e-5)


def test_between_steps_and_at_events_the_step_is_that_of_the_method_that_took_it():
    y0, k = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor(1000.0, dtype=F64)

    def solved(method, **settings):
        times = [0.0, 900.0]
        settings |= dict(params=[k], rtol=1e-6, atol=1e-6)
        return solve(van_der_pol, y0, times, method=method, **settings)

    t = torch.tensor([0.001, 0.01, 1.0, 300.0, 650.0], dtype=F64)
    sol, fine = solved("auto", dense=True), solved("kvaerno5", dense=True)
    assert (sol(t) - fine(t)).abs().max() < 1e-4
    crossing = Event(lambda t, y: y[0])
    met, wanted = (solved(method, event=crossing).event_time for method in ("auto", "kvaerno5"))
    assert met.item() == pytest.approx(wanted.item(), abs=0.01)


def test_solves_do_not_share_what_they_chose():
    first = by("auto").stats.methods
    solve(pendulum, torch.ones(2, dtype=F64), [0.0, 1.0], method="auto")
    assert by("auto").stats.methods == first


@pytest.mark.parametrize("control", [FixedStep(0.1), Adaptive(per_sample=True)], ids=str)
def test_steps_that_tell_nothing_of_stiffness_are_refused(control):
    with pytest.raises(InputError, match="method 'auto' tells stiffness from adaptive steps"):
        solve(pendulum, torch.ones(3, 2), [0.0, 1.0], method="auto", control=control)


def test_the_adjoint_that_solves_the_state_back_is_refused():
    y0 = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(InputError, match="cannot be followed backward"):
        solve(pendulum, y0, [0.0, 1.0], method="auto", gradient="adjoint")
