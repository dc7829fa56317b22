"""What keeps a flow's paths short and its field smooth, from the pass that integrates the density.

The terms are integrals along the path, beside the log-determinant.  They are integrated as so many
millionths of themselves: errors in them then count for nothing beside the log-determinant's, and no
term steers the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.flow.divergence import (
    Attached,
    Divergence,
    Hutchinson,
    VectorField,
    WithDivergence,
    push,
)

FAINT = 2.0**-20  # a power of two: nothing is rounded


@dataclass(frozen=True)
class Regularizer:
    """Weights of what is added to a loss, each ≥ 0; the terms are means over a batch.

    kinetic: of ∫ ½‖f‖² dt, which straightens paths; jacobian: of ∫ ‖∂f/∂x‖²_F dt, which smooths
    the field (exact with Tangents, estimated by Hutchinson's probes, and with any other divergence
    by one probe of its own); hjb: of ∫ |∂Φ/∂t − ½‖∇Φ‖²| dt, for fields −∇Φ that offer `residual`.
    steer: the solve of a training step goes on to a base time drawn from (−steer, steer) instead of
    0, so that the field learns to stand still there; < 1.
    Raises InputError for a weight out of range.
    Source: Finlay et al. 2020, equation 10; Onken et al. 2021, equation 8; Ghosh et al. 2020.

    >>> Regularizer(kinetic=0.01, jacobian=0.01).terms
    ('kinetic', 'jacobian')
    """

    kinetic: float = 0.0
    jacobian: float = 0.0
    hjb: float = 0.0
    steer: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                fits = 0 <= value < (1 if field.name == "steer" else math.inf)
            except TypeError:
                fits = False
            if not fits:
                bound = "a number from 0 to below 1" if field.name == "steer" else "a number ≥ 0"
                raise InputError(f"{field.name} must be {bound}, got {value!r}; 0 leaves it out")

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms whose weights are not 0, in order."""
        return tuple(name for name in ("kinetic", "jacobian", "hjb") if getattr(self, name))

    def around(self, divergence: Divergence) -> Divergence:
        """The divergence whose field gives the terms too; itself where there are none."""
        return Regularized(divergence, self) if self.terms else divergence

    def base_time(self) -> float:
        """When a solve to the base ends: 0, or drawn from torch's generator with `steer`."""
        return self.steer * (2 * torch.rand(()).item() - 1) if self.steer else 0.0

    def measured(self, along: tuple[Tensor, ...], span: float) -> dict[str, Tensor]:
        """The terms by name, 0-d: means over the batch of what was integrated over `span`.

        along: integrals that a field of `Regularized` gave; span: end − start of the solve.
        """
        sign = math.copysign(1 / FAINT, span)
        return {name: sign * part.mean() for name, part in zip(self.terms, along, strict=True)}

    def penalty(self, terms: dict[str, Tensor]) -> Tensor | float:
        """The weighted sum of the terms, 0-d."""
        return sum((getattr(self, name) * value for name, value in terms.items()), 0.0)


@dataclass(frozen=True)
class Regularized:
    """A divergence whose field gives the terms of a regularizer too, as faint rates."""

    divergence: Divergence
    regularizer: Regularizer

    def attach(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        """field(t, x, *rows, *params) → (dx/dt, (divergence, term, …)), all terms (batch,)."""
        terms = self.regularizer.terms
        inner = self._with_norm(field, x, *rows) if "jacobian" in terms else None
        attached = inner or self.divergence.attach(field, x, *rows)
        residual = _residual(field) if "hjb" in terms else None
        taken = len(rows)

        def with_terms(t: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Any]:
            value, found = attached.field(t, x, *tensors)
            trace, *norm = (found,) if isinstance(found, Tensor) else found
            rates: dict[str, Tensor] = {"jacobian": norm[0]} if norm else {}
            if "kinetic" in terms:
                rates["kinetic"] = 0.5 * value.square().sum(-1)
            if residual is not None:
                rates["hjb"] = residual(t, x, *tensors[:taken]).abs()
            return value, (trace, *(FAINT * rates[name] for name in terms))

        return WithDivergence(Attached(field, with_terms), attached.rows, attached.params)

    def _with_norm(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        own: Any = getattr(self.divergence, "attach_with_norm", None)
        return self._with_probe(field, x, *rows) if own is None else own(field, x, *rows)

    def _with_probe(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        """The divergence as it is, and the norm by a probe, which follows the field's rows."""
        attached = self.divergence.attach(field, x, *rows)
        taken = len(rows)

        def with_norm(t: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Any]:
            given, (probe, *rest) = tensors[:taken], tensors[taken:]
            value, trace = attached.field(t, x, *given, *rest)
            _, pushed = push(field, t, x, probe.transpose(0, 1), *given)
            return value, (trace, pushed.square().sum((0, -1)))

        probe = Hutchinson(seed=None).draw(x)
        both = (*attached.rows[:taken], probe, *attached.rows[taken:])
        return WithDivergence(with_norm, both, attached.params)


def _residual(field: Any) -> Callable[..., Tensor]:
    found: Any = getattr(field, "residual", None)
    if found is None:
        raise InputError(
            f"hjb= is for fields −∇Φ that offer residual(t, x), and {type(field).__name__} does "
            "not; use PotentialField, or leave hjb out"
        )
    return found
