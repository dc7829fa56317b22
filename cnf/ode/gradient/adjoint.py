"""The continuous adjoint: a second ODE, solved backward in memory independent of the steps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.field import Evaluation, alias
from cnf.ode.gradient.augmented import Augmented, going_back, sized, way_back
from cnf.ode.gradient.higher import only_once
from cnf.ode.gradient.problem import (
    Job,
    Repeated,
    Solved,
    TensorField,
    add_gradients,
    solved_by,
    stacked,
)
from cnf.ode.gradient.row_adjoint import back_through_rows
from cnf.ode.integrate import Accepted, Problem, Stats, integrate
from cnf.ode.interpolate import Polynomial
from cnf.ode.method import adjoint_method
from cnf.ode.state import Leaves, across, rms
from cnf.ode.tangent import are_batched
from cnf.ode.trajectory import Path


@dataclass(frozen=True)
class Adjoint:
    """Gradients by the adjoint equation, with the state solved back beside it.

    da/dt = −a ∂f/∂y and dL/dθ = ∫ a ∂f/∂θ dt; the parameter gradient is a quadrature and takes no
    part in the choice of steps.  Memory: the states at the output times and one evaluation's graph.
    interpolate: read the state off the forward solution, one state kept for each step, instead of
    solving it back: for fields whose solution cannot be followed backward.
    size: what the absolute tolerance takes the adjoint's size for.  The equation is linear, so that
    any will do: 1 asks of the adjoint what is asked of the state.  At 0.01 its error may be a
    hundred absolute tolerances, of its own size; that is where steps are best spent on nets with
    kinks, along whose solutions the adjoint jumps and the state does not.  None is 0.01, and 1 with
    interpolate, where the adjoint alone chooses the steps.
    Not exact for the computed solution: the error is of the order of the tolerance.
    Where it is differentiated again, the adjoint equation is solved with its own adjoint, in memory
    that depends on the steps no more; not with interpolate=True or steps of each row.
    Source: Chen et al. 2018, equations 4 and 7 to 10.
    """

    interpolate: bool = False
    size: float | None = None

    def __post_init__(self) -> None:
        known = self.size is None or isinstance(self.size, float | int)
        if not known or not (self.size is None or 0 < self.size < math.inf):
            raise InputError(f"size must be a number > 0 or None, got {self.size!r}")

    @property
    def unit(self) -> float:
        """The size that the adjoint is solved for."""
        return self.size or (1.0 if self.interpolate else 0.01)

    def solve(
        self, problem: Problem, field: TensorField, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        if problem.per_sample and (self.interpolate or problem.dense):
            raise InputError(
                "where every row has its own steps the adjoint goes with neither interpolate=True "
                "nor dense=True; use gradient='checkpoint'"
            )
        adjoint_method(
            problem.method, self.interpolate, bool(first.rates)
        )  # now, not when the gradient is asked for
        return solved_by(_Adjoint, self, problem, field, y, first, stats)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor) -> Leaves:
        width, keep = job.width, job.settings.interpolate
        trajectory = integrate(job.problem, tensors[:width], job.stats, first=job.first, keep=keep)
        solved = stacked(trajectory, job.problem)
        job.path.append(trajectory.path)
        ctx.job = job
        ctx.needs = tuple(tensor.requires_grad for tensor in tensors)
        knots = (leaf for one in trajectory.record for leaf in one.y)
        # the tensors too, so that torch notices one that is changed in place before backward
        ctx.save_for_backward(*solved.states, *tensors[width:], *knots)
        return (*solved.states, *solved.integrals)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        job: Job = ctx.job
        if are_batched(cotangents):
            raise InputError(
                "the adjoint equation is solved for one cotangent at a time: leave out vectorize="
                "True or is_grads_batched=True, or use gradient='checkpoint'"
            )
        saved, width = ctx.saved_tensors, job.width
        end = width + len(job.field.tensors)
        states, tensors, knots = saved[:width], saved[width:end], saved[end:]
        once = torch.is_grad_enabled() and (job.problem.per_sample or job.settings.interpolate)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not once):
            found = _backward(job, states, tensors, knots, cotangents)
        if once:
            found = only_once(found, (*states, *tensors, *cotangents), _ONCE)
        return None, *(g if needed else None for g, needed in zip(found, ctx.needs, strict=True))


_ONCE = (
    "the adjoint is differentiated twice only where all rows share their steps and the state is "
    "solved back; use gradient='checkpoint', or leave out per_sample=True and interpolate=True"
)


def _backward(
    job: Job, states: Leaves, tensors: Leaves, knots: Leaves, cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients by the first state and by the named tensors; with a graph, if that is enabled."""
    aliases = job.field.aliases()
    bound = job.field.bind(aliases)
    if job.problem.per_sample:
        a, totals = back_through_rows(job, bound, aliases, states, cotangents)
    else:
        back = _Back(job, bound, aliases, tensors, states, knots)
        a, totals = back.through(cotangents[: job.width], cotangents[job.width :])
    return [
        *a,
        *(None if g is None else g.to(x.dtype) for g, x in zip(totals, aliases, strict=True)),
    ]


@dataclass(frozen=True)
class _Back:
    """The way back from arrival to arrival, the adjoint's cotangents joining at each.

    field: reads `aliases`, copies of `tensors` without their history.
    """

    job: Job
    field: TensorField
    aliases: Leaves
    tensors: Leaves
    states: Leaves
    knots: Leaves

    def through(
        self, states_bar: Sequence[Tensor], integrals_bar: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients by the first state and by the named tensors."""
        times = self.job.path[0].times
        last = len(times) - 1
        a = [bar[last] for bar in states_bar]
        c = [bar[last] for bar in integrals_bar]
        totals: list[Tensor | None] = [None] * sum(x.requires_grad for x in self.aliases)
        known = _Interpolated(self.job, self.field, self.knots) if self.knots else None
        for i in range(last, 0, -1):
            if np.any(times[i] != times[i - 1]):
                y = tuple(leaf[i] for leaf in self.states)
                a, parts = self._interval((times[i], times[i - 1]), y, a, c, known)
                add_gradients(totals, parts)
            a = [bar + more[i - 1] for bar, more in zip(a, states_bar, strict=True)]
            c = [bar + more[i - 1] for bar, more in zip(c, integrals_bar, strict=True)]
        found = iter(totals)
        return a, [next(found) if x.requires_grad else None for x in self.aliases]

    def _interval(
        self,
        span: tuple[Any, Any],
        y: Leaves,
        a: list[Tensor],
        c: list[Tensor],
        known: _Interpolated | None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The adjoint at the start of one interval, and the named tensors' gradients over it.

        known: the forward solution, where it is read off and not solved back.
        """
        scale, units = sized((*a, *c), rms, self.job.settings.unit)
        c = units[len(y) :]
        start = (*(() if known else y), *units[: len(y)])
        augmented = Augmented(
            self.field, self.aliases, tuple(map(alias, c)), self.job.stats, len(start) - len(y),
            set(), known, (*self.tensors, *c),
        )  # fmt: skip
        states, integrals = _solved_back(self.job, augmented, span, start)
        a = [leaf * across(scale, leaf) for leaf in states[len(start) - len(y) :]]
        return a, [
            leaf * across(scale, leaf) if i in augmented.reached else None
            for i, leaf in enumerate(integrals)
        ]


def _solved_back(
    job: Job, augmented: Augmented, span: tuple[Any, Any], start: Leaves
) -> tuple[Leaves, Leaves]:
    """State and integrals at the end of the way back; with gradient by the adjoint, if enabled."""
    problem, stats = way_back(job.problem, augmented, span), Stats()
    with going_back():
        if not torch.is_grad_enabled():
            found = integrate(problem, start, stats)
            return found.states[-1], found.integrals[-1]
        with torch.no_grad():
            first = problem.evaluate(augmented, span[0], start, span[1])
        solved = job.settings.solve(problem, augmented, start, first, stats)
    states, integrals = (tuple(leaf[-1] for leaf in part) for part in solved[:2])
    return states, integrals


class _Interpolated:
    """The forward solution at any time, from the states in which its steps began."""

    def __init__(self, job: Job, field: TensorField, knots: Leaves) -> None:
        self._problem, self._field, width = job.problem, Repeated(field, job.stats), job.width
        path: Path = job.path[0]
        self._steps = [
            Accepted(None, t, h, knots[i * width : (i + 1) * width])
            for i, (_, t, h, _) in enumerate(path.steps)
        ]
        direction = job.problem.direction
        self._ends = [direction * (one.t + one.h) for one in self._steps]
        self._direction = direction
        self._piece: tuple[int, Polynomial] | None = None

    def __call__(self, t: float) -> Leaves:
        i = min(bisect_left(self._ends, self._direction * t), len(self._steps) - 1)
        if self._piece is None or self._piece[0] != i:
            with torch.no_grad():
                self._piece = i, self._polynomial(self._steps[i])
        one = self._steps[i]
        return self._piece[1]((t - one.t) / one.h)

    def _polynomial(self, one: Accepted) -> Polynomial:
        first = self._problem.first_stage(self._field, one.t, one.h, one.y)
        return self._problem.interpolant(self._field, one.t, one.h, one.y, first)
