"""What every gradient method shares: a problem over named tensors, and its stacked result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.ode.field import Evaluation, Field
from cnf.ode.integrate import Problem, Stats, Trajectory
from cnf.ode.jacobian import jacobian_of
from cnf.ode.state import Leaves
from cnf.ode.trajectory import Path


class Solved(NamedTuple):
    """States and integrals at the arrivals, each leaf of shape (arrivals, …), and their path.

    starts: where every row has its own steps and the solution is dense, the states in which the
    recorded steps begin, one after the other, each leaf of shape (rows of all steps, …).
    """

    states: Leaves
    integrals: Leaves
    path: Path
    starts: Leaves = ()

    def after(self, integrals: Leaves) -> Solved:
        """The same, with what had been integrated before the start."""
        together = zip(self.integrals, integrals, strict=True)
        return self._replace(integrals=tuple(leaf + more.to(leaf.dtype) for leaf, more in together))


class TensorField(Protocol):
    """A field over named tensors; see Field, which is one."""

    @property
    def tensors(self) -> Leaves: ...
    @property
    def precision(self) -> AbstractContextManager[Any]: ...
    def __call__(self, t: Any, y: Leaves) -> Evaluation: ...
    def aliases(self) -> Leaves: ...
    def bind(self, tensors: Sequence[Tensor]) -> TensorField: ...


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
    settings: Any,
    problem: Problem,
    field: TensorField,
    y: Leaves,
    first: Evaluation,
    stats: Stats,
) -> Solved:
    """The result of an autograd function whose tensors are y and then the field's.

    forward is given (ctx, job, *tensors); it returns the leaves of `Solved` in order, and leaves
    the path in the job.
    """
    job = Job(settings, problem, field, first, stats, len(y), [])
    outputs = function.apply(job, *y, *field.tensors)
    rates, width = len(first.rates), len(y)
    states, rest = outputs[:width], outputs[width:]
    return Solved(states, rest[:rates], job.path[0], rest[rates:])


class Repeated:
    """A field that backward evaluates: counted there, and under the solve's autocast state."""

    def __init__(self, field: Any, stats: Stats) -> None:
        self.inner, self._stats = field, stats

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        self._stats.nfe_backward += 1
        with self.inner.precision:
            return self.inner(t, y)

    def count(self, calls: int) -> None:
        """Count evaluations that were made of the inner field itself."""
        self._stats.nfe_backward += calls

    def jacobian(self, t: Any, y: Leaves) -> Tensor:
        self._stats.jacobians += 1
        return jacobian_of(self.inner, t, y)

    def take(self, rows: Tensor) -> Repeated:
        """The same for some rows of the batch."""
        return Repeated(self.inner.take(rows), self._stats)


class Job(NamedTuple):
    """What an autograd function is asked to do; width: the number of the state's leaves."""

    settings: Any
    problem: Problem
    field: Any  # a TensorField; a Field, but where the adjoint solves for its own gradient
    first: Evaluation
    stats: Stats
    width: int
    path: list[Path]


def stacked(trajectory: Trajectory, problem: Problem) -> Solved:
    """The trajectory's states and integrals along a first axis of arrivals."""
    if not problem.per_sample:
        return Solved(stack(trajectory.states), stack(trajectory.integrals), trajectory.path)
    starts: Leaves = ()
    if problem.dense:
        starts = tuple(
            torch.cat(leaves) for leaves in zip(*(one.y for one in trajectory.record), strict=True)
        )
    return Solved(trajectory.states[0], trajectory.integrals[0], trajectory.path, starts)


def stack(parts: Sequence[Leaves]) -> Leaves:
    """Each leaf of all parts along a new first axis."""
    return tuple(torch.stack(leaves) for leaves in zip(*parts, strict=True))


def add_gradients(totals: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    """Add parts to totals in place, entry by entry; None stands for zero."""
    for i, part in enumerate(parts):
        if part is not None:
            total = totals[i]
            totals[i] = part if total is None else total + part


def vjp(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    again: bool = False,
    keep: bool = False,
) -> list[Tensor | None]:
    """Cotangents times the Jacobian of outputs by inputs; None where it is identically zero.

    again: with a graph of its own, to be differentiated again; keep: the outputs' graph is left.
    """
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    heads, weights = zip(*pairs, strict=True)
    graph = dict(create_graph=again, retain_graph=again or keep, allow_unused=True)
    found = iter(torch.autograd.grad(heads, wanted, weights, **graph))
    return [next(found) if x.requires_grad else None for x in inputs]
