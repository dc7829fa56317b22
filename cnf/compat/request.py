"""What a caller of torchdiffeq's interface asked for, checked once, over one tensor.

A tuple of tensors lies end to end in one flat tensor, as it does there: so that one norm, one
tolerance for each entry and one interpolation serve every state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.field import Evaluation
from cnf.ode.state import Leaves, largest, precise_dtype, rms

Tolerance = Any  # a float, or a real tensor that broadcasts against the state
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass(frozen=True)
class Layout:
    """How the caller's state lies in one tensor: as it is, or a tuple's parts end to end.

    shapes: of the parts, or None where the state is a tensor.
    """

    shapes: tuple[torch.Size, ...] | None

    def join(self, state: Any) -> Tensor:
        """The one tensor of a state."""
        return state if self.shapes is None else torch.cat([part.reshape(-1) for part in state])

    def split(self, tensor: Tensor) -> Any:
        """The state of one tensor, or of a stack of such along its first axes."""
        if self.shapes is None:
            return tensor
        parts, end = [], 0
        for shape in self.shapes:
            start, end = end, end + shape.numel()
            # not split(), whose outputs could not be changed in place
            parts.append(tensor[..., start:end].view((*tensor.shape[:-1], *shape)))
        return tuple(parts)


@dataclass(frozen=True)
class Norm:
    """The size of a state in one tensor, 0-d.

    given: the caller's own norm of a state as the caller knows it; None for the largest root mean
    square of the parts.
    """

    layout: Layout
    given: Callable[[Any], Any] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.given is not None:
            found = torch.as_tensor(self.given(self.layout.split(tensor)), device=tensor.device)
            return found.abs().reshape(())
        parts = (tensor,) if self.layout.shapes is None else self.layout.split(tensor)
        return largest([rms(part) for part in parts])


@dataclass(frozen=True)
class Dynamics:
    """The caller's func as the core's field of one tensor: (time, (y,)) → dy/dt of y's shape.

    time: a host number, or a 0-d tensor, which keeps its graph; func gets it 0-d in `dtype`.
    """

    call: Callable[..., Any]
    layout: Layout
    dtype: torch.dtype
    device: torch.device

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        (state,) = y
        slope = self._joined(self.call(self.clock(t), self.layout.split(state)))
        if slope.shape != state.shape:
            slope = self._shaped(slope, state)
        return Evaluation((slope.to(state.dtype),), ())

    def clock(self, t: Any) -> Tensor:
        """The time as func gets it, 0-d."""
        if isinstance(t, Tensor):
            return t.to(self.device, self.dtype)
        return torch.full((), t, dtype=self.dtype, device=self.device)

    def _joined(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor if self.layout.shapes is None else Iterable):
            raise InputError(
                f"func returned {type(value).__name__} where dy/dt is expected, built like y0"
            )
        return self.layout.join(value)

    def _shaped(self, slope: Tensor, state: Tensor) -> Tensor:
        try:
            return slope.expand(state.shape)
        except RuntimeError:
            raise InputError(
                f"func returned dy/dt of shape {tuple(slope.shape)} for a state of shape "
                f"{tuple(state.shape)} (a tuple's parts counted end to end); they must agree"
            ) from None


@dataclass(frozen=True)
class Callbacks:
    """What func wants to be told of the steps: functions of (t0, y0, dt), each or None.

    y0 comes as the caller knows the state, t0 and dt as 0-d tensors; dt is the length of the step,
    positive in both directions of time.
    """

    layout: Layout
    step: Callable[..., Any] | None = None
    accept_step: Callable[..., Any] | None = None
    reject_step: Callable[..., Any] | None = None

    @classmethod
    def of(cls, func: Any, layout: Layout, ending: str = "") -> Callbacks:
        """Those that are attributes of func, with `ending` behind their names."""
        return cls(layout, *(getattr(func, name + ending, None) for name in CALLBACKS))

    @property
    def names(self) -> set[str]:
        found = (self.step, self.accept_step, self.reject_step)
        return {name for name, call in zip(CALLBACKS, found, strict=True) if call is not None}

    def tell(self, call: Callable[..., Any] | None, t: Any, y: Tensor, h: Any) -> None:
        """Call back, if there is anyone to call."""
        if call is not None:
            call(_moment(t, y), self.layout.split(y), abs(_moment(h, y)))


def _moment(number: Any, y: Tensor) -> Tensor:
    dtype = precise_dtype(y.real)
    return torch.as_tensor(number, dtype=dtype, device=y.device).detach()


class Solver(Protocol):
    """A family of methods; settings: the option keys that it knows; callbacks: those it calls."""

    @property
    def settings(self) -> frozenset[str]: ...
    @property
    def callbacks(self) -> frozenset[str]: ...

    def solve(self, request: Request) -> Tensor:
        """The states at all requested times, (times, *y.shape)."""
        ...

    def until_event(self, request: Request, event: Crossing) -> tuple[float, Tensor]:
        """(time, state) where the event happens; the state carries the graph."""
        ...


@dataclass(frozen=True)
class Request:
    """An initial value problem over one tensor and how to solve it.

    t: (times,) on y's device; times: the same on the host; norm: what errors are measured by;
    options: all others.
    """

    field: Dynamics
    y: Tensor
    t: Tensor
    times: tuple[float, ...]
    rtol: Tolerance
    atol: Tolerance
    method: str
    norm: Norm
    options: Mapping[str, Any]
    callbacks: Callbacks

    @property
    def layout(self) -> Layout:
        return self.field.layout

    @property
    def direction(self) -> float:
        """1 where time runs forward, −1 where it runs backward."""
        return -1.0 if len(self.times) > 1 and self.times[1] < self.times[0] else 1.0

    @property
    def follows_times(self) -> bool:
        """Whether the solution's dependence on the times is wanted."""
        return self.t.requires_grad and torch.is_grad_enabled()


def read_request(
    solver: Solver,
    method: str,
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    options: Mapping[str, Any] | None,
    callbacks: Callable[[Layout], Callbacks],
) -> Request:
    """The request, with the exceptions and warnings of torchdiffeq 0.2.5."""
    layout = _layout_of(y0)
    y = layout.join(y0)
    if not (y.is_floating_point() or y.is_complex()):
        raise InputError(f"y0 must be floating or complex, got {y.dtype}; try y0.float()")
    times = _checked_times(t)
    if t.device != y.device:
        warnings.warn(f"t is on {t.device} and y0 on {y.device}: t is moved there", stacklevel=4)
        t = t.to(y.device)
    found = callbacks(layout)
    settings = dict(options or {})
    norm = Norm(layout, settings.pop("norm", None))
    _warn_of_unknown(solver, method, settings, found)
    known = {key: value for key, value in settings.items() if key in solver.settings}
    return Request(
        Dynamics(func, layout, y.real.dtype, y.device),
        y,
        t,
        times,
        _tolerance("rtol", rtol, layout, y),
        _tolerance("atol", atol, layout, y),
        method,
        norm,
        known,
        found,
    )


def _layout_of(y0: Any) -> Layout:
    if isinstance(y0, Tensor):
        return Layout(None)
    if not (isinstance(y0, tuple) and y0 and all(isinstance(part, Tensor) for part in y0)):
        raise AssertionError(f"y0 must be a tensor or a tuple of tensors, got {_described(y0)}")
    return Layout(tuple(part.shape for part in y0))


def _described(y0: Any) -> str:
    name = type(y0).__name__
    return f"{name} of {len(y0)} parts" if isinstance(y0, tuple | list) else name


def _checked_times(t: Any) -> tuple[float, ...]:
    """The times on the host: one device-to-host read."""
    if not isinstance(t, Tensor):
        raise AssertionError(f"t must be a torch.Tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"t must be a floating point tensor, got {t.dtype}; try t.float()")
    if t.ndim != 1:
        raise AssertionError(f"t must be one dimensional, got shape {tuple(t.shape)}")
    times = on_host(t)
    if not (times and all(map(math.isfinite, times))):
        raise AssertionError(f"t must hold one finite time or more, got {times}")
    rises = {earlier < later for earlier, later in pairwise(times) if earlier != later}
    if len(set(times)) < len(times) or len(rises) > 1:
        raise AssertionError(f"t must be strictly increasing or decreasing, got {times}")
    return times


def on_host(t: Tensor) -> tuple[float, ...]:
    """Times as numbers."""
    return tuple(t.detach().double().cpu().tolist())


def _tolerance(name: str, value: Any, layout: Layout, y: Tensor) -> Tolerance:
    if isinstance(value, Tensor) and value.requires_grad:
        raise AssertionError(f"{name} cannot require gradient: give {name}.detach()")
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if not isinstance(value, Iterable):
        return float(value)
    real = {"dtype": y.real.dtype, "device": y.device}
    if layout.shapes is None:
        return torch.as_tensor(value, **real)
    parts = tuple(value)
    if len(parts) != len(layout.shapes):
        raise AssertionError(
            f"{name} has {len(parts)} entries and y0 has {len(layout.shapes)} parts: a tuple of "
            "tolerances must have the same length as the tuple y0"
        )
    pairs = zip(parts, layout.shapes, strict=True)
    return torch.cat([torch.as_tensor(p, **real).expand(s.numel()) for p, s in pairs])


def _warn_of_unknown(
    solver: Solver, method: str, settings: dict[str, Any], callbacks: Callbacks
) -> None:
    unknown = {key: value for key, value in settings.items() if key not in solver.settings}
    if unknown:
        warnings.warn(f"{method}: Unexpected arguments {unknown}", stacklevel=5)
    unheard = callbacks.names - solver.callbacks
    if unheard:
        warnings.warn(
            f"Solver '{method}' does not support callbacks {sorted(unheard)}", stacklevel=5
        )


class Crossing:
    """The caller's event function, made positive at the start: the first of its numbers to leave
    its side makes the value 0 or negative.
    """

    def __init__(self, call: Callable[[Tensor, Any], Tensor], request: Request) -> None:
        self._call, self._layout = call, request.layout
        self._dtype, self._device = precise_dtype(request.t), request.y.device
        with torch.no_grad():
            self._signs = torch.sign(self._value(request.times[0], request.y))

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        """0-d; never 0, so that what is zero on a stretch counts from where the stretch begins."""
        value = (self._value(t, y) * self._signs).min()
        return torch.where(value > 0, value, value - torch.finfo(value.dtype).tiny)

    @property
    def at_start(self) -> bool:
        """Whether the event is there from the start: one device-to-host read."""
        return bool((self._signs == 0).any())

    def host(self, t: Any, y: Tensor) -> float:
        """The value on the host: one device-to-host read."""
        with torch.no_grad():
            return self(t, y).item()

    def clock(self, t: Any) -> Tensor:
        """The time as the event function gets it, 0-d."""
        return torch.as_tensor(t, dtype=self._dtype, device=self._device)

    def _value(self, t: Any, y: Tensor) -> Tensor:
        return self._call(self.clock(t), self._layout.split(y))
