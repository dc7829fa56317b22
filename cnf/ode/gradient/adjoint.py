"""The continuous adjoint: a second ODE, solved backward in memory independent of the steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, Control
from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.problem import Job, Solved, add_gradients, solved_by, stacked, vjp
from cnf.ode.gradient.row_adjoint import back_through_rows
from cnf.ode.integrate import Accepted, Problem, Stats, integrate
from cnf.ode.interpolate import Polynomial, interpolant
from cnf.ode.state import Leaves, largest, rms
from cnf.ode.trajectory import Path


@dataclass(frozen=True)
class Adjoint:
    """Gradients by the adjoint equation, with the state solved back beside it.

    da/dt = −a ∂f/∂y and dL/dθ = ∫ a ∂f/∂θ dt; the parameter gradient is a quadrature and takes no
    part in the choice of steps.  Memory: the states at the output times and one evaluation's graph.
    interpolate: read the state off the forward solution, one state kept for each step, instead of
    solving it back: for fields whose solution cannot be followed backward.
    Not exact for the computed solution: the error is of the order of the tolerance.
    Source: Chen et al. 2018, equations 4 and 7 to 10.
    """

    interpolate: bool = False

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        if problem.per_sample and (self.interpolate or problem.dense):
            raise InputError(
                "where every row has its own steps the adjoint goes with neither interpolate=True "
                "nor dense=True; use gradient='checkpoint'"
            )
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
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        job: Job = ctx.job
        aliases = job.field.aliases()
        knots = ctx.saved_tensors[job.width + len(aliases) :]
        bound, states = job.field.bind(aliases), ctx.saved_tensors[: job.width]
        if job.problem.per_sample:
            a, totals = back_through_rows(job, bound, aliases, states, cotangents)
        else:
            back = _Back(job, bound, aliases, states, knots)
            a, totals = back.through(cotangents[: job.width], cotangents[job.width :])
        gradients = [
            None if g is None else g.to(x.dtype) for g, x in zip(totals, aliases, strict=True)
        ]
        return None, *(
            gradient if needed else None
            for gradient, needed in zip((*a, *gradients), ctx.needs, strict=True)
        )


@dataclass(frozen=True)
class _Back:
    """The way back from arrival to arrival, the adjoint's cotangents joining at each."""

    job: Job
    field: Field
    aliases: Leaves
    states: Leaves
    knots: Leaves

    def through(
        self, states_bar: Sequence[Tensor], integrals_bar: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients by the first state and by the named tensors."""
        times = self._times()
        last = len(times) - 1
        wanted = tuple(x for x in self.aliases if x.requires_grad)
        a = [bar[last] for bar in states_bar]
        c = [bar[last] for bar in integrals_bar]
        totals: list[Tensor | None] = [None] * len(wanted)
        for i in range(last, 0, -1):
            if np.any(times[i] != times[i - 1]):
                y = tuple(leaf[i] for leaf in self.states)
                a, parts = self._interval((times[i], times[i - 1]), wanted, y, a, c)
                add_gradients(totals, parts)
            a = [bar + more[i - 1] for bar, more in zip(a, states_bar, strict=True)]
            c = [bar + more[i - 1] for bar, more in zip(c, integrals_bar, strict=True)]
        found = iter(totals)
        return a, [next(found) if x.requires_grad else None for x in self.aliases]

    def _times(self) -> Any:
        """The arrivals' times."""
        return self.job.path[0].times

    def _interval(
        self, span: tuple[Any, Any], wanted: Leaves, y: Leaves, a: list[Tensor], c: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The adjoint at the start of one interval, and the named tensors' gradients over it.

        The adjoint equation is linear: it is solved for cotangents of unit size, so that the
        tolerance is relative to the gradient; one that is not finite makes every gradient NaN.
        """
        scale = largest([rms(bar) for bar in (*a, *c) if bar.numel()] or [torch.ones(())])
        scale = torch.where(scale == 0, 1.0, scale)
        units = [torch.where(scale.isfinite(), bar / scale.to(_real(bar)), 0.0) for bar in (*a, *c)]
        known = self._known() if self.knots else None
        solved_back = () if known else y
        augmented = _Augmented(
            self.field, wanted, tuple(units[len(y) :]), len(solved_back), known, set()
        )
        problem = self.job.problem
        adjoint = replace(
            problem, field=augmented, times=span, control=_without_rates(problem.control),
            watch=None, dense=False,
        )  # fmt: skip
        start = (*solved_back, *units[: len(y)])
        solved = _solve_back(adjoint, start, self.job.stats)
        a = [leaf * scale.to(_real(leaf)) for leaf in solved.states[-1][len(solved_back) :]]
        return a, [
            leaf * scale.to(_real(leaf)) if i in augmented.reached else None
            for i, leaf in enumerate(solved.integrals[-1])
        ]

    def _known(self) -> Callable[[float], Leaves]:
        return _Interpolated(self.job, self.field, self.knots)


def _solve_back(problem: Problem, start: Leaves, stats: Stats) -> Any:
    backward = Stats()
    try:
        return integrate(problem, start, backward)
    except IntegrationError as error:
        error.partial = None  # what was reached is the adjoint's, not the solution's
        raise
    finally:
        stats.nfe_backward += backward.calls


class _Interpolated:
    """The forward solution at any time, from the states in which its steps began."""

    def __init__(self, job: Job, field: Field, knots: Leaves) -> None:
        self._problem, self._field, width = job.problem, field, job.width
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
        return interpolant(self._problem.method, self._field, one.t, one.h, one.y, first)


def _real(leaf: Tensor) -> torch.dtype:
    return leaf.real.dtype


def _without_rates(control: Control) -> Control:
    """The same steps, not chosen by what is integrated: here that is the parameter gradient."""
    return replace(control, quadrature_atol=None) if isinstance(control, Adaptive) else control


@dataclass(frozen=True)
class _Augmented:
    """(y, a) ↦ (f, −a ∂f/∂y − c ∂rates/∂y), with rates −(a ∂f/∂θ + c ∂rates/∂θ).

    known: the forward solution, where it is read off and not solved back: then a alone is the
    state; reached: indices of the wanted tensors that the field read at least once.
    """

    field: Field
    wanted: Leaves
    rates_bar: Leaves
    width: int
    known: Callable[[float], Leaves] | None
    reached: set[int]

    def __call__(self, t: float, state: Leaves) -> Evaluation:
        y, a = (state[: self.width], state[self.width :])
        y = tuple(leaf.detach().requires_grad_() for leaf in (self.known(t) if self.known else y))
        with torch.enable_grad(), self.field.precision:
            value = self.field(t, y)
        rates_bar = [
            bar.to(rate.dtype) for bar, rate in zip(self.rates_bar, value.rates, strict=True)
        ]
        inputs = (*y, *self.wanted)
        found = vjp((*value.slope, *value.rates), (*a, *rates_bar), inputs)
        pulled = tuple(
            torch.zeros_like(x) if g is None else -g for g, x in zip(found, inputs, strict=True)
        )
        self.reached.update(i for i, g in enumerate(found[len(y) :]) if g is not None)
        slope = () if self.known else tuple(leaf.detach() for leaf in value.slope)
        return Evaluation((*slope, *pulled[: len(y)]), pulled[len(y) :])
