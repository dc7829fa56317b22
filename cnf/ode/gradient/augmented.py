"""The field of the adjoint equation, over the state and its cotangent, and how it is solved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cnf.error import IntegrationError
from cnf.ode.control import Adaptive
from cnf.ode.field import Evaluation, alias
from cnf.ode.gradient.problem import vjp
from cnf.ode.integrate import Problem, Stats
from cnf.ode.jacobian import jacobian_of
from cnf.ode.method import adjoint_method
from cnf.ode.state import Leaves, across, largest


@dataclass(frozen=True)
class Augmented:
    """(y, a) ↦ (f, −a ∂f/∂y − c ∂rates/∂y), with rates −(a ∂f/∂θ + c ∂rates/∂θ).

    It is a field over named tensors, θ and c, so that the adjoint can be solved for its own
    gradient, and differentiated again.
    field: reads `read`, the copies θ that it is differentiated by; rates_bar: c, copies likewise;
    stats: count the evaluations; width: leaves of y in the state; reached: which of those θ that
    need a gradient the field has read so far, by number; known: the forward solution, where y is
    read off it and not solved back: then a alone is the state; tensors: what θ and c are copies of.
    """

    field: Any
    read: Leaves
    rates_bar: Leaves
    stats: Stats
    width: int
    reached: set[int]
    known: Callable[[float], Leaves] | None = None
    tensors: Leaves = ()

    @property
    def precision(self) -> AbstractContextManager[Any]:
        return self.field.precision

    @property
    def row_wise(self) -> bool:
        return self.field.row_wise

    def aliases(self) -> Leaves:
        """Tensors to bind and differentiate by."""
        return (*self.field.aliases(), *map(alias, self.rates_bar))

    def bind(self, tensors: Sequence[Tensor]) -> Augmented:
        """The same, reading `tensors` in the place of θ and c."""
        read, rates_bar = tuple(tensors[: len(self.read)]), tuple(tensors[len(self.read) :])
        return replace(self, field=self.field.bind(read), read=read, rates_bar=rates_bar)

    def take(self, rows: Tensor) -> Augmented:
        """The same for some rows of the batch."""
        bars = tuple(bar.index_select(0, rows) for bar in self.rates_bar)
        return replace(self, field=self.field.take(rows), rates_bar=bars)

    def __call__(self, t: Any, state: Leaves) -> Evaluation:
        again = torch.is_grad_enabled()  # then the state's leaves are the caller's own copies
        y = state[: self.width]
        if not again:
            y = self.known(t) if self.known else y
            y = tuple(leaf.detach().requires_grad_() for leaf in y)
        value = self.value(t, y)
        inputs = (*y, *(x for x in self.read if x.requires_grad))
        found = vjp((*value.slope, *value.rates), self.bars(value, state), inputs, again=again)
        pulled = tuple(
            torch.zeros_like(x) if g is None else -g for g, x in zip(found, inputs, strict=True)
        )
        self.reached.update(i for i, g in enumerate(found[len(y) :]) if g is not None)
        slope = () if self.known else value.slope if again else map(Tensor.detach, value.slope)
        return Evaluation((*slope, *pulled[: len(y)]), pulled[len(y) :])

    def jacobian(self, t: Any, _: Leaves) -> Tensor:
        """−(∂f/∂y)ᵀ, whatever the adjoint is; for a state that is read off."""
        assert self.known is not None  # the implicit methods ask for it
        self.stats.jacobians += 1
        return -jacobian_of(self.field, t, self.known(t)).mT

    def value(self, t: Any, y: Leaves) -> Evaluation:
        """The forward field with its graph."""
        self.stats.nfe_backward += 1
        with torch.enable_grad(), self.field.precision:
            return self.field(t, y)

    def bars(self, value: Evaluation, state: Leaves) -> Leaves:
        """Cotangents of the forward field's slope and rates."""
        rates = (bar.to(rate.dtype) for bar, rate in zip(self.rates_bar, value.rates, strict=True))
        return (*state[self.width :], *rates)


def way_back(problem: Problem, augmented: Augmented, span: Any) -> Problem:
    """The adjoint equation over one interval, by the method and the tolerances of the solve."""
    control = problem.control
    if isinstance(control, Adaptive):  # what is integrated is the parameters' gradient here
        control = replace(control, quadrature_atol=None)
    method = adjoint_method(problem.method, augmented.known is not None, bool(augmented.rates_bar))
    return replace(
        problem,
        field=augmented,
        times=span,
        method=method,
        control=control,
        watch=None,
        dense=False,
    )


@contextmanager
def going_back() -> Iterator[None]:
    """Failures in here tell no partial solution: it would be the adjoint's."""
    try:
        yield
    except IntegrationError as error:
        error.partial = None
        raise


def sized(
    bars: Sequence[Tensor], norm: Callable[[Tensor], Tensor], size: float
) -> tuple[Tensor, list[Tensor]]:
    """(scale, cotangents over it): the adjoint equation is linear, and solved for a given size.

    So its tolerance is relative to the gradient.  A scale that is not finite makes every gradient
    NaN when it is multiplied again, and nothing else on the way.
    norm: `rms`, or `row_rms` for a scale of every row.
    """
    scale = largest([norm(bar.detach()) for bar in bars]) / size
    scale = torch.where(scale == 0, 1.0, scale)
    sizes = [across(scale, bar) for bar in bars]
    return scale, [
        torch.where(size.isfinite(), bar / size, 0.0) for bar, size in zip(bars, sizes, strict=True)
    ]
