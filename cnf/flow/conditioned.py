"""The field that is integrated for some rows: given their context, guided by it, undisturbed.

A field that takes a context is called f(t, x, context).  One that can do some of its work ahead of
a solve offers `embed(context)`, and is called with what that returns in the context's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.flow.divergence import KnowsDivergence, VectorField, push
from cnf.ode.field import is_row_wise
from cnf.training.mode import InMode


class Conditioned(NamedTuple):
    """A field(t, x, *rows) → dx/dt, and what it takes of every row of a batch besides x.

    told: the contexts that `rows` were made of, (batch, columns); rows told the same are alike.
    """

    field: VectorField
    rows: tuple[Tensor, ...] = ()
    told: Tensor | None = None


def embedded(field: VectorField, context: Tensor) -> Tensor:
    """What the field takes in the place of a context (batch, k): of as many rows."""
    embed: Callable[[Tensor], Tensor] | None = getattr(field, "embed", None)
    return embed(context) if callable(embed) else context


def guided(field: VectorField, weight: float) -> Guided:
    """The field (1 − w) f(t, x, none) + w f(t, x, given), called with (t, x, given, none).

    w = 1 follows the context as it was learned, above 1 more than that, 0 not at all.  It is a
    field of its own, with a density of its own: neither is that of the tempered conditional.
    Source: Ho & Salimans 2022, equation 6, for velocities: Zheng et al. 2023.
    """
    kind = GuidedClosedForm if isinstance(field, KnowsDivergence) else Guided
    return kind(field, weight)


class Guided:
    """See `guided`."""

    def __init__(self, field: Any, weight: float) -> None:
        self._field, self._weight = field, weight
        self.__name__ = getattr(field, "__name__", type(field).__name__)
        self.row_wise = is_row_wise(field)

    def __call__(self, t: Tensor, x: Tensor, given: Tensor, none: Tensor) -> Tensor:
        return torch.lerp(self._field(t, x, none), self._field(t, x, given), self._weight)

    def tangent(
        self, t: Tensor, x: Tensor, tangents: Tensor, given: Tensor, none: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(f, J·tangents), see `push`."""
        without = push(self._field, t, x, tangents, none)
        return _mixed(without, push(self._field, t, x, tangents, given), self._weight)


class GuidedClosedForm(Guided):
    """The same of a field that knows its divergence: traces add like fields."""

    def prepare(self) -> tuple[Tensor, ...]:
        return self._field.prepare()

    def with_divergence(
        self, t: Tensor, x: Tensor, given: Tensor, none: Tensor, *prepared: Tensor
    ) -> tuple[Tensor, Tensor]:
        without = self._field.with_divergence(t, x, none, *prepared)
        return _mixed(without, self._field.with_divergence(t, x, given, *prepared), self._weight)


def _mixed(
    none: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor], weight: float
) -> tuple[Tensor, Tensor]:
    value, other = (torch.lerp(a, b, weight) for a, b in zip(none, given, strict=True))
    return value, other


class Mixed:
    """The field in bfloat16 where torch's autocast allows it, and in full precision outside: the
    ODE's sums, and what comes back of it, stay as precise as they are.

    The rows that it takes, such as an embedded context, were made outside.
    """

    def __init__(self, field: Any) -> None:
        self._field = field
        self.__name__ = getattr(field, "__name__", type(field).__name__)
        self.row_wise = is_row_wise(field)

    def __call__(self, t: Tensor, x: Tensor, *rows: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self._field(t, x, *rows).to(x.dtype)

    def tangent(
        self, t: Tensor, x: Tensor, tangents: Tensor, *rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(f, J·tangents), see `push`."""
        with torch.autocast(x.device.type, torch.bfloat16):
            value, pushed = push(self._field, t, x, tangents, *rows)
        return value.to(x.dtype), pushed.to(x.dtype)

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._field.parameters() if isinstance(self._field, nn.Module) else ())


def undisturbed(field: VectorField) -> VectorField:
    """The field as it is in eval(): a module in train() may drop units or look at the whole batch.

    The field itself stays in its mode.
    """
    if not isinstance(field, nn.Module) or not any(part.training for part in field.modules()):
        return field
    return (UndisturbedClosedForm if isinstance(field, KnowsDivergence) else Undisturbed)(field)


class Undisturbed:
    """See `undisturbed`.  Every call switches modes, so that backward meets the same field."""

    def __init__(self, field: nn.Module) -> None:
        self._field: Any = field
        self.__name__ = type(field).__name__
        self.row_wise = is_row_wise(field)
        if callable(embed := getattr(field, "embed", None)):
            self.embed = partial(self._call, embed)

    def __call__(self, t: Tensor, x: Tensor, *rows: Tensor) -> Tensor:
        return self._call(self._field, t, x, *rows)

    def tangent(
        self, t: Tensor, x: Tensor, tangents: Tensor, *rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._call(push, self._field, t, x, tangents, *rows)

    def parameters(self) -> Iterator[Tensor]:
        return self._field.parameters()

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with InMode(self._field, training=False):
            return function(*arguments)


class UndisturbedClosedForm(Undisturbed):
    """The same of a field that knows its divergence, and perhaps how to pull cotangents back."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__(field)
        if pull := getattr(field, "pull_divergence", None):
            self.pull_divergence = partial(self._call, pull)

    def prepare(self) -> tuple[Tensor, ...]:
        return self._call(self._field.prepare)

    def with_divergence(self, t: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(self._field.with_divergence, t, x, *tensors)
