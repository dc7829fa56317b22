"""Where an event function turns zero, with gradients by all it depends on."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from cnf.compat.torchdiffeq import odeint, odeint_adjoint, odeint_event

ADAPTIVE = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
FINE = {name: {"step_size": 0.01, "interp": "cubic"} for name in FIXED}
FINE["euler"] = {"step_size": 1e-3}
FINE["explicit_adams"]["max_order"] = 4
ADJOINT = partial(odeint_adjoint, adjoint_params=())
BOTH_INTERFACES = pytest.mark.parametrize("interface", [odeint, ADJOINT], ids=["odeint", "adjoint"])


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


class Ball(nn.Module):
    """Free fall from a height with a speed: it lands where h + vt − gt²/2 = 0."""

    def __init__(self):
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(9.8, dtype=torch.float64))

    def forward(self, t, state):
        _, speed = state
        return speed, -self.gravity.expand_as(speed)


def landing(height, speed, gravity):
    return (speed + torch.sqrt(speed**2 + 2 * gravity * height)) / gravity


def swing(t, y):
    return torch.stack([y[1], -y[0]])


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_event_is_found_with_every_method_in_both_directions(method, direction):
    y0 = times(1.0, 0.0)
    found, y = odeint(
        swing, y0, direction * times(0, 1), event_fn=lambda t, y: y[0], method=method,
        options=FINE.get(method), rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    limit = {"euler": 2e-3, "fehlberg2": 1e-3}.get(method, 5e-5)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(direction * math.pi / 2, abs=limit)
    assert y.shape == (2, 2) and torch.equal(y[0], y0)
    torch.testing.assert_close(y[1], times(0.0, -direction), rtol=0, atol=limit)


def test_the_first_of_several_numbers_ends_the_solve():
    def event_fn(t, y):
        return torch.stack([y[0] + 2.0, y[1] + 0.5, t - 4.0])

    found, y = odeint(swing, times(1.0, 0.0), times(0, 1), event_fn=event_fn)
    assert found.item() == pytest.approx(math.asin(0.5), abs=1e-7)
    assert y[1, 1].item() == pytest.approx(-0.5, abs=1e-7)


def test_a_zero_at_the_start_is_the_event():
    for method in ("dopri5", "rk4"):
        found, y = odeint(swing, times(0.0, 1.0), times(0.3, 1), event_fn=lambda t, y: y[0],
                          method=method, options=FINE.get(method))  # fmt: skip
        assert found.item() == 0.3 and torch.equal(y[0], y[1])
    y0 = times(0.0, 1.0).requires_grad_()
    found, y = ADJOINT(swing, y0, times(0.3, 1), event_fn=lambda t, y: y[0])
    y.sum().backward()
    assert y0.grad.tolist() == [2.0, 2.0]


def test_a_function_that_is_zero_on_a_stretch_counts_from_its_beginning():
    def event_fn(t, y):
        return torch.zeros_like(t) if t > 2.5 else y[0] + 10.0

    found, _ = odeint(swing, times(1.0, 0.0), times(0, 1), event_fn=event_fn)
    assert found.item() == pytest.approx(2.5, abs=1e-8)


def test_an_event_needs_two_times_and_steps_of_some_length():
    event_fn = {"event_fn": lambda t, y: y[0]}
    with pytest.raises(ValueError, match="2 times"):
        odeint(swing, times(1, 0), times(0, 1, 2), **event_fn)
    with pytest.raises(ValueError, match="2 times"):
        ADJOINT(swing, times(1, 0), times(0, 1, 2), **event_fn)
    with pytest.raises(AssertionError, match="step_size"):
        odeint(swing, times(1, 0), times(0, 1), method="rk4", **event_fn)


def test_steps_that_never_meet_the_event_end():
    with pytest.raises(RuntimeError, match="no event came in 20000 steps"):
        odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method="euler",
               options={"step_size": 1e-3}, event_fn=lambda t, y: y + 1)  # fmt: skip
    with pytest.raises(AssertionError, match="max_num_steps exceeded"):
        odeint(swing, times(1, 0), times(0, 1), options={"max_num_steps": 50},
               event_fn=lambda t, y: y[0] + 2)  # fmt: skip


def test_the_event_costs_a_step_to_land_on_it():
    class Counted:
        calls = attempts = 0

        def __call__(self, t, y):
            self.calls += 1
            return swing(t, y)

        def callback_step(self, t0, y0, dt):
            self.attempts += 1

    func = Counted()
    odeint(func, times(1.0, 0.0), times(0, 1), event_fn=lambda t, y: y[0])
    assert func.calls == 2 + 6 * func.attempts + 5


@BOTH_INTERFACES
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_time_and_state_of_the_event_pass_gradcheck(interface, method):
    def land(height, speed, t0, gravity, floor):
        params = {} if interface is odeint else {"adjoint_params": (gravity,)}
        found, (h, v) = odeint_event(
            lambda t, y: (y[1], -gravity.expand_as(y[1])), (height, speed), t0,
            event_fn=lambda t, y: y[0] - floor * t, odeint_interface=interface, method=method,
            options={"step_size": 0.1, "interp": "cubic"} if method == "rk4" else {}, **params,
        )  # fmt: skip
        return found, h[-1], v[-1]

    inputs = (times(10.0), times(2.0), times(0.5), times(9.8)[0], times(0.3))
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(land, inputs, eps=1e-5, atol=1e-4)


@BOTH_INTERFACES
def test_the_falling_ball_lands_when_it_should(interface):
    height, speed = times(10.0).requires_grad_(), times(3.0).requires_grad_()
    ball, t0 = Ball(), times(0.0).requires_grad_()
    found, (h, v) = odeint_event(
        ball, (height, speed), t0, event_fn=lambda t, y: y[0], odeint_interface=interface
    )
    exact = landing(height, speed, ball.gravity)
    torch.testing.assert_close(found, exact[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(v[-1], speed - ball.gravity * exact, rtol=0, atol=1e-6)
    assert h.shape == v.shape == (2, 1) and abs(h[-1].item()) < 1e-7
    mine = torch.autograd.grad(found, (height, speed))
    for one, other in zip(mine, torch.autograd.grad(exact, (height, speed)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    found, _ = odeint_event(ball, (height, speed), t0, event_fn=lambda t, y: y[0])
    assert torch.autograd.grad(found, t0)[0].item() == pytest.approx(1.0, abs=1e-6)


@BOTH_INTERFACES
def test_time_may_run_backward_to_the_event(interface):
    y0, t0 = times(1.0, 0.0).requires_grad_(), times(1.0).requires_grad_()
    found, _ = odeint_event(
        swing, y0, t0, event_fn=lambda t, y: y[0] - 0.5, reverse_time=True,
        odeint_interface=interface,
    )  # fmt: skip
    assert found.item() == pytest.approx(1.0 - math.acos(0.5), abs=1e-7)
    gradient = torch.autograd.grad(found, (t0, y0), retain_graph=True)
    assert gradient[0].item() == pytest.approx(1.0, abs=1e-6)
    s = math.acos(0.5)  # x cos(s) − v sin(s) = 1/2 at t = 1 − s
    expected = times(-math.cos(s) / math.sin(s), 1.0)
    torch.testing.assert_close(gradient[1], expected, rtol=0, atol=1e-5)


def test_parameters_of_the_event_function_alone_get_their_gradient():
    level = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found, _ = odeint_event(lambda t, y: torch.ones_like(y), torch.zeros(1).double(), times(0.0),
                            event_fn=lambda t, y: y - level**2)  # fmt: skip
    assert found.item() == pytest.approx(0.25)
    assert torch.autograd.grad(found, level)[0].item() == pytest.approx(1.0)


def test_a_ball_bounces_and_every_bounce_is_differentiated():
    height = times(10.0).requires_grad_()
    state, t = (height, times(0.0)), times(0.0)
    for _ in range(3):
        t, solution = odeint_event(Ball(), state, t, event_fn=lambda t, y: y[0],
                                   rtol=1e-8, atol=1e-8)  # fmt: skip
        state = (solution[0][-1] + 1e-7, -0.8 * solution[1][-1])
    first = math.sqrt(2 * 10.0 / 9.8)
    exact = first * (1 + 2 * 0.8 + 2 * 0.8**2)
    assert t.item() == pytest.approx(exact, abs=1e-5)
    assert torch.autograd.grad(t, height)[0].item() == pytest.approx(exact / 20.0, abs=1e-5)


def test_the_way_back_from_an_event_ends_where_the_event_was_found():
    y0 = times(1.0, 0.0).requires_grad_()
    found, y = ADJOINT(swing, y0, times(0, 1), event_fn=lambda t, y: y[0])
    found.backward(retain_graph=True)  # the time itself is cut from the graph
    assert not y0.grad.any()
    y[-1].sum().backward()
    torch.testing.assert_close(y0.grad, times(-1.0, 1.0), rtol=0, atol=1e-6)
