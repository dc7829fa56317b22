"""The continuous adjoint: a second ODE, solved backward, in memory that no step count enlarges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.problem import Solved, add_gradients, stacked, vjp
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
        outputs = _Adjoint.apply(problem, field, first, stats, len(y), *y, *field.tensors)
        return Solved(outputs[: len(y)], outputs[len(y) :])


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
        ctx.save_for_backward(*solved.states)
        return (*solved.states, *solved.integrals)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        states, problem = ctx.saved_tensors, ctx.problem
        width, last = len(states), len(problem.times) - 1
        aliases = ctx.field.aliases()
        bound = ctx.field.bind(aliases)
        a = [bar[last] for bar in cotangents[:width]]
        c = [bar[last] for bar in cotangents[width:]]
        totals: list[Tensor | None] = [None] * len(aliases)
        for output in range(last, 0, -1):
            y = tuple(leaf[output] for leaf in states)
            span = (problem.times[output], problem.times[output - 1])
            a, parts = _interval(problem, span, bound, aliases, y, a, c, ctx.stats)
            add_gradients(totals, parts)
            a = [bar + more[output - 1] for bar, more in zip(a, cotangents[:width], strict=True)]
            c = [bar + more[output - 1] for bar, more in zip(c, cotangents[width:], strict=True)]
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
    aliases: Leaves,
    y: Leaves,
    a: Sequence[Tensor],
    c: Sequence[Tensor],
    stats: Stats,
) -> tuple[list[Tensor], list[Tensor]]:
    """The adjoint at the start of one output interval, and the named tensors' gradients over it.

    The adjoint equation is linear: it is solved for cotangents of unit size, so that the tolerance
    is relative to the gradient.
    """
    scale = largest([rms(bar) for bar in (*a, *c) if bar.numel()] or [torch.ones(())])
    scale = torch.where(scale > 0, scale, 1.0)
    unit = tuple(bar / scale.to(_real(bar)) for bar in a)
    rates_bar = tuple(bar / scale.to(_real(bar)) for bar in c)
    augmented = _Augmented(field, aliases, rates_bar, len(y))
    backward = Stats()
    solved = integrate(replace(problem, field=augmented, times=span), (*y, *unit), backward)
    stats.nfe_backward += backward.nfe
    a = [leaf * scale.to(_real(leaf)) for leaf in solved.states[-1][len(y) :]]
    return a, [leaf * scale.to(_real(leaf)) for leaf in solved.integrals[-1]]


def _real(leaf: Tensor) -> torch.dtype:
    return leaf.real.dtype


@dataclass(frozen=True)
class _Augmented:
    """(y, a) ↦ (f, −a ∂f/∂y − c ∂rates/∂y), with rates −(a ∂f/∂θ + c ∂rates/∂θ)."""

    field: Field
    aliases: Leaves
    rates_bar: Leaves
    width: int

    def __call__(self, t: float, state: Leaves) -> Evaluation:
        y = tuple(leaf.detach().requires_grad_() for leaf in state[: self.width])
        a = state[self.width :]
        with torch.enable_grad():
            value = self.field(t, y)
        rates_bar = [
            bar.to(rate.dtype) for bar, rate in zip(self.rates_bar, value.rates, strict=True)
        ]
        inputs = (*y, *self.aliases)
        found = vjp((*value.slope, *value.rates), (*a, *rates_bar), inputs)
        pulled = tuple(
            torch.zeros_like(x) if g is None else -g for g, x in zip(found, inputs, strict=True)
        )
        slope = tuple(leaf.detach() for leaf in value.slope)
        return Evaluation((*slope, *pulled[: self.width]), pulled[self.width :])
