"""Backpropagation through the solver: the graph of every step is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.problem import Solved, stacked
from cnf.ode.integrate import Accepted, Problem, Stats, integrate
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
            # without `first`: the field at the start is needed once more, with its graph
            return stacked(integrate(problem, y, stats), problem)
        found = integrate(problem, y, stats, first=first, keep=True)
        return replay(problem, field, y, first.rates, found.record, found.path)


def replay(
    problem: Problem,
    field: Field,
    y: Leaves,
    rates: Leaves,
    record: list[Accepted],
    path: Path,
) -> Solved:
    """The solution with its graph, by repeating the recorded steps of each row."""
    slots = len(path.times[0])
    integral = tuple(torch.zeros_like(rate, dtype=precise_dtype(rate)) for rate in rates)
    states = [tuple(leaf for leaf in y)] + [tuple(map(torch.zeros_like, y))] * (slots - 1)
    integrals = [integral] * slots
    starts = [take(y, torch.zeros(0, dtype=torch.long, device=y[0].device))]
    for one in record:
        part, at = (field, y) if one.rows is None else (field.take(one.rows), take(y, one.rows))
        starts.append(at)
        now = problem.first_stage(part, one.t, one.h, at)
        step = problem.step(part, one.t, one.h, at, now, False)
        y = put(y, one.rows, step.y)
        more = tuple(
            total + part.to(total.dtype)
            for total, part in zip(take(integral, one.rows), step.increment, strict=True)
        )
        integral = put(integral, one.rows, more)
        assert one.slot is not None
        for slot in one.slot.unique().tolist():
            if slot >= 0:
                states[slot] = _arrived(states[slot], y, one, slot)
                integrals[slot] = _arrived(integrals[slot], integral, one, slot)
    outs = [tuple(map(torch.stack, zip(*parts, strict=True))) for parts in (states, integrals)]
    flat = tuple(map(torch.cat, zip(*starts, strict=True))) if problem.dense else ()
    return Solved(outs[0], outs[1], path, flat)


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


def _arrived(out: Leaves, now: Leaves, one: Accepted, slot: int) -> Leaves:
    """`out` with the rows that reached `slot` at the end of this step."""
    assert one.slot is not None
    there = torch.nonzero(one.slot == slot).flatten()
    rows = there if one.rows is None else one.rows.index_select(0, there)
    return put(out, rows, take(now, rows))
