"""The loop where every row of the batch has its own time, step and error.

Times, steps and verdicts are host arrays; one device-to-host read an attempt brings the rows'
errors.  Rows that have arrived leave the batch where the field is row-wise, a sixteenth of the
batch or more at a time; until then, or where the field is not, their steps are of length 0.  Rows
are numbered by their place in the batch of y0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cnf.error import IntegrationError
from cnf.ode.control import Adaptive, on_grid
from cnf.ode.event import locate
from cnf.ode.field import Evaluation
from cnf.ode.method import ExplicitRungeKutta, Step
from cnf.ode.state import Leaves, bad_rows, is_finite, precise_dtype
from cnf.ode.stiffness import damping, stiffness
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
    on_device,
    on_host,
    tiniest,
    tolerances,
)

Array = np.ndarray
_OF_ROWS = ("rows", "t", "direction", "size", "tiniest", "next", "alive", "refused", "target",
            "label")  # fmt: skip


class RowField(Protocol):
    """A field whose rows can be taken apart."""

    @property
    def row_wise(self) -> bool: ...
    def __call__(self, t: Any, y: Leaves) -> Evaluation: ...
    def take(self, rows: Tensor) -> RowField: ...


@torch.no_grad()
def march_rows(
    problem: Problem,
    y: Leaves,
    stats: Stats,
    *,
    first: Evaluation | None = None,
    keep: bool | list[Accepted] = False,
) -> Trajectory:
    """Solve from y through each row's times, without a graph; see `integrate`."""
    trajectory = _RowMarch(problem, y, stats, first=first, keep=keep).run()
    if not is_finite((*trajectory.states[0], *trajectory.integrals[0])):
        _RowMarch(problem, y, Stats(), watch=True).run()
        raise failure("the solution is not finite", problem, _last(problem), 0.0, stats, [])
    return trajectory


class _RowMarch:
    """Where every row stands.  Arrays hold the rows still in the batch; `rows` are their numbers,
    `counts` their evaluations, accepted and rejected steps, `totals` those of all rows that left.

    keep: whether to write the record, or what to write it in; watch: whether to look at every step
    for what is not finite.
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
        self.field: Any = problem.field
        self.keep = keep is not False
        self.evaluate = Counted(self.field, stats)
        batch = len(y[0])
        self.batch, self.rows = batch, np.arange(batch)
        self.t, self.y = problem.times[0].copy(), tuple(leaf.detach() for leaf in y)
        self.totals = np.zeros((3, batch), dtype=np.int64)
        self.attempts = 0
        if first is None or problem.control.jumps:
            start, end = on_device(self.t, y), on_device(problem.times[-1], y)
            first = problem.evaluate(self.evaluate, start, self.y, end)
        self.first: Evaluation | None = first
        self.integral = tuple(
            torch.zeros_like(rate, dtype=precise_dtype(rate)) for rate in first.rates
        )
        self.direction = problem.direction
        control = problem.control
        unit = tolerances(self.y, control) if isinstance(control, Adaptive) else ()
        self.size = first_size(problem, self.evaluate, self.y, first, unit)
        if isinstance(control, Adaptive) and control.first_step is None:
            self.size = self._grid(self.size)
        self.counts = np.zeros((3, batch), dtype=np.int64)
        self.counts[0] = stats.calls
        self.tiniest = tiniest(problem)
        self.furthest = furthest(problem)
        self.endless = bool(np.isinf(problem.times[-1]).any())
        self.targets, self.labels = _targets(problem)
        self.next = np.zeros(batch, dtype=np.int64)
        self.alive = np.ones(batch, dtype=bool)
        self.refused = np.zeros(batch, dtype=np.int64)
        self.ratios = (np.ones(batch), np.ones(batch))
        self.solved = True
        self.events = self._event_values(self.t, self.y) if problem.watch else None
        self._prepare_output(keep)

    def run(self) -> Trajectory:
        self._pass_reached()
        while self.alive.any():
            self._advance()
        self.totals[:, self.rows] = self.counts
        self.stats.nfe, self.stats.accepted, self.stats.rejected = map(
            torch.from_numpy, self.totals
        )
        return self.out

    # what comes out ------------------------------------------------------------------------------

    def _prepare_output(self, keep: bool | list[Accepted]) -> None:
        """Room for the states at each output time, and at the rows' events if there are any."""
        slots = len(self.problem.times) + bool(self.problem.watch)
        states, integrals = (
            tuple(leaf.new_zeros((slots, *leaf.shape)) for leaf in leaves)
            for leaves in (self.y, self.integral)
        )
        times = np.full((slots, self.batch), np.nan)
        times[: len(self.problem.times)] = self.problem.times
        record = keep if isinstance(keep, list) else []
        stopped = np.full(self.batch, -1)
        self.out = Trajectory([states], [integrals], [times], record=record, stopped=stopped)
        for out, leaf in zip(states, self.y, strict=True):
            out[0] = leaf

    def _arrive(self, slot: Array) -> None:
        """Write down the rows that reached a slot: an index for each row in the batch, or −1."""
        there = np.flatnonzero(slot >= 0)
        if not len(there):
            return
        device = self.y[0].device
        at = torch.from_numpy(there).to(device)
        place = tuple(torch.from_numpy(index[there]).to(device) for index in (slot, self.rows))
        for outs, leaves in zip(
            (self.out.states[0], self.out.integrals[0]), (self.y, self.integral), strict=True
        ):
            for out, leaf in zip(outs, leaves, strict=True):
                out.index_put_(place, leaf.index_select(0, at))

    # one attempt ---------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One attempt at a step of every row that has not arrived."""
        problem, control = self.problem, self.problem.control
        self._check_budget()
        remaining = np.abs(self.target - self.t)
        length = np.where(self.alive, control.fit(self.size, remaining), 0.0)
        if self.endless:
            gone = np.isinf(self.target) & (np.abs(self.t) + length > self.furthest)
            if (self.alive & gone).any():
                raise self._failure(OUTGROWN, self.rows[self.alive & gone])
        h = self.direction * length
        t0, h0 = on_device(self.t, self.y), on_device(h, self.y)
        calls = self.stats.calls
        if self.first is None:
            self.first = problem.first_stage(self.evaluate, t0, h0, self.y)
            calls = self._count(calls, self.alive & (self.refused == 0))  # a refused row knew it
        adaptive = isinstance(control, Adaptive)
        step = problem.step(self.evaluate, t0, h0, self.y, self.first, adaptive)
        calls = self._count(calls, self.alive, step.calls)
        self.solved = step.solved
        if not self.solved and not adaptive:
            reason = "the step's equations have no solution"
            raise self._failure(reason, self._numbers(bad_rows(step.y)))
        accept = self._judge(step, length, control) if adaptive else self.alive.copy()
        if self.watch and not is_finite(step.y):
            reason = "the state or the field turned non-finite"
            raise self._failure(reason, self._numbers(bad_rows(step.y)))
        lands = accept & (length == remaining)
        end = np.where(lands, self.target, self.t + h)
        slot = np.where(lands, self.label, -1)
        if self.events is not None and accept.any():
            step, h, end, slot = self._happened(step, h, end, slot, accept)
            self._count(calls, slot == len(problem.times))
        self._accept(step, accept, h, end, slot)
        if lands.any() or (slot >= 0).any():
            self._pass_reached()
            self._leave()

    def _judge(self, step: Step, length: Array, control: Adaptive) -> Array:
        """Which rows' steps are good enough; chooses the sizes of the next attempt."""
        before, after = tolerances(self.y, control), tolerances(step.y, control)
        ratio = error_ratio(step, before, after, control)  # the one device-to-host read
        good = control.accepts(ratio, length)
        accept, refuse = self.alive & good, self.alive & ~good
        factor = control.factor(ratio, self.problem.method.order, self.ratios)
        if not step.solved:
            factor = np.where(np.isnan(ratio), np.maximum(factor, HALF), factor)
        grown = control.after(self.size, length, factor, self.refused > 0)
        if refuse.any():
            shrunk = control.within(length * factor)
            self.size = self._grid(
                np.where(refuse, shrunk, grown), np.where(refuse, length, np.inf)
            )
        else:
            self.size = self._grid(grown)
        self.refused = np.where(refuse, self.refused + 1, 0)
        if control.remembers:
            last, before = self.ratios
            self.ratios = (
                np.where(accept, np.maximum(ratio, 1e-10), last),
                np.where(accept, last, before),
            )
        self.counts[2] += refuse
        if refuse.any():
            self._check_hope(refuse, ratio, control)
        stuck = accept & (self.t + length == self.t) & (self.size <= length)
        if stuck.any():
            raise self._failure("the step vanished", self.rows[stuck])
        return accept

    def _count(self, calls: int, needed: Array, each: Array | None = None) -> int:
        """Count the evaluations since so many calls, for the rows that would need them alone.

        each: how many each row would need, where they need different numbers.
        """
        more = self.stats.calls - calls if each is None else each
        self.counts[0] += needed * more
        return self.stats.calls

    def _grid(self, size: Array, below: Array | None = None) -> Array:
        """Sizes that do not carry the rounding of a batch's arithmetic; fixed ones stay.

        below: what they must be shorter than, unless that is the shortest there may be.
        """
        control = self.problem.control
        if not isinstance(control, Adaptive):
            return size
        found = on_grid(size)
        if below is not None:
            found = np.where(found < below, found, on_grid(0.95 * below))
        return control.within(found)

    def _accept(self, step: Step, accept: Array, h: Array, end: Array, slot: Array) -> None:
        """Move the rows whose steps were good enough; the others stay where they are."""
        if not accept.any():
            return
        self.counts[1] += accept
        if self.keep:
            self._write(accept, h, slot)
        moved = torch.from_numpy(accept).to(self.y[0].device)
        everybody = bool(accept.all())
        self.y = _where(moved, step.y, self.y, everybody)
        if step.last is None or self.first is None or self.problem.control.jumps:
            self.first = None
        else:
            self.first = Evaluation(
                _where(moved, step.last.slope, self.first.slope, everybody),
                _where(moved, step.last.rates, self.first.rates, everybody),
            )
        totals = tuple(
            total + part.to(total.dtype)
            for total, part in zip(self.integral, step.increment, strict=True)
        )
        self.integral = _where(moved, totals, self.integral, everybody)
        if self.watch and not is_finite(self.integral):
            raise self._failure("a rate turned non-finite", self._numbers(bad_rows(self.integral)))
        self.t = np.where(accept, end, self.t)
        if (slot >= 0).any():
            self._arrive(slot)

    def _write(self, accept: Array, h: Array, slot: Array) -> None:
        """The record of this step: of the rows that took it, or of all with h = 0 for the rest."""
        device = self.y[0].device
        taken, rows, y = np.arange(len(self.rows)), None, self.y
        if self.field.row_wise:
            taken = np.flatnonzero(accept)
            rows = torch.from_numpy(self.rows[taken]).to(device)
            y = _take(self.y, torch.from_numpy(taken).to(device))
        start, length = on_device(self.t[taken], y), on_device(np.where(accept, h, 0.0)[taken], y)
        reached = torch.from_numpy(slot[taken]).to(device)
        self.out.record.append(Accepted(rows, start, length, y, reached))

    def _pass_reached(self) -> None:
        """Go on to each row's next target that lies ahead; rows without one have arrived."""
        while True:
            self.alive = self.alive & (self.next < len(self.targets))
            index = np.minimum(self.next, len(self.targets) - 1)
            self.target = self.targets[index, self.rows]
            self.label = self.labels[index, self.rows]
            behind = self.alive & (self.target == self.t)
            if not behind.any():
                break
            self.next = self.next + behind

    def _leave(self) -> None:
        """Take the rows that have arrived out of the batch, where the field allows it and they are
        a sixteenth of it: to sort the batch costs as much as some evaluations.
        """
        arrived = len(self.alive) - np.count_nonzero(self.alive)
        if arrived in (0, len(self.alive)) or 16 * arrived < len(self.alive):
            return
        if not self.field.row_wise:
            return
        self.totals[:, self.rows] = self.counts
        stay = np.flatnonzero(self.alive)
        at = torch.from_numpy(stay).to(self.y[0].device)
        for name in _OF_ROWS:
            setattr(self, name, getattr(self, name)[stay])
        self.counts = self.counts[:, stay]
        self.ratios = (self.ratios[0][stay], self.ratios[1][stay])
        if self.events is not None:
            self.events = self.events[:, stay]
        self.y, self.integral = _take(self.y, at), _take(self.integral, at)
        if self.first is not None:
            self.first = Evaluation(_take(self.first.slope, at), _take(self.first.rates, at))
        numbers = torch.from_numpy(self.rows).to(self.y[0].device)
        self.evaluate = Counted(self.field.take(numbers), self.stats)

    # events --------------------------------------------------------------------------------------

    def _event_values(self, t: Array, y: Leaves) -> Array:
        assert self.problem.watch is not None
        return self.problem.watch.values(on_device(t, y), y)

    def _happened(
        self, step: Step, h: Array, end: Array, slot: Array, accept: Array
    ) -> tuple[Step, Array, Array, Array]:
        """The step cut short for the rows that met an event on it: (step, h, end, slot)."""
        watch, before = self.problem.watch, self.events
        assert watch is not None and before is not None
        after = self._event_values(end, step.y)
        crossed = watch.crossed(before, after) & accept
        self.events = np.where(accept & (after != 0), after, before)
        met = crossed.any(0)
        if not met.any():
            return step, h, end, slot
        which, theta = self._first_events(crossed, before, after, h)
        cut = met & (theta < 1.0)
        if cut.any():
            h = np.where(cut, theta, 1.0) * h
            end = np.where(cut, self.t + h, end)
            t0, h0 = on_device(self.t, self.y), on_device(h, self.y)
            assert self.first is not None
            shorter = self.problem.step(self.evaluate, t0, h0, self.y, self.first, False)
            chosen = torch.from_numpy(cut).to(self.y[0].device)
            # the rows that are cut stop here: their last stage serves nobody
            step = step._replace(
                y=_where(chosen, shorter.y, step.y),
                increment=_where(chosen, shorter.increment, step.increment),
            )
        slot = np.where(met, len(self.problem.times), slot)
        assert self.out.stopped is not None
        self.out.stopped[self.rows[met]] = which[met]
        self.out.times[0][-1, self.rows[met]] = end[met]
        self.next = np.where(met, len(self.targets), self.next)
        return step, h, end, slot

    def _first_events(
        self, crossed: Array, before: Array, after: Array, h: Array
    ) -> tuple[Array, Array]:
        """(event, θ) of each row's first crossed event, at t + θh."""
        watch = self.problem.watch
        assert watch is not None and self.first is not None
        t0, h0 = on_device(self.t, self.y), on_device(h, self.y)
        inside = self.problem.interpolant(self.evaluate, t0, h0, self.y, self.first)
        which = np.full(len(self.t), -1)
        theta = np.full(len(self.t), np.inf)
        for i in np.flatnonzero(crossed.any(1)).tolist():

            def g(share: Array, i: int = i) -> Array:
                at = on_device(share, self.y)
                return on_host(watch.value(i, t0 + at * h0, inside.of_rows(at)))

            # rows that did not cross are given a bracket that is closed already
            start = np.where(crossed[i], before[i], 1.0)
            end = np.where(crossed[i], after[i], 0.0)
            place = np.where(crossed[i], locate(g, start, end), np.inf)
            which, theta = np.where(place < theta, i, which), np.minimum(place, theta)
        return which, theta

    # failure -------------------------------------------------------------------------------------

    def _check_budget(self) -> None:
        self.attempts += 1
        if self.attempts <= self.problem.max_steps:  # no row has tried more often than the loop
            return
        over = self.alive & (self.counts[1:].sum(0) >= self.problem.max_steps)
        if over.any():
            reason = f"max_steps={self.problem.max_steps} steps were not enough"
            if self.problem.watch and np.isinf(self.problem.times[-1, self.rows[over]]).any():
                reason += " for the event to come"
            raise self._failure(reason, self.rows[over])

    def _check_hope(self, refuse: Array, ratio: Array, control: Adaptive) -> None:
        """After refused steps: go on, or say why no step will do."""
        assert self.first is not None
        wild = refuse & ~np.isfinite(ratio)
        if wild.any():
            numbers = bad_rows((*self.first.slope, *self.first.rates), len(self.t))
            bad = [i for i in numbers if wild[i]]
            if bad:
                raise self._failure("the field returned a non-finite value", self._numbers(bad))
        vanished = refuse & (self.size < self.tiniest)
        if vanished.any():
            why = BEYOND if wild[vanished].any() else ""
            raise self._failure("the step vanished" + why, self.rows[vanished])
        hopeless = refuse & (self.refused >= control.max_rejections)
        if hopeless.any():
            reason = f"max_rejections={control.max_rejections} attempts in a row were refused"
            why = BEYOND if wild[hopeless].any() else ""
            raise self._failure(reason + why, self.rows[hopeless])

    def _reached(self, output: int) -> Leaves:
        """The states at an output time that every row reached, or met its event before."""
        ends = self.out.times[0][-1]
        early = (ends - self.problem.times[output]) * self.problem.direction < 0
        stopped = torch.from_numpy(early).to(self.y[0].device)
        at = tuple(leaf[output] for leaf in self.out.states[0])
        return _where(stopped, tuple(leaf[-1] for leaf in self.out.states[0]), at)

    def _numbers(self, places: Sequence[int]) -> Array:
        return self.rows[np.asarray(places, dtype=np.int64)]

    def _failure(self, reason: str, rows: Array) -> IntegrationError:
        if not self.solved:
            reason += ": Newton's iteration did not converge"
        at = np.flatnonzero(np.isin(self.rows, rows))
        first = at[0] if len(at) else 0
        passed = np.arange(len(self.targets))[:, None] < self.next[self.alive]
        outputs = (passed & (self.labels[:, self.rows[self.alive]] >= 0)).sum(0)
        count = 1 + int(outputs.min(initial=len(self.problem.times) - 1))
        states = [self._reached(i) for i in range(count)]
        t, size = float(self.t[first]), float(self.size[first])
        stiff = self._stiffness(at)
        return failure(reason, self.problem, t, size, self.stats, states, rows[:5].tolist(), stiff)

    def _stiffness(self, at: Array) -> float | None:
        """|h λ| of the rows at these places, if an explicit method finds a problem stiff there."""
        method = self.problem.method
        if not (
            isinstance(self.problem.control, Adaptive) and isinstance(method, ExplicitRungeKutta)
        ):
            return None
        t, h = on_device(self.t, self.y), on_device(self.direction * self.size, self.y)
        found = damping(self.evaluate, t, h, self.y)
        stiff = [stiffness([each], method.tableau) for each in found[at].tolist()]
        return max((each for each in stiff if each is not None), default=None)


def _targets(problem: Problem) -> tuple[Array, Array]:
    """(times, labels) of every row's targets in order, (targets, batch); −1 labels no output."""
    times, control = problem.times, problem.control
    extra = [*control.land_on, *control.jumps]
    more = np.array(extra)[:, None] * np.ones((1, times.shape[1]))
    low, high = np.minimum(times[0], times[-1]), np.maximum(times[0], times[-1])
    more = np.where((more > low) & (more < high), more, times[0])  # at the start: passed at once
    found = np.concatenate([more, times[1:]])
    labels = np.concatenate(
        [np.full(more.shape, -1), np.arange(1, len(times))[:, None] * np.ones_like(times[1:])]
    ).astype(np.int64)
    # of two at the same time the output comes first, and the other is passed at once
    order = np.lexsort((-labels, found * problem.direction), axis=0)
    return np.take_along_axis(found, order, 0), np.take_along_axis(labels, order, 0)


def _where(moved: Tensor, new: Leaves, old: Leaves, everybody: bool = False) -> Leaves:
    if everybody:
        return new
    return tuple(
        torch.where(moved.reshape(-1, *[1] * (b.ndim - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )


def _take(leaves: Leaves, at: Tensor) -> Leaves:
    return tuple(leaf.index_select(0, at) for leaf in leaves)


def _last(problem: Problem) -> float:
    return float(problem.times[-1].flat[0])
