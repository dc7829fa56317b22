"""Where every row has its own steps, it takes those that it takes alone, in any company."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import Event
from cnf.ode.solution import GRADIENTS, solve
from cnf.ode.tableau import TABLEAUS

F64 = torch.float64
ADAPTIVE = Adaptive(1e-5, 1e-7, per_sample=True)
FIXED = FixedStep(0.13, per_sample=True)
FINE = FixedStep(0.2, per_sample=True)
CONTROLS = {"adaptive": ADAPTIVE, "fixed": FIXED}
EACH_CONTROL = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
EACH_GRADIENT = pytest.mark.parametrize(  # reversible steps are shared, and not looked into
    "gradient", [name for name in GRADIENTS if name != "reversible"]
)
LOOSE = Adaptive(1e-3, 1e-4, per_sample=True)
SHORT = FixedStep(0.03, per_sample=True)  # where an implicit step's equations have a solution


def control_for(tableau, kind, control):
    if kind == "fixed":
        return SHORT if tableau.implicit else control
    return LOOSE if tableau.order < 3 else control


METHODS = {
    f"{name} {kind}": (name, control_for(tableau, kind, control))
    for name, tableau in TABLEAUS.items()
    for kind, control in CONTROLS.items()
    if tableau.adaptive or kind == "fixed"
}
EACH_METHOD = pytest.mark.parametrize(("method", "control"), METHODS.values(), ids=METHODS)


class Swing:
    """A driven pendulum of each row's own pace, (batch, 2); notes how many rows it is asked for."""

    def __init__(self, row_wise):
        self.row_wise, self.sizes = row_wise, []

    def __call__(self, t, y, pace):
        self.sizes.append(len(y))
        assert t.shape == (len(y),)
        angle, speed = y.unbind(-1)
        pull = torch.cos(2 * t) - torch.sin(angle) - 0.1 * speed * torch.cos(speed)
        return torch.stack([pace * speed, pace * pull], -1)


EACH_FIELD = pytest.mark.parametrize("row_wise", [True, False], ids=["row-wise", "masked"])
PACES = torch.tensor([1.0, 7.0, 0.2, 3.0, 12.0], dtype=F64)
STARTS = torch.tensor([[0.3, 1.0], [-1.0, 0.2], [2.0, 0.0], [0.0, -0.5], [1.0, 1.0]], dtype=F64)
OUTPUTS = torch.tensor([[0.0, 0.4, 0.8], [0.5, 0.1, -0.1], [0.0, 0.9, 1.2], [1.0, 0.9, 0.3],
                        [0.2, 0.3, 0.7]], dtype=F64).T  # fmt: skip


def swung(rows, t=(0.0, 0.3, 1.0), row_wise=True, **settings):
    """The rows of that batch by these numbers, in this order."""
    rows = torch.as_tensor(rows)
    times = t[:, rows] if isinstance(t, torch.Tensor) and t.ndim == 2 else t
    return solve(Swing(row_wise), STARTS[rows], times, rows=[PACES[rows]], **settings)


# a row is alone in its batch ---------------------------------------------------------------------


@EACH_METHOD
@EACH_FIELD
def test_a_row_takes_the_same_steps_to_the_same_state_in_any_batch(method, control, row_wise):
    t = OUTPUTS if row_wise else (0.3, 0.1, 0.0)
    settings = dict(t=t, row_wise=row_wise, method=method, control=control)
    order = [3, 0, 4, 1, 2]
    whole, mixed = swung(range(5), **settings), swung(order, **settings)
    if TABLEAUS[method].implicit and not row_wise:
        # then the equations of all rows are one system, solved to the tolerance of all
        assert torch.allclose(whole.y[:, order], mixed.y, rtol=1e-4, atol=1e-4)
        return
    for place, row in enumerate(order):
        alone = swung([row], **settings)
        assert torch.equal(alone.y[:, 0], whole.y[:, row])
        assert torch.equal(alone.y[:, 0], mixed.y[:, place])
        for name in ("nfe", "accepted", "rejected"):
            mine = getattr(alone.stats, name)
            assert mine.shape == (1,)
            assert mine == getattr(whole.stats, name)[row] == getattr(mixed.stats, name)[place]


def test_a_net_gives_a_row_the_same_steps_and_its_state_to_rounding():
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    y0, settings = 2 * torch.randn(64, 2, dtype=F64), dict(control=ADAPTIVE)
    with torch.no_grad():
        whole = solve(lambda t, y: 3 * net(y), y0, [0.0, 1.0], **settings)
        for row in range(0, 64, 9):
            alone = solve(lambda t, y: 3 * net(y), y0[row : row + 1], [0.0, 1.0], **settings)
            assert alone.stats.accepted == whole.stats.accepted[row]
            assert torch.allclose(alone.y[:, 0], whole.y[:, row], rtol=1e-12, atol=1e-12)


@EACH_FIELD
def test_own_steps_meet_the_tolerance_of_shared_ones(row_wise):
    got = swung(range(5), row_wise=row_wise, control=Adaptive(1e-8, 1e-8, per_sample=True))
    for row in range(5):
        exact = swung([row], method="dopri8", control=FixedStep(0.01, per_sample=True)).y
        assert torch.allclose(got.y[:, row], exact[:, 0], rtol=1e-6, atol=1e-6)


def test_rows_that_have_arrived_leave_a_row_wise_field_and_no_other():
    leaving, staying = Swing(True), Swing(False)
    for field in (leaving, staying):
        solve(field, STARTS, OUTPUTS, rows=[PACES], control=ADAPTIVE)
    sizes = leaving.sizes[1:]  # the first look is at the whole batch
    assert sizes == sorted(sizes, reverse=True) and set(sizes) >= {5, 1}
    assert set(staying.sizes) == {5}


def test_rows_of_different_stiffness_need_far_fewer_evaluations_than_with_shared_steps():
    rates = torch.tensor([1.0] * 10 + [5.0] * 5 + [50.0], dtype=F64)

    def field(t, y, rate):
        return -rate[:, None] * (y - torch.cos(rate * t.squeeze())[:, None])

    y0, t = torch.ones(16, 1, dtype=F64), [0.0, 4.0]
    shared = solve(field, y0, t, rows=[rates], rtol=1e-6, atol=1e-6)
    own = solve(field, y0, t, rows=[rates], control=Adaptive(1e-6, 1e-6, per_sample=True))
    assert torch.allclose(shared.y, own.y, atol=1e-4)
    assert own.stats.nfe.sum() * 3 < shared.stats.nfe * 16
    assert own.stats.nfe[0] * 10 < own.stats.nfe[-1]


# shapes ------------------------------------------------------------------------------------------


@EACH_CONTROL
@pytest.mark.parametrize("row_wise", [True, False])
def test_parts_of_a_state_may_have_any_shape_after_the_batch(control, row_wise):
    class Parts:
        def __call__(self, t, y):
            turn = y["z"] * 1j * (1 + t)[:, None]
            return {"x": -y["x"] * t, "m": y["x"][:, None, None] * torch.cos(y["m"]), "z": turn}

    field = Parts()
    field.row_wise = row_wise
    y0 = {
        "x": torch.linspace(0.5, 2, 4, dtype=F64),
        "m": torch.randn(4, 2, 3, dtype=F64),
        "z": torch.ones(4, 1, dtype=torch.complex128),
    }
    t = torch.stack([torch.zeros(4), torch.tensor([1.0, 0.2, -0.5, 2.0])])
    sol = solve(field, y0, t, control=control)
    for key, leaf in y0.items():
        assert sol.y[key].shape == (2, *leaf.shape) and sol.y[key].dtype == leaf.dtype
    end = t[-1].double()
    assert torch.allclose(sol.y["x"][-1], y0["x"] * torch.exp(-(end**2) / 2), atol=1e-4)
    assert torch.allclose(sol.y["z"][-1, :, 0], torch.exp(1j * (end + end**2 / 2)), atol=1e-3)


@EACH_CONTROL
@EACH_FIELD
@EACH_GRADIENT
@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_may_be_empty_or_hold_one_row(control, row_wise, gradient, batch):
    start, pace = STARTS[:batch].clone().requires_grad_(), PACES[:batch].clone().requires_grad_()
    sol = solve(Swing(row_wise), start, [0.0, 1.0], rows=[pace], control=control, gradient=gradient)
    assert sol.y.shape == (2, batch, 2) and sol.stats.nfe.shape == (batch,)
    by_start, by_pace = grad(sol.y[-1].sum(), (start, pace), allow_unused=batch == 0)
    assert by_start.shape == (batch, 2)
    assert by_pace is None or by_pace.shape == (batch,)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_dense_solution_of_any_batch_is_evaluated_at_any_number_of_times(batch):
    sol = solve(lambda t, y: -y, torch.ones(batch, 2), [0.0, 1.0], control=ADAPTIVE, dense=True)
    assert sol(0.5).shape == (batch, 2)
    assert sol(torch.linspace(0, 1, 5)).shape == (5, batch, 2)
    assert sol(torch.rand(4, batch)).shape == (4, batch, 2)


# what is integrated along the path ---------------------------------------------------------------


def with_rates(t, y, pace, w):
    """Swing's cousin with a weight, and rates that read everything."""
    t = t[:, None]
    slope = pace[:, None] * torch.tanh(y @ w) * torch.cos(t) - 0.2 * y
    return slope, ((y**2 * t).sum(-1) * pace, torch.sin(w.sum() * y))


@EACH_CONTROL
@pytest.mark.parametrize("t", [(0.0, 0.4, 1.0), OUTPUTS], ids=["shared times", "own times"])
def test_an_integral_equals_what_a_part_of_the_state_would_become(control, t):
    w = torch.randn(2, 2, dtype=F64)

    def as_state(t, state, pace):
        slope, rates = with_rates(t, state[0], pace, w)
        return slope, *rates

    zeros = torch.zeros(5, dtype=F64), torch.zeros(5, 2, dtype=F64)
    settings = dict(rows=[PACES], control=control if control is FIXED else TIGHT)
    sol = solve(with_rates, STARTS, t, params=[w], quadrature=True, **settings)
    parts = solve(as_state, (STARTS, *zeros), t, **settings).y[1:]
    for got, wanted in zip(sol.integral, parts, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)


# gradients ---------------------------------------------------------------------------------------

TIGHT = Adaptive(1e-8, 1e-8, per_sample=True)


def leaves():
    torch.manual_seed(3)
    w = torch.randn(2, 2, dtype=F64)
    times = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    return [x.clone().requires_grad_() for x in (STARTS, PACES / 5, w, times)]


def outputs(y0, pace, w, t, row_wise=False, **settings):
    """States and integrals at every time, from tensors that were computed."""
    field = lambda t, y, pace, w: with_rates(t, y, pace, w)  # noqa: E731
    field.row_wise = row_wise
    sol = solve(field, y0 * 1, t, rows=[pace * 1], params=[w * 1], quadrature=True, **settings)
    return (sol.y, *sol.integral)


def gradients(own_times, **settings):
    tensors = leaves()
    if own_times:
        tensors[3] = OUTPUTS.clone().requires_grad_()
    found = outputs(*tensors, **settings)
    loss = sum((torch.sin(3 * x) * torch.linspace(1, 2, x.numel()).view(x.shape)).sum()
               for x in found)  # fmt: skip
    return found, grad(loss, tensors)


EACH_TIMES = pytest.mark.parametrize("own_times", [False, True], ids=["shared times", "own times"])


@EACH_METHOD
@EACH_FIELD
def test_checkpoint_equals_backprop_on_the_same_steps(method, control, row_wise):
    own_times = row_wise == (control is FIXED)  # each with each
    settings = dict(method=method, control=control, row_wise=row_wise)
    values, wanted = gradients(own_times, gradient="backprop", **settings)
    again, got = gradients(own_times, gradient="checkpoint", **settings)
    for a, b in zip((*again, *got), (*values, *wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@EACH_FIELD
@EACH_TIMES
def test_the_adjoint_comes_close_to_backprop(row_wise, own_times):
    settings = dict(control=TIGHT, row_wise=row_wise)
    _, wanted = gradients(own_times, gradient="backprop", **settings)
    _, got = gradients(own_times, gradient="adjoint", **settings)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@EACH_FIELD
@EACH_TIMES
def test_the_gradients_of_own_steps_are_those_of_shared_ones(row_wise, own_times):
    settings = dict(control=TIGHT, row_wise=row_wise)
    _, got = gradients(own_times, **settings)
    *tensors, times = leaves()
    tensors.append(OUTPUTS.clone().requires_grad_() if own_times else times)
    total = torch.zeros((), dtype=F64)
    weights = [torch.linspace(1, 2, n).view(3, 5, *more) for n, *more in ((30, 2), (15,), (30, 2))]
    for row in range(5):
        y0, pace, w, t = tensors
        t = t[:, row] if own_times else t
        call = lambda t, y, pace, w: with_rates(t.reshape(1), y, pace, w)  # noqa: E731
        sol = solve(call, y0[row : row + 1], t, rows=[pace[row : row + 1]], params=[w],
                    quadrature=True, rtol=1e-8, atol=1e-8)  # fmt: skip
        for x, weight in zip((sol.y, *sol.integral), weights, strict=True):
            total = total + (torch.sin(3 * x) * weight[:, row : row + 1]).sum()
    for a, b in zip(got, grad(total, tensors), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@EACH_GRADIENT
@EACH_FIELD
@EACH_TIMES
def test_gradients_agree_with_differences(gradient, row_wise, own_times):
    tensors = leaves()
    if own_times:
        tensors[3] = OUTPUTS.clone().requires_grad_()
    settings = dict(gradient=gradient, row_wise=row_wise, control=FINE)
    assert gradcheck(lambda *x: outputs(*x, **settings), tensors, atol=1e-5, fast_mode=True)


# where it cannot go on ---------------------------------------------------------------------------


def spoiled(t, y):
    """Row 2 is no number from t = 0.6 on, or from the time in `y`'s second column."""
    bad = torch.tensor([False, False, True, False]) & (t > 0.6)
    return torch.where(bad[:, None], math.nan, -y)


Y0 = torch.ones(4, 1, dtype=F64)
FAILING = {
    "a field that turns NaN": (dict(field=spoiled), "non-finite.*rows 2"),
    "a field that is NaN": (
        dict(field=lambda t, y: torch.where(torch.arange(4)[:, None] == 1, math.nan, y)),
        "non-finite.*rows 1",
    ),
    "a solution that explodes": (
        dict(field=lambda t, y: y * y, y0=torch.tensor([[0.1], [5.0], [0.1], [0.2]], dtype=F64)),
        "vanished|non-finite|not finite",
    ),
    "a rate that is no number": (
        dict(
            field=lambda t, y: (-y, torch.where(torch.arange(4) == 3, math.inf, y[:, 0])),
            quadrature=True,
        ),
        "rate turned non-finite.*rows 3",
    ),
}


@EACH_CONTROL
@pytest.mark.parametrize(("given", "says"), FAILING.values(), ids=FAILING)
def test_a_row_that_cannot_go_on_is_named(control, given, says):
    with pytest.raises(IntegrationError, match=says) as caught:
        solve(**{"y0": Y0, "t": [0.0, 0.5, 1.0], "control": control, **given})
    error = caught.value
    assert "try" in str(error) and error.step > 0 and error.nfe > 0
    assert error.partial.shape[1:] == (4, 1) and error.partial.isfinite().all()


@EACH_CONTROL
@pytest.mark.parametrize("extra", [{}, dict(land_on=(0.05, 0.3)), dict(jumps=(0.05, 0.55))])
def test_what_every_row_has_reached_is_in_the_error(control, extra):
    control = replace(control, **extra)
    with pytest.raises(IntegrationError) as caught:
        solve(spoiled, Y0, [0.0, 0.1, 0.2, 0.5, 1.0], control=control)
    wanted = torch.exp(-torch.tensor([0.0, 0.1, 0.2, 0.5], dtype=F64))
    found = caught.value.partial
    # adaptive rows may be ahead of the one that fails, and it is the slowest that counts
    assert 3 <= len(found) <= 4
    assert torch.allclose(found, wanted[: len(found), None, None].expand_as(found), atol=1e-5)


def test_a_row_that_met_its_event_before_is_in_the_error_at_its_event():
    event = Event(lambda t, y: y[:, 0] - torch.tensor([0.9, 0.0, 0.0, 0.0], dtype=F64))
    with pytest.raises(IntegrationError) as caught:
        solve(spoiled, Y0, [0.0, 0.05, 0.5, 1.0], control=FIXED, event=event)
    assert caught.value.partial[2, 0].item() == pytest.approx(0.9, abs=1e-6)
    assert caught.value.partial[1, 0].item() == pytest.approx(math.exp(-0.05), abs=1e-6)


def test_rejections_and_steps_are_bounded_for_each_row():
    rates = torch.tensor([1.0, 1e4, 1.0], dtype=F64)

    def stiff(t, y, rate):
        return -rate[:, None] * (y - torch.cos(t)[:, None])

    settings = dict(y0=Y0[:3], t=[0.0, 1.0], rows=[rates])
    control = Adaptive(1e-6, 1e-6, per_sample=True, first_step=1.0, max_rejections=3)
    with pytest.raises(IntegrationError, match=r"max_rejections=3 .* were refused.*rows 1"):
        solve(stiff, control=control, **settings)
    with pytest.raises(IntegrationError, match=r"max_steps=200 steps .* \(rows 1\)"):
        solve(stiff, control=ADAPTIVE, max_steps=200, **settings)
    with pytest.raises(InputError, match="needs 8 steps"):
        solve(stiff, control=FIXED, max_steps=7, **settings)


# what is refused ---------------------------------------------------------------------------------

REFUSED = {
    "no batch": (dict(y0=torch.tensor(1.0)), "first dimension of rows"),
    "parts of different batches": (dict(y0=(torch.ones(2), torch.ones(3))), "the same in all"),
    "times of another batch": (dict(t=torch.zeros(2, 3)), r"shape \(times, 4\)"),
    "times that turn for a row": (
        dict(t=torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]]).repeat(1, 2)),
        "for row 1",
    ),
    "times without a number": (
        dict(t=torch.tensor([[0.0, 0.0], [1.0, math.nan]]).repeat(1, 2)),
        "finite for row 1",
    ),
    "times without steps of their own": (
        dict(t=torch.zeros(2, 4), control=Adaptive()),
        "per_sample=True",
    ),
    "a rate without a row": (
        dict(quadrature=True, field=lambda t, y: (-y, y.sum())),
        "one entry a row",
    ),
    "a field for one time": (
        dict(field=lambda t, y: -y * t if t > 0 else y),
        r"t\.reshape\(-1, 1\)",
    ),
}


@pytest.mark.parametrize(("given", "says"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_rows_is_refused_with_a_sentence(given, says):
    given = {"field": lambda t, y: -y, "y0": torch.ones(4, 2), "t": [0.0, 1.0], **given}
    with pytest.raises(InputError, match=says):
        solve(**{"control": ADAPTIVE, **given})
