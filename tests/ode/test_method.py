"""Every method meets its order on a nonlinear, non-autonomous problem, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from cnf.error import InputError
from cnf.ode.choice import choose_method
from cnf.ode.field import Evaluation
from cnf.ode.implicit import DiagonallyImplicit
from cnf.ode.jacobian import jacobian
from cnf.ode.method import ExplicitRungeKutta
from cnf.ode.solution import solve
from cnf.ode.tableau import TABLEAUS, Tableau

RALSTON = Tableau("ralston2", 2, c=(0, 2 / 3), a=((), (2 / 3,)), b=(1 / 4, 3 / 4))
METHODS = {**TABLEAUS, RALSTON.name: RALSTON}
EXPLICIT = {name: tableau for name, tableau in METHODS.items() if not tableau.implicit}
ADAPTIVE = {name: tableau for name, tableau in METHODS.items() if tableau.adaptive}
START = [[angle, speed] for angle in (-1.0, 0.2, 0.7, 1.5) for speed in (-0.6, 0.4)]
SPAN = 2.0
# steps across the span, by order: in the regime of small steps, and well above rounding
COUNTS = {1: (128, 512), 2: (64, 256), 3: (32, 128), 4: (24, 72), 5: (20, 60), 8: (10, 20)}


def driven(t, y):
    """A driven, damped pendulum: nonlinear, coupled, and it depends on time."""
    angle, speed = y[..., 0], y[..., 1]
    return torch.stack([speed, -torch.sin(angle) - 0.3 * angle * speed + torch.cos(2 * t)], -1)


def rate(t, y):
    return torch.sin(t) * y[..., 0] ** 2


def start():
    return torch.tensor(START, dtype=torch.float64)


def reference(direction):
    """(states, integrals) at the end, by another solver."""

    def right(t, flat):
        y, t = torch.tensor(flat).view(8, 3)[:, :2], torch.tensor(t)
        return torch.cat([driven(t, y), rate(t, y)[:, None]], 1).flatten().numpy()

    flat = torch.cat([start(), torch.zeros(8, 1)], 1).flatten()
    # as exact as it can be: order 8 comes down to 1e-13
    solved = solve_ivp(right, (0, direction * SPAN), flat, "DOP853", rtol=2.3e-14, atol=1e-15)
    end = torch.tensor(solved.y[:, -1]).view(8, 3)
    return end[:, :2], end[:, 2]


@pytest.fixture(scope="module", params=[1, -1], ids=["forward", "backward"])
def exact(request):
    return request.param, reference(request.param)


@pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)
def test_error_shrinks_at_the_stated_order(tableau, exact):
    direction, end = exact
    counts = COUNTS[tableau.order]
    errors = []
    for count in counts:
        sol = solve(
            lambda t, y: (driven(t, y), rate(t, y)),
            start(),
            [0.0, direction * SPAN],
            method=tableau,
            step_size=SPAN / count,
            quadrature=True,
        )
        got = (sol.y[-1], sol.integral[-1])
        errors.append([(x - y).norm().item() for x, y in zip(got, end, strict=True)])
    steps = math.log(counts[1] / counts[0])
    # order 5 is tuned: the error's next order still shows at these steps
    above = 1.3 if tableau.order == 5 else 0.5
    # order 8 is met from below, and rounding forbids smaller steps
    below = 0.3 if tableau.order == 8 else 0.2
    for coarse, fine in zip(*errors, strict=True):  # of the state, of the integral
        assert tableau.order - below <= math.log(coarse / fine) / steps <= tableau.order + above


class Watched:
    """A field of one leaf, as the core calls it, that notes every time it is called at."""

    def __init__(self, slope):
        self.slope, self.calls = slope, []

    def __call__(self, t, leaves):
        self.calls.append(t)
        return Evaluation((self.slope(torch.tensor(t, dtype=torch.float64), leaves[0]),), ())

    def jacobian(self, t, leaves):
        time = torch.tensor(t, dtype=torch.float64)
        return jacobian(lambda at: (self.slope(time, at[0]),), leaves, 1)


def one_step(tableau, h, estimate, slope=driven):
    field, y = Watched(slope), start()
    first = field(0.3, (y,))
    step = choose_method(tableau).step(field, 0.3, h, (y,), first, estimate)
    return step, field.calls


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("tableau", ADAPTIVE.values(), ids=ADAPTIVE)
def test_the_error_estimate_shrinks_one_order_above_the_embedded_solution(tableau, direction):
    sizes = (0.1, 0.025) if tableau.order < 8 else (0.4, 0.1)  # rounding below
    large, small = (one_step(tableau, direction * h, True)[0].error[0].norm().item() for h in sizes)
    assert math.log(large / small, 4) == pytest.approx(tableau.order, abs=0.3)


@pytest.mark.parametrize("tableau", ADAPTIVE.values(), ids=ADAPTIVE)
def test_the_error_estimate_is_of_the_size_of_the_embedded_solutions_error(tableau):
    # fehlberg2's first-order error is 1/512 of Euler's: it leads at small steps alone
    h = {"fehlberg2": 0.002, "dopri8": 0.2}.get(tableau.name, 0.05)
    step, _ = one_step(tableau, h, True)
    fine = solve(driven, start(), [0.3, 0.3 + h], method="dopri8", step_size=h / 20).y[-1]
    embedded = step.y[0] - step.error[0]
    assert 0.5 < (step.error[0].norm() / (fine - embedded).norm()).item() < 2.0


@pytest.mark.parametrize("tableau", ADAPTIVE.values(), ids=ADAPTIVE)
def test_the_last_stage_is_the_field_at_the_end_where_the_tableau_says_so(tableau):
    step, _ = one_step(tableau, 0.05, True)
    assert (step.last is not None) == tableau.fsal
    if step.last is not None:
        field_there = driven(torch.tensor(0.35, dtype=torch.float64), step.y[0])
        near = 1e-13 if tableau.implicit else 0.0  # it was solved for
        assert torch.allclose(step.last.slope[0], field_there, rtol=0.0, atol=near)


@pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)
def test_a_step_is_the_same_with_and_without_an_estimate_and_a_graph(tableau):
    plain, calls = one_step(tableau, 0.05, False)
    nodes = tableau.c[: tableau.used_stages]
    calls = dict.fromkeys(calls) if tableau.implicit else calls
    nodes = dict.fromkeys(nodes) if tableau.implicit else nodes
    assert list(calls) == pytest.approx([0.3 + c * 0.05 for c in nodes])
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    graphed, _ = one_step(tableau, 0.05, False, lambda t, y: driven(t, y) * w)
    assert torch.equal(plain.y[0], graphed.y[0]) and graphed.y[0].requires_grad
    if tableau.adaptive:
        assert torch.allclose(one_step(tableau, 0.05, True)[0].y[0], plain.y[0], atol=1e-16)


@pytest.mark.parametrize("tableau", EXPLICIT.values(), ids=EXPLICIT)
def test_a_step_rounds_the_state_once_whatever_its_number_of_stages(tableau):
    y = torch.linspace(1.0, 2.0, 1001)[:-1]
    slope = torch.rand(1000)
    first = Evaluation((slope,), ())
    step = ExplicitRungeKutta(tableau).step(lambda t, y: first, 0.0, 1e-3, (y,), first, False)
    exact = y.double() + 1e-3 * slope.double()
    half_a_unit = torch.finfo(torch.float32).eps / 2
    assert (step.y[0].double() - exact).abs().max() < 1.01 * half_a_unit


def test_a_method_is_chosen_by_name_tableau_or_as_it_is():
    assert choose_method("rk4").name == "rk4"
    assert choose_method("kvaerno5") == DiagonallyImplicit(TABLEAUS["kvaerno5"])
    assert choose_method(RALSTON) == ExplicitRungeKutta(RALSTON)
    method = ExplicitRungeKutta(RALSTON)
    assert choose_method(method) is method


@pytest.mark.parametrize(("method", "says"), [("dorpi5", "dopri5, tsit5"), (5, "int"), (None, "")])
def test_an_unknown_method_is_refused_with_the_names_of_the_known(method, says):
    with pytest.raises(InputError, match=f"method.*{says}"):
        choose_method(method)
