"""Steps fit what remains, grow and shrink within bounds, and refuse settings without a meaning."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnf.error import InputError
from cnf.ode.control import Adaptive, FixedStep

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
    ],
    ids=str,
)
def test_tolerances_without_a_meaning_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Adaptive(**settings)
