"""The loop lands on every output time, counts what it does, and always ends."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnf.error import IntegrationError
from cnf.ode.choice import choose_method
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.field import Evaluation
from cnf.ode.integrate import Problem, Stats, integrate

CONTROLS = {"fixed": FixedStep(0.07), "adaptive": Adaptive(1e-6, 1e-8)}
ALL = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)


class Counted:
    """A field of one leaf, as the core calls it, that notes every time it is called at."""

    def __init__(self, slope, rate=None):
        self.slope, self.rate, self.times = slope, rate, []

    def __call__(self, t, leaves):
        self.times.append(t)
        rates = () if self.rate is None else (self.rate(t, leaves[0]),)
        return Evaluation((self.slope(t, leaves[0]),), rates)


def swing(t, y):
    return math.cos(3 * t) * torch.flip(y, [0])


def run(slope, times, control, method="dopri5", rate=None, max_steps=10_000, y=None, **more):
    field, stats = Counted(slope, rate), Stats()
    problem = Problem(field, tuple(times), choose_method(method), control, max_steps)
    y = torch.tensor([1.0, 0.5], dtype=torch.float64) if y is None else y
    with torch.no_grad():
        return integrate(problem, (y,), stats, **more), stats, field


gaps = st.lists(st.floats(1e-3, 0.9), min_size=1, max_size=5)


@ALL
@settings(max_examples=30, deadline=None)
@given(gaps=gaps, start=st.floats(-2, 2), direction=st.sampled_from([1.0, -1.0]))
def test_output_times_are_landed_on_exactly(control, gaps, start, direction):
    times = [start]
    for gap in gaps:
        times.append(times[-1] + direction * gap)
    out, stats, _ = run(swing, times, control, keep=True)
    assert out.marks[0] == 0 and out.marks[-1] == len(out.record) == stats.accepted
    for i, mark in enumerate(out.marks[:-1]):
        assert out.record[mark].t == times[i]
        assert torch.equal(out.record[mark].y[0], out.states[i][0])
    for step, later in pairwise(out.record):
        assert step.h * direction > 0
        assert step.t + step.h == pytest.approx(later.t, abs=1e-12)


@ALL
def test_every_evaluation_is_counted(control):
    _, stats, field = run(swing, [0.0, 0.4, 2.0], control)
    assert stats.nfe == len(field.times)


@pytest.mark.parametrize(("method", "stages"), {"rk4": 4, "dopri5": 6, "bosh3": 3}.items())
def test_a_fixed_step_costs_its_stages(method, stages):
    _, stats, _ = run(swing, [0.0, 0.5, 1.0], FixedStep(0.1), method)
    assert (stats.nfe, stats.accepted, stats.rejected) == (10 * stages, 10, 0)


@pytest.mark.parametrize(("method", "fresh"), {"bosh3": 3, "dopri5": 6, "tsit5": 6}.items())
def test_the_last_stage_serves_as_the_next_steps_first(method, fresh):
    _, stats, _ = run(swing, [0.0, 2.0], CONTROLS["adaptive"], method)
    attempts = stats.accepted + stats.rejected
    assert stats.nfe == 2 + fresh * attempts  # two for the start and its step size


def test_a_given_first_evaluation_is_not_repeated():
    first = Evaluation((swing(0.0, torch.tensor([1.0, 0.5], dtype=torch.float64)),), ())
    for control in CONTROLS.values():
        _, alone, _ = run(swing, [0.0, 1.0], control)
        _, given_first, _ = run(swing, [0.0, 1.0], control, first=first)
        assert given_first.nfe == alone.nfe - 1


def test_a_first_step_that_is_given_saves_the_search_for_it():
    out, stats, _ = run(swing, [0.0, 1.0], Adaptive(1e-6, 1e-8, first_step=0.01), keep=True)
    assert out.record[0].h == 0.01
    assert stats.nfe == 1 + 6 * (stats.accepted + stats.rejected)
    out, *_ = run(swing, [0.0, 1.0], Adaptive(1.0, 1.0, first_step=100.0), keep=True)
    assert out.record[0].h == 1.0


def test_no_evaluation_lies_outside_the_span():
    for control in CONTROLS.values():
        for times in ([0.0, 0.3, 1.0], [1.0, 0.3, 0.0], [-3.0, 5.0]):
            _, _, field = run(swing, times, control)
            assert min(times) - 1e-12 <= min(field.times)
            assert max(field.times) <= max(times) + 1e-12


def test_fixed_steps_are_of_one_length_but_the_last():
    out, *_ = run(swing, [0.0, 0.25], FixedStep(0.1), keep=True)
    assert [step.h for step in out.record] == pytest.approx([0.1, 0.1, 0.05])


def test_a_tight_tolerance_takes_more_steps_and_a_rough_start_is_refused():
    loose, tight = (run(swing, [0.0, 2.0], Adaptive(r, r))[1] for r in (1e-3, 1e-9))
    assert tight.accepted > 2 * loose.accepted
    _, stats, _ = run(swing, [0.0, 2.0], Adaptive(1e-9, 1e-9, first_step=2.0))
    assert stats.rejected >= 1


def test_landing_on_many_outputs_does_not_shorten_the_steps_after_them():
    few = run(swing, [0.0, 1.0, 3.0], CONTROLS["adaptive"])[1]
    close = run(swing, [0.0, 1.0, 1.0 + 1e-9, 3.0], CONTROLS["adaptive"])[1]
    assert close.accepted <= few.accepted + 2


def test_integrals_add_up_in_double_precision_beside_a_single_precision_state():
    single = torch.ones(2)
    out, *_ = run(
        lambda t, y: 0 * y, [0.0, 1.0], FixedStep(1e-3), "euler", lambda t, y: 0.1 * y, y=single
    )
    assert out.integrals[-1][0].dtype == torch.float64
    wanted = torch.full((2,), 0.1).double()
    assert torch.allclose(out.integrals[-1][0], wanted, rtol=1e-7, atol=0)


def test_integrals_steer_the_steps_only_where_a_tolerance_is_theirs():
    def rate(t, y):
        return torch.cos(torch.tensor(200.0 * t)).double()

    alone = run(swing, [0.0, 1.0], Adaptive())[1]
    beside = run(swing, [0.0, 1.0], Adaptive(), rate=rate)[1]
    out, steered, _ = run(swing, [0.0, 1.0], Adaptive(quadrature_atol=1e-7), rate=rate)
    assert beside == alone
    assert steered.accepted > 5 * alone.accepted
    assert out.integrals[-1][0].item() == pytest.approx(math.sin(200) / 200, abs=1e-6)


def test_no_record_is_kept_where_nobody_asks_for_it():
    assert run(swing, [0.0, 1.0], FixedStep(0.1))[0].record == []


@ALL
def test_a_slope_that_is_the_state_or_a_kept_tensor_is_never_written_to(control):
    y = torch.tensor([1.0, 0.5], dtype=torch.float64)
    kept = torch.ones(1, dtype=torch.float64).expand(2)
    for slope in (lambda t, y: y, lambda t, y: kept, lambda t, y: y[:], lambda t, y: kept[:]):
        out, *_ = run(slope, [0.0, 0.5, 1.0], control, y=y, rate=lambda t, y: kept)
        assert y.tolist() == [1.0, 0.5] and kept.tolist() == [1.0, 1.0]
        assert out.integrals[-1][0].tolist() == pytest.approx([1.0, 1.0])
        assert torch.equal(out.states[0][0], y)
    assert torch.allclose(out.states[-1][0], y + 1.0)


# every loop ends -----------------------------------------------------------------------------


def nan_after(moment):
    return lambda t, y: torch.full_like(y, math.nan) if t > moment else swing(t, y)


def square(t, y):
    return y * y


def stiff(t, y):
    return -1e30 * (y - math.cos(t))


ENDLESS = {
    "a field that is NaN from the start": (nan_after(-1.0), "non-finite|not finite"),
    "a field that turns NaN": (nan_after(0.5), "vanished|non-finite"),
    "a field that is infinite": (lambda t, y: y / 0.0, "non-finite|not finite"),
    "a solution that explodes": (square, "vanished|non-finite"),
    "a solution that overflows": (lambda t, y: 1e300 * torch.exp(y), "vanished|non-finite"),
    "a field too stiff": (stiff, "vanished|non-finite|not finite"),
}


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize(("slope", "says"), ENDLESS.values(), ids=ENDLESS)
def test_every_loop_ends_and_says_where(control, dtype, direction, slope, says):
    y = torch.tensor([1.0, 0.5], dtype=dtype)
    with pytest.raises(IntegrationError, match=says) as caught:
        run(lambda t, y: direction * slope(direction * t, y), [0.0, direction * 3.0], control, y=y)
    error = caught.value
    assert 0 <= direction * error.t <= 3.0 and error.step > 0 and 0 < error.nfe < 20_000
    assert "try" in str(error)


@pytest.mark.parametrize(("method", "tolerance"), {"bosh3": 1e-5, "dopri5": 1e-9}.items())
def test_a_step_too_short_to_move_the_time_has_vanished(method, tolerance):
    with pytest.raises(IntegrationError, match="vanished") as caught:
        run(square, [0.0, 3.0], Adaptive(tolerance, tolerance), method)
    # at t = 1 the steps shrink with 1/y and are accepted for ever
    assert caught.value.t == pytest.approx(1.0, abs=1e-4) and caught.value.nfe < 6_000


@ALL
def test_states_reached_before_the_failure_are_in_the_error(control):
    with pytest.raises(IntegrationError) as caught:
        run(nan_after(1.5), [0.0, 0.5, 1.0, 2.0, 3.0], control)
    good = run(swing, [0.0, 0.5, 1.0], control)[0].states
    assert len(caught.value.partial) == 3
    for got, wanted in zip(caught.value.partial, good, strict=True):
        assert torch.allclose(got[0], wanted[0], atol=1e-5)


def test_the_rows_that_went_bad_are_named():
    def one_row_bad(t, y):
        return torch.where(torch.arange(4)[:, None] == 2, math.nan, y)

    for control in CONTROLS.values():
        with pytest.raises(IntegrationError, match=r"\(rows 2\)"):
            run(one_row_bad, [0.0, 1.0], control, y=torch.ones(4, 2))


@ALL
def test_a_rate_that_is_not_finite_is_reported(control):
    with pytest.raises(IntegrationError, match="rate"):
        run(swing, [0.0, 1.0], control, rate=lambda t, y: y / 0.0)


@ALL
def test_too_few_steps_are_reported_with_where_they_ended(control):
    with pytest.raises(IntegrationError, match="max_steps=3 steps were not enough") as caught:
        run(swing, [0.0, 3.0], control, max_steps=3)
    assert 0 < caught.value.t < 3.0


def test_refused_steps_count_as_steps_tried():
    with pytest.raises(IntegrationError, match="max_steps=2"):
        run(swing, [0.0, 3.0], Adaptive(1e-12, 1e-12, first_step=3.0), max_steps=2)


def test_a_part_that_stays_zero_needs_no_absolute_tolerance():
    y = torch.tensor([0.0, 1.0], dtype=torch.float64)
    out, *_ = run(lambda t, y: -y, [0.0, 1.0], Adaptive(1e-8, 0.0), y=y)
    assert out.states[-1][0].tolist() == pytest.approx([0.0, math.exp(-1)], abs=1e-7)


def test_a_field_that_stands_still_takes_few_steps():
    _, stats, _ = run(lambda t, y: 0 * y, [0.0, 1e6], Adaptive())
    assert stats.accepted <= 3


def test_an_error_survives_a_process_boundary():
    with pytest.raises(IntegrationError) as caught:
        run(square, [0.0, 3.0], Adaptive())
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert (copy.t, copy.step, copy.nfe) == (caught.value.t, caught.value.step, caught.value.nfe)
