"""What every gradient method shares: a problem over named tensors, and its stacked result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.ode.field import Evaluation, Field
from cnf.ode.integrate import Problem, Stats, Trajectory
from cnf.ode.state import Leaves


class Solved(NamedTuple):
    """States and integrals at the output times, each leaf of shape (times, …)."""

    states: Leaves
    integrals: Leaves


class Gradient(Protocol):
    """A way to differentiate a solution."""

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        """The solution, whose backward reaches y and the field's tensors.

        first: the field at the start, cut from its graph.
        """
        ...


def solved_by(
    function: type[torch.autograd.Function],
    problem: Problem,
    field: Field,
    y: Leaves,
    first: Evaluation,
    stats: Stats,
) -> Solved:
    """The result of an autograd function whose tensors are y and then the field's.

    forward is given (ctx, problem, field, first, stats, len(y), *tensors), and returns the stacked
    states and then the integrals.
    """
    outputs = function.apply(problem, field, first, stats, len(y), *y, *field.tensors)
    return Solved(outputs[: len(y)], outputs[len(y) :])


def stacked(trajectory: Trajectory) -> Solved:
    """The trajectory's states and integrals along a new first axis of times."""
    return Solved(_stack(trajectory.states), _stack(trajectory.integrals))


def _stack(parts: Sequence[Leaves]) -> Leaves:
    return tuple(torch.stack(leaves) for leaves in zip(*parts, strict=True))


def add_gradients(totals: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    """Add parts to totals in place, entry by entry; None stands for zero."""
    for i, part in enumerate(parts):
        if part is not None:
            total = totals[i]
            totals[i] = part if total is None else total + part


def vjp(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Cotangents times the Jacobian of outputs by inputs; None where it is identically zero."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    heads, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(heads, wanted, weights, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]
