"""How a solution depends on its times: where it starts, where it is read and where it stops.

A solve takes its times as numbers.  Gradients reach them by steps of length 0 at either end, which
change no value: dL/dt_i = ⟨λ_i, f(t_i, y_i)⟩ and dL/dt_0 = −⟨λ_0, f(t_0, y_0)⟩, and the second
derivatives with them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cnf.ode.field import Evaluation
from cnf.ode.state import Leaves, across
from cnf.ode.trajectory import Problem, on_device


def slide(
    field: Any, t: Tensor, by: Tensor, y: Leaves, first: Evaluation | None = None
) -> tuple[Leaves, Leaves]:
    """State, and increments of the integrals, where the solution went on from (t, y) by almost 0.

    t, by: 0-d, or (rows,) where every row has its own; first: the field at (t, y), if it is known.
    A step of the midpoint method: its derivatives are exact up to the second.
    """
    slope = field(t, y).slope if first is None else first.slope
    half = tuple(leaf + k * across(by / 2, k) for leaf, k in zip(y, slope, strict=True))
    middle = field(t + by / 2, half)
    moved = tuple(leaf + k * across(by, k) for leaf, k in zip(y, middle.slope, strict=True))
    return moved, tuple(rate * across(by, rate) for rate in middle.rates)


def from_start(problem: Problem, field: Any, t: Tensor, y: Leaves) -> tuple[Leaves, Leaves]:
    """What the solve starts with, states and integrals, as a function of the start t and of y.

    t: 0-d, or (batch,) where every row has its own times.
    """
    zero = _zero(problem, t)
    start = _known(problem, problem.times[0], problem.times[-1], y)
    return slide(field, start + zero, -zero, y)


def at_time(
    problem: Problem, field: Any, known: Any, t: Tensor, y: Leaves
) -> tuple[Leaves, Leaves]:
    """State, and increments of the integrals, at an output as functions of its time t and of y.

    known: the same time on the host, or (batch,) of such.
    """
    return slide(field, _known(problem, known, problem.times[0], y), _zero(problem, t), y)


def _zero(problem: Problem, t: Tensor) -> Tensor:
    """0, whose derivative by t is 1."""
    field: Any = problem.field
    return field.clock(t - t.detach())


def _known(problem: Problem, moment: Any, side: Any, y: Leaves) -> Tensor:
    """A host time as the field gets it, seen from the side of `side` where the field jumps."""
    field: Any = problem.field
    if problem.per_sample:
        moment, side = on_device(moment, y), on_device(side, y)
    return field.clock(problem.beside(moment, side))
