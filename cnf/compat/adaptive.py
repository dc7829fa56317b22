"""Steps chosen by their error, the requested times read off them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cnf.compat.request import CALLBACKS, Crossing, Request, on_host
from cnf.error import InputError, IntegrationError
from cnf.ode.choice import choose_method
from cnf.ode.control import Adaptive
from cnf.ode.event import Event, Watch
from cnf.ode.field import Evaluation
from cnf.ode.integrate import Problem, Stats, Trajectory, integrate
from cnf.ode.interpolate import Polynomial
from cnf.ode.method import Step
from cnf.ode.moment import slide
from cnf.ode.state import Leaves, Structure, precise_dtype
from cnf.ode.tableau import Tableau
from cnf.ode.trajectory import Measure

_FACTORS = {"safety": 0.9, "dfactor": 0.2, "ifactor": 10.0}
_MOST_STEPS = 2**31 - 1


@dataclass(frozen=True)
class AdaptiveSolver:
    """A Runge–Kutta pair of the core, by its name, or one of its own.

    The last requested time is landed on; those before it are read off the steps by the method's
    interpolation, so that their number costs no evaluation.
    """

    pair: str | Tableau

    settings = frozenset(
        {"min_step", "max_step", "first_step", "step_t", "jump_t", "max_num_steps", "dtype"}
        | _FACTORS.keys()
    )
    callbacks = frozenset(CALLBACKS)

    def solve(self, request: Request) -> Tensor:
        return _Walk(self.pair, request).through(request.times)

    def until_event(self, request: Request, event: Crossing) -> tuple[float, Tensor]:
        return _Walk(self.pair, request).until(event)

    def dense(self, request: Request) -> Pieces:
        """The solution at any time between the first and the last."""
        walk = _Walk(self.pair, request, keep=True)
        walk.through(request.times)
        return Pieces(tuple(walk.pieces))


@dataclass(frozen=True)
class Piece:
    """The solution on a step from t by h."""

    t: float
    h: float
    inside: Polynomial

    def at(self, t: Tensor) -> Tensor:
        """The states at times t, (times,): of shape (times, *y.shape), differentiable by t."""
        return self.inside.at_each((t.to(precise_dtype(t)) - self.t) / self.h)[0]


@dataclass(frozen=True)
class Pieces:
    """The solution on all steps, in the order in which they were taken."""

    pieces: tuple[Piece, ...]

    def __call__(self, t: Tensor) -> Tensor:
        """The states at times t of any shape: (*t.shape, *y.shape)."""
        direction = math.copysign(1.0, self.pieces[0].h)
        known = [piece.t + piece.h for piece in self.pieces]
        ends = torch.tensor(known, dtype=torch.float64, device="cpu")
        flat = t.reshape(-1)
        host = flat.detach().double().cpu()
        self._check_inside(host)
        found = torch.searchsorted(direction * ends, direction * host).clamp(max=len(ends) - 1)
        states = [self.pieces[i].at(flat[k : k + 1]) for k, i in enumerate(found.tolist())]
        none = self.pieces[0].at(flat[:0])  # which is all, where no time is asked for
        return torch.cat([none, *states]).reshape(*t.shape, *none.shape[1:])

    def _check_inside(self, t: Tensor) -> None:
        first, last = self.pieces[0], self.pieces[-1]
        low, high = sorted((first.t, last.t + last.h))
        slack = 1e-6 * (high - low)
        if not ((t >= low - slack) & (t <= high + slack)).all():
            raise AssertionError(
                f"the solution is known from t={low:g} to {high:g}, got {t.tolist()}"
            )


class _Walk:
    """The way through the requested times, as the core's loop reports it; see Observer.

    keep: whether to keep the solution on every step.
    """

    def __init__(self, pair: str | Tableau, request: Request, keep: bool = False) -> None:
        self.request = request
        control, measure = _control(request), _measure(request)
        self.problem = Problem(
            request.field, (), choose_method(pair), control, sys.maxsize,
            clock=request.field.dtype, measure=measure,
        )  # fmt: skip
        self.keep, self.pieces = keep, list[Piece]()
        self.most = int(request.options.get("max_num_steps", _MOST_STEPS))
        self.waiting = 0  # attempts since a requested time was reached
        self.times: tuple[float, ...] = ()  # those to read off, and the same as tensors
        self.moments = request.t[:0]
        self.read: list[Tensor] = []

    def through(self, times: tuple[float, ...]) -> Tensor:
        """The states at all times, (times, *y.shape)."""
        request, y = self.request, self.request.y
        if len(times) == 1:
            return torch.stack([y])
        landing = None if request.follows_times else -1  # the end is read off for its derivative
        self.times, self.moments = times[1:landing], request.t[1:landing]
        end = self._integrate(times[0], times[-1]).states[-1][0]
        last = [] if request.follows_times else [end[None]]
        return torch.cat([y[None], *self.read, *last])

    def until(self, event: Crossing) -> tuple[float, Tensor]:
        """(time, state) of the event."""
        request = self.request
        start, structure = request.times[0], Structure(request.y)
        if event.at_start:
            return start, request.y
        watch = Watch((Event(event),), structure, event.clock, False)
        self.problem = replace(self.problem, watch=watch)
        out = self._integrate(start, request.direction * math.inf)
        return out.times[-1], out.states[-1][0]

    def _integrate(self, start: float, end: float) -> Trajectory:
        request, y = self.request, self.request.y
        if request.follows_times:  # y as it is at a start that does not move
            t = request.t[0].to(precise_dtype(request.t))
            y = slide(request.field, t, t.detach() - t, (y,))[0][0]
        # not kept: a walk that held what holds it would keep its graphs until they are looked for
        problem = replace(self.problem, times=(start, end), observer=self)
        self.at = y
        try:
            return integrate(problem, (y,), Stats())
        except IntegrationError as error:
            raise AssertionError(f"{self._reason(error.step)}: {error}") from error

    def _reason(self, step: float) -> str:
        """What torchdiffeq calls it; a step of `min_step` is refused where it leads to NaN."""
        control: Any = self.problem.control
        finite = bool(self.at.isfinite().all()) and step > control.min_step
        return "underflow in dt" if finite else "non-finite values in state `y`"

    # what the loop reports ----------------------------------------------------------------------

    def attempt(self, t: float, h: float, y: Leaves) -> None:
        if self.waiting >= self.most:
            raise AssertionError(f"max_num_steps exceeded ({self.waiting}>={self.most}) at t={t:g}")
        self.waiting += 1
        self.at = y[0]
        callbacks = self.request.callbacks
        callbacks.tell(callbacks.step, t, y[0], h)

    def refuse(self, t: float, h: float, y: Leaves) -> None:
        callbacks = self.request.callbacks
        callbacks.tell(callbacks.reject_step, t, y[0], h)

    def accept(self, t: float, h: float, y: Leaves, step: Step) -> Evaluation | None:
        callbacks = self.request.callbacks
        callbacks.tell(callbacks.accept_step, t, y[0], h)
        count, self.at = self._reached(t + h, h), step.y[0]
        if not (count or self.keep):
            return step.last
        last = step.last or self.problem.evaluate(self.request.field, t + h, step.y, t)
        piece = self._piece(t, h, y, step._replace(last=last))
        if count:
            moments, self.moments = self.moments[:count], self.moments[count:]
            self.read.append(piece.at(moments))
            self.times, self.waiting = self.times[count:], 0
        if self.keep:
            self.pieces.append(piece)
        return last

    def _reached(self, end: float, h: float) -> int:
        """How many of the times to read lie before the end of a step."""
        direction = math.copysign(1.0, h)
        limit = direction * end + 1e-9 * abs(h)  # the last end may be rounded short
        return next((i for i, t in enumerate(self.times) if direction * t > limit), len(self.times))

    def _piece(self, t: float, h: float, y: Leaves, step: Step) -> Piece:
        first = Evaluation(tuple(ks[0] for ks in step.slopes), ())
        return Piece(t, h, self.problem.interpolant(self.request.field, t, h, y, first, step))


def _control(request: Request) -> Adaptive:
    options = request.options
    safety, least, most = (float(options.get(k, default)) for k, default in _FACTORS.items())
    if not (0 < safety <= 1 and 0 < least < 1 < most):
        raise InputError(
            "expected 0 < safety ≤ 1 and 0 < dfactor < 1 < ifactor in options, got "
            f"{safety:g}, {least:g}, {most:g}"
        )
    first = options.get("first_step")
    # tolerances by entry are the measure's
    rtol, atol = (1.0 if isinstance(x, Tensor) else x for x in (request.rtol, request.atol))
    step_t, jump_t = _distinct_times(request)
    return Adaptive(
        rtol, atol, safety=safety, min_factor=least, max_factor=most,
        first_step=None if first is None else float(first),
        max_rejections=math.ceil(100 - 40 / math.log(least)),  # the step has vanished by then
        min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)),
        land_on=step_t, jumps=jump_t,
    )  # fmt: skip


def _distinct_times(request: Request) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The times of `step_t` and `jump_t`; raises InputError where one occurs twice."""
    found = []
    for key in ("step_t", "jump_t"):
        given = request.options.get(key)
        found.append(() if given is None else _numbers(given))
    together = [*found[0], *found[1]]
    if len(set(together)) < len(together):
        raise InputError(
            f"`step_t` and `jump_t` must not have any repeated elements, got {together}"
        )
    return found[0], found[1]


def _numbers(given: Any) -> tuple[float, ...]:
    if isinstance(given, Tensor):
        return on_host(given.reshape(-1))
    return tuple(float(moment) for moment in given)


def _measure(request: Request) -> Measure | None:
    """How errors are measured where the control's RMS and two numbers do not say it."""
    rtol, atol = request.rtol, request.atol
    numbers = not (isinstance(rtol, Tensor) or isinstance(atol, Tensor))
    if numbers and request.norm.given is None and request.layout.shapes is None:
        return None

    def measure(parts: Leaves, y: Leaves, end: Leaves) -> float:
        size = torch.maximum(y[0].abs(), end[0].abs())
        scale = (atol + rtol * size).clamp_min(torch.finfo(size.dtype).tiny)
        return request.norm(parts[0] / scale).item()

    return measure
