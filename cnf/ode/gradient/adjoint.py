"""The continuous adjoint: a second ODE, solved backward, in memory that no step count enlarges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cnf.error import IntegrationError
from cnf.ode.control import Adaptive, Control
from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.problem import Solved, add_gradients, solved_by, stacked, vjp
from cnf.ode.integrate import Problem, Stats, integrate
from cnf.ode.state import Leaves, largest, rms


@dataclass(frozen=True)
class Adjoint:
    """Gradients by the adjoint equation, with the state solved back beside it.

    da/dt = −a ∂f/∂y and dL/dθ = ∫ a ∂f/∂θ dt; the parameter gradient is a quadrature and takes no
    part in the choice of steps.  Memory: the states at the output times and one evaluation's graph.
    Not exact for the computed solution: the error is of the order of the tolerance.
    Source: Chen et al. 2018, equations 4 and 7 to 10.
    """

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        return solved_by(_Adjoint, problem, field, y, first, stats)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        field: Field,
        first: Evaluation,
        stats: Stats,
        width: int,
        *tensors: Tensor,
    ) -> Leaves:
        solved = stacked(integrate(problem, tensors[:width], stats, first=first))
        ctx.problem, ctx.field, ctx.stats = problem, field, stats
        ctx.needs = tuple(tensor.requires_grad for tensor in tensors)
        ctx.width = width
        # the tensors too, so that torch notices one that is changed in place before backward
        ctx.save_for_backward(*solved.states, *tensors[width:])
        return (*solved.states, *solved.integrals)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        problem, width, last = ctx.problem, ctx.width, len(ctx.problem.times) - 1
        states = ctx.saved_tensors[:width]
        aliases = ctx.field.aliases()
        bound = ctx.field.bind(aliases)
        wanted = tuple(x for x in aliases if x.requires_grad)
        a = [bar[last] for bar in cotangents[:width]]
        c = [bar[last] for bar in cotangents[width:]]
        totals: list[Tensor | None] = [None] * len(wanted)
        for output in range(last, 0, -1):
            y = tuple(leaf[output] for leaf in states)
            span = (problem.times[output], problem.times[output - 1])
            a, parts = _interval(problem, span, bound, wanted, y, a, c, ctx.stats)
            add_gradients(totals, parts)
            a = [bar + more[output - 1] for bar, more in zip(a, cotangents[:width], strict=True)]
            c = [bar + more[output - 1] for bar, more in zip(c, cotangents[width:], strict=True)]
        found = iter(totals)
        totals = [next(found) if x.requires_grad else None for x in aliases]
        gradients = [
            None if g is None else g.to(x.dtype) for g, x in zip(totals, aliases, strict=True)
        ]
        return (None,) * 5 + tuple(
            gradient if needed else None
            for gradient, needed in zip((*a, *gradients), ctx.needs, strict=True)
        )


def _interval(
    problem: Problem,
    span: tuple[float, float],
    field: Field,
    wanted: Leaves,
    y: Leaves,
    a: Sequence[Tensor],
    c: Sequence[Tensor],
    stats: Stats,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The adjoint at the start of one output interval, and the named tensors' gradients over it.

    The adjoint equation is linear: it is solved for cotangents of unit size, so that the tolerance
    is relative to the gradient; a cotangent that is not finite makes every gradient NaN.
    """
    scale = largest([rms(bar) for bar in (*a, *c) if bar.numel()] or [torch.ones(())])
    scale = torch.where(scale == 0, 1.0, scale)
    units = [torch.where(scale.isfinite(), bar / scale.to(_real(bar)), 0.0) for bar in (*a, *c)]
    augmented = _Augmented(field, wanted, tuple(units[len(y) :]), len(y), set())
    adjoint = replace(problem, field=augmented, times=span, control=_without_rates(problem.control))
    backward = Stats()
    try:
        solved = integrate(adjoint, (*y, *units[: len(y)]), backward)
    except IntegrationError as error:
        error.partial = None  # what was reached is the adjoint's, not the solution's
        raise
    finally:
        stats.nfe_backward += backward.nfe
    a = [leaf * scale.to(_real(leaf)) for leaf in solved.states[-1][len(y) :]]
    return a, [
        leaf * scale.to(_real(leaf)) if i in augmented.reached else None
        for i, leaf in enumerate(solved.integrals[-1])
    ]


def _real(leaf: Tensor) -> torch.dtype:
    return leaf.real.dtype


def _without_rates(control: Control) -> Control:
    """The same steps, not chosen by what is integrated: here that is the parameter gradient."""
    return replace(control, quadrature_atol=None) if isinstance(control, Adaptive) else control


@dataclass(frozen=True)
class _Augmented:
    """(y, a) ↦ (f, −a ∂f/∂y − c ∂rates/∂y), with rates −(a ∂f/∂θ + c ∂rates/∂θ).

    reached: indices of the wanted tensors that the field read at least once.
    """

    field: Field
    wanted: Leaves
    rates_bar: Leaves
    width: int
    reached: set[int]

    def __call__(self, t: float, state: Leaves) -> Evaluation:
        y = tuple(leaf.detach().requires_grad_() for leaf in state[: self.width])
        a = state[self.width :]
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
        self.reached.update(i for i, g in enumerate(found[self.width :]) if g is not None)
        slope = tuple(leaf.detach() for leaf in value.slope)
        return Evaluation((*slope, *pulled[: self.width]), pulled[self.width :])
