"""Implicit methods take few steps where a problem is stiff, and their gradients are exact."""

from __future__ import annotations

import functools
import math
import weakref

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.autograd import grad, gradcheck, gradgradcheck

from cnf.error import InputError, IntegrationError
from cnf.ode.choice import choose_method
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import Event
from cnf.ode.field import Evaluation
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.interpolate import interpolation_order
from cnf.ode.jacobian import jacobian
from cnf.ode.solution import solve
from cnf.ode.tableau import TABLEAUS

F64 = torch.float64
IMPLICIT = [name for name, tableau in TABLEAUS.items() if tableau.implicit]
EACH = pytest.mark.parametrize("method", IMPLICIT)
EACH_ADAPTIVE = pytest.mark.parametrize("method", ["kvaerno3", "kvaerno5"])


# stiff problems ------------------------------------------------------------------------------


def by_components(rates):
    """The field of a function of components, which serves SciPy as it is."""

    def field(t, y):
        return torch.stack(rates(t, y.unbind(-1)), -1)

    field.rates = rates
    return field


@by_components
def van_der_pol(t, y):
    x, v = y
    return [v, 1000 * (1 - x * x) * v - x]


@by_components
def robertson(t, y):
    a, b, c = y
    slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return [back - slow, slow - back - fast, fast]


SPECTRUM = torch.logspace(0, 6, 5, dtype=F64)
MIX = torch.linalg.qr(torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]


def linear(t, y):
    """Rates from 1 to 10⁶, mixed by a rotation, towards a moving state."""
    return -((y - torch.cos(t)) @ MIX * SPECTRUM) @ MIX.T


# field, start, times (of the van der Pol oscillator, a whole period and more), size of a component
PROBLEMS = {
    "van der pol": (van_der_pol, (2.0, 0.0), (0.0, 400.0, 1700.0), (2.0, 1e-3)),
    "robertson": (robertson, (1.0, 0.0, 0.0), (0.0, 0.4, 40.0, 1e5), (1.0, 3e-5, 1.0)),
    "linear": (linear, (0.0,) * 5, (0.0, 1e-3, 10.0), (1.0,) * 5),
}


@functools.cache
def by_radau(name):
    field, start, times, _ = PROBLEMS[name]

    def right(t, y):
        if hasattr(field, "rates"):
            return field.rates(t, y)
        return field(torch.tensor(t), torch.tensor(y)).numpy()

    rtol, atol = 1e-10, 1e-14 if name == "robertson" else 1e-11
    found = solve_ivp(right, (0.0, times[-1]), start, "Radau", times, rtol=rtol, atol=atol)
    return torch.tensor(found.y.T)


STEPS = {  # the most that may be tried
    ("kvaerno5", "van der pol", 1e-4): 260,
    ("kvaerno5", "van der pol", 1e-6): 450,
    ("kvaerno5", "robertson", 1e-4): 45,
    ("kvaerno5", "robertson", 1e-7): 130,
    ("kvaerno5", "linear", 1e-4): 50,
    ("kvaerno5", "linear", 1e-7): 190,
    ("kvaerno3", "van der pol", 1e-4): 700,
    ("kvaerno3", "robertson", 1e-5): 400,
    ("kvaerno3", "linear", 1e-5): 300,
}


LONG = {("kvaerno5", "van der pol", 1e-6), ("kvaerno3", "van der pol", 1e-4)}
LONG |= {("kvaerno3", "robertson", 1e-5)}


@pytest.mark.parametrize(
    ("method", "name", "tolerance"),
    [pytest.param(*key, marks=[pytest.mark.slow] if key in LONG else []) for key in STEPS],
)
def test_a_stiff_problem_is_solved_to_its_tolerance_in_few_steps(method, name, tolerance):
    field, start, times, sizes = PROBLEMS[name]
    atol = tolerance * (1e-6 if name == "robertson" else 1.0)
    start = torch.tensor(start, dtype=F64)
    sol = solve(field, start, times, method=method, rtol=tolerance, atol=atol)
    errors = (sol.y - by_radau(name)).abs() / torch.tensor(sizes, dtype=F64)
    assert errors.max() <= (5 if method == "kvaerno5" else 20) * tolerance
    stats, tried = sol.stats, sol.stats.accepted + sol.stats.rejected
    assert tried <= STEPS[method, name, tolerance]
    assert stats.nfe <= 18 * tried and stats.jacobians <= tried


def test_an_explicit_method_would_need_more_steps_than_it_is_given():
    field, start, times, _ = PROBLEMS["van der pol"]
    with pytest.raises(IntegrationError, match=r"stiff there .* try method='kvaerno5'"):
        solve(field, torch.tensor(start, dtype=F64), times, max_steps=1000)


@pytest.mark.parametrize("rate", [1e2, 1e5, 1e8])
@pytest.mark.parametrize("direction", [1, -1])
@EACH
def test_a_smooth_solution_is_followed_however_stiff_the_way_to_it(method, direction, rate):
    """Prothero and Robinson: y = sin t, whatever the rate at which others are drawn to it."""

    def drawn(t, y):
        return direction * rate * (torch.sin(t) - y) + torch.cos(t)

    y0 = torch.zeros(1, dtype=F64)
    times = [0.0, direction * 3.0]
    sol = solve(drawn, y0, times, method=method, step_size=0.1)
    assert (sol.y[-1] - math.sin(times[-1])).abs() < (2e-3 if rate == 1e2 else 1e-4)
    assert sol.stats.jacobians == 1
    if TABLEAUS[method].adaptive:
        sol = solve(drawn, y0, times, method=method, rtol=1e-6, atol=1e-6)
        assert (sol.y[-1] - math.sin(times[-1])).abs() < 1e-5
        assert sol.stats.accepted + sol.stats.rejected < 90


@EACH_ADAPTIVE
def test_a_linear_problem_needs_one_jacobian_and_one_factorization_for_each_length(
    method, monkeypatch
):
    lengths = []
    factored = torch.linalg.lu_factor_ex
    monkeypatch.setattr(
        torch.linalg, "lu_factor_ex", lambda m: lengths.append(len(m)) or factored(m)
    )
    y0 = torch.zeros(5, dtype=F64)
    sol = solve(linear, y0, [0.0, 1.0], method=method, step_size=1 / 16)
    assert sol.stats.jacobians == 1 and len(lengths) == 1
    lengths.clear()
    sol = solve(linear, y0, [0.0, 1.0], method=method, rtol=1e-5)
    assert sol.stats.jacobians == 1
    assert len(lengths) <= sol.stats.accepted + sol.stats.rejected


# rows ----------------------------------------------------------------------------------------


class Drawn:
    """Rows that are drawn to cos t at rates of their own, and turn their speed with y²."""

    def __init__(self, row_wise):
        self.row_wise = row_wise

    def __call__(self, t, y, rate):
        t = t.reshape(-1, 1)
        return -rate * (y - torch.cos(t)) * (1 + 0.3 * y.flip(1) ** 2)


RATES = torch.tensor([[1.0], [30.0], [1e3], [1e6]], dtype=F64)


def drawn_rows(chosen=slice(None), row_wise=True, **settings):
    rates = RATES[chosen]
    y0 = torch.tensor([[1.0, 1.0]], dtype=F64).repeat(len(rates), 1)
    return solve(Drawn(row_wise), y0, [0.0, 0.7, 2.0], rows=[rates], **settings)


@EACH_ADAPTIVE
def test_rows_of_different_stiffness_are_solved_each_with_its_own_jacobian(method):
    exact = drawn_rows(method="kvaerno5", rtol=1e-9, atol=1e-9)
    for control in (Adaptive(1e-6, 1e-6), Adaptive(1e-6, 1e-6, per_sample=True)):
        sol = drawn_rows(method=method, control=control)
        assert (sol.y - exact.y).abs().max() < 3e-5
    whole = drawn_rows(method=method, row_wise=False, step_size=0.1)
    blocks = drawn_rows(method=method, step_size=0.1)
    assert torch.allclose(whole.y, blocks.y, rtol=1e-12, atol=1e-12)


@EACH_ADAPTIVE
def test_a_row_with_steps_of_its_own_does_not_depend_on_its_neighbours(method):
    control = Adaptive(1e-6, 1e-6, per_sample=True)
    together = drawn_rows(method=method, control=control)
    assert len(set(together.stats.accepted.tolist())) > 1
    for row in range(len(RATES)):
        alone = drawn_rows(slice(row, row + 1), method=method, control=control)
        assert torch.allclose(alone.y[:, 0], together.y[:, row], rtol=1e-12, atol=1e-12)
        assert alone.stats.accepted[0] == together.stats.accepted[row]


def test_a_state_whose_jacobian_is_too_large_is_refused():
    with pytest.raises(InputError, match=r"field\.row_wise = True"):
        solve(lambda t, y: -y, torch.ones(4000, 2), [0.0, 1.0], method="kvaerno3")
    rows = type("Rows", (), {"row_wise": True, "__call__": lambda self, t, y: -y})()
    end = solve(rows, torch.ones(4000, 2), [0.0, 1.0], method="kvaerno3").y[-1]
    assert torch.allclose(end, torch.full((4000, 2), math.exp(-1)), atol=1e-4)


# states, and what lies along the way ---------------------------------------------------------


@EACH
def test_parts_of_a_state_are_solved_together(method):
    """Each part turns on the other: only the whole Jacobian solves the steps at once."""

    def coupled(t, y):
        a, (b,) = y["a"], y["b"]
        return {"a": -1000 * (a - b.sum()), "b": (-b + 0.1j * a.mean(),)}

    y0 = {
        "a": torch.full((2, 3), 2.0, dtype=torch.complex128),
        "b": (torch.ones(2, dtype=torch.complex128),),
    }
    sol = solve(coupled, y0, [0.0, 0.3, 1.0], method=method, step_size=0.1)
    assert sol.y["a"].shape == (3, 2, 3) and sol.stats.jacobians == 1
    fine = solve(coupled, y0, [0.0, 0.3, 1.0], method="kvaerno5", rtol=1e-10, atol=1e-10)
    near = {1: 0.1, 2: 3e-3, 3: 1e-3, 5: 1e-3}[TABLEAUS[method].order]
    assert (sol.y["a"][-1] - fine.y["a"][-1]).abs().max() < near
    assert (sol.y["b"][0] - fine.y["b"][0]).abs().max() < near


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@EACH_ADAPTIVE
def test_single_precision_meets_a_loose_tolerance(method, tolerance):
    start = torch.tensor(PROBLEMS["van der pol"][1])
    sol = solve(van_der_pol, start, [0.0, 400.0], method=method, rtol=tolerance, atol=tolerance)
    assert sol.y.dtype == torch.float32
    exact = by_radau("van der pol")[1]
    assert (sol.y[-1].double() - exact).abs()[0] < 30 * tolerance


@EACH
def test_integrals_have_the_methods_order_and_do_not_steer_the_steps(method):
    y0 = torch.ones(2, dtype=F64)
    errors = []
    for count in (20, 40):
        sol = solve(
            lambda t, y: (-y * torch.cos(t), torch.sin(t) * y),
            y0, [0.0, 1.0], method=method, step_size=1 / count, quadrature=True,
        )  # fmt: skip
        plain = solve(
            lambda t, y: -y * torch.cos(t), y0, [0.0, 1.0], method=method, step_size=1 / count
        )
        assert torch.equal(sol.y, plain.y)
        errors.append((sol.integral[-1] - INTEGRAL).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > TABLEAUS[method].order - 0.4


# ∫ sin t · exp(−sin t) dt from 0 to 1, by SciPy
INTEGRAL = solve_ivp(
    lambda t, y: [math.sin(t) * math.exp(-math.sin(t))], (0, 1), [0.0], rtol=1e-13, atol=1e-15
).y[0, -1]


@EACH
def test_the_solution_between_the_steps_has_the_order_that_is_stated(method):
    def curve(t, y):
        return torch.stack([y[1], -torch.sin(y[0]) + torch.cos(t)])

    y0, inside = torch.tensor([1.0, 0.5], dtype=F64), torch.linspace(0.05, 1.95, 39, dtype=F64)
    exact = solve(curve, y0, [0.0, *inside.tolist(), 2.0], method="dopri8", rtol=1e-12, atol=1e-12)
    errors = []
    for count in (10, 20):
        sol = solve(curve, y0, [0.0, 2.0], method=method, step_size=2 / count, dense=True)
        errors.append((sol(inside) - exact.y[1:-1]).abs().max().item())
    order = min(TABLEAUS[method].order, interpolation_order(choose_method(method)) + 1)
    assert order - 0.35 < math.log2(errors[0] / errors[1]) < order + 1.2


@EACH_ADAPTIVE
def test_between_the_steps_of_a_stiff_solve_nothing_is_magnified(method):
    field, start, _, _ = PROBLEMS["van der pol"]
    y0, inside = torch.tensor(start, dtype=F64), torch.linspace(1.0, 700.0, 50, dtype=F64)
    sol = solve(field, y0, [0.0, 800.0], method=method, rtol=1e-6, atol=1e-6, dense=True)
    fine = solve(field, y0, [0.0, *inside.tolist()], method="kvaerno5", rtol=1e-9, atol=1e-9)
    errors = (sol(inside) - fine.y[1:]).abs().amax(0)
    assert errors[0] < 3e-4 and errors[1] < 1e-5


@EACH_ADAPTIVE
def test_an_event_is_met_where_the_solution_is_fast(method):
    field, start, _, _ = PROBLEMS["van der pol"]
    event = Event(lambda t, y: y[0])
    y0 = torch.tensor(start, dtype=F64)
    sol = solve(field, y0, [0.0, math.inf], method=method, rtol=1e-7, atol=1e-7, event=event)
    assert sol.event_time.item() == pytest.approx(807.0849, abs=4e-2)
    assert abs(sol.y[-1, 0].item()) < 1e-6 and sol.y[-1, 1] < -600


@pytest.mark.parametrize(("rows", "direction"), [(False, 1), (False, -1), (True, 1)])
@EACH_ADAPTIVE
def test_a_jump_is_seen_from_the_side_of_the_step_even_by_a_stage_beyond_it(
    method, rows, direction
):
    seen = []

    def jumping(t, y):
        t = direction * t
        seen.extend(t.detach().reshape(-1).tolist())
        return direction * -200 * (y - torch.where(t > 1.0, 1.0, -1.0).reshape(-1, 1))

    y0 = torch.zeros(2, 1, dtype=F64)
    jumps = (float(direction),)
    control = Adaptive(1e-6, 1e-6, per_sample=rows, jumps=jumps)
    sol = solve(jumping, y0, [0.0, direction * 1.0], method=method, control=control)
    assert (sol.y[-1] + 1).abs().max() < 1e-6 and max(seen) < 1.0
    sol = solve(
        jumping, y0, [0.0, direction * 1.0, direction * 2.0], method=method, control=control
    )
    assert (sol.y[-1] - 1).abs().max() < 1e-6
    landing = Adaptive(1e-6, 1e-6, per_sample=rows, land_on=(direction * 0.7,))
    ends = [
        solve(lambda t, y: direction * -y, y0 + 1, [0.0, direction * 1.0], method=method, control=c)
        for c in (landing, Adaptive(1e-6, 1e-6, per_sample=rows))
    ]
    assert torch.allclose(ends[0].y, ends[1].y, atol=1e-5)


# Newton's iteration --------------------------------------------------------------------------


def square(t, y):
    return y * y


@pytest.mark.parametrize("rows", [False, True])
def test_a_fixed_step_whose_equation_has_no_solution_is_an_error(rows):
    """k = (1 + hk)² has no real root for h > 1/4."""
    y0 = torch.tensor([[1e-3], [1.0]], dtype=F64)
    ends = dict(method="implicit_euler", control=FixedStep(0.2, per_sample=rows))
    assert solve(square, y0, [0.0, 0.2], **ends).y[-1, 1].item() == pytest.approx(
        (1 - math.sqrt(1 - 4 * 0.2)) / (2 * 0.2), abs=1e-12
    )
    control = FixedStep(0.3, per_sample=rows)
    for sign in (1.0, -1.0):
        field = functools.partial(lambda sign, t, y: sign * y * y, sign)
        with pytest.raises(
            IntegrationError, match=r"Newton's iteration .* try a smaller"
        ) as caught:
            solve(field, y0, [0.0, sign * 0.3], method="implicit_euler", control=control)
        assert caught.value.t == 0.0 and caught.value.partial.shape == (1, 2, 1)
    with pytest.raises(IntegrationError, match=r"\(rows 1\)"):
        solve(
            Rows(square),
            y0,
            [0.0, 0.3],
            method="implicit_euler",
            control=FixedStep(0.3, per_sample=rows),
        )


class Rows:
    row_wise = True

    def __init__(self, call):
        self.call = call

    def __call__(self, t, y):
        return self.call(t, y)


@EACH_ADAPTIVE
@pytest.mark.parametrize("rows", [False, True])
def test_a_step_whose_equations_are_not_solved_is_tried_again_shorter(method, rows):
    y0 = torch.tensor([[0.5], [1.0]], dtype=F64)
    control = Adaptive(1e-3, 1e-3, first_step=0.9, per_sample=rows)
    sol = solve(Rows(square), y0, [0.0, 0.9], method=method, control=control)
    assert torch.allclose(sol.y[-1], y0 / (1 - 0.9 * y0), rtol=5e-2)
    assert np.max(np.asarray(sol.stats.rejected)) >= 1


@EACH_ADAPTIVE
def test_a_field_that_ends_somewhere_is_solved_up_to_there(method):
    """Newton's iteration leaves the domain of the root: those steps are refused."""
    y0 = torch.ones(1, dtype=F64)
    sol = solve(lambda t, y: -torch.sqrt(y), y0, [0.0, 1.99], method=method, rtol=1e-6, atol=1e-9)
    assert sol.y[-1].item() == pytest.approx(0.005**2, abs=1e-6)
    with pytest.raises(IntegrationError, match=r"vanished|refused"):
        solve(lambda t, y: -torch.sqrt(y) - 0.1, y0, [0.0, 3.0], method=method)


@pytest.mark.parametrize(
    "slope", [square, lambda t, y: y * math.nan, lambda t, y: torch.log(1 - t) + 0 * y]
)
@pytest.mark.parametrize("steps", [dict(), dict(step_size=0.04)], ids=["adaptive", "fixed"])
@EACH_ADAPTIVE
def test_what_cannot_be_continued_ends(method, steps, slope):
    with pytest.raises(IntegrationError, match="try"):
        solve(slope, torch.ones(2, dtype=F64), [0.0, 3.0], method=method, **steps)


class Hardening:
    """A field as the core calls it, which turns a million times stiffer at t = 1."""

    jacobians = 0

    def __call__(self, t, leaves):
        return Evaluation((-(1e6 if t >= 1 else 1.0) * (leaves[0] - math.cos(t)),), ())

    def jacobian(self, t, leaves):
        self.jacobians += 1
        return jacobian(lambda at: self(t, at).slope, leaves, 1)


@EACH_ADAPTIVE
def test_a_jacobian_that_has_aged_is_renewed_within_the_step(method):
    field, y = Hardening(), (torch.ones(2, dtype=F64),)
    steps = choose_method(method).begin()
    for t, taken in ((0.0, 1), (0.5, 1), (1.0, 2), (1.1, 2)):
        step = steps.step(field, t, 0.1, y, field(t, y), True)
        assert step.solved and field.jacobians == taken


def test_no_graph_is_kept_of_the_iteration():
    """What backpropagation keeps does not grow with the turns that a root takes."""
    kept = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    def keep(strength):
        y0 = torch.full((3,), 0.5, dtype=F64, requires_grad=True)
        settings = dict(method="implicit_euler", step_size=0.5, gradient="backprop")
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            sol = solve(lambda t, y: -strength * torch.sinh(y), y0, [0.0, 1.0], **settings)
        return len(kept), sol

    few, easy = keep(1.0)
    more, hard = keep(8.0)
    assert more == 2 * few and hard.stats.jacobians > easy.stats.jacobians + 5


# gradients -----------------------------------------------------------------------------------


def reaction(t, y, k):
    """Stiff and nonlinear, with rates that a gradient must reach."""
    a, b = y.unbind(-1)
    fast = 100 * k[0] * (a - b**2)
    return torch.stack([-fast + torch.cos(t) * k[1], fast - b], -1)


def rated(t, y, k):
    return reaction(t, y, k), (y**2).sum(-1) * k[1]


def leaves():
    y0 = torch.tensor([[0.7, 0.8], [0.1, 0.3]], dtype=F64, requires_grad=True)
    return y0, torch.tensor([1.3, 0.7], dtype=F64, requires_grad=True)


@EACH
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradients_agree_with_differences(method, gradient):
    def outputs(y0, k):
        sol = solve(
            rated, y0, [0.0, 0.25, 0.5], method=method, step_size=0.25, params=[torch.exp(k) / 3],
            gradient=gradient, quadrature=True,
        )  # fmt: skip
        return sol.y, sol.integral

    assert gradcheck(outputs, leaves(), atol=1e-6, fast_mode=True)


@EACH_ADAPTIVE
@pytest.mark.parametrize("t", [(0.0, 0.3, 1.0), (1.0, 0.9, 0.85)], ids=["on", "back"])
def test_gradients_by_times_and_captured_leaves_agree_with_differences(method, t):
    w = torch.randn(2, 2, dtype=F64, requires_grad=True)
    y0 = torch.randn(3, 2, dtype=F64)

    def outputs(t, w):
        settings = dict(method=method, step_size=0.1, gradient=Checkpoint("sqrt"))
        return solve(lambda t, y: torch.tanh(y @ w) * torch.cos(t), y0, t, **settings).y

    t = torch.tensor(t, dtype=F64, requires_grad=True)
    assert gradcheck(outputs, (t, w), atol=1e-4, fast_mode=True)


@EACH_ADAPTIVE
@pytest.mark.parametrize("rows", [False, True])
def test_on_adaptive_steps_checkpoint_comes_as_close_to_backprop_as_newtons_iteration(method, rows):
    found = []
    for gradient in ("backprop", "checkpoint"):
        y0, k = leaves()
        control = Adaptive(1e-5, 1e-5, per_sample=rows)
        sol = solve(
            rated, y0, [0.0, 0.5, 2.0], method=method, control=control, params=[k],
            gradient=gradient, quadrature=True,
        )  # fmt: skip
        found.append((sol, grad(sol.y.sum() + sol.integral[-1].sum(), (y0, k))))
    (one, wanted), (two, got) = found
    if rows:  # backpropagation goes the ways of the rows again
        assert torch.allclose(one.y, two.y, atol=1e-6)
    else:
        assert torch.equal(one.y, two.y) and torch.equal(one.integral, two.integral)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@EACH_ADAPTIVE
def test_the_adjoint_reads_the_solution_off_and_comes_close_to_backprop(method):
    tolerance = 1e-6
    found = []
    for gradient in ("backprop", Adjoint(interpolate=True)):
        y0, k = leaves()
        sol = solve(
            rated, y0, [0.0, 0.5, 2.0], method=method, rtol=tolerance, atol=tolerance, params=[k],
            gradient=gradient, quadrature=True,
        )  # fmt: skip
        found.append(grad(sol.y.sum() + sol.integral[-1].sum(), (y0, k)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=3e-4, atol=3e-4)
    assert sol.stats.nfe_backward > 0 and sol.stats.jacobians > 0


@EACH
@pytest.mark.parametrize("rows", [False, True])
def test_the_adjoint_that_solves_the_state_back_is_refused(method, rows):
    y0, k = leaves()
    control = FixedStep(0.1, per_sample=rows)
    with pytest.raises(InputError, match=r"cannot be followed backward.*'checkpoint'"):
        solve(
            reaction, y0, [0.0, 1.0], method=method, control=control, params=[k], gradient="adjoint"
        )


@pytest.mark.parametrize("method", [*IMPLICIT, "auto", "scipy:LSODA"])
def test_steps_that_cannot_be_undone_are_refused(method):
    y0, k = leaves()
    settings = dict(method=method, params=[k], gradient="reversible")
    if TABLEAUS.get(method) is not None:
        settings["step_size"] = 0.1
    with pytest.raises(InputError, match=r"undoes explicit steps|cannot be repeated"):
        solve(reaction, y0, [0.0, 1.0], **settings)


@EACH
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_second_derivatives_are_exact_and_third_ones_refused(method, gradient):
    def end(y0, k):
        settings = dict(method=method, step_size=0.25, params=[k], gradient=gradient)
        return solve(reaction, y0[0], [0.0, 0.25], **settings).y[-1]

    assert gradgradcheck(end, leaves(), atol=1e-5)
    y0, k = leaves()
    (first,) = grad(end(y0, k).sum(), y0, create_graph=True)
    with pytest.raises(InputError, match=r"first and second derivatives"):
        grad(first.sum(), k, create_graph=True)


@EACH_ADAPTIVE
@pytest.mark.parametrize("gradient", ["checkpoint", Adjoint(interpolate=True)], ids=str)
def test_a_gradient_through_a_stiff_solve_is_that_of_the_limit(method, gradient):
    """On the slow manifold a = b² the fast rate has no influence, and backward stays stable."""
    y0 = torch.tensor([0.64, 0.8], dtype=F64, requires_grad=True)
    k = torch.tensor([1e4, 0.7], dtype=F64, requires_grad=True)
    settings = dict(method=method, rtol=1e-5, atol=1e-7, params=[k], gradient=gradient)
    sol = solve(reaction, y0, [0.0, 2.0], **settings)
    by_y0, by_k = grad(sol.y[-1, 1], (y0, k))
    assert by_k[0].abs() < 1e-6 and 0.05 < by_k[1] < 5
    # what is added to a or to b is shared out at once: a + b is what counts
    assert torch.allclose(by_y0[0], by_y0[1], rtol=1e-3)
    stats = sol.stats
    assert stats.accepted < 60 and stats.nfe_backward < 2500
