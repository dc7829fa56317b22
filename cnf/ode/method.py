"""One step of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.ode.control import Control
from cnf.ode.field import Evaluation
from cnf.ode.jacobian import Layout, jacobian_of
from cnf.ode.state import Leaves, combine, weighted_sum
from cnf.ode.sums import Columns, columns, is_small
from cnf.ode.tableau import Tableau, Weights

Evaluate = Callable[[Any, Leaves], Evaluation]  # time: a float, or (rows,) where rows have theirs


class Step(NamedTuple):
    """What one step of length h brings.

    y: the state at t + h; increment: of the integrals along the path; last: the field at (t + h, y)
    where the method has it already; error, increment_error: local error estimates, or empty;
    slopes: of each leaf of the state, the field at the stages that were evaluated, or empty;
    solved: whether the equations of an implicit step were solved; where not, y or the error is NaN;
    calls: evaluations that each row needed, on the host, None where all needed the same.
    """

    y: Leaves
    increment: Leaves
    last: Evaluation | None = None
    error: Leaves = ()
    increment_error: Leaves = ()
    slopes: Sequence[Sequence[Tensor]] = ()
    solved: bool = True
    calls: Any = None


class Method(Protocol):
    """A way to make one step; `order` is that of its solution.

    It may offer more: see `prepared`, `begun`, `taken`, `twice_differentiable`
    and `adjoint_method`.
    """

    @property
    def name(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def adaptive(self) -> bool: ...

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        """The step from (t, y), where the field is `first`; with error estimates if asked for, for
        which every stage is evaluated.
        """
        ...


@dataclass(frozen=True)
class ExplicitRungeKutta:
    """One step of an explicit Runge–Kutta method, with a graph where gradients are enabled.

    lean: whether nobody differentiates its steps, so that sums need not be in the order that a
    graph has them.
    """

    tableau: Tableau
    lean: bool = False

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
        # a row's last bits must not depend on how many rows with their own steps there are
        if self.lean and len(y) == 1 and is_small(y[0]) and not isinstance(field, OwnPace):
            found = columns(tableau, estimate, y[0].dtype, y[0].ndim)
            if found is not None:
                return _small_step(tableau, found, field, t, h, y[0], first, estimate)
        slopes, rates, at, last = self._stages(field, t, h, y, first, estimate)
        lands = estimate and tableau.fsal
        y1 = at if lands else _ended(y, slopes, tableau.b_weights, h)
        increment = _sums(rates, tableau.b_weights, h)
        if not estimate:
            return Step(y1, increment, slopes=slopes)
        ks = slopes
        if torch.is_grad_enabled():
            ks, rates = _detached(slopes), _detached(rates)
        error = _sums(ks, tableau.error_weights, h)
        increment_error = _sums(rates, tableau.error_weights, h)
        return Step(y1, increment, last if lands else None, error, increment_error, slopes)

    def undifferentiated(self) -> ExplicitRungeKutta:
        """The method where nobody differentiates."""
        return ExplicitRungeKutta(self.tableau, lean=True)

    def _stages(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, every: bool
    ) -> tuple[list[list[Tensor]], list[list[Tensor]], Leaves, Evaluation]:
        """(slopes, rates) of each leaf at the stages, those for the error alone if `every` is asked
        for; where the last stage is, and the field there.
        """
        tableau, at, value, width = self.tableau, y, first, len(y)
        found = [[k] for part in first for k in part]
        rows = tableau.later_stages if every else tableau.later_used_stages
        if len(found) == 1:  # one tensor and nothing beside it: the usual case, in few calls
            (leaf,), (ks,) = y, found
            for c, weights in rows:
                at = (combine(leaf, ks, weights, h),)
                value = field(t + c * h, at)
                ks.append(value.slope[0])
            return found, [], at, value
        for c, weights in rows:
            own = found[:width]
            at = tuple([combine(leaf, ks, weights, h) for leaf, ks in zip(y, own, strict=True)])
            value = field(t + c * h, at)
            for ks, k in zip(found, value.slope + value.rates, strict=True):
                ks.append(k)
        return found[:width], found[width:], at, value


def take_step(
    method: Method, field: Evaluate, t: Any, h: Any, y: Leaves, first: Evaluation, estimate: bool
) -> Step:
    """The step from (t, y) by h; of each row by its own h, where t and h have shape (rows,).

    Where they are 0-d tensors the step is that of floats, differentiable by them.
    """
    if not isinstance(h, Tensor):
        return method.step(field, t, h, y, first, estimate)
    pace = OwnPace(field, t, h)
    step = method.step(pace, 0.0, 1.0, y, pace.scaled(first), estimate)
    if step.last is None:
        return step
    # not _replace: some versions of torch.compile cannot trace it
    return Step(
        step.y,
        step.increment,
        pace.unscaled(step.last),
        step.error,
        step.increment_error,
        step.slopes,
        step.solved,
        step.calls,
    )


class OwnPace:
    """h·f(t + s·h, y) over s from 0 to 1, with t and h of each row's own, float64 of shape (rows,),
    or of all, 0-d.

    A step of this field of length 1 is a step of every row of f by the row's own length: so there
    is one step function for both.
    """

    def __init__(self, field: Evaluate, t: Tensor, h: Tensor) -> None:
        self._field, self._t, self._h = field, t, h
        self._known: list[tuple[Evaluation, Evaluation]] = []
        self._factors: dict[tuple[torch.dtype, int], Tensor] = {}

    def __call__(self, s: float, y: Leaves) -> Evaluation:
        return self.scaled(self._field(torch.add(self._t, self._h, alpha=s), y))

    def scaled(self, value: Evaluation) -> Evaluation:
        """h times the field's value."""
        scaled = Evaluation(*(tuple(leaf * self._lengths(leaf) for leaf in part) for part in value))
        self._known.append((scaled, value))
        return scaled

    def unscaled(self, scaled: Evaluation) -> Evaluation | None:
        """The field's value that `scaled` came from; None for what did not come from the field."""
        for made, value in self._known:
            if made.slope[0] is scaled.slope[0]:  # tensors: compiled code cannot tell tuples apart
                return value
        return None

    def jacobian(self, s: float, y: Leaves) -> Tensor:
        """h times the field's Jacobian, of each row by its own h."""
        found = jacobian_of(self._field, torch.add(self._t, self._h, alpha=s), y)
        ones = (torch.full_like(leaf, 1 + 1j if leaf.is_complex() else 1) for leaf in y)
        each = tuple(leaf * self._lengths(leaf) for leaf in ones)
        return found * Layout(y, len(found)).vector(each).unsqueeze(-1)

    def _lengths(self, leaf: Tensor) -> Tensor:
        real = leaf.real.dtype if leaf.dtype.is_complex else leaf.dtype
        known = self._factors.get((real, leaf.ndim))
        if known is None:
            known = self._h.to(real)
            if known.ndim:
                known = known.reshape(-1, *[1] * (leaf.ndim - 1))
            self._factors[real, leaf.ndim] = known
        return known


def prepared(method: Method, control: Control, evaluate: Evaluate, t: Any, y: Leaves) -> Method:
    """The method for a solve from (t, y) with such steps; raises InputError for what it cannot do.

    Methods that need to know offer `prepare(control, evaluate, t, y)`.
    """
    prepare = getattr(method, "prepare", None)
    return method if prepare is None else prepare(control, evaluate, t, y)


def begun(method: Method) -> Method:
    """The method for a run of steps; one that learns from step to step offers `begin()`."""
    begin = getattr(method, "begin", None)
    return method if begin is None else begin()


def twice_differentiable(method: Method) -> Method:
    """The method with a graph that has second derivatives; where they cost more it offers
    `twice()`.
    """
    twice = getattr(method, "twice", None)
    return method if twice is None else twice()


def undifferentiated(method: Method) -> Method:
    """The method for a solve that nobody differentiates; one that is then cheaper offers
    `undifferentiated()`.
    """
    offered = getattr(method, "undifferentiated", None)
    return method if offered is None else offered()


def taken(method: Method, t: float) -> Method:
    """The method that took the step from t; one that is several offers `at(t)`."""
    at = getattr(method, "at", None)
    return method if at is None else at(t)


def adjoint_method(method: Method, interpolate: bool, rated: bool) -> Method:
    """The method for the adjoint equation, the state read off (`interpolate`) or solved back,
    with rates (`rated`) or without; raises InputError where there is none.

    One that does not serve for it offers `back(interpolate, rated)`.
    """
    back = getattr(method, "back", None)
    return method if back is None else back(interpolate, rated)


def _small_step(
    tableau: Tableau,
    weights: Columns,
    field: Evaluate,
    t: float,
    h: float,
    y: Tensor,
    first: Evaluation,
    estimate: bool,
) -> Step:
    """The step of a small state without a graph, in few calls."""
    at, value, slope = y, first, first.slope[0]
    values, slopes = [first], [slope]
    sums, rows = buffer = weights.take(y.shape)
    torch.mul(weights.first, slope, out=sums)
    for (c, column), row in zip(weights.later, rows, strict=False):
        at = torch.add(y, row, alpha=h)
        value = field(t + c * h, (at,))
        slope = value.slope[0]
        sums.addcmul_(column, slope)
        slopes.append(slope)
        values.append(value)
    end = torch.add(y, rows[len(weights.later)], alpha=h) if weights.ends else at
    rates = [[known.rates[i] for known in values] for i in range(len(first.rates))]
    increment = _sums(rates, tableau.b_weights, h)
    if not estimate:
        weights.give(y.shape, buffer)
        return Step((end,), increment, None, (), (), [slopes])
    error = torch.add(weights.zero, rows[-1], alpha=h)
    weights.give(y.shape, buffer)
    increment_error = _sums(rates, tableau.error_weights, h)
    last = None if weights.ends else value
    return Step((end,), increment, last, (error,), increment_error, [slopes])


def _moved(y: Leaves, slopes: list[list[Tensor]], weights: Weights, h: float) -> Leaves:
    return tuple([combine(leaf, ks, weights, h) for leaf, ks in zip(y, slopes, strict=True)])


def _ended(y: Leaves, slopes: list[list[Tensor]], weights: Weights, h: float) -> Leaves:
    """`_moved` with the slopes summed first: y is rounded once a step and not once a stage, which
    adds up over a long way in single precision.
    """
    if len(weights) == 1:
        return _moved(y, slopes, weights, h)
    return tuple([leaf + weighted_sum(ks, weights, h) for leaf, ks in zip(y, slopes, strict=True)])


def _sums(slopes: list[list[Tensor]], weights: Weights, h: float) -> Leaves:
    return tuple([weighted_sum(ks, weights, h) for ks in slopes])


def _detached(slopes: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[k.detach() for k in ks] for ks in slopes]
