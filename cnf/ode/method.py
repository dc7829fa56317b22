"""One step of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from cnf.error import InputError
from cnf.ode.field import Evaluation
from cnf.ode.state import Leaves, combine, weighted_sum
from cnf.ode.tableau import TABLEAUS, Tableau

Evaluate = Callable[[float, Leaves], Evaluation]


class Step(NamedTuple):
    """What one step of length h brings.

    y: the state at t + h; increment: of the integrals along the path; last: the field at (t + h, y)
    where the method has it already; error, increment_error: local error estimates, or empty.
    """

    y: Leaves
    increment: Leaves
    last: Evaluation | None = None
    error: Leaves = ()
    increment_error: Leaves = ()


class Method(Protocol):
    """A way to make one step; `order` is that of its solution."""

    @property
    def name(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def adaptive(self) -> bool: ...

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        """The step from (t, y), where the field is `first`; with error estimates if asked for."""
        ...


@dataclass(frozen=True)
class ExplicitRungeKutta:
    """One step of an explicit Runge–Kutta method, with a graph where gradients are enabled."""

    tableau: Tableau

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        return self.tableau.adaptive

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        tableau = self.tableau
        stages = [first]
        at = y
        for i in range(1, tableau.stages if estimate else tableau.used_stages):
            at = _state(y, stages, tableau.a[i], h)
            stages.append(field(t + tableau.c[i] * h, at))
        lands = estimate and tableau.fsal
        y1 = at if lands else _state(y, stages, tableau.b, h)
        increment = _integral(stages, tableau.b, h)
        if not estimate:
            return Step(y1, increment)
        assert tableau.error is not None  # the front door pairs methods and controls
        with torch.no_grad():
            error = _error(stages, tableau.error, h)
            increment_error = _integral(stages, tableau.error, h)
        return Step(y1, increment, stages[-1] if lands else None, error, increment_error)


def choose_method(method: str | Tableau | Method) -> Method:
    """The method of a name, a tableau, or itself; raises InputError with the list of names."""
    if isinstance(method, Tableau):
        return ExplicitRungeKutta(method)
    if not isinstance(method, str):
        if callable(getattr(method, "step", None)):
            return method
        raise InputError(f"method must be a name or a Tableau, got {type(method).__name__}")
    if method not in TABLEAUS:
        raise InputError(f"unknown method {method!r}; known are {', '.join(TABLEAUS)}")
    return ExplicitRungeKutta(TABLEAUS[method])


def _state(y: Leaves, stages: Sequence[Evaluation], weights: Sequence[float], h: float) -> Leaves:
    if len(y) == 1:
        return (combine(y[0], [stage.slope[0] for stage in stages], weights, h),)
    slopes = zip(*(stage.slope for stage in stages), strict=True)
    return tuple(combine(leaf, ks, weights, h) for leaf, ks in zip(y, slopes, strict=True))


def _error(stages: Sequence[Evaluation], weights: Sequence[float], h: float) -> Leaves:
    slopes = zip(*(stage.slope for stage in stages), strict=True)
    return tuple(weighted_sum(ks, weights, h) for ks in slopes)


def _integral(stages: Sequence[Evaluation], weights: Sequence[float], h: float) -> Leaves:
    rates = zip(*(stage.rates for stage in stages), strict=True)
    return tuple(weighted_sum(ks, weights, h) for ks in rates)
