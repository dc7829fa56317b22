"""Steps from point to point of a grid that is known beforehand.

Where the times require a gradient the grid carries it: the solution on the grid is differentiated
as it is computed, the lengths of the steps included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cnf.compat.request import Crossing, Dynamics, Request, on_host
from cnf.error import InputError
from cnf.ode.choice import choose_method
from cnf.ode.control import FixedStep
from cnf.ode.event import locate
from cnf.ode.field import Evaluation
from cnf.ode.interpolate import hermite
from cnf.ode.method import Evaluate, take_step
from cnf.ode.state import Leaves, precise_dtype

Moment = Any  # a time: a float, or a 0-d tensor where the times require a gradient

_LONGEST_WAIT = 20_000  # steps until an event


class Stepper(Protocol):
    """One step after the other of one solve; it may remember those before."""

    def __call__(
        self, field: Evaluate, t: Moment, h: Moment, y: Tensor, first: Evaluation
    ) -> Tensor:
        """The state at t + h, where the field at (t, y) is `first`."""
        ...


@dataclass(frozen=True)
class FixedGridSolver:
    """Any stepper on a grid; begin: makes one for a request."""

    begin: Callable[[Request], Stepper]
    more_settings: frozenset[str] = frozenset()

    callbacks = frozenset({"callback_step"})

    @property
    def settings(self) -> frozenset[str]:
        return self.more_settings | {"step_size", "grid_constructor", "interp", "perturb"}

    def solve(self, request: Request) -> Tensor:
        times, direction = request.times, request.direction
        states = [request.y]
        if len(times) == 1:
            return torch.stack(states)
        grid = _grid(request)
        points, asked = on_host(grid), _moments(request.t, times)
        walk = _Walk(request, self.begin(request))
        for end, point in zip(_moments(grid, points)[1:], points[1:], strict=True):
            arc = walk.to(end)
            while len(states) < len(times) and direction * (point - times[len(states)]) >= 0:
                states.append(arc.at(asked[len(states)]))
        return torch.stack(states)

    def until_event(self, request: Request, event: Crossing) -> tuple[float, Tensor]:
        size = request.options.get("step_size")
        if size is None:
            raise AssertionError(
                f"events with method={request.method!r} need a `step_size` in options: without it "
                "the steps have no length"
            )
        shift = request.direction * FixedStep(size).step_size
        if event.at_start:
            return request.times[0], request.y
        start = _moments(request.t, request.times)[0]
        before = event.host(start, request.y)
        walk = _Walk(request, self.begin(request))
        for i in range(_LONGEST_WAIT):
            arc = walk.to(start + shift * (i + 1))
            after = event.host(arc.end, arc.y1)
            if after <= 0:
                found = _crossing(arc, event, before, after)
                return found, arc.at(found)
            before = after
        raise RuntimeError(f"no event came in {_LONGEST_WAIT} steps of {size}; raise `step_size`")


class RungeKuttaStepper:
    """Steps of a Runge–Kutta method of the core."""

    def __init__(self, name: str) -> None:
        self._method = choose_method(name)

    def __call__(
        self, field: Evaluate, t: Moment, h: Moment, y: Tensor, first: Evaluation
    ) -> Tensor:
        return take_step(self._method, field, t, h, (y,), first, False).y[0]


class _Walk:
    """Where the solution stands on its grid."""

    def __init__(self, request: Request, stepper: Stepper) -> None:
        self._request, self._stepper = request, stepper
        self._t, self._y = _moments(request.t, request.times)[0], request.y
        self._arc: _Arc | None = None
        self._cubic = _is_cubic(request)
        self._perturb = bool(request.options.get("perturb", False))

    def to(self, end: Moment) -> _Arc:
        """The step to the next point of the grid."""
        request, t, y = self._request, self._t, self._y
        request.callbacks.tell(request.callbacks.step, t, y, end - t)
        field: Evaluate = _Between(request.field, t, end) if self._perturb else request.field
        known = self._arc.last if self._arc and not self._perturb else None
        first = known or field(t, (y,))
        y1 = self._stepper(field, t, end - t, y, first)
        self._t, self._y = end, y1
        self._arc = _Arc(field, t, end, y, y1, first, self._cubic)
        return self._arc


class _Arc:
    """A step with the solution between its ends: a chord, or the cubic with the slopes there.

    last: the field at the end, once it was needed.
    """

    def __init__(
        self,
        field: Evaluate,
        t: Moment,
        end: Moment,
        y: Tensor,
        y1: Tensor,
        first: Evaluation,
        cubic: bool,
    ) -> None:
        self.t, self.end, self.y, self.y1 = t, end, y, y1
        self._field, self._first, self._cubic = field, first, cubic
        self.last: Evaluation | None = None

    def at(self, t: Moment) -> Tensor:
        """The state at time t, differentiable by it and by the ends."""
        h = self.end - self.t
        theta = (t - self.t) / h
        if isinstance(theta, Tensor):
            h, theta = h.to(self.y.real.dtype), theta.to(self.y.real.dtype)
        elif theta == 1.0:
            return self.y1
        if not self._cubic:
            return self.y1 + (self.y1 - self.y) * (theta - 1.0)  # at θ = 1 the very end
        self.last = self.last or self._field(self.end, (self.y1,))
        return hermite(h, (self.y,), self._first, (self.y1,), self.last)(theta)[0]


class _Between:
    """The field on a step whose ends may be jumps, seen from inside the step."""

    def __init__(self, field: Dynamics, t: Moment, end: Moment) -> None:
        self._field = field
        ends = torch.stack([field.clock(t), field.clock(end)]).detach()
        inner = torch.nextafter(ends, ends.flip(0))
        self._low, self._high = inner.min(), inner.max()

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        time = self._field.clock(t)
        # the nudge is no part of the dependence on the time
        nudge = (torch.clamp(time, self._low, self._high) - time).detach()
        return self._field(time + nudge, y)


def _crossing(arc: _Arc, event: Crossing, before: float, after: float) -> float:
    """The time on the step when the event happens."""
    start, end = _number(arc.t), _number(arc.end)

    def moment(theta: np.ndarray) -> float:
        return start + float(theta[0]) * (end - start)

    def g(theta: np.ndarray) -> np.ndarray:
        t = moment(theta)
        return np.array([event.host(t, arc.at(t))])

    return moment(locate(g, np.array([before]), np.array([after])))


def _grid(request: Request) -> Tensor:
    """The points to step on, from the first to the last requested time."""
    size, constructor = (request.options.get(key) for key in ("step_size", "grid_constructor"))
    if size is not None and constructor is not None:
        raise InputError("step_size and grid_constructor are mutually exclusive: give one of them")
    if constructor is not None:
        y0 = request.layout.split(request.y)
        return _checked_grid(constructor(request.field.call, y0, request.t), request)
    if size is None:
        return request.t
    control, t = FixedStep(size), request.t.to(precise_dtype(request.t))
    count = int(control.count(abs(request.times[-1] - request.times[0])))
    shifts = torch.arange(count, dtype=t.dtype, device=t.device)
    return torch.cat([t[:1] + shifts * (request.direction * control.step_size), t[-1:]])


def _checked_grid(grid: Any, request: Request) -> Tensor:
    if not (isinstance(grid, Tensor) and grid.ndim == 1 and len(grid) > 1):
        raise AssertionError(f"grid_constructor must return two times or more (1-D), got {grid!r}")
    hosts, times = on_host(grid), request.times
    if hosts[0] != times[0] or hosts[-1] != times[-1]:
        raise AssertionError(
            f"grid_constructor must begin and end where t does, at {times[0]:g} and "
            f"{times[-1]:g}, got {hosts[0]:g} and {hosts[-1]:g}"
        )
    if any(request.direction * (end - start) <= 0 for start, end in pairwise(hosts)):
        raise AssertionError(f"grid_constructor must return times in the order of t, got {hosts}")
    return grid


def _moments(t: Tensor, times: Sequence[float]) -> Sequence[Moment]:
    """The times one by one: tensors where their gradient is wanted, else host numbers."""
    if t.requires_grad and torch.is_grad_enabled():
        return t.to(precise_dtype(t)).unbind()
    return times


def _number(moment: Moment) -> float:
    return moment.detach().item() if isinstance(moment, Tensor) else moment


def _is_cubic(request: Request) -> bool:
    interp = request.options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise InputError(f"interp must be 'linear' or 'cubic', got {interp!r}")
    return interp == "cubic"
