"""A learned end time: how long the ODE runs, as part of the field.

Solving dx/ds = f(s, x) over [0, T] is solving dx/dt = T f(T t, x) over [0, 1], so that T is a
parameter like any other and gets its gradient, ∂L/∂T = ⟨λ(T), f(T, x(T))⟩, whatever the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def learned_end_time(field: nn.Module, end: float = 1.0) -> EndTime:
    """The field T f(T t, x), whose T > 0 starts at `end` and is learned.

    It offers what the field offers: its closed form, its tangents.  Raises ValueError for end ≤ 0.
    """
    kind = EndTimeClosedForm if hasattr(field, "with_divergence") else EndTime
    return kind(field, end)


class EndTime(nn.Module):
    """See `learned_end_time`."""

    def __init__(self, field: nn.Module, end: float = 1.0) -> None:
        super().__init__()
        if not (0 < end < math.inf):
            raise ValueError(f"the end time must be a number > 0, got {end!r}")
        self.field: Any = field
        self.log_end = nn.Parameter(torch.tensor(math.log(end)))
        self.row_wise = getattr(field, "row_wise", False)

    @property
    def end(self) -> Tensor:
        """T, 0-d."""
        return self.log_end.exp()

    def forward(self, t: Tensor, x: Tensor, *rows: Tensor) -> Tensor:
        return self.end * self.field(self.end * t, x, *rows)

    @property
    def embed(self) -> Callable[[Tensor], Tensor] | None:
        """What the field makes of contexts once for each solve, where it offers that."""
        return getattr(self.field, "embed", None)

    @property
    def tangent(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """(f, J·tangents) as a function of (t, x, tangents), where the field offers it."""
        carry = getattr(self.field, "tangent", None)
        if carry is None:
            return None

        def scaled(t: Tensor, x: Tensor, tangents: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
            value, pushed = carry(self.end * t, x, tangents, *rows)
            return self.end * value, self.end * pushed

        return scaled


class EndTimeClosedForm(EndTime):
    """The same of a field that knows its divergence."""

    def prepare(self) -> tuple[Tensor, ...]:
        return self.field.prepare()

    def with_divergence(self, t: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(f, tr ∂f/∂x); tensors: rows, then what `prepare` returned."""
        value, trace = self.field.with_divergence(self.end * t, x, *tensors)
        return self.end * value, self.end * trace
