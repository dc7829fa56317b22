"""Backpropagation through the solver: the graph of every step is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cnf.ode.compiled import Compiled
from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.problem import Solved, stack, stacked
from cnf.ode.integrate import Problem, Stats, integrate
from cnf.ode.method import twice_differentiable
from cnf.ode.state import Leaves, precise_dtype
from cnf.ode.trajectory import Path


@dataclass(frozen=True)
class Backprop:
    """Gradients of the computed solution by autograd; memory grows with steps times stages.

    Exact for the computed solution, step sizes taken as constants.  The field may capture anything.
    Where every row has its own steps they are found without a graph, and taken once more with it.
    """

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        if not problem.per_sample:
            if not isinstance(problem.method, Compiled):
                problem = replace(problem, method=twice_differentiable(problem.method))
            # without `first`: the field at the start is needed once more, with its graph
            return stacked(integrate(problem, y, stats), problem)
        path = integrate(problem, y, stats, first=first, keep=True).path
        return replay(problem, field, y, first.rates, path)


def replay(problem: Problem, field: Any, y: Leaves, rates: Leaves, path: Path) -> Solved:
    """The solution with its graph, by repeating the steps of a path that was recorded.

    rates: the field's at the start, whose shapes the integrals take.
    """
    problem = replace(problem, method=twice_differentiable(problem.method))
    integral = tuple(torch.zeros_like(rate, dtype=precise_dtype(rate)) for rate in rates)
    if problem.per_sample:
        return _replay_rows(problem, field, y, integral, path)
    states, integrals = [y], [integral]
    for begun, ended in pairwise(path.marks):
        for _, t, h, _ in path.steps[begun:ended]:
            y, integral = _repeat(problem, field, t, h, y, integral)
        states.append(y)
        integrals.append(integral)
    return Solved(stack(states), stack(integrals), path)


def _replay_rows(problem: Problem, field: Any, y: Leaves, integral: Leaves, path: Path) -> Solved:
    """The same where every row has its own steps."""
    slots = len(path.times[0])
    states, integrals = [y] + [tuple(map(torch.zeros_like, y))] * (slots - 1), [integral] * slots
    starts = [take(y, torch.zeros(0, dtype=torch.long, device=y[0].device))]
    for rows, t, h, slot in path.steps:
        part, at = (field, y) if rows is None else (field.take(rows), take(y, rows))
        starts.append(at)
        ends = _repeat(problem, part, t, h, at, take(integral, rows))
        y, integral = put(y, rows, ends[0]), put(integral, rows, ends[1])
        for reached in slot.unique().tolist():
            if reached >= 0:
                there = torch.nonzero(slot == reached).flatten()
                there = there if rows is None else rows.index_select(0, there)
                states[reached] = put(states[reached], there, take(y, there))
                integrals[reached] = put(integrals[reached], there, take(integral, there))
    flat = tuple(map(torch.cat, zip(*starts, strict=True))) if problem.dense else ()
    return Solved(stack(states), stack(integrals), path, flat)


def _repeat(
    problem: Problem, field: Any, t: Any, h: Any, y: Leaves, integral: Leaves
) -> tuple[Leaves, Leaves]:
    """State and integrals at the end of a step."""
    first = problem.first_stage(field, t, h, y)
    step = problem.step(field, t, h, y, first, False)
    return step.y, tuple(
        total + part.to(total.dtype) for total, part in zip(integral, step.increment, strict=True)
    )


def take(leaves: Leaves, rows: Tensor | None) -> Leaves:
    """Some rows of each leaf; all for None."""
    return leaves if rows is None else tuple(leaf.index_select(0, rows) for leaf in leaves)


def put(leaves: Leaves, rows: Tensor | None, parts: Leaves) -> Leaves:
    """The leaves with some of their rows replaced."""
    if rows is None:
        return parts
    return tuple(
        leaf.index_copy(0, rows, part.to(leaf.dtype))
        for leaf, part in zip(leaves, parts, strict=True)
    )
