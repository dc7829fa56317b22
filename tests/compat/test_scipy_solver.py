"""SciPy's solvers behind the same door."""

from __future__ import annotations

import pytest
import torch

from cnf.compat.torchdiffeq import odeint

BOTH_WAYS = pytest.mark.parametrize("end", [2.0, -2.0])


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
@BOTH_WAYS
def test_solvers_of_scipy_are_chosen_by_an_option(solver, end, pendulum, start):
    t = torch.linspace(0, end, 5, dtype=torch.float64)
    y = odeint(pendulum, start, t, method="scipy_solver", options={"solver": solver},
               rtol=1e-6, atol=1e-8)  # fmt: skip
    assert not y.requires_grad
    assert (y - pendulum.exact(t)).abs().max() < 1e-3


def test_a_failure_of_scipy_is_an_assertion():
    with pytest.raises(AssertionError, match="SciPy could not solve"):
        odeint(lambda t, y: y * y, torch.ones(1), torch.tensor([0.0, 3.0]), method="scipy_solver",
               options={"solver": "RK45"})  # fmt: skip


def test_tolerances_by_entry_reach_scipy():
    y0 = (torch.ones(2, dtype=torch.float64), torch.ones((), dtype=torch.float64))
    a, b = odeint(lambda t, y: (-y[0], y[1]), y0, times(0, 1), method="scipy_solver",
                  rtol=(1e-9, 1e-9), atol=(1e-9, 1e-12))  # fmt: skip
    torch.testing.assert_close(a[-1], torch.exp(-y0[0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(b[-1], torch.exp(y0[1]), rtol=0, atol=1e-7)


def test_an_unknown_solver_is_scipys_to_refuse():
    with pytest.raises(ValueError, match="`method` must be one of"):
        odeint(lambda t, y: -y, torch.ones(1), times(0, 1), method="scipy_solver",
               options={"solver": "RK77"})  # fmt: skip


def test_it_knows_no_events():
    with pytest.raises(ValueError, match="knows no events"):
        odeint(lambda t, y: -y, torch.ones(1), times(0, 1), method="scipy_solver",
               event_fn=lambda t, y: y - 0.5)  # fmt: skip
