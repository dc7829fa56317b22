"""The solution inside a step: a polynomial in θ = (τ − t)/h, of the method's own order.

dopri5 and tsit5 have weights of their own for it (order 4).  Any other step is interpolated by the
polynomial that agrees with the solution and its slope at both ends (order 3, for methods up to
order 4), in the middle too (order 5, for order 5), or at both thirds (order 7, for any higher):
what lies between the ends comes from steps of the same method, part of the way.  An implicit
method's step is interpolated without the slope at its start, since f(t, y) magnifies what y is off
the solution as much as the problem is stiff, while the slopes of stages do not: by the value and
the slope at the end (order 2, for methods up to order 2), and in the middle too (order 4).
Source: Hairer, Nørsett & Wanner, Solving ODEs I, section II.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from cnf.ode.field import Evaluation
from cnf.ode.implicit import DiagonallyImplicit
from cnf.ode.method import Evaluate, ExplicitRungeKutta, Method, Step, taken
from cnf.ode.state import Leaves, across


@dataclass(frozen=True)
class Polynomial:
    """y(θ) = Σ c_k θ^k; coefficients: for each leaf, c_0, c_1, …"""

    coefficients: tuple[list[Tensor], ...]

    def __call__(self, theta: float | Tensor) -> Leaves:
        """The state at θ, a number or a 0-d tensor of the leaves' precision."""
        return tuple(_horner(leaf, theta) for leaf in self.coefficients)

    def at_each(self, theta: Tensor) -> Leaves:
        """The state at every θ, (times,): leaves of shape (times, …)."""
        return tuple(
            _horner(leaf, across(theta, leaf[0].unsqueeze(0))) for leaf in self.coefficients
        )

    def of_rows(self, theta: Tensor) -> Leaves:
        """The state of every row at its own θ, (rows,)."""
        return tuple(_horner(leaf, across(theta, leaf[0])) for leaf in self.coefficients)


def interpolation_order(method: Method) -> int:
    """The order of what `interpolant` gives: its error inside a step is O(h^(order + 1))."""
    if isinstance(method, ExplicitRungeKutta) and method.tableau.dense is not None:
        return method.tableau.dense_order
    implicit = isinstance(method, DiagonallyImplicit)
    return 2 * len(_nodes(method.order, implicit)) - (2 if implicit else 1)


def interpolant(
    method: Method,
    field: Evaluate,
    t: float,
    h: float,
    y: Leaves,
    first: Evaluation,
    step: Step | None = None,
) -> Polynomial:
    """The solution inside the step from (t, y) by h, where the field is `first`.

    step: the step itself, where it was taken already: only what it did not keep is evaluated.
    The graph follows.
    """
    method = taken(method, t)
    weights = _weights(method)
    if weights is None:
        return _hermite(method, field, t, h, y, first, step)
    slopes = _slopes(method, field, t, h, y, first, step)
    return Polynomial(
        tuple(
            [leaf, *(_sum(h, column, ks) for column in zip(*weights, strict=True))]
            for leaf, ks in zip(y, slopes, strict=True)
        )
    )


def hermite(h: Any, y: Leaves, first: Evaluation, end: Leaves, last: Evaluation) -> Polynomial:
    """The cubic that agrees with the solution and its slope at both ends of a step by h.

    h: a float, or a 0-d tensor of y's precision; first, last: the field at the ends.
    """
    rises = tuple(after - before for after, before in zip(end, y, strict=True))
    return _through((0.0, 1.0), h, y, [rises], [first.slope, last.slope])


def _slopes(
    method: Method, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, step: Any
) -> Sequence[Sequence[Tensor]]:
    """Of each leaf, the field wherever the method's weights want it."""
    assert isinstance(method, ExplicitRungeKutta) and method.tableau.dense is not None
    if step is None or not step.slopes or len(step.slopes[0]) < method.tableau.stages:
        step = method.step(field, t, h, y, first, True)
    if len(method.tableau.dense) == method.tableau.stages:
        return step.slopes
    last = step.last or field(t + h, step.y)
    return [[*ks, k] for ks, k in zip(step.slopes, last.slope, strict=True)]


def _hermite(
    method: Method,
    field: Evaluate,
    t: float,
    h: float,
    y: Leaves,
    first: Evaluation,
    step: Step | None,
) -> Polynomial:
    implicit = isinstance(method, DiagonallyImplicit)
    nodes = _nodes(method.order, implicit)
    changes, slopes = [], [] if implicit else [first.slope]
    for node in nodes[1:]:
        known = step if node == 1.0 else None
        part = known or method.step(field, t, node * h, y, first, False)
        last = part.last or field(t + node * h, part.y)
        changes.append(tuple(end - start for end, start in zip(part.y, y, strict=True)))
        slopes.append(last.slope)
    return _through(nodes, h, y, changes, slopes)


def _through(
    nodes: tuple[float, ...],
    h: Any,
    y: Leaves,
    changes: Sequence[Leaves],
    slopes: Sequence[Leaves],
) -> Polynomial:
    """The polynomial with given changes at the nodes but the first, and slopes at all of them, or
    at all but the first.
    """
    matrix = _hermite_matrix(nodes, len(slopes) == len(nodes))
    split = len(nodes) - 1
    leaves = []
    for i, leaf in enumerate(y):
        rises = [change[i] for change in changes]
        ks = [slope[i] for slope in slopes]
        terms = [
            _sum(1.0, row[:split], rises) + _sum(h, row[split:], ks) for row in matrix.tolist()
        ]
        leaves.append([leaf, *terms])
    return Polynomial(tuple(leaves))


def _nodes(order: int, implicit: bool) -> tuple[float, ...]:
    if implicit:
        return (0.0, 1.0) if order <= 2 else (0.0, 0.5, 1.0)
    if order <= 4:
        return (0.0, 1.0)
    return (0.0, 0.5, 1.0) if order == 5 else (0.0, 1 / 3, 2 / 3, 1.0)


@cache
def _hermite_matrix(nodes: tuple[float, ...], start: bool) -> np.ndarray:
    """Coefficients of θ, θ², … by the changes at the nodes but the first, and the slopes at all;
    without that at the start if `start` is false.
    """
    powers = np.arange(1, 2 * len(nodes) - (not start))
    at = np.array(nodes)[:, None]
    values, slopes = at[1:] ** powers, powers * at ** (powers - 1.0)
    return np.linalg.inv(np.vstack([values, slopes if start else slopes[1:]]))


def _weights(method: Method) -> tuple[tuple[float, ...], ...] | None:
    return method.tableau.dense if isinstance(method, ExplicitRungeKutta) else None


def _sum(h: Any, weights: Any, slopes: Any) -> Tensor:
    total: Tensor | None = None
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0.0:
            part = slope * (h * weight)
            total = part if total is None else total + part
    return slopes[0] * 0.0 if total is None else total


def _horner(coefficients: list[Tensor], theta: Any) -> Tensor:
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * theta + coefficient
    return total
