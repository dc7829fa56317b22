"""The discrete adjoint: accepted steps are recorded, and replayed one by one in backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.field import Evaluation, Field, alias
from cnf.ode.gradient.backprop import put, replay, take
from cnf.ode.gradient.higher import pulled_back
from cnf.ode.gradient.problem import (
    Job,
    Repeated,
    Solved,
    add_gradients,
    solved_by,
    stacked,
    vjp,
)
from cnf.ode.integrate import Accepted, Problem, Stats, integrate
from cnf.ode.method import Evaluate, ExplicitRungeKutta, Step
from cnf.ode.state import Leaves
from cnf.ode.trajectory import Path

KEEP = ("stages", "steps", "sqrt")
Bars = Sequence[Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Gradients of the computed solution, exact, from the states in which accepted steps begin.

    keep: "stages", the states of every step's stages (explicit methods): backward holds the graph
    of one evaluation at a time, or none where the field knows its own vector-Jacobian product;
    "steps", one state for each step: backward repeats the step with its graph; "sqrt", a state for
    each of about √steps segments: backward repeats a segment before it goes through it; None,
    "stages" where the method is explicit and the field knows its own vector-Jacobian product, else
    "steps".
    memory: instead, the most that may be kept, in bytes or as "256MB": all steps while they fit,
    else as many as do.
    Work is that of backpropagation plus one more evaluation for each stage, two for "sqrt".
    Where it is differentiated again, the recorded steps are repeated with all their graph.
    Source: discrete adjoint of the recorded steps, e.g. Zhuang et al. 2020 (ACA), section 3.
    """

    keep: str | None = None
    memory: int | str | None = None

    def __post_init__(self) -> None:
        if self.keep not in (*KEEP, None):
            raise InputError(f"keep must be one of {', '.join(KEEP)}, got {self.keep!r}")
        if self.memory is not None:
            if self.keep is not None:
                raise InputError("memory= chooses what to keep: give it or keep=, not both")
            as_bytes(self.memory)  # now, not at the first solve

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        if problem.per_sample and (self.keep in ("stages", "sqrt") or self.memory is not None):
            raise InputError(
                "where every row has its own steps Checkpoint keeps them all: with per_sample=True "
                "use Checkpoint()"
            )
        if self.keep == "stages" and not isinstance(problem.method, ExplicitRungeKutta):
            raise InputError(
                f"keep='stages' needs an explicit Runge–Kutta method, and {problem.method.name} is "
                "none; use keep='steps'"
            )
        settings = self
        if self.keep is None and self.memory is None:
            explicit = isinstance(problem.method, ExplicitRungeKutta) and not problem.per_sample
            settings = Checkpoint("stages" if explicit and field.has_formula else "steps")
        return solved_by(_Replayed, settings, problem, field, y, first, stats)

    def record(self, problem: Problem, y: Leaves) -> Record:
        """An empty record that keeps what the settings say."""
        if self.keep == "stages":
            assert isinstance(problem.method, ExplicitRungeKutta)
            return Stages(problem.method.tableau.used_stages)
        if self.keep == "sqrt":
            return Record(None)
        if self.memory is None:
            return Record(0)
        size = max(sum(leaf.numel() * leaf.element_size() for leaf in y), 1)
        return Record(max(as_bytes(self.memory) // size, 2))


class Record(list[Accepted]):
    """The accepted steps, of which only some keep their state: every stride-th.

    most: how many states may be kept; 0 for all; None for about the square root of the steps.
    """

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self.most, self.stride = most, 1

    def append(self, step: Accepted) -> None:
        super().append(step if len(self) % self.stride == 0 else step._replace(y=()))
        kept = -(-len(self) // self.stride)
        if self.most != 0 and kept > (2 * self.stride if self.most is None else self.most):
            self.stride *= 2
            for i in range(self.stride // 2, len(self), self.stride):
                self[i] = self[i]._replace(y=())


class Stages(Record):
    """The accepted steps, each with the states of its stages one after the other.

    used: how many stages the solution reads; points: the states of the last step's, but the first.
    """

    def __init__(self, used: int) -> None:
        super().__init__(0)
        self.used, self.points = used, list[Leaves]()

    def append(self, step: Accepted) -> None:
        stages = (step.y, *self.points[: self.used - 1])
        super().append(step._replace(y=tuple(leaf for y in stages for leaf in y)))


@dataclass(frozen=True, kw_only=True)
class _Noted(Problem):
    """A problem whose record is told where the stages of every step are, until one is accepted."""

    record: Stages

    def step(
        self, field: Evaluate, t: Any, h: Any, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        points = self.record.points
        points.clear()

        def noting(moment: Any, point: Leaves) -> Evaluation:
            points.append(point)
            return field(moment, point)

        return super().step(noting, t, h, y, first, estimate)


def as_bytes(memory: int | str) -> int:
    """A number of bytes, from itself or from "256MB", "2 GB", "64kB" and their like."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    text = str(memory).strip().upper()
    number = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    try:
        found = int(float(number) * units[text[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        found = 0
    if isinstance(memory, bool) or found < 1:
        raise InputError(f"memory must be a number of bytes or such as '256MB', got {memory!r}")
    return found


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor) -> Leaves:
        problem, width = job.problem, job.width
        y = tensors[:width]
        record = job.settings.record(problem, y)
        if isinstance(record, Stages):
            known = {one.name: getattr(problem, one.name) for one in fields(problem)}
            problem = _Noted(**known, record=record)
        trajectory = integrate(problem, y, job.stats, first=job.first, keep=record)
        job.path.append(trajectory.path)
        ctx.job = job
        ctx.kept = [len(one.y) for one in trajectory.record]
        ctx.needs = tuple(tensor.requires_grad for tensor in tensors)
        states = (leaf for one in trajectory.record for leaf in one.y)
        # the tensors too, so that torch notices one that is changed in place before backward
        ctx.save_for_backward(*states, *tensors)
        solved = stacked(trajectory, problem)
        return (*solved.states, *solved.integrals, *solved.starts)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        job: Job = ctx.job
        if torch.is_grad_enabled():
            found = _differentiable(job, ctx.saved_tensors[-len(ctx.needs) :], cotangents)
        else:
            record = _record(job.path[0], ctx.kept, ctx.saved_tensors)
            found = _backward(job, record, cotangents)
        return None, *(g if needed else None for g, needed in zip(found, ctx.needs, strict=True))


def _backward(job: Job, record: list[Accepted], cotangents: Bars) -> list[Tensor | None]:
    """Gradients by the first state and by the named tensors, one step's graph at a time."""
    width, rates = job.width, len(job.first.rates)
    aliases = job.field.aliases()
    again = _Replay(job, job.field.bind(aliases), aliases, job.settings.keep == "stages")
    through = again.through_rows if job.problem.per_sample else again.through
    by_state, by_tensor = through(
        record,
        cotangents[:width],
        cotangents[width : width + rates],
        cotangents[width + rates :],
    )
    return [*by_state, *by_tensor]


def _differentiable(job: Job, tensors: Leaves, cotangents: Bars) -> list[Tensor | None]:
    """The same gradients with a graph, from that of all the recorded steps."""
    width = job.width
    inside = (*map(alias, tensors[:width]), *job.field.aliases())
    field = Repeated(job.field.bind(inside[width:]), job.stats)
    again = replay(job.problem, field, inside[:width], job.first.rates, job.path[0])
    return pulled_back(
        (*again.states, *again.integrals, *again.starts), inside, tensors, cotangents
    )


def _record(path: Path, kept: list[int], saved: Leaves) -> list[Accepted]:
    """The record again, from what autograd saved."""
    record, used = [], 0
    for (rows, t, h, slot), count in zip(path.steps, kept, strict=True):
        record.append(Accepted(rows, t, h, saved[used : used + count], slot))
        used += count
    return record


@dataclass(frozen=True)
class _Replay:
    """The recorded steps, repeated from last to first with the graph of one step at a time."""

    job: Job
    field: Field
    aliases: Leaves
    by_stages: bool

    def through(
        self,
        record: list[Accepted],
        states_bar: Bars,
        integrals_bar: Bars,
        _: Bars,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients by the first state and by the named tensors.

        states_bar, integrals_bar: cotangents of shape (arrivals, …).
        """
        marks = self.job.path[0].marks
        last = len(marks) - 1
        y_bar = [bar[last] for bar in states_bar]
        q_bar = [bar[last] for bar in integrals_bar]
        totals: list[Tensor | None] = [None] * len(self.aliases)
        segment = _Segments(record, self._forward)
        for output in range(last, 0, -1):
            for i in reversed(range(marks[output - 1], marks[output])):
                y_bar, parts = self._step(segment[i], self.field, y_bar, q_bar)
                add_gradients(totals, parts)
            y_bar = [bar + more[output - 1] for bar, more in zip(y_bar, states_bar, strict=True)]
            q_bar = [bar + more[output - 1] for bar, more in zip(q_bar, integrals_bar, strict=True)]
        return y_bar, totals

    def through_rows(
        self,
        record: list[Accepted],
        states_bar: Bars,
        integrals_bar: Bars,
        starts_bar: Bars,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The same where every row has its own steps; starts_bar: of the states they begin in."""
        y_bar = tuple(torch.zeros_like(bar[0]) for bar in states_bar)
        q_bar = tuple(torch.zeros_like(bar[0]) for bar in integrals_bar)
        totals: list[Tensor | None] = [None] * len(self.aliases)
        end = len(starts_bar[0]) if starts_bar else 0
        for one in reversed(record):
            at = _reached(take(y_bar, one.rows), states_bar, one)
            q_at = _reached(take(q_bar, one.rows), integrals_bar, one)
            q_bar = put(q_bar, one.rows, q_at)
            with torch.enable_grad():  # gradients of aligned tensors go through their rows
                field = self.field if one.rows is None else self.field.take(one.rows)
            begun, parts = self._step(one, field, list(at), list(q_at))
            add_gradients(totals, parts)
            if starts_bar:
                end, last = end - len(begun[0]), end
                begun = [b + bar[end:last] for b, bar in zip(begun, starts_bar, strict=True)]
            y_bar = put(y_bar, one.rows, tuple(begun))
        return [bar + more[0] for bar, more in zip(y_bar, states_bar, strict=True)], totals

    def _step(
        self, one: Accepted, field: Field, y_bar: list[Tensor], q_bar: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        if self.by_stages:
            return self._stages(one, field, y_bar, q_bar)
        problem = self.job.problem
        with torch.enable_grad():
            y = tuple(leaf.detach().requires_grad_() for leaf in one.y)
            evaluate = Repeated(field, self.job.stats)
            first = problem.first_stage(evaluate, one.t, one.h, y)
            step = problem.step(evaluate, one.t, one.h, y, first, False)
            increment = tuple(
                part.to(bar.dtype) for part, bar in zip(step.increment, q_bar, strict=True)
            )
        found = vjp((*step.y, *increment), (*y_bar, *q_bar), (*y, *self.aliases))
        by_state = [
            torch.zeros_like(bar) if part is None else part
            for part, bar in zip(found, y_bar, strict=False)
        ]
        return by_state, found[len(y) :]

    def _stages(
        self, one: Accepted, field: Field, y_bar: list[Tensor], q_bar: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """A step's gradients with the graph of one stage at a time.

        Each stage is evaluated again at its own state: κ_i = h b_i λ + h Σ_j a_ji ℓ_j is pulled
        back to ℓ_i, and λ grows by Σ ℓ_i.
        """
        method, width = self.job.problem.method, len(y_bar)
        assert isinstance(method, ExplicitRungeKutta)
        tableau, used = method.tableau, method.tableau.used_stages
        totals: list[Tensor | None] = [None] * len(self.aliases)
        pulled: dict[int, list[Tensor]] = {}
        for i in reversed(range(used)):
            kappa = [
                _weighted(
                    [(tableau.b[i], bar), *((tableau.a[j][i], pulled[j][k]) for j in pulled)], one.h
                )
                for k, bar in enumerate(y_bar)
            ]
            rates = [bar * (tableau.b[i] * one.h) for bar in q_bar]
            moment, point = one.t + tableau.c[i] * one.h, one.y[i * width : (i + 1) * width]
            pulled[i], parts = self._stage(moment, one.t + one.h / 2, point, field, kappa, rates)
            add_gradients(totals, parts)
        by_state = [bar + sum(ell[k] for ell in pulled.values()) for k, bar in enumerate(y_bar)]
        return by_state, totals

    def _stage(
        self, t: float, side: float, y: Leaves, field: Field, kappa: Bars, rates_bar: Bars
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Cotangents of one evaluation pulled back to its state and to the named tensors."""
        by_formula = self._by_formula(t, side, y, field, kappa, rates_bar)
        if by_formula is not None:
            return by_formula
        with torch.enable_grad():
            y = tuple(leaf.detach().requires_grad_() for leaf in y)
            inside = self.job.problem.beside(t, side, beyond=True)  # as the step saw it
            value = Repeated(field, self.job.stats)(inside, y)
        heads = (*value.slope, *value.rates)
        bars = [bar.to(head.dtype) for bar, head in zip((*kappa, *rates_bar), heads, strict=True)]
        found = vjp(heads, bars, (*y, *self.aliases))
        by_state = [
            torch.zeros_like(bar) if part is None else part
            for part, bar in zip(found, kappa, strict=False)
        ]
        return by_state, found[len(y) :]

    def _by_formula(
        self, t: float, side: float, y: Leaves, field: Field, kappa: Bars, rates_bar: Bars
    ) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """The same by the field's own vector-Jacobian product; None where it has none."""
        given = self.job.first.rates
        rates = [bar.to(rate.dtype) for bar, rate in zip(rates_bar, given, strict=True)]
        found = field.pull(self.job.problem.beside(t, side, beyond=True), y, kappa, rates)
        if found is None:
            return None
        self.job.stats.nfe_backward += 1
        return list(found[0]), found[1]

    @torch.no_grad()
    def _forward(self, one: Accepted) -> Leaves:
        """Where a recorded step ends."""
        problem, evaluate = self.job.problem, Repeated(self.field, self.job.stats)
        first = problem.first_stage(evaluate, one.t, one.h, one.y)
        return problem.step(evaluate, one.t, one.h, one.y, first, False).y


class _Segments:
    """Recorded steps with their states, read from last to first.

    Where a state was not kept, the steps from the last one that was are taken again.
    """

    def __init__(self, record: list[Accepted], forward: Any) -> None:
        self._record, self._forward = record, forward
        self._known: dict[int, Leaves] = {}

    def __getitem__(self, i: int) -> Accepted:
        one = self._record[i]
        if one.y:
            return one
        if i not in self._known:
            self._known = {}
            start = next(k for k in range(i, -1, -1) if self._record[k].y)
            y = self._record[start].y
            for k in range(start, i):
                y = self._forward(self._record[k]._replace(y=y))
                self._known[k + 1] = y
        return one._replace(y=self._known.pop(i))


def _reached(bars: Leaves, arrivals: Bars, one: Accepted) -> Leaves:
    """Cotangents of a step's rows with those of what they reached at its end."""
    assert one.slot is not None
    there = one.slot >= 0
    found = []
    for bar, arrival in zip(bars, arrivals, strict=True):
        rows = torch.arange(len(bar), device=bar.device) if one.rows is None else one.rows
        more = arrival[one.slot.clamp(min=0), rows]
        mask = there.reshape(-1, *[1] * (bar.ndim - 1))
        found.append(bar + torch.where(mask, more, torch.zeros_like(more)))
    return tuple(found)


def _weighted(terms: list[tuple[float, Tensor]], h: float) -> Tensor:
    """h Σ weight · tensor."""
    total = terms[0][1] * (terms[0][0] * h)
    for weight, tensor in terms[1:]:
        if weight != 0.0:
            total = torch.add(total, tensor, alpha=weight * h)
    return total
