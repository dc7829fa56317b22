"""The table of docs/solve.md, "What goes with what", cell by cell: yes is right, no is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import cnf
from cnf.error import InputError
from cnf.ode.control import FixedStep
from cnf.ode.event import Event
from cnf.ode.solution import solve

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch hides it itself
]
PAGE = Path(__file__).parents[2] / "docs" / "solve.md"
FAMILIES = {"explicit": ("dopri5",)}  # other tests run over every method
KINDS = (cnf.Backprop, cnf.Checkpoint, cnf.Adjoint, cnf.Reversible)
GRADIENTS = {kind.__name__: kind for kind in KINDS}
STEPS = {"shared": False, "of each row": True}
F64 = torch.float64
Y0 = torch.tensor([[1.0, 0.2]], dtype=F64)
W = torch.tensor([[0.3, -1.0], [1.2, 0.1]], dtype=F64)


def table():
    """(header, rows) of the table, cells without their backticks."""
    lines = PAGE.read_text(encoding="utf-8").split("### What goes with what")[1].splitlines()
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")]
             for line in lines if line.startswith("|")]  # fmt: skip
    return cells[0], cells[2:]


HEADER, ROWS = table() if PAGE.exists() else ([], [])


def field(t, y, w):
    """One row, nonlinear and non-autonomous; t 0-d or (1,)."""
    return torch.tanh(y @ w) * torch.cos(t.reshape(-1, 1)) - 0.2 * y


def value(y0, w, **settings):
    return solve(field, y0, [0.0, 0.4, 1.0], params=[w], **settings).y[1:].sin().sum()


def by_both(loss, **more):
    y0, w = (x.clone().requires_grad_() for x in (Y0, W))
    return torch.autograd.grad(loss(y0, w), (y0, w), **more), (y0, w)


def gradient(**settings):
    return by_both(functools.partial(value, **settings))[0]


def event(**settings):
    def loss(y0, w):
        falls = Event(lambda t, y: y[:, 0] - 0.8)
        sol = solve(field, y0, [0.0, 0.2, 5.0], params=[w], event=falls, **settings)
        assert not sol.event_time.isnan().any()
        return sol.event_time.sum() + sol.y.sin().sum()

    return by_both(loss)[0]


def dense(**settings):
    def loss(y0, w):
        return solve(field, y0, [0.0, 1.0], params=[w], dense=True, **settings)(0.37).sin().sum()

    return by_both(loss)[0]


def second(**settings):
    first, tensors = by_both(functools.partial(value, **settings), create_graph=True)
    return torch.autograd.grad(sum((x**2).sum() for x in first), tensors)


def forward_mode(**settings):
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, torch.ones_like(x)) for x in (Y0, W))
        return (forward_ad.unpack_dual(value(*duals, **settings)).tangent,)


def transformed(**settings):
    return torch.func.grad(functools.partial(value, **settings), (0, 1))(Y0, W)


def mapped(**settings):
    both = torch.func.grad(functools.partial(value, **settings), (0, 1))
    found = torch.func.vmap(both)(torch.stack([Y0, 2 * Y0]), torch.stack([W, W]))
    return tuple(x[0] for x in found)


def compiled(**settings):
    return gradient(compile=True, **settings)


PROBES = {  # column: what to do, and what it must equal with backpropagation in fine steps
    "gradient": (gradient, gradient),
    "event": (event, event),
    "dense": (dense, dense),
    "second derivatives": (second, second),
    "forward mode": (forward_mode, lambda **s: (sum(x.sum() for x in gradient(**s)),)),
    "torch.func": (transformed, gradient),
    "vmap": (mapped, gradient),
    "compile": (compiled, gradient),
}


@functools.cache
def wanted(column):
    fine = dict(method="dopri8", control=FixedStep(0.05), gradient=cnf.Backprop())
    return PROBES[column][1](**fine)


def test_the_table_has_the_columns_and_rows_that_are_tested():
    if not PAGE.exists():
        pytest.skip("the documentation is not here")
    assert ["method", "gradient=", "steps", *PROBES] == HEADER
    assert {row[0] for row in ROWS} == set(FAMILIES) and {row[2] for row in ROWS} == set(STEPS)
    kinds = {type(eval(row[1], GRADIENTS)).__name__ for row in ROWS}
    assert kinds == set(GRADIENTS) - {"__builtins__"}
    assert len({tuple(row[:3]) for row in ROWS}) == len(ROWS)
    assert all(set(row[3:]) <= {"yes", "no"} for row in ROWS)


@pytest.mark.parametrize("column", PROBES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_what_says_yes_is_right_and_what_says_no_is_refused(row, column, monkeypatch):
    monkeypatch.setattr("cnf.ode.compiled.BACKEND", "aot_eager")  # without the C++ compiler
    for method in FAMILIES[row[0]]:
        settings = dict(
            method=method,
            gradient=eval(row[1], GRADIENTS),
            control=FixedStep(0.05, per_sample=STEPS[row[2]]),
        )
        if row[HEADER.index(column)] == "no":
            with pytest.raises(InputError, match=r"[a-z].{30}"):
                PROBES[column][0](**settings)
            continue
        got = PROBES[column][0](**settings)
        for a, b in zip(got, wanted(column), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4) and a.isfinite().all()
