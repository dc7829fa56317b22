"""The discrete adjoint: accepted steps are recorded, and replayed one by one in backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.problem import Solved, add_gradients, solved_by, stacked, vjp
from cnf.ode.integrate import Accepted, Problem, Stats, integrate
from cnf.ode.state import Leaves


@dataclass(frozen=True)
class Checkpoint:
    """Gradients of the computed solution, exact, from one state for each accepted step.

    Backward repeats each step with its graph: memory is steps times the state, plus one step's
    graph; work is that of backpropagation plus one more evaluation for each stage.
    Source: discrete adjoint of the recorded steps, e.g. Zhuang et al. 2020 (ACA), section 3.
    """

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        return solved_by(_Replayed, problem, field, y, first, stats)


class _Replayed(torch.autograd.Function):
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
        trajectory = integrate(problem, tensors[:width], stats, first=first, keep=True)
        ctx.problem, ctx.field, ctx.stats, ctx.width = problem, field, stats, width
        ctx.steps = [(accepted.t, accepted.h) for accepted in trajectory.record]
        ctx.marks = trajectory.marks
        ctx.needs = tuple(tensor.requires_grad for tensor in tensors)
        states = (leaf for accepted in trajectory.record for leaf in accepted.y)
        # the tensors too, so that torch notices one that is changed in place before backward
        ctx.save_for_backward(*states, *tensors[width:])
        solved = stacked(trajectory)
        return (*solved.states, *solved.integrals)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        width, saved = ctx.width, ctx.saved_tensors
        record = [
            Accepted(None, t, h, saved[i * width : (i + 1) * width])
            for i, (t, h) in enumerate(ctx.steps)
        ]
        aliases = ctx.field.aliases()
        replay = _Replay(ctx.problem, ctx.field.bind(aliases), aliases, ctx.stats)
        by_state, by_tensor = replay.backward(
            record, ctx.marks, cotangents[:width], cotangents[width:]
        )
        return (None,) * 5 + tuple(
            gradient if needed else None
            for gradient, needed in zip((*by_state, *by_tensor), ctx.needs, strict=True)
        )


@dataclass(frozen=True)
class _Replay:
    """The recorded steps, repeated from last to first with the graph of one step at a time."""

    problem: Problem
    field: Field
    aliases: Leaves
    stats: Stats

    def backward(
        self,
        record: Sequence[Accepted],
        marks: Sequence[int],
        states_bar: Sequence[Tensor],
        integrals_bar: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients by the first state and by the named tensors.

        states_bar, integrals_bar: cotangents of shape (times, …).
        """
        last = len(marks) - 1
        y_bar = [bar[last] for bar in states_bar]
        q_bar = [bar[last] for bar in integrals_bar]
        totals: list[Tensor | None] = [None] * len(self.aliases)
        for output in range(last, 0, -1):
            for accepted in reversed(record[marks[output - 1] : marks[output]]):
                y_bar, parts = self._step(accepted, y_bar, q_bar)
                add_gradients(totals, parts)
            y_bar = [bar + more[output - 1] for bar, more in zip(y_bar, states_bar, strict=True)]
            q_bar = [bar + more[output - 1] for bar, more in zip(q_bar, integrals_bar, strict=True)]
        return y_bar, totals

    def _step(
        self, accepted: Accepted, y_bar: list[Tensor], q_bar: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        with torch.enable_grad():
            y = tuple(leaf.detach().requires_grad_() for leaf in accepted.y)
            first = self._evaluate(accepted.t, y)
            step = self.problem.method.step(
                self._evaluate, accepted.t, accepted.h, y, first, estimate=False
            )
            increment = tuple(
                part.to(bar.dtype) for part, bar in zip(step.increment, q_bar, strict=True)
            )
        found = vjp((*step.y, *increment), (*y_bar, *q_bar), (*y, *self.aliases))
        by_state = [
            torch.zeros_like(bar) if part is None else part
            for part, bar in zip(found, y_bar, strict=False)
        ]
        return by_state, found[len(y) :]

    def _evaluate(self, t: float, y: Leaves) -> Evaluation:
        self.stats.nfe_backward += 1
        with self.field.precision:
            return self.field(t, y)
