"""One step of a diagonally implicit Runge–Kutta method, whose stages solve equations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.control import Adaptive, Control
from cnf.ode.field import Evaluation
from cnf.ode.method import OwnPace, Step
from cnf.ode.newton import Memory, Newton
from cnf.ode.state import Leaves, combine, weighted_sum
from cnf.ode.tableau import Row, Tableau, Weights


@dataclass(frozen=True)
class DiagonallyImplicit:
    """One step of a method with `tableau.implicit`, with a graph where gradients are enabled.

    rtol, atol: the tolerance of the steps, of which Newton's iteration leaves 1/100 over at most;
    both 0 to iterate down to rounding; differentiable: how often, 1 or 2; memory: of a run of
    steps, None for a single one.
    Where Newton's iteration fails the error estimate is NaN, so that the step is refused; without
    an estimate it tries harder, and what it then gives up is NaN.
    """

    tableau: Tableau
    rtol: float = 0.0
    atol: float = 0.0
    differentiable: int = 1
    memory: Memory | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        return self.tableau.adaptive

    def prepare(self, control: Control, evaluate: Any, t: Any, y: Leaves) -> DiagonallyImplicit:
        """The method with the tolerance of these steps."""
        if isinstance(control, Adaptive):
            return replace(self, rtol=control.rtol, atol=control.atol)
        return replace(self, rtol=0.0, atol=0.0)

    def begin(self) -> DiagonallyImplicit:
        """The method for a run of steps, which learn from each other.

        But for rows with steps of their own: when a row gets a new Jacobian would depend on its
        neighbours.
        """
        return replace(self, memory=Memory())

    def twice(self) -> DiagonallyImplicit:
        """The method with second derivatives."""
        return replace(self, differentiable=2)

    def back(self, interpolate: bool, rated: bool) -> DiagonallyImplicit:
        """The method for the adjoint equation; raises InputError unless y is read off."""
        if not interpolate:
            raise InputError(
                f"a stiff solution cannot be followed backward: with {self.name} take "
                "gradient=Adjoint(interpolate=True), which reads it off the forward solve, or "
                "'checkpoint'"
            )
        return self

    def step(
        self, field: Any, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        """See Method; the field has a `jacobian` too."""
        tableau = self.tableau
        newton = self._newton(field, t, h, y, not estimate)
        slopes, rates, end = self._stages(newton, field, t, h, y, first)
        leaves, solved = newton.layout.leaves, newton.finish()
        last = Evaluation(leaves(slopes[-1]), tuple(ks[-1] for ks in rates))
        rows = len(y[0]) if y[0].ndim else 1
        by_rows = isinstance(field, OwnPace) and newton.layout.blocks == rows
        calls = newton.calls if by_rows else None
        increment = _sums(rates, tableau.b_weights, h)
        step = Step(leaves(end), increment, last, solved=solved, calls=calls)
        if not estimate:
            return step._replace(y=leaves(newton.spoiled(end)))
        with torch.no_grad():
            error = newton.spoiled(weighted_sum(slopes, tableau.error_weights, h))
            increment_error = _sums(rates, tableau.error_weights, h)
        return step._replace(error=leaves(error), increment_error=increment_error)

    def _newton(self, field: Any, t: float, h: float, y: Leaves, patient: bool) -> Newton:
        memory = None if isinstance(field, OwnPace) else self.memory
        return Newton(
            field, t, y, h * self.tableau.a[-1][-1], memory or Memory(),
            tolerance=(self.rtol, self.atol), patient=patient, twice=self.differentiable == 2,
        )  # fmt: skip

    def _stages(
        self, newton: Newton, field: Any, t: float, h: float, y: Leaves, first: Evaluation
    ) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
        """Slopes at the stages as vectors, each rate at the stages, and the state at the last."""
        tableau, layout = self.tableau, newton.layout
        start, slopes = layout.vector(y), [layout.vector(first.slope)]
        rates, end = [[rate] for rate in first.rates], start
        for i in range(1, tableau.stages):
            moment = t + tableau.c[i] * h
            base = combine(start, slopes, _before(tableau.a_weights[i], i), h)
            guess = weighted_sum(slopes, _guess(tableau.c[: i + 1]), 1.0)
            slopes.append(newton.root(moment, base, guess))
            end = torch.add(base, slopes[-1], alpha=h * tableau.a[i][i])
            if rates:
                newton.calls += 1
                for ks, k in zip(rates, field(moment, layout.leaves(end)).rates, strict=True):
                    ks.append(k)
        return slopes, rates, end


def _sums(rates: list[list[Tensor]], weights: Weights, h: float) -> Leaves:
    return tuple(weighted_sum(ks, weights, h) for ks in rates)


def _before(weights: Weights, stage: int) -> Weights:
    return tuple((j, weight) for j, weight in weights if j < stage)


@cache
def _guess(nodes: Row) -> Weights:
    """Weights of the stages so far whose sum predicts the stage at the last node.

    The polynomial through the slopes at the nearest nodes, four at most; of two stages at one node
    the later.
    """
    *known, node = nodes
    latest = {c: j for j, c in enumerate(known)}
    near = sorted(latest, key=lambda c: abs(c - node))[:4]
    if near[0] == node:
        return ((latest[node], 1.0),)
    return tuple(
        (latest[c], prod((node - other) / (c - other) for other in near if other != c))
        for c in near
    )
