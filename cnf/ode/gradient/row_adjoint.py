"""The continuous adjoint where every row has its own steps, backward as well as forward.

The parameters are shared by the rows, whose steps are accepted one row at a time: so their gradient
is no part of the steps, but a quadrature over each accepted one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cnf.ode.field import Field
from cnf.ode.gradient.augmented import Augmented, going_back, sized, way_back
from cnf.ode.gradient.problem import Job, add_gradients, vjp
from cnf.ode.integrate import Accepted, Problem, Stats, integrate
from cnf.ode.state import Leaves, across, row_rms

# three nodes of Gauss and Legendre on (0, 1): exact for polynomials of degree 5
_NODES = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5)
_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)


def back_through_rows(
    job: Job, field: Field, aliases: Leaves, states: Leaves, cotangents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients by the first state and by the named tensors.

    states: at the arrivals, (slots, batch, …); cotangents: of these and of the integrals.
    """
    width = job.width
    times, states = _in_order(job, states)
    wanted = tuple(x for x in aliases if x.requires_grad)
    bars = [bar[-1] for bar in cotangents]
    totals: list[Tensor | None] = [None] * len(wanted)
    for i in range(len(times) - 1, 0, -1):
        y = tuple(leaf[i] for leaf in states)
        c = bars[width:]
        if np.any(times[i] != times[i - 1]):
            a = _interval(job, field, wanted, times[[i, i - 1]], y, bars, totals)
        else:
            a = bars[:width]
        bars = [bar + more[i - 1] for bar, more in zip([*a, *c], cotangents, strict=True)]
    found = iter(totals)
    return bars[:width], [next(found) if x.requires_grad else None for x in aliases]


def _in_order(job: Job, states: Leaves) -> tuple[np.ndarray, Leaves]:
    """Arrivals in the order of time for every row: what an event kept from being reached is put
    at the event, and the event of a row without one at its last time.
    """
    path = job.path[0]
    times = path.times[0].copy()
    if path.stopped is None or len(times) == len(job.problem.times):
        return times, states
    ends, direction = times[-1], job.problem.direction
    met = ~np.isnan(ends)
    late = met & ((times - np.where(met, ends, 0.0)) * direction >= 0)
    times = np.where(late, ends, times)
    times[-1] = np.where(met, ends, times[-2])
    device = states[0].device
    late_rows, met_rows = torch.from_numpy(late).to(device), torch.from_numpy(met).to(device)

    def moved(leaf: Tensor) -> Tensor:
        shape = [1] * (leaf.ndim - 2)
        end = torch.where(met_rows.reshape(-1, *shape), leaf[-1], leaf[-2])
        leaf = torch.where(late_rows.reshape(*late_rows.shape, *shape), end, leaf)
        return torch.cat([leaf[:-1], end[None]])

    return times, tuple(map(moved, states))


def _interval(
    job: Job,
    field: Field,
    wanted: Leaves,
    span: np.ndarray,
    y: Leaves,
    bars: Sequence[Tensor],
    totals: list[Tensor | None],
) -> list[Tensor]:
    """The adjoint at the start of one interval; adds the named tensors' gradients to `totals`."""
    width, size = len(y), job.settings.unit
    scale, units = sized(bars, row_rms, size)
    augmented = Augmented(field, (), tuple(units[width:]), job.stats, width, set())
    adjoint = way_back(job.problem, augmented, span)
    quadrature = _Quadrature(adjoint, augmented, wanted, scale, totals)
    with going_back():
        found = integrate(adjoint, (*y, *units[:width]), Stats(), keep=quadrature)
    return [leaf[1] * across(scale, leaf[1]) for leaf in found.states[0][width:]]


class _Quadrature(list[Accepted]):
    """∫ a ∂f/∂θ dt, added up step by step as the loop accepts them; nothing is kept."""

    def __init__(
        self,
        problem: Problem,
        augmented: Augmented,
        wanted: Leaves,
        scale: Tensor,
        totals: list[Tensor | None],
    ) -> None:
        super().__init__()
        self._problem, self._augmented = problem, augmented
        self._wanted, self._scale, self._totals = wanted, scale, totals

    def append(self, one: Accepted) -> None:
        if not self._wanted:
            return
        field = self._rows(one)
        scale = self._scale if one.rows is None else self._scale.index_select(0, one.rows)
        problem = self._problem
        first = problem.first_stage(field, one.t, one.h, one.y)
        inside = problem.interpolant(field, one.t, one.h, one.y, first)
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            state = inside(node)
            y = tuple(leaf.detach() for leaf in state[: field.width])
            field = self._rows(one)  # anew: its graph serves once
            value = field.value(torch.add(one.t, one.h, alpha=node), y)
            size = one.h * scale.double() * -weight
            bars = [bar * across(size, bar) for bar in field.bars(value, state)]
            found = vjp((*value.slope, *value.rates), bars, self._wanted)
            add_gradients(self._totals, found)

    @torch.enable_grad()  # gradients of aligned tensors go through their rows
    def _rows(self, one: Accepted) -> Augmented:
        return self._augmented if one.rows is None else self._augmented.take(one.rows)
