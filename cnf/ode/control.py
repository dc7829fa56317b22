"""How long a step is: frozen settings and pure functions on host numbers.

Numbers are floats where all rows of a batch share their steps, and float64 arrays of shape (rows,)
where every row has its own: one code decides for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from cnf.error import InputError, whole_number

Number = Any  # a float, or a float64 array of shape (rows,)


@dataclass(frozen=True)
class FixedStep:
    """Steps of one length, the last before each output time shortened to land on it.

    step_size: > 0, in units of t; per_sample: every row on its own clock, for output times or
    events of its own; land_on: times to step on besides; jumps: times where the field jumps, which
    are landed on, and where the field is asked from the side of the step.
    Raises InputError for values out of range.  No value is read from the device while it steps.
    """

    step_size: float
    _: KW_ONLY
    per_sample: bool = False
    land_on: tuple[float, ...] = ()
    jumps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _positive("step_size", self.step_size)
        # a NumPy float32 or a tensor would drag the times down to its own precision
        object.__setattr__(self, "step_size", float(self.step_size))
        _take_times(self)

    def fit(self, step: Number, remaining: Number) -> Number:
        """The step to take where `remaining` is left (both > 0); `remaining` itself lands."""
        return choose(remaining <= step * (1 + _SLACK), remaining, step)

    def count(self, span: Number) -> Any:
        """How many steps cover `span`; of each row for an array of spans."""
        return np.maximum(np.ceil(span / self.step_size - _SLACK), 1).astype(np.int64)


@dataclass(frozen=True)
class Adaptive:
    """Steps as long as the estimated local error allows: |error| ≤ atol + rtol·|y| in RMS.

    rtol, atol: tolerances of the state, ≥ 0 and not both 0; per_sample: every row of the batch has
    its own time, step and error; quadrature_atol: the absolute tolerance of what is integrated
    along the path, in its own units, or None to leave it out of the choice.
    safety, min_factor, max_factor, pcoeff, icoeff, dcoeff: with r_n = error over tolerance and k
    the order, the next step is the last one times safety · r_n^(−(p+i+d)/k) · r_{n−1}^((p+2d)/k) ·
    r_{n−2}^(−d/k) within these bounds; the default is the I controller, a usual PI (0.4, 0.3, 0).
    first_step: > 0, or None to choose it; min_step: a step this short is accepted whatever its
    error; max_step: none is longer; land_on: times to step on besides the output times; jumps:
    times where the field jumps, which are landed on, and where the field is asked from the side of
    the step; max_rejections: attempts in a row that may be refused.
    Raises InputError for values out of range.
    Source: Hairer, Nørsett & Wanner, Solving ODEs I, section II.4; Söderlind 2003 for PID.
    """

    rtol: float = 1e-5
    atol: float = 1e-6
    _: KW_ONLY
    per_sample: bool = False
    quadrature_atol: float | None = None
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    first_step: float | None = None
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    min_step: float = 0.0
    max_step: float = math.inf
    land_on: tuple[float, ...] = ()
    jumps: tuple[float, ...] = ()
    max_rejections: int = 100

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "min_step", "pcoeff", "icoeff", "dcoeff"):
            value = getattr(self, name)
            if not (_finite(value) and value >= 0):
                raise InputError(f"{name} must be a number ≥ 0, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.rtol == 0 and self.atol == 0:
            raise InputError("rtol and atol are both 0: no step could be accepted; set one of them")
        for name in ("quadrature_atol", "first_step"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
                object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 < self.safety <= 1 or not 0 < self.min_factor < 1 < self.max_factor:
            raise InputError(
                "expected 0 < safety ≤ 1 and 0 < min_factor < 1 < max_factor, got "
                f"{self.safety!r}, {self.min_factor!r}, {self.max_factor!r}"
            )
        if not self.min_step <= self.max_step or not self.max_step > 0:
            raise InputError(
                f"expected min_step ≤ max_step and max_step > 0, got {self.min_step!r} and "
                f"{self.max_step!r}"
            )
        if self.pcoeff + self.icoeff + self.dcoeff <= 0:
            raise InputError("pcoeff, icoeff and dcoeff are all 0: the step would never change")
        whole_number("max_rejections", self.max_rejections, 1)
        _take_times(self)

    def fit(self, step: Number, remaining: Number) -> Number:
        """The step to take where `remaining` is left (both > 0); `remaining` itself lands."""
        # two equal steps rather than a long one and a sliver
        short = choose(remaining < 2 * step, remaining / 2, step)
        return choose(remaining <= step * _STRETCH, remaining, short)

    @property
    def remembers(self) -> bool:
        """Whether the next step depends on the errors of earlier steps."""
        return bool(self.pcoeff or self.dcoeff)

    def accepts(self, ratio: Number, length: Number) -> Number:
        """Whether a step of that length and error over tolerance will do."""
        shortest = self.min_step * _STRETCH  # a step that was stretched to land is no longer
        return (ratio <= 1.0) | ((length <= shortest) & (ratio < _LARGEST_RATIO))

    def factor(self, ratio: Number, order: int, earlier: tuple[Number, Number] = (1.0, 1.0)) -> Any:
        """What to multiply the step by, given error over tolerance; a NaN shrinks it most.

        earlier: those of the two accepted steps before.  A refused step shrinks by its own error.
        """
        ratio = sane_ratio(ratio)
        good = ratio <= 1.0
        total = self.pcoeff + self.icoeff + self.dcoeff
        grown = self.safety * ratio ** (choose(good, -total, -1.0) / order)
        if self.remembers:
            last, before = earlier
            history = last ** ((self.pcoeff + 2 * self.dcoeff) / order)
            history = history * before ** (-self.dcoeff / order)
            grown = grown * choose(good, history, 1.0)
        return clip(grown, self.min_factor, choose(good, self.max_factor, 1.0))

    def after(self, size: Number, length: Number, factor: Number, refused: Number) -> Number:
        """The size to try next, after an accepted step of `length` where `size` was allowed.

        refused: whether the attempt before was: what was just refused would be refused again, so
        that a step after it does not grow.
        """
        grown = length * choose(refused, choose(factor < 1.0, factor, 1.0), factor)
        # a step cut short to land says little about how long the next may be
        kept = choose(length == size, grown, choose(size > grown, size, grown))
        return self.within(kept)

    def within(self, size: Number) -> Number:
        """The size within min_step and max_step."""
        return clip(size, self.min_step, self.max_step)


Control = FixedStep | Adaptive


def choose(condition: Any, yes: Number, no: Number) -> Any:
    """`yes` where the condition holds, else `no`; row by row for an array of conditions."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, yes, no)
    return yes if condition else no


def over(a: Number, b: Number) -> Any:
    """a / b; not finite where b is 0."""
    if isinstance(b, np.ndarray):
        with np.errstate(divide="ignore", invalid="ignore"):
            return a / b
    return a / b if b else math.inf


def clip(value: Number, low: float, high: Number) -> Any:
    """The value within bounds."""
    if isinstance(value, np.ndarray):
        return np.minimum(np.maximum(value, low), high)
    return min(max(value, low), high)


def on_grid(size: np.ndarray) -> np.ndarray:
    """The nearest sizes of 16 an octave, evenly spaced in it; 0 and infinity stay.

    Step sizes amplify rounding: each depends on the error of the last, some tenfold every few
    steps.  On a grid the differences that a row's neighbours make in the last bits die out, and a
    row alone takes the very steps that it takes in any batch.
    """
    mantissa, exponent = np.frexp(size)  # size = mantissa · 2^exponent, 1/2 ≤ mantissa < 1
    return np.ldexp(np.rint(mantissa * 32) / 32, exponent)


def sane_ratio(ratio: Number) -> Any:
    """Error over tolerance within bounds where its powers are finite; NaN is the largest."""
    if isinstance(ratio, np.ndarray):
        found = np.where(np.isnan(ratio), _LARGEST_RATIO, ratio)
        return np.minimum(np.maximum(found, 1 / _LARGEST_RATIO), _LARGEST_RATIO)
    return _LARGEST_RATIO if ratio != ratio else clip(ratio, 1 / _LARGEST_RATIO, _LARGEST_RATIO)


_LARGEST_RATIO = 1e100
_STRETCH = 1 + 1e-8  # of an adaptive step, to land rather than to leave a sliver
_SLACK = 1e-4  # of a fixed step: output times rounded to float32 must not cost one more


def _take_times(control: Control) -> None:
    """Check `land_on` and `jumps`, and keep them as tuples of floats."""
    for name in ("land_on", "jumps"):
        given: Sequence[float] = getattr(control, name)
        try:
            times = tuple(float(moment) for moment in given)
        except (TypeError, ValueError):
            raise InputError(f"{name} must be a sequence of times, got {given!r}") from None
        if not all(math.isfinite(moment) for moment in times):
            raise InputError(f"{name} must be finite times, got {times}")
        object.__setattr__(control, name, times)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _positive(name: str, value: float) -> None:
    if not (_finite(value) and value > 0):
        raise InputError(f"{name} must be a number > 0, got {value!r}")
