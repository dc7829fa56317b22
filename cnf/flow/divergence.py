"""A field in, the same field with its divergence out.

A field that knows its divergence offers `prepare()` and `with_divergence(t, x, *prepared)`, and
perhaps `pull_divergence`, which pulls cotangents back without a graph; one that can carry tangents
offers `tangent(t, x, tangents)`; any other is differentiated by torch.func.  What the field takes
of every row besides x, such as a context, follows x, and the tangents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cnf.error import InputError, whole_number
from cnf.ode.field import is_row_wise

VectorField = Callable[..., Tensor]  # f(t, x, *rows) → dx/dt


class WithDivergence(NamedTuple):
    """field(t, x, *rows, *params) → (dx/dt, divergence), of shapes (batch, dim) and (batch,)."""

    field: Callable[..., tuple[Tensor, Tensor]]
    rows: tuple[Tensor, ...] = ()
    params: tuple[Tensor, ...] = ()


class Divergence(Protocol):
    """A way to get tr ∂f/∂x along the path."""

    def attach(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        """The field with its divergence for one solve over the batch x, (batch, dim).

        rows: what else the field takes of every row, f(t, x, *rows); they come first among those
        that are returned.
        """
        ...


@runtime_checkable
class KnowsDivergence(Protocol):
    """A field with a divergence of its own."""

    def prepare(self) -> tuple[Tensor, ...]: ...
    def with_divergence(self, t: Tensor, x: Tensor, *prepared: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ClosedForm:
    """The field's own exact trace, for about the price of one Hutchinson probe in any dimension.

    Raises InputError for a field that offers none.  Source: tr(W₃ S₂ W₂ S₁ W₁) = s₂ᵀ M s₁ with
    M = W₂ ∘ (W₁ W₃)ᵀ; for one layer Chen et al. 2018, section 4.
    """

    def attach(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        if not isinstance(field, KnowsDivergence):
            raise InputError(
                f"the field {_name(field)} offers no closed form of its divergence: give it "
                "prepare() and with_divergence(t, x, *prepared), or use divergence=Tangents()"
            )
        pull = getattr(field, "pull_divergence", None)
        attached = _Attached(field, field.with_divergence, pull)
        return WithDivergence(attached, rows, field.prepare())


@dataclass(frozen=True)
class Tangents:
    """The exact trace by forward mode: dim tangents carried beside x, layer by layer where the
    field can, else by torch.func.jvp.  Work and memory grow with dim.
    """

    def attach(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        basis = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

        def with_trace(t: Tensor, x: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
            value, pushed = push(field, t, x, basis[:, None].expand(-1, x.shape[0], -1), *rows)
            return value, torch.einsum("ibi->b", pushed)

        return WithDivergence(_Attached(field, with_trace), rows)


@dataclass(frozen=True)
class Hutchinson:
    """An unbiased estimate of the trace, mean over probes of εᵀ J ε, with ε drawn once per solve.

    probes: ≥ 1; law: "rademacher" (the smaller variance) or "gaussian"; seed: an integer draws one
    ε shared by all rows, the same in every solve, so that a row's result does not depend on its
    place; None draws a new ε for every row and solve from torch's generator, as training wants.
    Source: Hutchinson 1990; Grathwohl et al. 2019, equation 7.
    """

    probes: int = 1
    law: str = "rademacher"
    seed: int | None = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", whole_number("probes", self.probes, 1))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole_number("seed", self.seed, 0))
        if self.law not in ("rademacher", "gaussian"):
            raise InputError(f"law must be 'rademacher' or 'gaussian', got {self.law!r}")

    def attach(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        def with_estimate(t: Tensor, x: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
            probes = rows[-1].transpose(0, 1)
            value, pushed = push(field, t, x, probes, *rows[:-1])
            return value, (probes * pushed).sum(-1).mean(0)

        return WithDivergence(_Attached(field, with_estimate), (*rows, self.draw(x)))

    def draw(self, x: Tensor) -> Tensor:
        """Noise of shape (batch, probes, dim) and x's dtype and device."""
        batch, dim = x.shape
        if self.seed is None:
            return self._noise((batch, self.probes, dim), None).to(x)
        generator = torch.Generator().manual_seed(self.seed)
        shared = self._noise((1, self.probes, dim), generator)
        return shared.to(x).expand(batch, -1, -1)

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        if self.law == "gaussian":
            return torch.randn(shape, generator=generator)
        return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


def choose_divergence(divergence: str | Divergence, field: VectorField) -> Divergence:
    """The divergence of a name or itself; "auto" is the closed form where the field offers it,
    else exact tangents, in any dimension.
    """
    if not isinstance(divergence, str):
        if isinstance(divergence, type) or not callable(getattr(divergence, "attach", None)):
            raise InputError(
                "divergence must be a name or a divergence such as Hutchinson(probes=2), got "
                f"{divergence!r}"
            )
        return divergence
    if divergence == "auto":
        return ClosedForm() if isinstance(field, KnowsDivergence) else Tangents()
    named: dict[str, Divergence] = {
        "closed_form": ClosedForm(),
        "tangents": Tangents(),
        "hutchinson": Hutchinson(),
    }
    if divergence not in named:
        known = ", ".join(("auto", *named))
        raise InputError(f"unknown divergence {divergence!r}; known are {known}")
    return named[divergence]


def push(
    field: VectorField, t: Tensor, x: Tensor, tangents: Tensor, *rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(f, J·tangents) of shapes (batch, dim) and (k, batch, dim), for tangents of the latter.

    rows: what else the field takes of every row.
    """
    carry: Callable[..., tuple[Tensor, Tensor]] | None = getattr(field, "tangent", None)
    if callable(carry):
        return carry(t, x, tangents, *rows)

    _load_forward_mode()
    x = x.contiguous()  # an expanded row cannot carry tangents

    def along(tangent: Tensor) -> Any:
        return torch.func.jvp(lambda x: field(t, x, *rows), (x,), (tangent,))

    value_once: Any = (None, 0)  # the value is the same for all tangents
    along_all: Any = torch.func.vmap(along, out_dims=value_once, randomness="same")
    return along_all(tangents)


@cache
def _load_forward_mode() -> None:
    """Make torch load its rules of forward mode, which warns of torch's own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.neg, (torch.zeros(()),), (torch.zeros(()),))


class _Attached:
    """A field with its divergence that still owns the field's parameters."""

    def __init__(
        self,
        field: Any,
        call: Callable[..., tuple[Tensor, Tensor]],
        pull: Callable[..., Any] | None = None,
    ) -> None:
        self._field, self._call = field, call
        self.row_wise = is_row_wise(field)
        self.pull = pull  # of cotangents, by the field's own formula; see cnf.ode.field.Pulls

    def __call__(self, t: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(t, x, *tensors)

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._field.parameters() if isinstance(self._field, nn.Module) else ())


def _name(field: Any) -> str:
    return getattr(field, "__name__", type(field).__name__)
