"""The one loop: steps from output time to output time, its counters and its record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.error import IntegrationError
from cnf.ode.control import Adaptive, Control, FixedStep
from cnf.ode.field import Evaluation
from cnf.ode.method import Evaluate, Method, Step
from cnf.ode.state import Leaves, bad_rows, combine, is_finite, largest, precise_dtype, rms


@dataclass
class Stats:
    """What a solve cost: evaluations of the field forward and backward, steps taken and refused.

    The backward count grows when `backward()` runs.
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y) over strictly monotone host `times`, and how to solve it."""

    field: Evaluate
    times: tuple[float, ...]
    method: Method
    control: Control
    max_steps: int

    @property
    def direction(self) -> float:
        return math.copysign(1.0, self.times[-1] - self.times[0])

    @property
    def span(self) -> float:
        return abs(self.times[-1] - self.times[0])


class Accepted(NamedTuple):
    """One accepted step: from (t, y) by h; rows: those of the batch that took it, None for all."""

    rows: None
    t: float
    h: float
    y: Leaves


@dataclass
class Trajectory:
    """States and integrals at each output time.

    record: the accepted steps, where they were kept; marks: how many there were at each output
    time.
    """

    states: list[Leaves] = field(default_factory=list)
    integrals: list[Leaves] = field(default_factory=list)
    record: list[Accepted] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)


def integrate(
    problem: Problem,
    y: Leaves,
    stats: Stats,
    *,
    first: Evaluation | None = None,
    keep: bool = False,
) -> Trajectory:
    """Solve from y at times[0] through all times; the graph follows where gradients are enabled.

    first: the field at the start, where the caller has it; keep: whether to keep the record.
    Raises IntegrationError where the state turns non-finite, the step vanishes or steps run out.
    """
    trajectory = _March(problem, y, stats, first=first, keep=keep).run()
    if not is_finite((*trajectory.states[-1], *trajectory.integrals[-1])):
        with torch.no_grad():  # once more, looking at every step, to say where
            _March(problem, y, Stats(), watch=True).run()
        raise _failure("the solution is not finite", problem, problem.times[-1], 0.0, stats, [])
    return trajectory


class _March:
    """The way from output time to output time: where it stands, and what it leaves behind.

    keep: whether to write the record; watch: whether to look at every step for what is not finite,
    at one device-to-host read each.
    """

    def __init__(
        self,
        problem: Problem,
        y: Leaves,
        stats: Stats,
        *,
        first: Evaluation | None = None,
        keep: bool = False,
        watch: bool = False,
    ) -> None:
        self.problem, self.stats, self.keep, self.watch = problem, stats, keep, watch
        self.evaluate = _Counted(problem.field, stats)
        self.t, self.y = problem.times[0], y
        first = self.evaluate(self.t, y) if first is None else first
        self.first: Evaluation | None = first
        self.integral = tuple(
            torch.zeros_like(rate, dtype=precise_dtype(rate)) for rate in first.rates
        )
        self.size = _first_size(problem, self.evaluate, y, first)
        self.refused = False  # whether the last attempt was
        self.attempts = self.steps = 0
        self.out = Trajectory()

    def run(self) -> Trajectory:
        self._arrive()
        for target in self.problem.times[1:]:
            while self.t != target:
                self._advance(target)
            self._arrive()
        return self.out

    def _arrive(self) -> None:
        self.out.states.append(self.y)
        self.out.integrals.append(self.integral)
        self.out.marks.append(self.steps)

    def _advance(self, target: float) -> None:
        """One attempt at a step towards `target`."""
        problem, control = self.problem, self.problem.control
        if self.attempts >= problem.max_steps:
            raise self._failure(f"max_steps={problem.max_steps} steps were not enough", self.size)
        self.attempts += 1
        remaining = abs(target - self.t)
        length = control.fit(self.size, remaining)
        h = problem.direction * length
        if self.first is None:
            self.first = self.evaluate(self.t, self.y)
        adaptive = isinstance(control, Adaptive)
        step = problem.method.step(self.evaluate, self.t, h, self.y, self.first, adaptive)
        if adaptive and not self._judge(step, length, control):
            return
        if self.watch and not is_finite(step.y):
            reason = "the state or the field turned non-finite"
            raise self._failure(reason, length, bad_rows(step.y))
        self._accept(step, h, target if length == remaining else self.t + h)

    def _judge(self, step: Step, length: float, control: Adaptive) -> bool:
        """Whether the step is good enough; chooses the size of the next attempt."""
        ratio = _error_ratio(step, self.y, control).item()  # the one device-to-host read
        factor = control.factor(ratio, self.problem.method.order)
        if not ratio <= 1.0:
            self.refused = True
            self.stats.rejected += 1
            self.size = length * factor
            self._check_hope(ratio)
            return False
        # what was just refused would be refused again: a step after it does not grow
        grown = length * (min(factor, 1.0) if self.refused else factor)
        # a step cut short to land says little about how long the next may be
        self.size = grown if length == self.size else max(self.size, grown)
        self.refused = False
        if self.t + length == self.t and grown <= length:
            raise self._failure("the step vanished", length)
        return True

    def _accept(self, step: Step, h: float, t: float) -> None:
        if self.keep:
            self.out.record.append(Accepted(None, self.t, h, self.y))
        self.stats.accepted += 1
        self.steps += 1
        self.t, self.y, self.first = t, step.y, step.last
        self.integral = tuple(
            total + part.to(total.dtype)
            for total, part in zip(self.integral, step.increment, strict=True)
        )
        if self.watch and not is_finite(self.integral):
            raise self._failure("a rate turned non-finite", abs(h))

    def _check_hope(self, ratio: float) -> None:
        """After a refused step: go on, or say why no step will do."""
        first, times = self.first, self.problem.times
        assert first is not None  # the attempt needed it
        if not math.isfinite(ratio) and not is_finite((*first.slope, *first.rates)):
            reason = "the field returned a non-finite value"
            raise self._failure(reason, self.size, bad_rows(first.slope))
        if self.size < 1e-13 * max(abs(times[0]), abs(times[-1]), self.problem.span):
            rows = [] if math.isfinite(ratio) else bad_rows(self.y)
            raise self._failure("the step vanished", self.size, rows)

    def _failure(self, reason: str, step: float, rows: Sequence[int] = ()) -> IntegrationError:
        return _failure(reason, self.problem, self.t, step, self.stats, self.out.states, rows)


class _Counted:
    """A field that counts its evaluations."""

    def __init__(self, field: Evaluate, stats: Stats) -> None:
        self._field, self._stats = field, stats

    def __call__(self, t: float, y: Leaves) -> Evaluation:
        self._stats.nfe += 1
        return self._field(t, y)


@torch.no_grad()
def _error_ratio(step: Step, y: Leaves, control: Adaptive) -> Tensor:
    """Estimated error over tolerance, 0-d: the largest RMS of the state's leaves and integrals."""
    ratios = [
        rms(error / _tolerance(torch.maximum(y0.abs(), y1.abs()), control))
        for error, y0, y1 in zip(step.error, y, step.y, strict=True)
    ]
    if control.quadrature_atol is not None:
        ratios += [rms(error) / control.quadrature_atol for error in step.increment_error]
    return largest(ratios)


@torch.no_grad()
def _first_size(problem: Problem, evaluate: Evaluate, y: Leaves, first: Evaluation) -> float:
    """The first step to try.  Source: Hairer, Nørsett & Wanner I, section II.4, starting step."""
    control, span = problem.control, problem.span
    if isinstance(control, FixedStep):
        return control.step_size
    if control.first_step is not None:
        return min(control.first_step, span)
    scales = tuple(_tolerance(leaf.abs(), control) for leaf in y)
    height, slope = torch.stack([_norm(y, scales), _norm(first.slope, scales)]).tolist()
    trial = 0.01 * height / slope if height > 1e-5 and slope > 1e-5 else 1e-6 * span
    trial = min(trial, span)
    if not math.isfinite(trial) or trial == 0.0:
        return span  # nothing to go by: the loop will shrink it, or say what is wrong
    h = problem.direction * trial
    ahead = tuple(combine(leaf, [k], [1.0], h) for leaf, k in zip(y, first.slope, strict=True))
    then = evaluate(problem.times[0] + h, ahead)
    change = tuple(k1 - k0 for k0, k1 in zip(first.slope, then.slope, strict=True))
    steepest = max(slope, _norm(change, scales).item() / trial)
    if steepest <= 1e-15:
        return span  # the field stands still here
    guess = (0.01 / steepest) ** (1 / problem.method.order)
    return min(100 * trial, guess, span) if math.isfinite(guess) else trial


def _tolerance(size: Tensor, control: Adaptive) -> Tensor:
    """atol + rtol·size, in place; never 0, since a part that stays 0 would have the error 0/0."""
    return size.mul_(control.rtol).add_(max(control.atol, torch.finfo(size.dtype).tiny))


def _norm(leaves: Leaves, scales: Leaves) -> Tensor:
    return largest([rms(leaf / scale) for leaf, scale in zip(leaves, scales, strict=True)])


def _failure(
    reason: str,
    problem: Problem,
    t: float,
    step: float,
    stats: Stats,
    reached: Sequence[Leaves],
    rows: Sequence[int] = (),
) -> IntegrationError:
    where = f" (rows {', '.join(map(str, rows))})" if rows else ""
    if isinstance(problem.control, FixedStep):
        remedy = "a smaller step_size, bounded weights in the field, or inputs of unit scale"
    else:
        remedy = "a larger atol and rtol, a smoother field, inputs of unit scale, or more max_steps"
    return IntegrationError(
        f"{reason}{where} at t={t:.6g} with step {abs(step):.2g} of {problem.method.name}, after "
        f"{stats.nfe} evaluations; the solution may blow up or be stiff there: try {remedy}",
        t=t,
        step=abs(step),
        nfe=stats.nfe,
        partial=list(reached),
    )
