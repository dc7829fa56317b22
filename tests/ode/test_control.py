"""Steps fit what remains, grow and shrink within bounds, and refuse settings without a meaning."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, FixedStep, on_grid
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.solution import solve
from cnf.ode.tableau import TABLEAUS

length = st.floats(1e-9, 1e9)
CONTROLS = {"fixed": FixedStep(0.1), "adaptive": Adaptive()}


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
@given(step=length, remaining=length)
def test_a_step_is_positive_and_never_passes_what_remains(control, step, remaining):
    assert 0 < control.fit(step, remaining) <= remaining


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
@given(remaining=length, share=st.floats(1.0, 1e6))
def test_a_step_that_reaches_the_end_is_all_that_remains(control, remaining, share):
    assert control.fit(remaining * share, remaining) == remaining


@given(step=length, remaining=length)
def test_an_adaptive_step_leaves_no_sliver(step, remaining):
    taken = Adaptive().fit(step, remaining)
    left = remaining - taken
    assert left == 0 or left >= 0.99 * taken


@given(step=length, more=st.floats(0, 1e-8))
def test_a_step_stretched_to_land_is_accepted_as_the_shortest_step_is(step, more):
    control = Adaptive(min_step=step)
    landing = control.fit(step, step * (1 + more))
    assert control.accepts(5.0, step) and control.accepts(5.0, landing)
    assert not control.accepts(5.0, 1.01 * step)


@given(steps=st.integers(1, 400), start=st.floats(-100, 100), part=st.floats(0.01, 0.99))
def test_fixed_steps_are_as_many_as_counted(steps, start, part):
    control = FixedStep(0.1)
    for span in (steps * 0.1, (steps - part) * 0.1):
        t, end, taken = start, start + span, 0
        while t != end:
            step = control.fit(control.step_size, end - t)
            t = end if step == end - t else t + step
            taken += 1
        assert taken == control.count(span) == steps


def test_output_times_in_single_precision_cost_no_extra_step():
    times = torch.linspace(0, 1, 101).double().tolist()
    spans = [b - a for a, b in pairwise(times)]
    assert [FixedStep(0.01).count(span) for span in spans] == [1] * 100


@given(ratio=st.floats(0, 1e300), order=st.integers(1, 8))
def test_the_step_changes_within_bounds_and_shrinks_when_refused(ratio, order):
    control = Adaptive(min_factor=0.3, max_factor=5.0)
    factor = control.factor(ratio, order)
    assert 0.3 <= factor <= 5.0
    if ratio > 1:
        assert factor < 1


@given(small=st.floats(1e-12, 1e12), more=st.floats(1, 1e3), order=st.integers(1, 8))
def test_a_larger_error_never_lengthens_the_step(small, more, order):
    control = Adaptive()
    assert control.factor(small * more, order) <= control.factor(small, order)


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_an_error_that_is_no_number_shrinks_the_step_most(ratio):
    assert Adaptive(min_factor=0.25).factor(ratio, 5) == 0.25


@given(
    ratios=st.tuples(*[st.floats(1e-3, 1.0)] * 3),
    coefficients=st.tuples(*[st.floats(0.05, 0.4)] * 3),
    order=st.integers(2, 8),
)
def test_an_accepted_step_changes_by_the_errors_of_three_steps(ratios, coefficients, order):
    p, i, d = coefficients
    now, last, before = ratios
    control = Adaptive(pcoeff=p, icoeff=i, dcoeff=d, safety=0.8, min_factor=1e-9, max_factor=1e9)
    wanted = 0.8 * now ** (-(p + i + d) / order)
    wanted *= last ** ((p + 2 * d) / order) * before ** (-d / order)
    assert control.factor(now, order, (last, before)) == pytest.approx(wanted, rel=1e-12)
    # a refused step shrinks by its own error alone
    refused = control.factor(2 / now, order, (last, before))
    assert refused == pytest.approx(0.8 * (now / 2) ** (1 / order), rel=1e-12)


def test_a_step_without_error_grows_most():
    assert Adaptive(max_factor=7.0).factor(0.0, 5) == 7.0


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, int])
def test_settings_become_plain_floats(kind):
    assert type(FixedStep(kind(2)).step_size) is float
    adaptive = Adaptive(kind(1), kind(1), first_step=kind(1))
    assert {type(x) for x in (adaptive.rtol, adaptive.atol, adaptive.first_step)} == {float}


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Adaptive().rtol = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        FixedStep(1.0).step_size = 1.0


@pytest.mark.parametrize("step_size", [0, -0.1, math.nan, math.inf, "0.1", None])
def test_a_step_size_without_a_meaning_is_refused(step_size):
    with pytest.raises(InputError, match="step_size"):
        FixedStep(step_size)


@pytest.mark.parametrize(
    "settings",
    [
        dict(rtol=-1e-3),
        dict(atol=math.nan),
        dict(rtol=math.inf),
        dict(rtol="tight"),
        dict(rtol=None),
        dict(rtol=0.0, atol=0.0),
        dict(quadrature_atol=0.0),
        dict(quadrature_atol=-1.0),
        dict(first_step=0.0),
        dict(first_step="auto"),
        dict(safety=0.0),
        dict(safety=1.5),
        dict(min_factor=1.0),
        dict(max_factor=1.0),
        dict(min_factor=math.nan),
        dict(min_step=-1.0),
        dict(min_step=2.0, max_step=1.0),
        dict(max_step=0.0, min_step=0.0),
        dict(pcoeff=-0.1),
        dict(icoeff=0.0),
        dict(dcoeff=math.nan),
        dict(max_rejections=0),
        dict(max_rejections=1.5),
        dict(land_on=3.0),
        dict(land_on=("noon",)),
        dict(jumps=(math.nan,)),
    ],
    ids=str,
)
def test_tolerances_without_a_meaning_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Adaptive(**settings)


@pytest.mark.parametrize("name", ["land_on", "jumps"])
def test_times_to_land_on_are_kept_as_floats(name):
    for control in (Adaptive(**{name: [1, np.float32(0.5)]}), FixedStep(1.0, **{name: [1, 0.5]})):
        assert getattr(control, name) == (1.0, 0.5)
        assert {type(moment) for moment in getattr(control, name)} == {float}


# one code for a number and for an array ----------------------------------------------------------


@given(
    sizes=st.lists(length, min_size=1, max_size=5),
    ratio=st.floats(0, 1e6) | st.just(math.nan),
    earlier=st.tuples(st.floats(1e-10, 1), st.floats(1e-10, 1)),
    refused=st.booleans(),
)
def test_rows_are_decided_on_as_each_would_be_alone(sizes, ratio, earlier, refused):
    control = Adaptive(pcoeff=0.4, icoeff=0.3, dcoeff=0.1, min_step=1e-3, max_step=1e3)
    rows = np.array(sizes)
    n = len(rows)
    ratios, refusals = np.full(n, ratio), np.full(n, refused)
    factors = control.factor(ratios, 5, (np.full(n, earlier[0]), np.full(n, earlier[1])))
    after = control.after(rows, rows / 2, factors, refusals)
    for i, size in enumerate(sizes):
        factor = control.factor(ratio, 5, earlier)
        assert factors[i] == pytest.approx(factor, rel=1e-14)
        assert after[i] == pytest.approx(control.after(size, size / 2, factor, refused), rel=1e-14)
        assert control.fit(rows, np.full(n, 3.0))[i] == control.fit(size, 3.0)
        assert control.accepts(ratios, rows)[i] == control.accepts(ratio, size)


@given(size=st.floats(1e-12, 1e12))
def test_sizes_on_the_grid_are_near_and_stay_there(size):
    grid = on_grid(np.array([size, 0.0, np.inf]))
    assert grid[0] == pytest.approx(size, rel=1 / 32) and grid[1:].tolist() == [0.0, math.inf]
    assert np.array_equal(on_grid(grid), grid)
    # what rounding does to a size does not change it, but on the edge between two sizes
    assert np.array_equal(on_grid(grid * (1 + 1e-12)), grid)


# what the settings do to a solve -----------------------------------------------------------------

F64 = torch.float64
CONTROLLERS = {
    "I": {},
    "PI": dict(pcoeff=0.4, icoeff=0.3),
    "PID": dict(pcoeff=0.1, icoeff=0.3, dcoeff=0.05),
    "H211": dict(pcoeff=0.25, icoeff=0.25),
}
EACH_PACE = pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])


def brusselator(t, y):
    a, b = y.unbind(-1)
    return torch.stack([1 + a * a * b - 4 * a, 3 * a - a * a * b], -1)


START = torch.tensor([[1.5, 3.0]], dtype=F64)


def steps(per_sample=False, field=brusselator, t=(0.0, 8.0), y0=START, method="dopri5", **settings):
    """(lengths of the accepted steps, the solution): each step's end is an arrival."""
    control = Adaptive(**{"rtol": 1e-6, "atol": 1e-6, "per_sample": per_sample, **settings})
    sol = solve(field, y0, t, control=control, method=method, dense=True)
    path = sol.dense.solved.path
    return [abs(float(h)) for _, _, h, _ in path.steps] if per_sample else [
        abs(b - a) for a, b in pairwise(path.times)
    ], sol  # fmt: skip


@EACH_PACE
@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_meets_the_tolerance_with_as_many_steps(per_sample, name):
    exact = solve(brusselator, START, [0.0, 8.0], method="dopri8", rtol=1e-12, atol=1e-12).y[-1]
    plain, _ = steps(per_sample)
    lengths, sol = steps(per_sample, **CONTROLLERS[name])
    assert torch.allclose(sol.y[-1], exact, rtol=3e-5, atol=3e-5)
    assert 0.7 * len(plain) < len(lengths) < 1.4 * len(plain)


@EACH_PACE
def test_a_pi_controller_is_steadier_where_stability_bounds_the_steps(per_sample):
    """Of an I controller the steps swing to and fro there (Hairer & Wanner II, section IV.2)."""

    def stiff(t, y):
        return -100 * (y - torch.cos(t).reshape(-1, 1))

    def swing(**more):
        settings = dict(method="tsit5", rtol=1e-3, atol=1e-3, **more)
        lengths, sol = steps(per_sample, stiff, (0.0, 4.0), START[:, :1], **settings)
        middle = np.log(lengths[len(lengths) // 2 : -3])
        return np.abs(np.diff(middle)).mean(), int(sol.stats.rejected)

    swings, refused = swing()
    steadier, fewer = swing(**CONTROLLERS["PI"])
    assert steadier < swings / 5 and fewer < refused / 5


@EACH_PACE
def test_no_step_is_longer_than_the_longest(per_sample):
    lengths, _ = steps(per_sample, max_step=0.05)
    assert max(lengths) <= 0.05 * (1 + 1e-8) and len(lengths) >= 160


@EACH_PACE
def test_a_step_of_the_shortest_length_is_taken_whatever_its_error(per_sample):
    lengths, sol = steps(per_sample, min_step=0.2, rtol=1e-10, atol=1e-10)
    assert min(lengths[:-2]) >= 0.2 * (1 - 1e-12) and len(lengths) <= 42
    assert (sol.y[-1] - steps(per_sample)[1].y[-1]).abs().max() > 1e-5  # and it shows


@EACH_PACE
def test_a_step_of_the_shortest_length_is_not_taken_to_a_state_that_is_no_number(per_sample):
    with pytest.raises(IntegrationError, match="non-finite"):
        steps(per_sample, lambda t, y: -torch.sqrt(y), (0.0, 3.0), torch.ones(1, 1), min_step=0.1)


@EACH_PACE
def test_the_first_step_is_as_given_and_within_bounds(per_sample):
    for settings, first in (
        (dict(first_step=1e-3), 1e-3),
        (dict(first_step=1e-5, min_step=1e-4), 1e-4),
        (dict(first_step=1e9, max_step=1e-3), 1e-3),
    ):
        lengths, _ = steps(per_sample, t=(0.0, 0.05), **settings)
        assert lengths[0] == pytest.approx(first, rel=1e-9)


@EACH_PACE
def test_a_cautious_safety_takes_more_steps_and_refuses_fewer(per_sample):
    bold, daring = steps(per_sample, safety=1.0)
    careful, cautious = steps(per_sample, safety=0.5)
    assert len(careful) > 1.3 * len(bold)
    assert int(cautious.stats.rejected) < int(daring.stats.rejected)


@EACH_PACE
def test_steps_change_by_no_more_than_the_factors(per_sample):
    lengths, _ = steps(per_sample, max_factor=1.5, min_factor=0.8)
    ratios = [b / a for a, b in pairwise(lengths[:-2])]
    assert max(ratios) <= 1.5 * 1.05


@EACH_PACE
@pytest.mark.parametrize("t", [(0.0, 8.0), (1.0, -0.5)], ids=["on", "back"])
def test_times_to_land_on_are_landed_on_and_are_no_outputs(per_sample, t):
    inside = (0.123, 0.777) if t[0] == 0 else (0.777, 0.123)
    extra = (0.777, 99.0, 0.123, *t)  # what lies outside or at an end is no target
    for method, control in (
        ("dopri5", Adaptive(1e-6, 1e-6, per_sample=per_sample, land_on=extra)),
        ("rk4", FixedStep(0.1, per_sample=per_sample, land_on=extra)),
    ):
        seen = []

        def noted(t, y, seen=seen):
            seen.append(float(t))
            return brusselator(t, y)

        sol = solve(noted, START, t, control=control, method=method)
        assert sol.y.shape[0] == 2 and set(inside) <= set(seen)


# a field that jumps ------------------------------------------------------------------------------

JUMPS = (0.3, 0.7)


def jumping(t, y):
    """Pulled one way and another, with jumps at 0.3 and 0.7; (rows, 1)."""
    t = t.reshape(-1, 1)
    pull = torch.where(t < 0.3, 1.0, torch.where(t < 0.7, -2.0, 3.0)).to(y.dtype)
    return pull * torch.cos(y) + torch.sin(3 * t)


@pytest.fixture(scope="module")
def beyond_jumps():
    """Where `jumping` goes in [0, 1], by pieces without a jump, on and back."""
    y0, ends = torch.tensor([[0.4]], dtype=F64), {}
    for direction, times in ((1, (0.0, 0.3, 0.7, 1.0)), (-1, (1.0, 0.7, 0.3, 0.0))):
        y = y0
        for start, end in pairwise(times):
            middle = torch.tensor((start + end) / 2, dtype=F64)

            def piece(t, y, middle=middle):
                smooth = jumping(t, y) - jumping(t, 0 * y)
                pull = (jumping(middle, 0 * y) - torch.sin(3 * middle)) * torch.cos(y)
                return pull + torch.sin(3 * t) + 0 * smooth

            y = solve(piece, y, [start, end], method="dopri8", step_size=0.01).y[-1]
        ends[direction] = y
    return y0, ends


@EACH_PACE
@pytest.mark.parametrize("method", ["rk4", "bosh3", "dopri5", "dopri8"])
@pytest.mark.parametrize("direction", [1, -1])
def test_a_field_that_jumps_keeps_its_order_where_the_jumps_are_told(
    per_sample, method, direction, beyond_jumps
):
    y0, ends = beyond_jumps
    order, t = TABLEAUS[method].order, (0.0, 1.0)[::direction]
    counts = (4, 8) if order == 8 else (4, 32)

    def error(count, jumps):
        control = FixedStep(1 / (count + 0.37), per_sample=per_sample, jumps=jumps)
        sol = solve(jumping, y0, t, control=control, method=method)
        return (sol.y[-1] - ends[direction]).abs().item()

    told, untold = ([error(n, jumps) for n in counts] for jumps in (JUMPS, ()))
    assert math.log(told[0] / told[1]) / math.log(counts[1] / counts[0]) > order - 0.5
    assert untold[1] > 2e-4  # no method is of a higher order than 1 there


@EACH_PACE
@pytest.mark.parametrize("direction", [1, -1])
def test_adaptive_steps_pass_a_jump_with_few_refusals_where_it_is_told(
    per_sample, direction, beyond_jumps
):
    y0, ends = beyond_jumps
    t = (0.0, 1.0)[::direction]
    told, blind = (
        solve(jumping, y0, t, control=Adaptive(1e-8, 1e-8, per_sample=per_sample, jumps=jumps))
        for jumps in (JUMPS, ())
    )
    assert torch.allclose(told.y[-1], ends[direction], atol=1e-7)
    assert 5 * int(told.stats.rejected) < int(blind.stats.rejected)


GRADIENTS = ["backprop", "checkpoint", "adjoint"]
MEMBERS = [(gradient, rows) for gradient in GRADIENTS for rows in (False, True)]
MEMBERS.append((Adjoint(interpolate=True), False))


@pytest.mark.parametrize(("gradient", "per_sample"), MEMBERS, ids=str)
def test_gradients_pass_a_jump_on_the_right_side(gradient, per_sample, beyond_jumps):
    y0 = beyond_jumps[0].clone().requires_grad_()
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def field(t, y):
        return scale * jumping(t, y)

    def value(gradient, control):
        sol = solve(field, y0, [0.0, 0.7, 1.0], control=control, gradient=gradient)
        return torch.autograd.grad(sol.y[1:].sin().sum(), (y0, scale))

    control = Adaptive(1e-9, 1e-9, per_sample=per_sample, jumps=JUMPS)
    exact = value("backprop", FixedStep(0.01, jumps=JUMPS))
    for a, b in zip(value(gradient, control), exact, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "per_sample, gradient",
    [(False, Checkpoint(keep="steps")), (False, Checkpoint(keep="stages")), (True, Checkpoint()),
     (False, "adjoint")],
    ids=["steps", "stages", "rows", "adjoint"],
)  # fmt: skip
def test_no_stage_sees_the_other_side_of_a_jump_for_rounding(dtype, per_sample, gradient):
    """t + h may lie a bit before the jump, or behind it, and be the jump as the field sees it."""
    draw = random.Random(0)
    for _ in range(40):
        start, jump = sorted(round(draw.uniform(0, 1), 2) for _ in range(2))
        if start == jump:
            continue
        w = torch.ones((), dtype=dtype, requires_grad=True)

        def field(t, y, jump=jump, w=w):
            before = torch.where(t < jump, 1.0, 100.0).to(y)
            return w * (before[:, None] if per_sample else before) * torch.ones_like(y)

        control = FixedStep(10.0, jumps=(jump,), per_sample=per_sample)
        y = solve(field, torch.zeros(2, 1, dtype=dtype), [start, jump], method="rk4",
                  control=control, gradient=gradient).y[-1]  # fmt: skip
        (found,) = torch.autograd.grad(y.sum(), w)
        assert torch.allclose(y, torch.full_like(y, jump - start), atol=1e-5)
        assert abs(found.item() - 2 * (jump - start)) < 1e-5
