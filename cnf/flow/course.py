"""What a flow does on the way: where points are, how they are spread and how they move at a time t.

Everything is in the units of the data: points of the base, too, are shown as if they had arrived.
A conditional flow is looked at given one context, (columns,), for all points.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from cnf.flow.base import base_log_prob
from cnf.flow.conditioned import Conditioned
from cnf.flow.continuous import Moved, Solver
from cnf.flow.divergence import Divergence
from cnf.ode.solution import solve

NUDGE = 1e-3  # of the time, by which points are moved to see where they go


class Travelled(Protocol):
    """What is looked at, such as a `Flow`."""

    base: Any
    solver: Solver

    def chosen_divergence(self) -> Divergence: ...
    def white(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def unwhite(self, z: Tensor) -> Tensor: ...
    def conditioned(self, context: Tensor | None = None) -> Conditioned: ...
    def carry_to_base(
        self,
        x: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
        times: tuple[float, float] = ...,
    ) -> tuple[Tensor, Moved]: ...


def paths(
    flow: Travelled, z: Tensor, times: Iterable[float], context: Tensor | None = None
) -> Tensor:
    """Where the base's points z (n, dim) are at increasing times from 0 to 1, (times, n, dim)."""
    field, rows, _ = _given(flow, z, context)
    solver = flow.solver.for_rows(field, z, rows)
    found = solve(
        field,
        z,
        [float(t) for t in times],
        method=solver.method,
        control=solver.control,
        gradient=solver.gradient,
        rows=rows,
        max_steps=solver.max_steps,
    ).y
    return flow.unwhite(found.flatten(0, 1)).unflatten(0, found.shape[:2])


def log_density_at(flow: Travelled, x: Tensor, t: float, context: Tensor | None = None) -> Tensor:
    """Log-density, nats, of the points on the way at time t, at x (n, dim): (n,).

    At t = 0 it is the base's, at t = 1 the flow's own.
    """
    if t == 0.0:
        z, logdet = flow.white(x)
        return base_log_prob(flow.base, z) + logdet
    conditioned = _given(flow, x, context)
    solver = flow.solver.for_rows(conditioned.field, x, conditioned.rows)
    divergence = flow.chosen_divergence()
    return flow.carry_to_base(x, divergence, solver, conditioned, (float(t), 0.0))[0]


@torch.no_grad()
def velocity_at(flow: Travelled, x: Tensor, t: float, context: Tensor | None = None) -> Tensor:
    """dx/dt of points that are at x (n, dim) at time t, (n, dim)."""
    z, _ = flow.white(x)
    field, rows, _ = _given(flow, z, context)
    moved = NUDGE * field(torch.tensor(float(t), dtype=z.dtype, device=z.device), z, *rows)
    return (flow.unwhite(z + moved) - flow.unwhite(z - moved)) / (2 * NUDGE)


def _given(flow: Travelled, x: Tensor, context: Tensor | None) -> Conditioned:
    """The field for points x (n, dim), all of that context."""
    return flow.conditioned(None if context is None else context.expand(len(x), -1))
