"""The solution stops where g(t, y) = 0, at the right time, with the gradient of that time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ellipk
from torch.autograd import grad, gradcheck, gradgradcheck

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import Event, locate
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.solution import GRADIENTS, solve
from cnf.ode.tableau import TABLEAUS

F64 = torch.float64
ENDED = [name for name in GRADIENTS if name != "reversible"]  # which knows no events
TIGHT = dict(rtol=1e-9, atol=1e-11)
EACH_PACE = pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])


def tight(per_sample):
    return Adaptive(1e-9, 1e-11, per_sample=per_sample)


def fall(t, y):
    """Height and speed of a ball, (rows, 2)."""
    return torch.stack([y[:, 1], torch.full_like(y[:, 1], -9.81)], -1)


def swing(t, y):
    """A harmonic oscillator, (rows, 2)."""
    return torch.stack([y[:, 1], -y[:, 0]], -1)


def pendulum(t, y):
    return torch.stack([y[:, 1], -torch.sin(y[:, 0])], -1)


def first(t, y):
    return y[:, 0]


# when it comes -----------------------------------------------------------------------------------

PROBLEMS = {  # field, start, g, direction, end, when
    "a ball hits the ground": (fall, [10.0, 2.0], first, 0, 5.0,
                               (2 + math.sqrt(4 + 2 * 9.81 * 10)) / 9.81),
    "a pendulum hangs": (pendulum, [1.2, 0.0], first, 0, 9.0, ellipk(math.sin(0.6) ** 2)),
    "an oscillator rises through zero": (swing, [1.0, 0.0], first, 1, 9.0, 1.5 * math.pi),
    "an oscillator falls through zero": (swing, [1.0, 0.0], first, -1, 9.0, 0.5 * math.pi),
    "an oscillator at a time": (swing, [1.0, 0.0], lambda t, y: t - 2 + 0 * y[:, 0], 0, 9.0, 2.0),
    "backward in time": (swing, [1.0, 0.0], first, 1, -9.0, -1.5 * math.pi),
    "falling, backward in time": (swing, [1.0, 0.0], first, -1, -9.0, -0.5 * math.pi),
}  # fmt: skip


@EACH_PACE
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_known_event_comes_at_its_time(name, per_sample):
    field, start, g, direction, end, when = PROBLEMS[name]
    sol = solve(
        field,
        torch.tensor([start], dtype=F64),
        [0.0, end / 9, end],
        control=tight(per_sample),
        event=Event(g, direction=direction),
    )
    assert sol.event_time.shape == ((1,) if per_sample else ())
    assert sol.event_time.item() == pytest.approx(when, abs=1e-8)
    assert sol.event_index.tolist() == ([0] if per_sample else 0)
    assert g(sol.event_time, sol.y[-1]).item() == pytest.approx(0, abs=1e-8)
    plain = solve(field, torch.tensor([start], dtype=F64), [0.0, end / 9], **TIGHT).y[-1]
    assert torch.allclose(sol.y[1], plain, atol=1e-7)  # what was read before is what it was


@pytest.mark.parametrize("method", TABLEAUS)
@EACH_PACE
def test_every_method_finds_the_event_as_exactly_as_it_solves(method, per_sample):
    order, step = TABLEAUS[method].order, 0.02
    control = FixedStep(step, per_sample=per_sample)
    y0 = torch.tensor([[1.0, 0.0]], dtype=F64)
    sol = solve(swing, y0, [0.0, 9.0], method=method, control=control, event=Event(first))
    assert sol.event_time.item() == pytest.approx(math.pi / 2, abs=2 * step**order + 1e-13)


def test_a_float32_event_is_found_to_its_precision():
    sol = solve(swing, torch.tensor([[1.0, 0.0]]), [0.0, 9.0], event=Event(first), rtol=1e-6)
    assert sol.event_time.dtype == torch.float32
    assert sol.event_time.item() == pytest.approx(math.pi / 2, abs=1e-5)


@EACH_PACE
@pytest.mark.parametrize("offset", [1e-3, 1e-9])
def test_an_event_near_the_start_is_found(per_sample, offset):
    y0 = torch.tensor([[offset, -1.0]], dtype=F64)
    sol = solve(swing, y0, [0.0, 9.0], control=tight(per_sample), event=Event(first))
    assert sol.event_time.item() == pytest.approx(offset, rel=1e-5)


@EACH_PACE
def test_a_zero_at_the_very_start_does_not_count(per_sample):
    y0 = torch.tensor([[0.0, 1.0]], dtype=F64)
    sol = solve(swing, y0, [0.0, 9.0], control=tight(per_sample), event=Event(first))
    assert sol.event_time.item() == pytest.approx(math.pi, abs=1e-8)


@EACH_PACE
def test_an_event_at_an_output_time_is_met_there(per_sample):
    event = Event(lambda t, y: t - 1 + 0 * y[..., 0].sum(-1 if per_sample else None))
    y0 = torch.tensor([1.0], dtype=F64)
    sol = solve(lambda t, y: -y, y0[:, None] if per_sample else y0, [0.0, 1.0, 2.0],
                control=tight(per_sample), event=event)  # fmt: skip
    assert sol.event_time.item() == 1.0
    assert sol.y[1].item() == sol.y[2].item() == pytest.approx(math.exp(-1), abs=1e-8)


# whether it comes --------------------------------------------------------------------------------


@EACH_PACE
def test_where_none_comes_the_solution_goes_on_to_its_end(per_sample):
    y0 = torch.tensor([[1.0, 0.0]], dtype=F64)
    sol = solve(swing, y0, [0.0, 1.0, 1.5], control=tight(per_sample), event=Event(first))
    plain = solve(swing, y0, [0.0, 1.0, 1.5], control=tight(per_sample))
    assert torch.equal(sol.y, plain.y) and sol.event_time.isnan().all()
    assert (sol.event_index == -1).all() and sol.crossings == ()


@EACH_PACE
def test_an_event_ends_a_solution_without_end(per_sample):
    y0 = torch.tensor([[10.0, 2.0]], dtype=F64)
    lands, left = ((2 + sign * math.sqrt(4 + 2 * 9.81 * 10)) / 9.81 for sign in (1, -1))
    sol = solve(fall, y0, [0.0, math.inf], control=tight(per_sample), event=Event(first))
    assert sol.event_time.item() == pytest.approx(lands, abs=1e-8)
    fixed = FixedStep(0.01, per_sample=per_sample)
    sol = solve(fall, y0, [0.0, 0.1, math.inf], control=fixed, event=Event(first))
    assert sol.event_time.item() == pytest.approx(lands, abs=1e-8)
    up = solve(fall, y0, [0.0, -math.inf], control=tight(per_sample), event=Event(first))
    assert up.event_time.item() == pytest.approx(left, abs=1e-8)


@EACH_PACE
@pytest.mark.parametrize("still", [False, True])
def test_a_solution_without_end_says_that_its_event_did_not_come(per_sample, still):
    field = (lambda t, y: 0 * y) if still else swing
    never = Event(lambda t, y: y[:, 0] - 3)
    y0 = torch.tensor([[1.0, 0.0]], dtype=F64)
    with pytest.raises(IntegrationError, match="not enough for the event to come"):
        solve(field, y0, [0.0, math.inf], control=tight(per_sample), event=never, max_steps=300)


def test_a_solution_without_end_stops_at_the_largest_number():
    never = Event(lambda t, y: y[0] - 3)
    with pytest.raises(IntegrationError, match="t has outgrown its dtype"):
        solve(lambda t, y: 0 * y, torch.ones(2), [0.0, math.inf], event=never)


def test_only_a_terminal_event_makes_an_end_of_infinity():
    for event in (None, Event(first, terminal=False)):
        with pytest.raises(InputError, match="finite"):
            solve(swing, torch.ones(1, 2), [0.0, math.inf], event=event)


# several -----------------------------------------------------------------------------------------


def test_all_events_are_told_in_order_and_the_first_terminal_one_ends_it():
    events = [
        Event(first, terminal=False),
        Event(lambda t, y: y[:, 1], terminal=False, direction=-1),
        Event(lambda t, y: t - 8),
    ]
    y0 = torch.tensor([[1.0, -1e-3]], dtype=F64)
    sol = solve(swing, y0, [0.0, 5.0, 20.0], event=events, **TIGHT)
    shift = math.atan(1e-3)
    wanted = [(0, 0.5), (0, 1.5), (1, 2.0), (0, 2.5)]
    for crossing, (index, halves) in zip(sol.crossings, wanted, strict=False):
        assert crossing.event == index
        assert crossing.t.item() == pytest.approx(halves * math.pi - shift, abs=1e-7)
        assert crossing.y[0, index].item() == pytest.approx(0, abs=1e-7)
    assert [one.event for one in sol.crossings] == [0, 0, 1, 0, 2]
    assert sol.event_time.item() == pytest.approx(8.0) and sol.event_index.item() == 2
    assert torch.equal(sol.y[-1], sol.crossings[-1].y)


def test_events_that_come_together_are_all_met():
    def above(level, scale):
        return Event(lambda t, y: scale * (y.sum() - level), terminal=False)

    for method in ("dopri5", "bosh3"):
        events = [above(2.0, 1.0), above(2.0, -7.0), above(2.0 + 1e-12, 3.0), above(2.5, 1.0)]
        sol = solve(lambda t, y: y, torch.ones(1, dtype=F64), [0.0, 1.0], method=method,
                    event=events, **TIGHT)  # fmt: skip
        assert sorted(one.event for one in sol.crossings) == [0, 1, 2, 3]
        times = [one.t.item() for one in sol.crossings]
        assert times == pytest.approx([math.log(2)] * 3 + [math.log(2.5)], abs=1e-7)


def test_an_event_that_does_not_end_it_changes_no_state():
    y0 = torch.tensor([[1.0, 0.3]], dtype=F64)
    t = [0.0, 3.0, 9.0]
    sol = solve(swing, y0, t, event=Event(first, terminal=False), **TIGHT)
    assert torch.allclose(sol.y, solve(swing, y0, t, **TIGHT).y, atol=1e-7)
    assert len(sol.crossings) == 3 and sol.event_time.isnan()


def test_every_row_stops_at_its_own_event():
    y0 = torch.tensor([[1.0, 0.0], [0.5, 0.5], [2.0, -1.0], [0.1, 0.0]], dtype=F64)
    events = [Event(first), Event(lambda t, y: y[:, 1] - 0.4, direction=-1)]
    sol = solve(swing, y0, [0.0, 0.3, 1.6, 1.9], control=tight(True), event=events)
    for row in range(4):
        alone = solve(swing, y0[row : row + 1], [0.0, 0.3, 1.6, 1.9], event=events, **TIGHT)
        assert sol.event_index[row] == alone.event_index
        assert torch.allclose(sol.event_time[row], alone.event_time, atol=1e-7, equal_nan=True)
        assert torch.allclose(sol.y[:, row], alone.y[:, 0], atol=1e-7)
    assert sol.event_index.tolist() == [0, 1, 0, 0]
    late = solve(swing, y0, [0.0, 0.3, 1.2], control=tight(True), event=events)
    assert late.event_index.tolist() == [-1, 1, 0, -1]
    assert late.event_time.isnan().tolist() == [True, False, False, True]


def test_a_row_wise_field_may_lose_rows_to_their_events():
    class Swing:
        row_wise = True

        def __call__(self, t, y):
            sizes.append(len(y))
            return swing(t, y)

    sizes: list[int] = []
    y0 = torch.tensor([[1.0, 0.0], [0.1, -1.0], [1.0, 1.0]], dtype=F64)
    settings = dict(control=tight(True), event=Event(first))
    leaving = solve(Swing(), y0, [0.0, 5.0], **settings)
    assert set(sizes) == {1, 2, 3}
    staying = solve(swing, y0, [0.0, 5.0], **settings)
    assert torch.equal(leaving.event_time, staying.event_time)
    assert torch.equal(leaving.y, staying.y) and torch.equal(leaving.stats.nfe, staying.stats.nfe)
    for row in range(3):
        alone = solve(swing, y0[row : row + 1], [0.0, 5.0], **settings)
        assert torch.equal(alone.event_time[0], leaving.event_time[row])
        assert alone.stats.nfe[0] == leaving.stats.nfe[row]


# gradients ---------------------------------------------------------------------------------------

EVERY = {
    "backprop": "backprop",
    "checkpoint": "checkpoint",
    "stages": Checkpoint(keep="stages"),
    "sqrt": Checkpoint(keep="sqrt"),
    "adjoint": "adjoint",
    "interpolated adjoint": Adjoint(interpolate=True),
}
EACH_OF_ALL = pytest.mark.parametrize("gradient", EVERY.values(), ids=EVERY)


def driven(t, y, w):
    """(rows, 2) and a rate for each, with t 0-d or (rows,)."""
    pull = -w * torch.sin(y[:, 0]) + 0.3 * torch.cos(t)
    return torch.stack([y[:, 1], pull], -1), y[:, 0] ** 2 * torch.cos(t)


def met(y0, w, level, t, gradient, control, method="dopri5"):
    """Everything that a loss may read of a solution that an event with a parameter ended."""
    event = Event(lambda t, y: y[:, 0] - level * torch.cos(0.1 * t))
    sol = solve(driven, y0 * 1, t, params=[w * 1], quadrature=True, gradient=gradient,
                control=control, method=method, event=event)  # fmt: skip
    assert not sol.event_time.isnan().any()
    return sol.event_time, sol.y, sol.integral


def given(rows, *times):
    y0 = torch.tensor([[1.0, 0.2], [0.8, -0.3], [1.2, 0.4]], dtype=F64)[:rows]
    tensors = (y0, torch.tensor(2.0, dtype=F64), torch.tensor(0.3, dtype=F64))
    return [x.requires_grad_() for x in (*tensors, torch.tensor(times, dtype=F64))]


TIMES = pytest.mark.parametrize("times", [(0.0, 0.3, 4.0), (0.5, 0.2, -4.0)], ids=["on", "back"])


@EACH_OF_ALL
@pytest.mark.parametrize(
    ("method", "times"), [("dopri5", (0.0, 0.3, 4.0)), ("rk4", (0.5, 0.3, -4.0))], ids=str
)
def test_gradients_at_an_event_agree_with_differences(gradient, method, times):
    control = FixedStep(0.19 if method == "dopri5" else 0.06)
    tensors = given(1, *times)
    assert gradcheck(
        lambda *x: met(*x, gradient, control, method), tensors, atol=1e-5, fast_mode=True
    )


@EACH_OF_ALL
def test_adaptive_steps_give_the_same_gradients_at_an_event(gradient):
    found = []
    for how, control in (("backprop", FixedStep(0.1)), (gradient, Adaptive(1e-8, 1e-8))):
        tensors = given(1, 0.0, 0.3, 4.0)
        time, y, q = met(*tensors, how, control, "dopri5" if how == "backprop" else "bosh3")
        found.append(grad(time.sum() + y.sin().sum() + q.sum(), tensors))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ENDED)
@TIMES
def test_gradients_at_the_events_of_rows_agree_with_differences(gradient, times):
    control = FixedStep(0.19, per_sample=True)
    tensors = given(3, *times)
    assert gradcheck(lambda *x: met(*x, gradient, control), tensors, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("gradient", ENDED)
def test_a_row_without_an_event_has_the_gradients_of_a_plain_solve(gradient):
    """Also where g stands still, as on a row that rests."""
    control = Adaptive(1e-9, 1e-9, per_sample=True)
    y0 = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=F64, requires_grad=True)
    never = torch.tensor([[0.0], [0.0]], dtype=F64)

    def field(t, y, moves):
        return swing(t, y) * moves

    moves = torch.tensor([[1.0], [0.0]], dtype=F64)
    sol = solve(field, y0, [0.0, 3.0], rows=[moves], control=control, gradient=gradient,
                event=Event(lambda t, y: y[:, 0] + never[:, 0]))  # fmt: skip
    assert sol.event_index.tolist() == [0, -1]
    (by_y,) = grad(sol.y[-1].sum() + sol.event_time[0], y0)
    assert by_y[1].tolist() == [1.0, 1.0] and by_y.isfinite().all()


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_second_derivatives_at_an_event_agree_with_differences(gradient):
    tensors = given(1, 0.0, 0.3, 4.0)
    control = FixedStep(0.19)
    assert gradgradcheck(lambda *x: met(*x, gradient, control), tensors, atol=1e-4, fast_mode=True)


def test_every_evaluation_is_counted_also_those_for_an_event():
    for per_sample in (False, True):
        calls = []

        def field(t, y, calls=calls):
            calls.append(t)
            return swing(t, y)

        y0 = torch.tensor([[1.0, 0.0]], dtype=F64, requires_grad=True)
        t = torch.tensor([0.0, 1.0, 9.0], requires_grad=True)
        sol = solve(field, y0, t, event=Event(first), control=tight(per_sample))
        assert sol.stats.calls == len(calls) == sol.stats.nfe


# what is refused ---------------------------------------------------------------------------------

REFUSED = {
    "a number for an event": (3.0, "must be an Event"),
    "a list of functions": ([first], "must be an Event"),
    "several numbers": (Event(lambda t, y: y[:, 0]), r"shape \(2,\), but all rows share"),
    "no tensor": (Event(lambda t, y: 1.0), "real tensor, got float"),
    "a complex tensor": (Event(lambda t, y: y.sum() * 1j), "real tensor"),
}


@pytest.mark.parametrize(("event", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_event_is_refused_with_a_sentence(event, says):
    with pytest.raises(InputError, match=says):
        solve(swing, torch.ones(2, 2), [0.0, 1.0], event=event)


def test_rows_of_their_own_pace_need_a_number_each_and_stop_there():
    settings = dict(control=Adaptive(per_sample=True))
    with pytest.raises(InputError, match=r"one number a row, shape \(2,\)"):
        solve(swing, torch.ones(2, 2), [0.0, 1.0], event=Event(lambda t, y: y.sum()), **settings)
    with pytest.raises(InputError, match="leave out per_sample=True"):
        event = Event(first, terminal=False)
        solve(swing, torch.ones(2, 2), [0.0, 1.0], event=event, **settings)


@pytest.mark.parametrize(
    ("given", "says"),
    [(dict(g=1.0), "a function"), (dict(direction=2), "direction"), (dict(direction="up"), "up")],
)
def test_an_event_without_a_meaning_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        Event(**{"g": first, **given})


# the search --------------------------------------------------------------------------------------


def test_the_search_ends_where_every_sign_has_changed():
    wanted = np.array([0.3, 1e-9, 0.999, 0.5])

    def g(x):
        return np.array([x[0] - 0.3, (x[1] - 1e-9) ** 3, np.exp(9 * (x[2] - 0.999)) - 1,
                         1.0 if x[3] >= 0.5 else -1e-3])  # fmt: skip

    found = locate(g, g(np.zeros(4)), g(np.ones(4)))
    assert np.all(g(found) >= 0) and found == pytest.approx(wanted, abs=1e-9)


def test_rows_whose_event_never_comes_end_before_t_outgrows_its_dtype():
    calls = []

    def field(t, y):
        calls.append(t)
        return 0 * y

    event = Event(lambda t, y: y[:, 0] - 2.0)
    with pytest.raises(IntegrationError, match="t has outgrown its dtype"):
        solve(field, torch.ones(2, 1), [0.0, math.inf], event=event,
              control=Adaptive(per_sample=True))  # fmt: skip
    assert len(calls) < 1000 and all(torch.isfinite(t).all() for t in calls)


def test_rows_with_times_of_their_own_may_go_on_until_their_events():
    times = torch.tensor([[0.0, 0.5], [math.inf, math.inf]])
    y0, event = torch.tensor([[1.0], [1.0]]), Event(lambda t, y: y[:, 0] - 3.0)
    found = solve(lambda t, y: torch.ones_like(y), y0, times, event=event,
                  control=Adaptive(per_sample=True))  # fmt: skip
    assert torch.allclose(found.event_time, torch.tensor([2.0, 2.5]))


def test_a_state_that_blows_up_on_its_way_to_an_event_is_said_to():
    event = Event(lambda t, y: y + 1.0)
    with pytest.raises(IntegrationError, match="turned non-finite"):
        solve(lambda t, y: y**2, torch.tensor(1.0), [0.0, math.inf], event=event, method="rk4",
              step_size=0.1, max_steps=300)  # fmt: skip


def test_an_event_is_as_exact_in_inference_mode():
    def swing(t, y):
        return torch.stack([y[1], -torch.sin(y[0])])

    settings = dict(event=Event(lambda t, y: y[0]), rtol=1e-3, atol=1e-3)
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        known = solve(swing, y0, [0.0, 10.0], **settings)
    with torch.inference_mode():
        found = solve(swing, y0, [0.0, 10.0], **settings)
    assert torch.equal(found.event_time, known.event_time) and abs(found.y[-1][0]) < 1e-8
