"""Sums that grow together give the step that sums one after the other give, in fewer calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from cnf.ode.field import Evaluation
from cnf.ode.method import ExplicitRungeKutta, take_step
from cnf.ode.solution import solve
from cnf.ode.sums import KEPT, MOST, columns
from cnf.ode.tableau import TABLEAUS

# of torch, where its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
EXPLICIT = {name: tableau for name, tableau in TABLEAUS.items() if not tableau.implicit}
DOPRI5 = ExplicitRungeKutta(TABLEAUS["dopri5"], lean=True)


def field(t, y):
    (leaf,) = y
    return Evaluation((torch.cos(leaf) * (1.0 + t),), (leaf.sum(-1) * t,))


def step(method, y, estimate, h=0.3):
    return method.step(field, 0.2, h, (y,), field(0.2, (y,)), estimate)


def together(name, estimate):
    """What sums that grow together are made with, or None."""
    return columns(EXPLICIT[name], estimate, torch.float64, 2)


def rows(count=5, dtype=torch.float64):
    return torch.linspace(-2.0, 2.0, 3 * count, dtype=dtype).view(count, 3)


class Calls(TorchDispatchMode):
    """Counts what torch computes inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_methods_with_many_stages_are_among_those_that_gain():
    assert all(together(name, True) for name in ("dopri5", "tsit5", "dopri8"))
    assert not any(together(name, False) for name in ("euler", "midpoint", "heun2", "rk4"))


@pytest.mark.parametrize("name", EXPLICIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [0.3, -0.3])
@torch.no_grad()
def test_a_step_is_the_same(name, dtype, h):
    tableau, y = EXPLICIT[name], rows(dtype=dtype)
    near = dict.fromkeys(("rtol", "atol"), 1e-13 if dtype == torch.float64 else 1e-5)
    for estimate in {False, tableau.adaptive}:
        plain = step(ExplicitRungeKutta(tableau), y, estimate, h)
        for _ in range(2):  # the second in what the first has left
            found = step(ExplicitRungeKutta(tableau, lean=True), y, estimate, h)
            torch.testing.assert_close(found[:5], plain[:5], **near)
            torch.testing.assert_close(list(found.slopes), list(plain.slopes), **near)


@torch.no_grad()
def test_it_takes_half_the_calls():
    y = rows()
    first = Evaluation((y,), ())
    counts = []
    for method in (DOPRI5, DOPRI5, ExplicitRungeKutta(DOPRI5.tableau)):
        with Calls() as calls:
            method.step(lambda t, y: first, 0.0, 0.1, (y,), first, True)
        counts.append(len(calls.names))
    assert counts[1:] == [14, 26]


@torch.no_grad()
def test_what_leaves_a_step_is_not_written_again():
    seen = []

    def noting(t, y):
        seen.append(y[0])
        return field(t, y)

    y = rows()
    first = DOPRI5.step(noting, 0.0, 0.3, (y,), field(0.0, (y,)), True)
    kept = [x.clone() for x in (*first.y, *first.error, *first.slopes[0], *seen)]
    had = [*first.y, *first.error, *first.slopes[0], *seen]
    DOPRI5.step(field, 0.3, 0.5, first.y, first.last, True)
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(had, kept, strict=True))


@torch.no_grad()
def test_a_field_may_take_steps_of_its_own():
    def solving(t, y):
        inner = step(DOPRI5, y[0], True, 0.1).y[0]
        return Evaluation((inner,), (t * inner.sum(-1),))

    y = rows()
    arguments = (0.0, 0.3, (y,), solving(0.0, (y,)), True)
    found, plain = (
        m.step(solving, *arguments) for m in (DOPRI5, ExplicitRungeKutta(DOPRI5.tableau))
    )
    torch.testing.assert_close(found[:5], plain[:5], rtol=1e-13, atol=1e-14)


@torch.no_grad()
def test_steps_in_several_threads_do_not_meet():
    def solved(seed):
        y = rows() + seed
        return solve(lambda t, y: torch.cos(y) * t, y, (0.0, 3.0), rtol=1e-9, atol=1e-9).y

    wanted = [solved(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool, torch.no_grad():
        found = list(pool.map(torch.no_grad()(solved), [*range(8)] * 4))
    assert all(map(torch.equal, found, wanted * 4))


def test_buffers_are_of_use_in_and_out_of_inference_mode():
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            step(DOPRI5, rows(7), True)


@torch.no_grad()
def test_few_buffers_are_kept():
    for count in range(1, 2 * KEPT):
        step(DOPRI5, rows(count), True)
    assert len(together("dopri5", True).spare) <= KEPT


def with_a_graph(method):
    step(method, rows().requires_grad_(), True)


@torch.no_grad()
def of_a_large_state(method):
    step(method, torch.zeros(MOST + 3).view(-1, 1), True)


@torch.no_grad()
def of_rows_with_their_own(method):
    y, h = rows(), torch.full((5,), 0.3, dtype=torch.float64)
    take_step(method, lambda t, y: field(0.2, y), h, h, (y,), field(0.2, (y,)), True)


@torch.no_grad()
def under_vmap(method):
    torch.func.vmap(lambda y: step(method, y, True).y[0])(rows())


@torch.no_grad()
def in_forward_mode(method):
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(torch.ones(()), torch.ones(()))  # in the field alone
        y, first = (rows(),), Evaluation((rows(),), ())
        found = method.step(lambda t, y: Evaluation((weight * y[0],), ()), 0.0, 0.1, y, first, True)
        assert forward_ad.unpack_dual(found.y[0]).tangent is not None


@torch.no_grad()
def of_complex_numbers(method):
    step(method, rows().to(torch.complex128), True)


@torch.no_grad()
def of_an_empty_batch(method):
    step(method, rows()[:0], True)


@pytest.mark.parametrize(
    "run",
    [
        with_a_graph,
        of_a_large_state,
        of_rows_with_their_own,
        under_vmap,
        in_forward_mode,
        of_complex_numbers,
        of_an_empty_batch,
    ],
)
def test_it_is_left_out(run, monkeypatch):
    monkeypatch.setattr("cnf.ode.method._small_step", None)
    run(DOPRI5)


def test_a_solve_that_is_differentiated_does_without(monkeypatch):
    monkeypatch.setattr("cnf.ode.method._small_step", None)
    y = rows().requires_grad_()
    solve(lambda t, y: -y, y, (0.0, 1.0)).y.sum().backward()
    t = torch.tensor([0.0, 1.0], requires_grad=True)
    solve(lambda t, y: -y, rows(), t).y.sum().backward()
    with pytest.raises(TypeError):
        solve(lambda t, y: -y, rows(), (0.0, 1.0))


def test_a_solve_with_a_graph_and_without_agree_to_rounding():
    y = rows()

    def run(gradient):
        return solve(lambda t, y: torch.cos(y) * t, y, (0.0, 3.0), rtol=1e-8, gradient=gradient)

    with torch.no_grad():
        without = run("checkpoint")
    y.requires_grad_()
    graph = run("backprop")
    assert graph.stats.accepted == without.stats.accepted
    torch.testing.assert_close(graph.y.detach(), without.y, rtol=1e-13, atol=1e-13)


def test_the_default_device_is_of_no_account():
    y, settings = torch.ones(3, 2), dict(rtol=1.234e-4, atol=5.6e-7)
    with torch.device("meta"), torch.no_grad():
        there = solve(lambda t, y: -y, y, [0.0, 1.0], method="tsit5", **settings).y
    here = solve(lambda t, y: -y, y, [0.0, 1.0], method="tsit5", **settings).y
    assert there.device.type == "cpu" and torch.equal(there, here)
