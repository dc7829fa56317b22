"""A method coupled with itself, whose steps can be undone: exact gradients in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError, IntegrationError, whole_number
from cnf.ode.compiled import Compiled
from cnf.ode.control import Adaptive
from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.higher import only_once
from cnf.ode.gradient.problem import Job, Repeated, Solved, add_gradients, solved_by, stacked, vjp
from cnf.ode.implicit import DiagonallyImplicit
from cnf.ode.integrate import Accepted, Problem, Stats, integrate
from cnf.ode.method import Evaluate, Method, Step
from cnf.ode.oracle import Oracle
from cnf.ode.state import Leaves
from cnf.ode.switching import Switching
from cnf.ode.tangent import is_unreadable
from cnf.ode.trajectory import Steps

Bars = Sequence[Tensor]
# what y and z may part by, of the state's size: in adaptive steps 1,000 tolerances, or where these
# are loose a twentieth or 20 of them; in fixed steps, which may be as coarse as one likes, a half,
# or ten times what the first step alone parts them by, for each step
ADAPTIVE_APART, FEW_TOLERANCES, MANY_TOLERANCES = 0.05, 20.0, 1000.0
FIXED_APART, MOST_STEPS = 0.5, 10.0


@dataclass(frozen=True)
class Reversible:
    """Gradients of the computed solution, exact to rounding, from its last state alone.

    The solution is that of an algebraically reversible scheme: a second state z goes along, and
    with the increment Ψ_h(t, y) of the method's step, y' = ℓ y + (1 − ℓ) z + Ψ_h(t, z) and
    z' = z − Ψ_{−h}(t + h, y').  It has the method's order at twice the evaluations; backward undoes
    the steps one by one.
    Where the solution contracts like e^(−λt), y and z part like e^(λt), and ℓ pulls them together:
    over the whole time by the product of all ℓ, by whose inverse rounding grows backward.
    coupling: ℓ, 0 < ℓ ≤ 1, of every step; None chooses it by the step's length, so that rounding
    grows to its own two thirds' power in all (2e-5 in single precision, 4e-11 in double) and
    contractions of up to e^5 and e^12 part nothing; every: a number of steps after which z starts
    anew from y, at the price of one kept pair each time, or None.
    Raises IntegrationError where y and z have parted by more than their steps explain: take every=,
    a smaller coupling, or "checkpoint".
    Source: McCallum & Foster 2024, Efficient, accurate and stable gradients for neural ODEs.
    """

    coupling: float | None = None
    every: int | None = None
    changes_solution: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = self.coupling is None or isinstance(self.coupling, float | int)
        if not known or not (self.coupling is None or 0 < self.coupling <= 1):
            raise InputError(f"coupling must be a number in (0, 1] or None, got {self.coupling!r}")
        if self.every is not None:
            whole_number("every", self.every, 1)

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        if isinstance(problem.method, Compiled):
            raise InputError("gradient='reversible' does not go with compile=True; leave one out")
        if problem.per_sample or problem.dense or problem.watch:
            raise InputError(
                "gradient='reversible' undoes steps that all rows share, between output times: it "
                "goes with neither per_sample=True nor dense=True nor event=; use 'checkpoint'"
            )
        if isinstance(problem.method, DiagonallyImplicit | Switching | Oracle):
            raise InputError(
                f"gradient='reversible' undoes explicit steps, and those of {problem.method.name} "
                "are none; use 'checkpoint'"
            )
        return solved_by(_Undone, self, problem, field, y, first, stats)

    def coupling_of(self, h: float, span: float, y: Leaves) -> float:
        """ℓ of a step of length h on a way of length `span`."""
        if self.coupling is not None:
            return self.coupling
        rounding = max(torch.finfo(leaf.dtype).eps for leaf in y)
        share = abs(h) / span if self.every is None else 1 / self.every
        return rounding ** (share / 3)


@dataclass(frozen=True)
class Coupled:
    """Steps of a method on (y, z), leaf after leaf, that can be undone.

    span: the length of the whole way; record: the accepted steps so far, by which z starts anew in
    time.
    """

    method: Method
    settings: Reversible
    span: float
    record: _Pairs

    @property
    def name(self) -> str:
        return f"reversible {self.method.name}"

    @property
    def order(self) -> int:
        return self.method.order

    @property
    def adaptive(self) -> bool:
        return self.method.adaptive

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        y, z = _halves(y)
        one, coupling = OnOne(field), self.settings.coupling_of(h, self.span, y)
        if self.record.starts_anew(len(self.record.steps)):
            z, first = y, _twice(one(t, y))
        there = self.method.step(one, t, h, z, _half(first), estimate)
        end = tuple(
            torch.add(moved, before - at, alpha=coupling)
            for moved, before, at in zip(there.y, y, z, strict=True)
        )
        back = self.method.step(one, t + h, -h, end, one(t + h, end), False)
        after = tuple(at + (now - moved) for at, now, moved in zip(z, end, back.y, strict=True))
        if not self.record.steps:  # where both were one
            self.record.first_apart = _apart(end, after)
        return Step((*end, *after), there.increment, None, there.error * 2, there.increment_error)


@dataclass(frozen=True)
class OnSecond:
    """A field on (y, z): that of z, for both."""

    field: Evaluate

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        value = self.field(t, _halves(y)[1])
        return _twice(value)


@dataclass(frozen=True)
class OnOne:
    """The field that OnSecond was made of."""

    doubled: Evaluate

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        return _half(self.doubled(t, (*y, *y)))


class _Pairs(list[Accepted]):
    """The accepted steps at whose beginning z started anew; `steps`: all, without their states;
    first_apart: by how much the first of them parts y and z, a tensor for each leaf.
    """

    def __init__(self, every: int | None) -> None:
        super().__init__()
        self._every, self.steps = every, Steps()
        self.first_apart: list[Tensor] = []

    def starts_anew(self, i: int) -> bool:
        """Whether z starts anew from y at the beginning of step i."""
        return self._every is not None and i > 0 and i % self._every == 0

    def append(self, step: Accepted) -> None:
        if self.starts_anew(len(self.steps)):
            super().append(step)
        self.steps.append(step)


class _Undone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor) -> Leaves:
        problem, y, settings = job.problem, tensors[: job.width], job.settings
        record = _Pairs(settings.every)
        coupled = replace(
            problem,
            field=OnSecond(problem.field),
            method=Coupled(problem.method, settings, problem.span, record),
        )
        trajectory = integrate(coupled, (*y, *y), job.stats, first=_twice(job.first), keep=record)
        last = trajectory.states[-1]
        if settings.every != 1:  # then no step sees what the last one left apart
            _check_pair(last, record.first_apart, coupled, job.stats)
        trajectory.states = [_halves(both)[0] for both in trajectory.states]
        job.path.append(trajectory.path)
        ctx.job = job
        ctx.needs = tuple(tensor.requires_grad for tensor in tensors)
        pairs = (leaf for one in record for leaf in one.y)
        ctx.save_for_backward(*last, *tensors[job.width :], *pairs)
        solved = stacked(trajectory, problem)
        return (*solved.states, *solved.integrals)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        job, saved = ctx.job, ctx.saved_tensors
        with torch.no_grad():
            aliases = job.field.aliases()
            last, pairs = saved[: 2 * job.width], saved[2 * job.width + len(aliases) :]
            undo = _Undo(job, Repeated(job.field.bind(aliases), job.stats), aliases, pairs)
            states_bar, integrals_bar = cotangents[: job.width], cotangents[job.width :]
            by_state, by_tensor = undo.through(last, states_bar, integrals_bar)
        found = [*by_state, *by_tensor]
        if torch.is_grad_enabled():
            found = only_once(found, (*saved, *cotangents), _ONCE)
        return None, *(g if needed else None for g, needed in zip(found, ctx.needs, strict=True))


_ONCE = (
    "gradient='reversible' has first derivatives alone; for a second take 'checkpoint', 'adjoint' "
    "or 'backprop'"
)


@dataclass(frozen=True)
class _Undo:
    """The way back: each step is undone, and its two halves differentiated as they are met."""

    job: Job
    field: Evaluate
    aliases: Leaves
    pairs: Leaves

    def through(
        self, last: Leaves, states_bar: Bars, integrals_bar: Bars
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients by the first state and by the named tensors."""
        path = self.job.path[0]
        count = len(path.marks) - 1
        (y, z) = _halves(last)
        totals: list[Tensor | None] = [None] * len(self.aliases)
        y_bar, z_bar = [bar[count] for bar in states_bar], [0 * bar[count] for bar in states_bar]
        q_bar = [bar[count] for bar in integrals_bar]
        anew, width = _Pairs(self.job.settings.every), 2 * len(y)
        kept = (self.pairs[i - width : i] for i in range(len(self.pairs), 0, -width))
        for output in range(count, 0, -1):
            for i in reversed(range(path.marks[output - 1], path.marks[output])):
                _, t, h, _ = path.steps[i]
                z, y_bar = self._second_half(t, h, y, z, y_bar, z_bar, totals)
                y, y_bar, z_bar = self._first_half(t, h, y, z, y_bar, z_bar, q_bar, totals)
                if anew.starts_anew(i):  # z was y there
                    y_bar = [a + b for a, b in zip(y_bar, z_bar, strict=True)]
                    z_bar = [torch.zeros_like(bar) for bar in z_bar]
                    y, z = _halves(next(kept))
            y_bar = [bar + more[output - 1] for bar, more in zip(y_bar, states_bar, strict=True)]
            q_bar = [bar + more[output - 1] for bar, more in zip(q_bar, integrals_bar, strict=True)]
        return [a + b for a, b in zip(y_bar, z_bar, strict=True)], totals

    def _second_half(
        self, t: float, h: float, y: Leaves, z: Leaves, y_bar: Bars, z_bar: Bars, totals: list[Any]
    ) -> tuple[Leaves, list[Tensor]]:
        """z before z' = z + y' − step(y', −h), and the cotangent of y'."""
        end, step = self._step(t + h, -h, y)
        before = tuple(
            after - (now - moved.detach()) for after, now, moved in zip(z, y, step.y, strict=True)
        )
        found = vjp(step.y, [-bar for bar in z_bar], (*end, *self.aliases))
        add_gradients(totals, found[len(y) :])
        pulled = _dense(found, z_bar)
        return before, [sum(bars) for bars in zip(y_bar, z_bar, pulled, strict=True)]  # type: ignore

    def _first_half(
        self,
        t: float,
        h: float,
        y: Leaves,
        z: Leaves,
        y_bar: Bars,
        z_bar: Bars,
        q_bar: Bars,
        totals: list[Any],
    ) -> tuple[Leaves, list[Tensor], list[Tensor]]:
        """y before y' = step(z, h) + ℓ (y − z), and the cotangents of y and z."""
        coupling = self.job.settings.coupling_of(h, self.job.problem.span, z)
        start, step = self._step(t, h, z)
        before = tuple(
            at + (now - moved.detach()) / coupling
            for at, now, moved in zip(z, y, step.y, strict=True)
        )
        heads = (*step.y, *step.increment)
        bars = [bar.to(head.dtype) for bar, head in zip((*y_bar, *q_bar), heads, strict=True)]
        found = vjp(heads, bars, (*start, *self.aliases))
        add_gradients(totals, found[len(y) :])
        y_bar = [coupling * bar for bar in y_bar]
        pulled = zip(z_bar, _dense(found, z_bar), y_bar, strict=True)
        return before, y_bar, [bar + more - less for bar, more, less in pulled]

    def _step(self, t: float, h: float, y: Leaves) -> tuple[Leaves, Step]:
        """The method's own step with its graph, and the leaves that it starts from."""
        problem = self.job.problem
        with torch.enable_grad():
            start = tuple(leaf.detach().requires_grad_() for leaf in y)
            first = problem.first_stage(self.field, t, h, start)
            return start, problem.step(self.field, t, h, start, first, False)


def is_reversible(gradient: Any) -> bool:
    """Whether a gradient, or its name, is this one, by which a step has twice the evaluations."""
    return gradient == "reversible" or isinstance(gradient, Reversible)


def _dense(found: Sequence[Tensor | None], like: Bars) -> list[Tensor]:
    """The first gradients, zeros where one is identically zero."""
    pairs = zip(found, like, strict=False)
    return [torch.zeros_like(bar) if part is None else part for part, bar in pairs]


def _apart(y: Leaves, z: Leaves) -> list[Tensor]:
    return [torch.linalg.vector_norm(a - b).double() for a, b in zip(y, z, strict=True)]


def _check_pair(last: Leaves, first_apart: list[Tensor], problem: Problem, stats: Stats) -> None:
    """Raises IntegrationError where y and z have parted: one device-to-host read, where any is
    possible.
    """
    if is_unreadable(last):
        return
    y, z = _halves(last)
    sizes = [torch.linalg.vector_norm(leaf).double() for leaf in y]
    found = torch.stack([*_apart(y, z), *sizes, *first_apart]).cpu().numpy()
    parts = np.split(found, [len(y), 2 * len(y)])
    distance, size, first = (float(np.linalg.norm(part)) for part in parts)
    control = problem.control
    if isinstance(control, Adaptive):
        tolerance = max(control.rtol, control.atol)
        coarse = max(ADAPTIVE_APART, FEW_TOLERANCES * tolerance)
        most = min(MANY_TOLERANCES * tolerance, coarse) * size
    else:
        most = max(FIXED_APART * size, MOST_STEPS * stats.accepted * first)
    if distance > most:
        t, every = problem.times[-1], min(50, max(1, stats.accepted // 4))
        raise IntegrationError(
            f"the two states of {problem.method.name} have parted by {distance / size:.1%} at "
            f"t={t:.6g}, after {stats.accepted} steps: the solution contracts by more than their "
            f"coupling makes up for; try gradient=Reversible(every={every}), a smaller coupling, "
            "or gradient='checkpoint'",
            t=t,
            nfe=stats.calls,
        )


def _halves(leaves: Leaves) -> tuple[Leaves, Leaves]:
    half = len(leaves) // 2
    return leaves[:half], leaves[half:]


def _half(value: Evaluation) -> Evaluation:
    return Evaluation(_halves(value.slope)[0], value.rates)


def _twice(value: Evaluation) -> Evaluation:
    return Evaluation(value.slope * 2, value.rates)
