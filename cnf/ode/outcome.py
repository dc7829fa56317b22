"""What a solve's arrivals mean to the user: outputs, events, and the solution between the times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.event import Watch
from cnf.ode.gradient.problem import Solved, stack
from cnf.ode.moment import at_time, slide
from cnf.ode.state import Leaves, across
from cnf.ode.trajectory import Counted, Path, Problem, Stats, on_device, on_host


class Crossing(NamedTuple):
    """An event that happened: which one, when (0-d) and in which state."""

    event: int
    t: Tensor
    y: Any


class Met(NamedTuple):
    """Where the solution stopped: time and event, 0-d or (batch,), NaN and −1 for nowhere; the
    state and the integrals there.
    """

    time: Tensor
    event: Tensor
    y: Leaves
    integral: Leaves
    crossings: tuple[Crossing, ...] = ()


class Requested(NamedTuple):
    """States and integrals at the requested times, each leaf of shape (times, …).

    reached: which of the times came before an event, bool of shape (times,), or (times, batch)
    where every row has its own steps.
    """

    states: Leaves
    integrals: Leaves
    reached: np.ndarray

    def after(self, met: Met) -> Requested:
        """The same, staying at the event from there on."""
        if self.reached.all():
            return self
        mask = torch.from_numpy(self.reached).to(met.time.device)
        states, integrals = (
            tuple(
                torch.where(mask.reshape((*mask.shape, *[1] * (leaf.ndim - mask.ndim))), leaf, end)
                for leaf, end in zip(leaves, ends, strict=True)
            )
            for leaves, ends in ((self.states, met.y), (self.integrals, met.integral))
        )
        return Requested(states, integrals, self.reached)


def at_requested_times(problem: Problem, solved: Solved) -> Requested:
    """The arrivals at the output times."""
    count, path = len(problem.times), solved.path
    if problem.per_sample:
        reached = np.ones(problem.times.shape, dtype=bool)
        if problem.watch:
            ends = path.times[0][-1]
            late = (problem.times - np.where(np.isnan(ends), np.inf, ends)) * problem.direction
            reached = np.isnan(ends) | (late < 0)
        states, integrals = (
            tuple(leaf[:count] for leaf in part) for part in (solved.states, solved.integrals)
        )
        return Requested(states, integrals, reached)
    if not (problem.watch or problem.dense):
        return Requested(solved.states, solved.integrals, np.ones(count, dtype=bool))
    places = {label: place for place, label in enumerate(path.labels)}
    reached = np.array([k in places for k in range(count)])
    last = len(path.labels) - 1
    chosen = torch.tensor(
        [places.get(k, last) for k in range(count)], device=solved.states[0].device
    )
    states, integrals = (
        tuple(leaf.index_select(0, chosen) for leaf in part)
        for part in (solved.states, solved.integrals)
    )
    return Requested(states, integrals, reached)


def read_at_times(
    requested: Requested, problem: Problem, path: Path, start: Leaves, t: Tensor, stats: Stats
) -> Requested:
    """The same as functions of the requested times t too, which gradients then reach.

    start: y0, which is no function of t[0].
    """
    evaluate, rows = Counted(problem.field, stats), problem.per_sample
    states, integrals = [start], [tuple(torch.zeros_like(leaf[0]) for leaf in requested.integrals)]
    for i, here in enumerate(requested.reached[1:], start=1):
        y, q = (tuple(leaf[i] for leaf in part) for part in (requested.states, requested.integrals))
        if np.any(here):
            moment, known, calls = t[i], problem.times[i], stats.calls
            if not np.all(here):  # a row stays at its event, whatever the time
                moment = torch.where(torch.from_numpy(here).to(t.device), moment, moment.detach())
                known = np.where(here, known, path.times[0][-1])
            y, more = at_time(problem, evaluate, known, moment, y)
            q = tuple(a + b.to(a.dtype) for a, b in zip(q, more, strict=True))
            counted = torch.from_numpy(here) if rows else 1
            stats.nfe = stats.nfe + (stats.calls - calls) * counted
        states.append(y)
        integrals.append(q)
    return Requested(stack(states), stack(integrals), requested.reached)


def events_met(problem: Problem, solved: Solved, stats: Stats) -> Met:
    """Where the solution stopped, with gradients by everything that g and the solution depend on.

    The located time is followed by differentiable steps of Newton's method along the solution.
    """
    if problem.per_sample:
        return _rows_met(problem, solved, stats)
    watch, path = problem.watch, solved.path
    assert watch is not None
    crossings, stop = [], None
    for j, label in enumerate(path.labels):
        if label is None or label >= 0:
            continue
        event = -1 - label
        y = tuple(leaf[j] for leaf in solved.states)
        q = tuple(leaf[j] for leaf in solved.integrals)
        found = corrected(problem, stats, event, path.times[j], y, q)
        crossings.append(Crossing(event, found.time, watch.state.build(found.y)))
        stop = found if watch.events[event].terminal else stop
    if stop is None:
        last = tuple(leaf[-1] for leaf in solved.states)
        integral = tuple(leaf[-1] for leaf in solved.integrals)
        nowhere = torch.full_like(watch.clock(path.times[-1]), torch.nan)
        stop = Met(nowhere, torch.tensor(-1, device=nowhere.device), last, integral)
    return stop._replace(crossings=tuple(crossings))


def _rows_met(problem: Problem, solved: Solved, stats: Stats) -> Met:
    watch, path = problem.watch, solved.path
    assert watch is not None and path.stopped is not None
    ends = path.times[0][-1]
    device = solved.states[0].device
    index = torch.from_numpy(path.stopped).to(device)
    stopped = np.where(np.isnan(ends), _finite_end(problem), ends)
    host = on_device(stopped, solved.states)
    states, integrals = (
        tuple(_rows_where(index >= 0, leaf[-1], leaf[-2]) for leaf in part)
        for part in (solved.states, solved.integrals)
    )
    met = Met(torch.full_like(watch.clock(host), torch.nan), index, states, integrals)
    for event in np.unique(path.stopped[path.stopped >= 0]).tolist():
        here = index == event
        found = corrected(problem, stats, event, host, states, integrals, here.cpu())
        met = Met(
            torch.where(here, found.time, met.time),
            index,
            tuple(_rows_where(here, a, b) for a, b in zip(found.y, met.y, strict=True)),
            tuple(
                _rows_where(here, a, b) for a, b in zip(found.integral, met.integral, strict=True)
            ),
        )
    return met


def _finite_end(problem: Problem) -> np.ndarray:
    return np.where(np.isfinite(problem.times[-1]), problem.times[-1], problem.times[0])


def corrected(
    problem: Problem, stats: Stats, event: int, t: Any, y: Leaves, integral: Leaves, of: Any = 1
) -> Met:
    """The zero of g near (t, y), by Newton's method along the solution, with its derivatives.

    Two of its steps are exact up to the second derivatives.  of: 1, or which rows it is for.
    """
    watch, evaluate, calls = problem.watch, Counted(problem.field, stats), stats.calls
    assert watch is not None
    moment = watch.clock(t)
    largest = 0.01 * _lengths(problem, t).to(moment)
    for _ in range(2):
        value = evaluate(moment, y)
        shift = _newton_step(watch, event, moment, y, value.slope)
        shift = torch.where(shift.abs() <= largest, shift, torch.zeros_like(shift))
        y, more = slide(evaluate, moment, shift, y, value)
        moment = moment + shift
        integral = tuple(a + b.to(a.dtype) for a, b in zip(integral, more, strict=True))
    stats.nfe = stats.nfe + (stats.calls - calls) * of
    return Met(moment, torch.full_like(moment, event, dtype=torch.long), y, integral)


def _newton_step(watch: Watch, event: int, t: Tensor, y: Leaves, slope: Leaves) -> Tensor:
    """−g/ġ along the solution, 0-d or (batch,); 0 where g stands still."""
    if torch.is_inference_mode_enabled():  # where nothing is recorded, of tensors of its own
        with torch.inference_mode(False):
            copies = (tuple(leaf.clone() for leaf in leaves) for leaves in (y, slope))
            return _newton_step(watch, event, t.clone(), *copies)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        later = torch.zeros_like(t, requires_grad=True)
        ahead = tuple(leaf + k * across(later, k) for leaf, k in zip(y, slope, strict=True))
        value = watch.value(event, t + later, ahead)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (speed,) = torch.autograd.grad(value.sum(), later, create_graph=again)
    value = watch.value(event, t, y)
    moves = speed != 0
    # not the quotient first: its gradient where it is not taken would be 0 times infinity
    return torch.where(moves, -value / torch.where(moves, speed, 1.0), torch.zeros_like(value))


def _lengths(problem: Problem, t: Any) -> Tensor:
    if isinstance(t, Tensor):
        return (t - on_device(problem.times[0], (t,))).abs()
    return torch.tensor(abs(t - problem.times[0]))


def _rows_where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


@dataclass(frozen=True)
class Dense:
    """The solution at any time inside the interval, from the states in which its steps began."""

    problem: Problem
    solved: Solved

    def __call__(self, t: Any) -> Any:
        field: Any = self.problem.field
        like = self.solved.states[0]
        t = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
        t = t.to(like.device)
        states = self._of_rows(t) if self.problem.per_sample else self._of_all(t)
        return field.state.build(states)

    def _of_all(self, t: Tensor) -> Leaves:
        """Where all rows share their steps: (*t.shape, *y.shape)."""
        times = np.array(self.solved.path.times)
        direction = self.problem.direction
        host = on_host(t).reshape(-1)
        _check_inside(host, times[0], times[-1])
        pieces = np.searchsorted(direction * times, direction * host, side="left") - 1
        pieces = np.maximum(pieces, 0)
        flat, order, found = t.reshape(-1), [], []
        for piece in np.unique(pieces).tolist():
            members = np.flatnonzero(pieces == piece)
            order.append(members)
            chosen = torch.from_numpy(members).to(t.device)
            found.append(self._on_piece(piece, times, flat.index_select(0, chosen)))
        inverse = torch.from_numpy(np.argsort(np.concatenate([*order, np.zeros(0, int)])))
        shape = tuple(t.shape)
        if not found:
            return tuple(leaf[:0].reshape(*shape, *leaf.shape[1:]) for leaf in self.solved.states)
        together = (torch.cat(leaves) for leaves in zip(*found, strict=True))
        return tuple(
            leaf.index_select(0, inverse.to(t.device)).reshape(*shape, *leaf.shape[1:])
            for leaf in together
        )

    def _on_piece(self, piece: int, times: np.ndarray, t: Tensor) -> Leaves:
        problem: Any = self.problem
        y = tuple(leaf[piece] for leaf in self.solved.states)
        start, h = float(times[piece]), float(times[piece + 1] - times[piece])
        first = problem.first_stage(problem.field, start, h, y)
        inside = problem.interpolant(problem.field, start, h, y, first)
        return inside.at_each((t - start) / h)

    def _of_rows(self, t: Tensor) -> Leaves:
        """Where every row has its own steps: (*t.shape without the batch, batch, …)."""
        batch = self.solved.states[0].shape[1]
        if t.ndim > 2 or (t.ndim == 2 and t.shape[1] != batch):
            raise InputError(
                f"t must be a number, or of shape (times,) or (times, {batch}), got "
                f"{tuple(t.shape)}"
            )
        moments = t if t.ndim == 2 else t.unsqueeze(-1).expand(*t.shape, batch)
        shape = moments.shape[:-1]
        if not moments.numel():
            return tuple(leaf.new_zeros((*shape, *leaf.shape[1:])) for leaf in self.solved.states)
        moments = moments.reshape(-1, batch)
        places = self._places(on_host(moments))
        found = [self._at(*one) for one in zip(moments, *places, strict=True)]
        return tuple(
            torch.stack(leaves).reshape(*shape, *leaves[0].shape)
            for leaves in zip(*found, strict=True)
        )

    def _at(self, t: Tensor, places: np.ndarray, start: np.ndarray, h: np.ndarray) -> Leaves:
        """The state of every row at its own t, (batch,), inside the step that begins at `start`."""
        problem: Any = self.problem
        at = torch.from_numpy(places).to(t.device)
        y = tuple(leaf.index_select(0, at) for leaf in self.solved.starts)
        begin, length = on_device(start, y), on_device(h, y)
        first = problem.first_stage(problem.field, begin, length, y)
        inside = problem.interpolant(problem.field, begin, length, y, first)
        return inside.of_rows((t - begin) / length)

    def _places(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the step that holds t in each row: the place among all steps, its start, its length.

        t: (times, batch).
        """
        batch = np.arange(t.shape[1])
        rows, start, h = _flat_steps(self.solved.path.steps, len(batch))
        taken = np.flatnonzero(h != 0.0)
        order = taken[np.lexsort((start[taken] * np.sign(h[taken]), rows[taken]))]
        last = np.searchsorted(rows[order], batch, side="right") - 1
        begins, ends = self.problem.times[0], start[order[last]] + h[order[last]]
        _check_inside(t, begins, ends)
        length = np.abs(ends - begins)
        progress = np.abs(start[order] - begins[rows[order]]) / length[rows[order]]
        wanted = np.abs(t - begins) / length
        found = np.searchsorted(2.0 * rows[order] + progress, 2.0 * batch + wanted)
        chosen = order[np.maximum(found - 1, np.searchsorted(rows[order], batch))]
        return chosen, start[chosen], h[chosen]


def _flat_steps(steps: Sequence[Any], batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, t, h) of every row's every step, one after the other, on the host."""
    rows = [np.arange(batch) if one[0] is None else one[0].cpu().numpy() for one in steps]
    starts, lengths = ([one[k].cpu().numpy() for one in steps] for k in (1, 2))
    return np.concatenate(rows), np.concatenate(starts), np.concatenate(lengths)


def _check_inside(t: np.ndarray, start: Any, end: Any) -> None:
    """Raises InputError for a time outside; t: (times,), or (times, batch) with ends of rows."""
    low, high = np.minimum(start, end), np.maximum(start, end)
    slack = 1e-6 * (high - low)
    outside = np.argwhere(~((t >= low - slack) & (t <= high + slack)))
    if len(outside):
        at = tuple(outside[0])
        whose = f" of row {at[1]}" if t.ndim == 2 else ""
        low, high = (np.broadcast_to(bound, t.shape)[at] for bound in (low, high))
        raise InputError(
            f"t={t[at]:g} lies outside the solution's interval{whose}, {low:g} to {high:g}"
        )
