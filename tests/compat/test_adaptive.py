"""Options of adaptive steps, what func is told of them, and the dense solution."""

from __future__ import annotations

import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch

from cnf.compat.torchdiffeq import odeint, odeint_adjoint, odeint_dense

ADAPTIVE = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
EVERY_METHOD = pytest.mark.parametrize("method", ADAPTIVE)


def times(*moments):
    return torch.tensor(moments, dtype=torch.float64)


class Watched:
    """A field whose steps are noted as (t0, dt)."""

    def __init__(self, slope=lambda t, y: torch.cos(3 * t) * y):
        self.slope, self.calls = slope, 0
        self.tried, self.taken, self.refused, self.states = [], [], [], []

    def __call__(self, t, y):
        self.calls += 1
        return self.slope(t, y)

    def callback_step(self, t0, y0, dt):
        assert t0.shape == dt.shape == () and t0.dtype == dt.dtype == torch.float64
        self.tried.append((t0.item(), dt.item()))
        self.states.append(y0)

    def callback_accept_step(self, t0, y0, dt):
        self.taken.append((t0.item(), dt.item()))

    def callback_reject_step(self, t0, y0, dt):
        self.refused.append((t0.item(), dt.item()))


def solve(end=3.0, y0=None, slope=None, method="dopri5", interface=odeint, **settings):
    func = Watched() if slope is None else Watched(slope)
    y0 = torch.ones(2, dtype=torch.float64) if y0 is None else y0
    t = end if isinstance(end, torch.Tensor) else times(0, end)
    return func, interface(func, y0, t, method=method, **settings)


# what is told ----------------------------------------------------------------------------------


@EVERY_METHOD
@pytest.mark.parametrize("end", [3.0, -3.0])
def test_every_attempt_is_told_and_then_taken_or_refused(method, end):
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    func, _ = solve(end, method=method, options={"first_step": 1.0}, **tolerance)
    assert func.refused and sorted(func.tried) == sorted(func.taken + func.refused)
    at, sign = 0.0, math.copysign(1.0, end)
    for t0, dt in func.taken:
        assert t0 == pytest.approx(at, abs=1e-12) and dt > 0
        at += sign * dt
    assert at == pytest.approx(end)


def test_a_callback_gets_the_state_as_the_caller_knows_it():
    pair = (torch.ones(2, 1).double(), torch.zeros(()).double())
    func, _ = solve(y0=pair, slope=lambda t, y: (y[1] * y[0], y[1] + 1))
    first = func.states[0]
    assert isinstance(first, tuple) and [part.shape for part in first] == [(2, 1), ()]
    assert torch.equal(first[0], pair[0])


@pytest.mark.parametrize(
    ("method", "unheard"),
    {
        "rk4": {"callback_accept_step", "callback_reject_step"},
        "implicit_adams": {"callback_accept_step", "callback_reject_step"},
        "scipy_solver": {"callback_step", "callback_accept_step", "callback_reject_step"},
    }.items(),
)
def test_callbacks_that_a_method_does_not_call_are_warned_of(method, unheard):
    with pytest.warns(UserWarning, match=f"'{method}' does not support callbacks") as caught:
        solve(0.1, method=method, rtol=1e-2, atol=1e-2)
    assert all(name in str(caught[0].message) for name in unheard)


# options ---------------------------------------------------------------------------------------


def test_unknown_options_are_warned_of_and_left_out():
    for method, key in (("dopri5", "step_size"), ("rk4", "first_step"), ("scipy_solver", "norms")):
        with pytest.warns(UserWarning, match=f"{method}: Unexpected arguments .*{key}"):
            y = odeint(lambda t, y: -y, torch.ones(1), times(0, 1), method=method,
                       options={key: 1.0})  # fmt: skip
        assert torch.isfinite(y).all()


def test_options_are_not_changed():
    options = {"norm": lambda y: y.abs().max(), "first_step": 0.1, "jump_t": times(0.5)}
    before = dict(options)
    solve(options=options)
    solve(interface=odeint_adjoint, adjoint_params=(), options=options)
    assert options == before


@pytest.mark.parametrize("size", [0.05, torch.tensor(0.05)])
def test_the_first_step_is_the_one_given(size):
    func, _ = solve(options={"first_step": size})
    assert func.tried[0][1] == pytest.approx(0.05)
    assert func.calls == 1 + 6 * len(func.tried)


def test_steps_keep_between_the_shortest_and_the_longest():
    func, _ = solve(options={"min_step": 0.5, "max_step": 0.6})
    assert not func.refused
    assert all(0.3 <= dt <= 0.6 for _, dt in func.taken)
    assert len(func.taken) in (5, 6)


def test_safety_and_factors_choose_the_next_step():
    cautious, _ = solve(rtol=1e-5, options={"safety": 0.5})
    usual, _ = solve(rtol=1e-5)
    assert len(cautious.taken) > 1.4 * len(usual.taken)
    slow, _ = solve(rtol=1e-3, options={"ifactor": 1.5, "first_step": 1e-4})
    lengths = [dt for _, dt in slow.taken]
    assert all(later / earlier < 1.5001 for earlier, later in pairwise(lengths))
    for dfactor in (0.1, 0.8):
        shrunk, _ = solve(options={"dfactor": dfactor, "first_step": 2.0, "max_step": 2.0})
        assert shrunk.tried[1][1] / shrunk.tried[0][1] >= dfactor - 1e-9
    with pytest.raises(ValueError, match=r"dfactor < 1 < ifactor.*got 0\.9, 0\.2, 0\.5"):
        solve(options={"ifactor": 0.5})


def test_the_steps_to_a_requested_time_are_bounded():
    func, _ = solve(times(0, 1, 2, 3))
    most = max(sum(a <= t0 < a + 1 for t0, _ in func.tried) for a in (0, 1, 2))
    solve(times(0, 1, 2, 3), options={"max_num_steps": most + 2})
    with pytest.raises(AssertionError, match=r"max_num_steps exceeded \(4>=4\)"):
        solve(options={"max_num_steps": 4})


def test_step_t_are_landed_on():
    for t, wanted in ((times(0, 3), times(0.7, 2.2)), (times(3, 0), [2.2, 0.7])):
        func, _ = solve(t, options={"step_t": wanted, "dtype": torch.float32})
        starts = [t0 for t0, _ in func.taken]
        assert 0.7 in starts and 2.2 in starts


@pytest.mark.parametrize("way", [1.0, -1.0])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_jump_t_saves_the_search_for_a_jump(interface, method, way):
    def slope(t, y):
        return torch.where(way * t < 0.5, -0.5 * y, y**2)

    settings = {"rtol": 1e-6, "atol": 1e-6, "interface": interface, "method": method}
    if interface is odeint_adjoint:
        settings["adjoint_params"] = ()
    counts, errors = [], []
    for options in ({}, {"jump_t": times(0.5 * way)}):
        y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
        func, y = solve(times(0, 0.3 * way, way), y0, slope, options=options, **settings)
        y[-1].sum().backward()
        counts.append(func.calls)
        middle = math.exp(-0.25 * way)
        errors.append(abs(y[-1, 0].item() - middle / (1 - 0.5 * way * middle)))
    assert counts[1] < counts[0] and errors[1] < 1e-5


def test_times_to_step_on_must_differ():
    for options in ({"step_t": times(1, 1)}, {"step_t": times(1), "jump_t": times(1)}):
        with pytest.raises(ValueError, match="repeated"):
            solve(options=options)


def test_the_norm_decides_what_is_good_enough():
    seen = []

    def norm(y):
        seen.append(y)
        return 30 * y.abs().max()

    usual, _ = solve()
    strict, _ = solve(options={"norm": norm})
    assert all(y.shape == (2,) for y in seen)
    assert len(strict.taken) > 1.5 * len(usual.taken)
    seen.clear()
    pair = (torch.ones(2).double(), torch.ones(()).double())

    def of_pair(state):
        seen.append(tuple(part.shape for part in state))
        return state[0].abs().max()

    solve(y0=pair, slope=lambda t, y: (-y[0], y[1]), options={"norm": of_pair})
    assert set(seen) == {((2,), ())}


def test_a_norm_that_is_a_plain_number_accepts_everything():
    func, _ = solve(options={"norm": lambda y: 0.0, "first_step": 0.5})
    assert not func.refused


def test_by_default_the_worst_part_of_a_tuple_decides():
    calm, wild = torch.zeros(1000).double(), torch.ones(1).double()

    def slope(t, y):
        return 0 * y[0], torch.cos(40 * t) * y[1]

    func, (_, y) = solve(1.0, (calm, wild), slope)
    assert y[-1].item() == pytest.approx(math.exp(math.sin(40) / 40), abs=1e-6)
    together, _ = solve(
        1.0, torch.cat([calm, wild]), lambda t, y: torch.cat(slope(t, (y[:-1], y[-1:])))
    )
    assert func.calls > 1.2 * together.calls


def test_tolerances_may_differ_by_entry_and_by_part():
    def slope(t, y):
        return y * torch.stack([torch.cos(30 * t), -torch.ones_like(t)])

    loose = {"rtol": torch.tensor(1e-2), "atol": torch.tensor([1e3, 1e-8])}
    func, y = solve(1.0, slope=slope, **loose)
    tight, _ = solve(1.0, slope=slope)
    assert func.calls < tight.calls / 2
    assert y[-1, 1].item() == pytest.approx(math.exp(-1), abs=1e-2)
    pair = (torch.ones(1).double(), torch.ones(1).double())
    by_part, (_, y) = solve(
        1.0,
        pair,
        lambda t, y: (y[0] * torch.cos(30 * t), -y[1]),
        rtol=(1e-2, 1e-7),
        atol=(1e3, 1e-9),
    )
    assert by_part.calls < tight.calls / 2
    assert y[-1].item() == pytest.approx(math.exp(-1), abs=1e-6)


# failures ---------------------------------------------------------------------------------------


def test_a_solution_that_blows_up_makes_the_step_vanish():
    with pytest.raises(AssertionError, match="underflow in dt"):
        solve(slope=lambda t, y: y * y)
    with pytest.raises(AssertionError, match="underflow in dt"):
        solve(slope=lambda t, y: torch.full_like(y, math.nan))


def test_a_state_that_is_not_finite_is_told():
    with pytest.raises(AssertionError, match="non-finite values in state"):
        solve(y0=torch.tensor([1.0, math.nan]))
    with pytest.raises(AssertionError, match="non-finite values in state"):
        solve(slope=lambda t, y: 1e300 * torch.exp(y), options={"min_step": 1.0})


def test_a_shortest_step_does_not_make_a_failure_endless():
    def slope(t, y):
        return torch.where(t > 1, math.nan, 1.0) * y

    with pytest.raises(AssertionError, match=r"underflow in dt|non-finite"):
        solve(slope=slope, options={"min_step": 0.3})


# dense -------------------------------------------------------------------------------------------


@EVERY_METHOD
@pytest.mark.parametrize("ends", [(0.0, 3.0), (3.0, 0.0)])
def test_a_dense_solution_is_that_at_the_requested_times(method, ends, pendulum):
    y0 = torch.tensor(pendulum.start, dtype=torch.float64)
    settings = {"rtol": 1e-4, "atol": 1e-4, "method": method}
    t = torch.linspace(*ends, 31, dtype=torch.float64)
    dense = odeint_dense(pendulum, y0, *ends, **settings)
    expected = odeint(pendulum, y0, t, **settings)
    torch.testing.assert_close(dense(t), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(t[4]), expected[4], rtol=0, atol=1e-12)
    assert dense(t.view(1, 31)).shape == (1, 31, 2) and dense(1.5).shape == (2,)


def test_a_dense_solution_is_known_between_its_ends_alone():
    dense = odeint_dense(lambda t, y: -y, torch.ones(2), torch.tensor(0.0), torch.tensor(1.0))
    torch.testing.assert_close(dense(0.0), torch.ones(2))
    torch.testing.assert_close(dense(torch.tensor(1.0)), torch.full((2,), math.exp(-1)))
    for t in (-0.1, 1.1):
        with pytest.raises(AssertionError, match="known from t=0 to 1"):
            dense(t)
    with pytest.raises(AssertionError, match="adaptive"):
        odeint_dense(lambda t, y: -y, torch.ones(2), 0.0, 1.0, method="rk4")


def test_a_dense_solution_of_a_tuple_is_a_tuple():
    dense = odeint_dense(
        lambda t, y: (-y[0], y[0].sum()), (torch.ones(2, 1), torch.zeros(())), 0.0, 1.0
    )
    a, b = dense(torch.tensor([0.2, 0.9, 0.5]))
    assert a.shape == (3, 2, 1) and b.shape == (3,)


def test_a_dense_solution_keeps_the_precision_of_plain_numbers():
    dense = odeint_dense(lambda t, y: torch.ones_like(y), torch.zeros(1).double(), 0.1, 0.7)
    assert dense(0.3).item() == pytest.approx(0.3 - 0.1, abs=1e-15)


def test_a_solve_keeps_no_graph_once_its_result_is_gone():
    made = []

    def field(t, y):
        value = -y * weight
        made.append(weakref.ref(value))
        return value

    weight = torch.ones((), requires_grad=True)
    gc.disable()
    try:
        y = odeint(field, torch.ones(2), torch.tensor([0.0, 1.0]))
        assert y.requires_grad
        del y
        assert not any(one() is not None for one in made)
    finally:
        gc.enable()


def test_a_dense_solution_may_be_asked_at_no_time():
    ends = torch.tensor(0.0), torch.tensor(1.0)
    inside = odeint_dense(lambda t, y: -y, torch.ones(2), *ends)
    assert inside(torch.empty(0)).shape == (0, 2)
