"""The pairs are those that torchdiffeq's users know."""

from __future__ import annotations

import pytest

from cnf.compat.pair import DOPRI5, DOPRI8
from cnf.ode.tableau import TABLEAUS


def test_dopri5_estimates_its_error_as_shampine_does():
    assert DOPRI5.error is not None
    # his weights of fourth order, in the denominators of the paper
    fourth = (1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
    expected = [b - other for b, other in zip(DOPRI5.b, fourth, strict=True)]
    assert DOPRI5.error == pytest.approx(expected, abs=1e-15)


def test_dopri8_is_the_cores_with_weights_for_what_lies_between():
    core = TABLEAUS["dopri8"]
    assert (DOPRI8.a, DOPRI8.b, DOPRI8.c, DOPRI8.error) == (core.a, core.b, core.c, core.error)
    assert DOPRI8.dense_order == 5
    assert len(DOPRI8.dense) == DOPRI8.stages + 1
