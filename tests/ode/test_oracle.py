"""SciPy's solvers answer through the same door, with a gradient by the adjoint."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import grad

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import Event
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.oracle import EXPLICIT, STIFF
from cnf.ode.solution import solve

F64 = torch.float64
EACH = pytest.mark.parametrize("solver", [*EXPLICIT, *STIFF])


def coupled(t, y, w):
    x, (v,) = y["x"], y["v"]
    return {"x": torch.sin(x @ w) + t * v.sum(), "v": (-v * x.mean(),)}, (x**2).sum(-1)


def state():
    x = torch.tensor([[1.0, -0.3], [0.2, 0.8]], dtype=F64, requires_grad=True)
    return {"x": x, "v": (torch.tensor([0.5], dtype=F64, requires_grad=True),)}


def weight():
    return torch.tensor([[-0.5, 1.0], [-1.0, -0.2]], dtype=F64, requires_grad=True)


def solved(method, direction=1, **settings):
    y0, w = state(), weight()
    times = [0.0, direction * 0.4, direction * 1.5]
    settings = {"rtol": 1e-8, "atol": 1e-8, **settings}
    sol = solve(coupled, y0, times, method=method, params=[w], quadrature=True, **settings)
    return sol, (y0["x"], y0["v"][0], w)


@EACH
@pytest.mark.parametrize("direction", [1, -1])
def test_it_solves_states_of_parts_in_both_directions_with_their_integrals(solver, direction):
    exact, _ = solved("dopri8", direction, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        sol, _ = solved(f"scipy:{solver}", direction)
    pairs = [(sol.y["x"], exact.y["x"]), (sol.y["v"][0], exact.y["v"][0])]
    for got, wanted in (*pairs, (sol.integral, exact.integral)):
        assert torch.allclose(got, wanted, rtol=0, atol=2e-5 if solver == "BDF" else 2e-6)
    assert sol.stats.accepted > 0 and sol.stats.nfe == sol.stats.calls > 0
    assert (sol.stats.jacobians > 0) == (solver in ("Radau", "BDF"))


def test_integrals_do_not_steer_the_steps():
    y0 = torch.ones(2, dtype=F64)
    counts = []
    for size in (0.0, 1e6):
        field = lambda t, y: (-y, size * torch.sin(30 * t) * y)  # noqa: B023, E731
        sol = solve(field, y0, [0.0, 3.0], method="scipy:DOP853", quadrature=True)
        counts.append(sol.stats.accepted)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("gradient", "solvers", "direction"),
    [("adjoint", EXPLICIT, 1), ("adjoint", EXPLICIT, -1), (None, ["RK45", *STIFF], 1)],
)
def test_the_adjoint_comes_close_to_backprop_by_a_method_of_ours(gradient, solvers, direction):
    gradient = gradient or Adjoint(interpolate=True)
    tolerance = dict(rtol=1e-6, atol=1e-6)
    sol, tensors = solved("dopri8", direction, gradient="backprop", **tolerance)
    wanted = grad(sol.y["x"].sum() + sol.integral.sum(), tensors)
    for solver in solvers:
        sol, tensors = solved(f"scipy:{solver}", direction, gradient=gradient, **tolerance)
        got = grad(sol.y["x"].sum() + sol.integral.sum(), tensors)
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        assert sol.stats.nfe_backward > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_the_state_keeps_its_precision_and_the_field_sees_it(dtype):
    seen = set()

    def field(t, y):
        seen.add((t.dtype, y.dtype))
        return -y

    sol = solve(field, torch.ones(2, 3, dtype=dtype), [0.0, 1.0], method="scipy:LSODA")
    assert sol.y.dtype == dtype and seen == {(torch.float32, dtype)}
    assert torch.allclose(sol.y[-1].real, torch.tensor(1.0).neg().exp(), atol=1e-4)


def test_a_stiff_problem_is_solved():
    y0 = torch.zeros(1, dtype=F64)
    for solver in STIFF:
        sol = solve(
            lambda t, y: -1e6 * (y - torch.sin(t)), y0, [0.0, 3.0], method=f"scipy:{solver}"
        )
        assert (sol.y[-1] - 0.14112).abs() < 1e-4 and sol.stats.accepted < 300


def test_failures_are_integration_errors():
    y0 = torch.ones(2, dtype=F64)
    with pytest.raises(IntegrationError, match="SciPy gave up") as caught:
        solve(lambda t, y: y * y, y0, [0.0, 0.5, 2.0], method="scipy:RK45")
    assert caught.value.partial.shape == (2, 2) and 0.99 < caught.value.t < 1.01
    with pytest.raises(IntegrationError, match="max_steps=3"):
        solve(lambda t, y: -y, y0, [0.0, 20.0], method="scipy:RK45", max_steps=3)


REFUSED = {
    "fixed steps": (dict(step_size=0.1), "leave out step_size="),
    "fixed steps by a control": (dict(control=FixedStep(0.1)), "leave out step_size="),
    "steps of rows": (dict(control=Adaptive(per_sample=True)), "per_sample=True"),
    "jumps": (dict(control=Adaptive(jumps=(0.5,))), "jumps="),
    "an event": (dict(event=Event(lambda t, y: y.sum())), "neither event="),
    "a dense solution": (dict(dense=True), "nor dense=True"),
    "a solver that SciPy has not": (dict(method="scipy:RK4"), "scipy:LSODA"),
    "a gradient by replay": (dict(gradient="checkpoint", graph=True), "gradient='adjoint'"),
    "a gradient by backprop": (dict(gradient="backprop", graph=True), "gradient='adjoint'"),
    "a stiff gradient by replay": (
        dict(method="scipy:BDF", graph=True),
        r"Adjoint\(interpolate=True\), or solve under torch.no_grad\(\)",
    ),
    "a stiff solution solved back": (
        dict(method="scipy:Radau", gradient="adjoint", graph=True),
        "cannot be followed backward",
    ),
}


@pytest.mark.parametrize(("given", "says"), REFUSED.values(), ids=REFUSED)
def test_what_scipy_does_not_do_is_refused_with_a_sentence(given, says):
    given = {"method": "scipy:RK45", **given}
    y0 = torch.ones(3, 2, requires_grad=given.pop("graph", False))
    with pytest.raises(InputError, match=says):
        solve(lambda t, y: -y, y0, [0.0, 1.0], **given)


def test_scipy_is_not_loaded_until_it_is_asked_for():
    code = (
        "import sys, torch, cnf; cnf.solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0]); "
        "assert 'scipy' not in sys.modules; "
        "cnf.solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method='scipy:RK45'); "
        "assert 'scipy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["RK45", "DOP853", "Radau", "BDF", "LSODA"])
@pytest.mark.parametrize("until", [0.0, 0.5])
def test_a_field_that_is_not_finite_ends_the_solve(name, until):
    y0 = torch.ones(2, dtype=torch.float64)

    def field(t, y):
        return -y if t < until else y * math.nan

    with pytest.raises(IntegrationError, match=r"finite|gave up") as caught:
        solve(field, y0, [0.0, 1.0], method=f"scipy:{name}", max_steps=2000)
    assert caught.value.t <= 0.75
