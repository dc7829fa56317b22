"""How long a step is: frozen settings and pure functions on host numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnf.error import InputError


@dataclass(frozen=True)
class FixedStep:
    """Steps of one length, the last before each output time shortened to land on it.

    step_size: > 0, in units of t.  Raises InputError for any other.
    No value is read from the device while it steps.
    """

    step_size: float

    def __post_init__(self) -> None:
        _positive("step_size", self.step_size)
        # a NumPy float32 or a tensor would drag the times down to its own precision
        object.__setattr__(self, "step_size", float(self.step_size))

    def fit(self, step: float, remaining: float) -> float:
        """The step to take where `remaining` is left (both > 0); `remaining` itself lands."""
        return remaining if remaining <= step * (1 + _SLACK) else step

    def count(self, span: float) -> int:
        """How many steps cover `span`."""
        return max(math.ceil(span / self.step_size - _SLACK), 1)


@dataclass(frozen=True)
class Adaptive:
    """Steps as long as the estimated local error allows: |error| ≤ atol + rtol·|y| in RMS.

    rtol, atol: tolerances of the state, ≥ 0 and not both 0; quadrature_atol: the absolute tolerance
    of what is integrated along the path, in its own units, or None to leave it out of the choice;
    safety, min_factor, max_factor: the next step is the last one times
    safety·ratio^(−1/order) within these bounds; first_step: > 0, or None to choose it.
    Raises InputError for values out of range.
    Source: Hairer, Nørsett & Wanner, Solving ODEs I, section II.4.
    """

    rtol: float = 1e-5
    atol: float = 1e-6
    quadrature_atol: float | None = None
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    first_step: float | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (_finite(value) and value >= 0):
                raise InputError(f"{name} must be a number ≥ 0, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.rtol == 0 and self.atol == 0:
            raise InputError("rtol and atol are both 0: no step could be accepted; set one of them")
        if self.quadrature_atol is not None:
            _positive("quadrature_atol", self.quadrature_atol)
            object.__setattr__(self, "quadrature_atol", float(self.quadrature_atol))
        if self.first_step is not None:
            _positive("first_step", self.first_step)
            object.__setattr__(self, "first_step", float(self.first_step))
        if not 0 < self.safety <= 1 or not 0 < self.min_factor < 1 < self.max_factor:
            raise InputError(
                "expected 0 < safety ≤ 1 and 0 < min_factor < 1 < max_factor, got "
                f"{self.safety!r}, {self.min_factor!r}, {self.max_factor!r}"
            )

    def fit(self, step: float, remaining: float) -> float:
        """The step to take where `remaining` is left (both > 0); `remaining` itself lands."""
        if remaining <= step * (1 + 1e-8):
            return remaining
        # two equal steps rather than a long one and a sliver
        return remaining / 2 if remaining < 2 * step else step

    def factor(self, ratio: float, order: int) -> float:
        """What to multiply the step by, given error over tolerance; a NaN ratio shrinks it most."""
        if ratio < 1e-300:  # 0, or so small that its inverse overflows
            return self.max_factor
        if not math.isfinite(ratio):
            return self.min_factor
        grown = self.safety * ratio ** (-1.0 / order)
        largest = self.max_factor if ratio <= 1.0 else 1.0
        return min(max(grown, self.min_factor), largest)


Control = FixedStep | Adaptive

_SLACK = 1e-4  # of a fixed step: output times rounded to float32 must not cost one more


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _positive(name: str, value: float) -> None:
    if not (_finite(value) and value > 0):
        raise InputError(f"{name} must be a number > 0, got {value!r}")
