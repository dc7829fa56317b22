"""Where a solution may stop: the zeros of g(t, y), told from steps that cross them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.state import Leaves, Structure

Array = np.ndarray


@dataclass(frozen=True)
class Event:
    """A zero of g(t, y) along the solution.

    g: t a 0-d tensor and y a state → one number, for the whole batch; or t and the values of shape
    (batch,), where every row has its own steps; direction: 1 where g must rise as the solve goes
    on, −1 where it must fall, 0 for either; terminal: whether the solution stops there.
    A zero at the very start does not count, and a step that crosses twice is not seen to cross.
    """

    g: Callable[[Tensor, Any], Tensor]
    _: KW_ONLY
    direction: int = 0
    terminal: bool = True

    def __post_init__(self) -> None:
        if not callable(self.g):
            raise InputError(f"an event is a function g(t, y), got {self.g!r}")
        if self.direction not in (-1, 0, 1):
            raise InputError(f"direction must be −1, 0 or 1, got {self.direction!r}")


@dataclass(frozen=True)
class Watch:
    """Events over a state of a known structure; clock: a host time as g gets it."""

    events: tuple[Event, ...]
    state: Structure
    clock: Callable[[Any], Tensor]
    per_sample: bool

    def __bool__(self) -> bool:
        return bool(self.events)

    def value(self, event: int, t: Any, y: Leaves) -> Tensor:
        """g of one event, 0-d or (rows,)."""
        value = self.events[event].g(self.clock(t), self.state.build(y))
        if not isinstance(value, Tensor) or value.is_complex():
            raise InputError(f"an event's g must return a real tensor, got {_described(value)}")
        if self.per_sample:
            rows = len(y[0])
            if tuple(value.shape) not in ((rows,), (rows, 1)):
                raise InputError(
                    f"an event's g must return one number a row, shape ({rows},), where every row "
                    f"has its own steps; got shape {tuple(value.shape)}"
                )
            return value.reshape(rows)
        if value.numel() != 1:
            raise InputError(
                f"an event's g returned shape {tuple(value.shape)}, but all rows share their steps "
                "and stop together: return one number, or give every row its own steps with "
                "control=Adaptive(..., per_sample=True)"
            )
        return value.reshape(())

    @torch.no_grad()
    def values(self, t: Any, y: Leaves) -> Array:
        """g of every event on the host, (events,) or (events, rows): one device-to-host read."""
        found = [self.value(i, t, y).double() for i in range(len(self.events))]
        return torch.stack(found).cpu().numpy()

    def crossed(self, before: Array, after: Array) -> Array:
        """Which events happened between two values, bool of their shape."""
        rises, falls = (before < 0) & (after >= 0), (before > 0) & (after <= 0)
        directions = np.array([event.direction for event in self.events])
        directions = directions.reshape(-1, *[1] * (before.ndim - 1))
        return (rises & (directions >= 0)) | (falls & (directions <= 0))


def locate(g: Callable[[Array], Array], before: Array, after: Array) -> Array:
    """Where in (0, 1] each g turns zero, given its values at 0 and 1; of their shape.

    g: positions (n,) → values (n,), all at once.  The Illinois form of the false position, with a
    bisection where it stalls; the end of the bracket where g has crossed is what comes back.
    """
    low, high = np.zeros_like(before), np.ones_like(after)
    at_low, at_high = before.copy(), after.copy()
    for turn in range(100):
        if np.all((high - low <= _NARROW) | (at_high == 0)):
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            guess = high - at_high * (high - low) / (at_high - at_low)
        inside = (guess > low) & (guess < high) & (turn % 3 < 2)
        middle = np.where(inside, guess, (low + high) / 2)
        value = g(middle)
        still = np.sign(value) == np.sign(before)
        at_high = np.where(still, np.where(at_high == 0, at_high, at_high / 2), value)
        at_low = np.where(still, value, at_low / 2)
        low, high = np.where(still, middle, low), np.where(still, high, middle)
    return high


_NARROW = 1e-14


def as_events(event: Event | Sequence[Event] | None) -> tuple[Event, ...]:
    """The events of `event=`; raises InputError for anything else."""
    if event is None:
        return ()
    events = tuple(event) if isinstance(event, Sequence) else (event,)
    for one in events:
        if not isinstance(one, Event):
            raise InputError(f"event must be an Event(g) or a list of such, got {one!r}")
    return events


def _described(value: Any) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
