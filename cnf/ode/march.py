"""The one loop: steps from output time to output time, where all rows share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from cnf.error import IntegrationError
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.event import locate
from cnf.ode.field import Evaluation
from cnf.ode.method import ExplicitRungeKutta, Step
from cnf.ode.state import Leaves, bad_rows, is_finite, precise_dtype
from cnf.ode.stiffness import damping, stiffness
from cnf.ode.tangent import is_unreadable
from cnf.ode.trajectory import (
    BEYOND,
    HALF,
    OUTGROWN,
    Accepted,
    Counted,
    Problem,
    Stats,
    Trajectory,
    error_ratio,
    failure,
    first_size,
    furthest,
    tiniest,
    tolerances,
)

_STEPS_AHEAD = 20  # attempts after a failure, to tell whether stability chose the steps


def march(
    problem: Problem,
    y: Leaves,
    stats: Stats,
    *,
    first: Evaluation | None = None,
    keep: bool | list[Accepted] = False,
) -> Trajectory:
    """Solve from y at times[0] through all times; the graph follows where gradients are enabled.

    first: the field at the start, where the caller has it; keep: whether to keep the record, or
    what to keep it in.
    Raises IntegrationError where the state turns non-finite, the step vanishes or steps run out.
    """
    trajectory = _March(problem, y, stats, first=first, keep=keep).run()
    reached = (*trajectory.states[-1], *trajectory.integrals[-1])
    # where no number can be read, what is not finite stays so
    if not is_unreadable(reached) and not is_finite(reached):
        with torch.no_grad():  # once more, looking at every step, to say where
            _March(replace(problem, observer=None), y, Stats(), watch=True).run()
        raise failure("the solution is not finite", problem, problem.times[-1], 0.0, stats, [])
    return trajectory


class Target(NamedTuple):
    """A time to land on; label: its index if it is an output time; jump: the field jumps there."""

    t: float
    label: int | None
    jump: bool


class _March:
    """The way from output time to output time: where it stands, and what it leaves behind.

    keep: whether to write the record, or what to write it in; watch: whether to look at every step
    for what is not finite, at one device-to-host read each.
    """

    def __init__(
        self,
        problem: Problem,
        y: Leaves,
        stats: Stats,
        *,
        first: Evaluation | None = None,
        keep: bool | list[Accepted] = False,
        watch: bool = False,
    ) -> None:
        self.problem, self.stats, self.watch = problem, stats, watch
        self.keep = keep is not False
        self.evaluate = Counted(problem.field, stats)
        self.t, self.y, self.direction = problem.times[0], y, problem.direction
        if first is None or self.t in problem.control.jumps:
            first = problem.evaluate(self.evaluate, self.t, y, problem.times[-1])
        self.first: Evaluation | None = first
        self.integral = tuple(
            torch.zeros_like(rate, dtype=precise_dtype(rate)) for rate in first.rates
        )
        self.unit = self._unit(y)  # of errors, where the step begins
        self.next_unit = self.unit  # and where the attempt ended
        self.size = first_size(problem, self.evaluate, y, first, self.unit)
        self.tiniest = tiniest(problem)
        self.furthest = furthest(problem)
        self.events = problem.watch.values(self.t, y) if problem.watch else None
        self.refused = 0  # attempts in a row
        self.ratios = (1.0, 1.0)  # error over tolerance of the last two accepted steps
        self.attempts = self.steps = 0
        self.stopped, self.solved, self.probing = False, True, False
        self.out = Trajectory(record=keep if isinstance(keep, list) else [])

    def run(self) -> Trajectory:
        self._arrive(0)
        for target in _targets(self.problem):
            while self.t != target.t and not self.stopped:
                self._advance(target)
            if target.jump:
                self.first = None  # the last stage saw the other side
        self.stats.nfe = self.stats.calls
        return self.out

    def _arrive(self, label: int | None) -> None:
        out = self.out
        out.states.append(self.y)
        out.integrals.append(self.integral)
        out.times.append(self.t)
        out.labels.append(label)
        out.marks.append(self.steps)

    def _advance(self, target: Target) -> None:
        """One attempt at a step towards `target`."""
        problem, control = self.problem, self.problem.control
        if self.attempts >= problem.max_steps:
            if not (is_unreadable(self.y) or is_finite(self.y)):
                reason = "the state or the field turned non-finite"
                raise self._failure(reason, self.size, bad_rows(self.y))
            reason = f"max_steps={problem.max_steps} steps were not enough"
            if problem.watch and not math.isfinite(target.t):
                reason += " for the event to come"
            raise self._failure(reason, self.size)
        self.attempts += 1
        remaining = abs(target.t - self.t)
        length = control.fit(self.size, remaining)
        h = self.direction * length
        if math.isinf(target.t) and abs(self.t) + length > self.furthest:
            raise self._failure(OUTGROWN, length)
        if self.first is None:
            self.first = problem.first_stage(self.evaluate, self.t, h, self.y)
        if problem.observer is not None:
            problem.observer.attempt(self.t, h, self.y)
        adaptive = isinstance(control, Adaptive)
        step = problem.step(self.evaluate, self.t, h, self.y, self.first, adaptive)
        self.solved = step.solved
        if adaptive and not self._judge(step, length, control):
            if problem.observer is not None:
                problem.observer.refuse(self.t, h, self.y)
            return
        if not self.solved and not adaptive:
            raise self._failure("the step's equations have no solution", length, bad_rows(step.y))
        if self.watch and not is_finite(step.y):
            reason = "the state or the field turned non-finite"
            raise self._failure(reason, length, bad_rows(step.y))
        end = target.t if length == remaining else self.t + h
        label = target.label if end == target.t else None
        if self.events is not None and self._happened(step, h, end, label):
            return
        self._accept(step, h, end)
        if label is not None or problem.dense:
            self._arrive(label)

    def _judge(self, step: Step, length: float, control: Adaptive) -> bool:
        """Whether the step is good enough; chooses the size of the next attempt."""
        ratio = self._ratio(step, control)
        factor = control.factor(ratio, self.problem.method.order, self.ratios)
        factor = factor if step.solved else max(factor, HALF)
        if not control.accepts(ratio, length):
            self.refused += 1
            self.stats.rejected += 1
            self.size = control.within(length * factor)
            self._check_hope(ratio, control, step.y)
            return False
        self.size = control.after(self.size, length, factor, self.refused > 0)
        self.refused = 0
        self.ratios = (max(ratio, 1e-10), self.ratios[0])
        if self.t + length == self.t and self.size <= length:
            raise self._failure("the step vanished", length)
        return True

    def _unit(self, y: Leaves) -> Leaves:
        """The tolerances at y; none where errors are not measured by them."""
        control = self.problem.control
        if isinstance(control, FixedStep) or self.problem.measure is not None:
            return ()
        return tolerances(y, control)

    def _ratio(self, step: Step, control: Adaptive) -> float:
        """Error over tolerance, on the host: the one read."""
        measure = self.problem.measure
        if measure is not None:
            y, end = (tuple(leaf.detach() for leaf in leaves) for leaves in (self.y, step.y))
            return measure(step.error, y, end)
        self.next_unit = self._unit(step.y)
        return error_ratio(step, self.unit, self.next_unit, control)

    def _accept(self, step: Step, h: float, t: float) -> None:
        if self.keep:
            self.out.record.append(Accepted(None, self.t, h, self.y))
        self.stats.accepted += 1
        self.steps += 1
        observer, last = self.problem.observer, step.last
        if observer is not None:
            last = observer.accept(self.t, h, self.y, step)
        self.t, self.y, self.first, self.unit = t, step.y, last, self.next_unit
        if self.integral:
            self.integral = tuple(
                total + part.to(total.dtype)
                for total, part in zip(self.integral, step.increment, strict=True)
            )
        if self.watch and not is_finite(self.integral):
            raise self._failure("a rate turned non-finite", abs(h))

    def _happened(self, step: Step, h: float, end: float, label: int | None) -> bool:
        """Whether an event happened on this step, which then ends where the first of them did."""
        watch = self.problem.watch
        assert watch is not None and self.events is not None
        before, after = self.events, watch.values(end, step.y)
        crossed = watch.crossed(before, after)
        if not crossed.any():
            # a zero has no side: the side that it was left from still counts
            self.events = np.where(after == 0, before, after)
            return False
        index, theta = self._first_event(np.flatnonzero(crossed), after, h, step)
        if theta < 1.0:
            assert self.first is not None
            h, label = theta * h, None
            step = self.problem.step(self.evaluate, self.t, h, self.y, self.first, False)
            end = self.t + h
            self.next_unit = self._unit(step.y)
        if end != self.t:
            self._accept(step, h, end)
        now = watch.values(end, step.y)
        # another that was crossed is still to come, though rounding may put it behind already
        self.events = np.where(crossed | (now == 0), before, now)
        self.events[index] = after[index] if after[index] != 0 else -before[index]
        self._arrive(-1 - index)
        if label is not None:
            self._arrive(label)
        self.stopped = watch.events[index].terminal
        return True

    @torch.no_grad()
    def _first_event(
        self, crossed: np.ndarray, after: np.ndarray, h: float, step: Step
    ) -> tuple[int, float]:
        """(event, θ) of the first of the crossed events, at t + θh."""
        watch, t = self.problem.watch, self.t
        assert watch is not None and self.events is not None and self.first is not None
        inside = self.problem.interpolant(self.evaluate, t, h, self.y, self.first, step)
        found = []
        for i in crossed.tolist():

            def g(theta: np.ndarray, i: int = i) -> np.ndarray:
                share = float(theta[0])
                value = watch.value(i, t + share * h, inside(share))
                return np.array([value.item()])

            place = locate(g, self.events[i : i + 1], after[i : i + 1])
            found.append((float(place[0]), i))
        theta, index = min(found)
        return index, theta

    def _check_hope(self, ratio: float, control: Adaptive, tried: Leaves) -> None:
        """After a refused step, to the state `tried`: go on, or say why no step will do."""
        first = self.first
        assert first is not None  # the attempt needed it
        if not math.isfinite(ratio) and not is_finite((*first.slope, *first.rates)):
            reason = "the field returned a non-finite value"
            raise self._failure(reason, self.size, bad_rows(first.slope))
        rows, why = ([], "") if math.isfinite(ratio) else (bad_rows(tried), BEYOND)
        if self.size < self.tiniest:
            raise self._failure("the step vanished" + why, self.size, rows)
        if self.refused >= control.max_rejections:
            reason = f"max_rejections={control.max_rejections} attempts in a row were refused"
            raise self._failure(reason + why, self.size, rows)

    def _failure(self, reason: str, step: float, rows: Sequence[int] = ()) -> IntegrationError:
        if not self.solved:
            reason += ": Newton's iteration did not converge"
        pairs = zip(self.out.labels, self.out.states, strict=True)
        reached = [state for label, state in pairs if label is not None and label >= 0]
        stiff = self._stiffness()
        return failure(reason, self.problem, self.t, step, self.stats, reached, rows, stiff)

    def _stiffness(self) -> float | None:
        """|h λ| of the next few steps, if an explicit method finds the problem stiff there."""
        method = getattr(self.problem.method, "plain", self.problem.method)  # of compiled steps
        problem = replace(self.problem, method=method)
        control, size = problem.control, self.size
        if self.probing or not (math.isfinite(size) and size > 0.0):
            return None
        if not (isinstance(control, Adaptive) and isinstance(method, ExplicitRungeKutta)):
            return None
        ahead = replace(
            problem, times=(self.t, problem.times[-1]), max_steps=_STEPS_AHEAD, watch=None,
            observer=None, dense=False, control=replace(control, first_step=size, land_on=()),
        )  # fmt: skip
        record: list[Accepted] = []
        # whatever the field raises there is not the failure to report
        with torch.no_grad(), suppress(Exception):
            y = tuple(leaf.detach() for leaf in self.y)
            probe = _March(ahead, y, Stats(), keep=record)
            probe.probing = True
            with suppress(IntegrationError):  # of steps, as a rule
                probe.run()
            found = [float(damping(problem.field, one.t, one.h, one.y)[0]) for one in record]
            return stiffness(found, method.tableau)
        return None


def _targets(problem: Problem) -> list[Target]:
    """Every time to land on, in order."""
    control, times = problem.control, problem.times
    if not (control.land_on or control.jumps):
        return [Target(t, i, False) for i, t in enumerate(times) if i > 0]
    labels = {t: i for i, t in enumerate(times)}
    inside = {
        t
        for t in (*control.land_on, *control.jumps)
        if min(times[0], times[-1]) < t < max(times[0], times[-1])
    }
    found = sorted({*times[1:], *inside}, reverse=problem.direction < 0)
    return [Target(t, labels.get(t), t in control.jumps) for t in found]
