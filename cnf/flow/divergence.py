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
from torch.utils.checkpoint import checkpoint

from cnf.error import InputError, whole_number
from cnf.ode.field import is_row_wise
from cnf.training.ranks import row_noise

VectorField = Callable[..., Tensor]  # f(t, x, *rows) → dx/dt


class WithDivergence(NamedTuple):
    """field(t, x, *rows, *params) → (dx/dt, divergence), of shapes (batch, dim) and (batch,)."""

    field: Callable[..., tuple[Tensor, Any]]
    rows: tuple[Tensor, ...] = ()
    params: tuple[Tensor, ...] = ()


class Divergence(Protocol):
    """A way to get tr ∂f/∂x along the path; one that pushes tangents offers `attach_with_norm` too,
    whose field returns (dx/dt, (divergence, ‖∂f/∂x‖²_F)) from the same pass.
    """

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
        attached = Attached(field, field.with_divergence, pull)
        return WithDivergence(attached, rows, field.prepare())


@dataclass(frozen=True)
class Tangents:
    """The exact trace by forward mode: dim tangents carried beside x, layer by layer where the
    field can, else by torch.func.jvp.  Work grows with dim, memory does not.

    chunk: tangents of every row that are carried at once, by default as many as make TANGENTS in
    the whole batch.  Where they are not all, the field is evaluated once for each chunk, and once
    more in backward.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            object.__setattr__(self, "chunk", whole_number("chunk", self.chunk, 1))

    def attach(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        def with_trace(t: Tensor, x: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
            value, (trace,) = self._summed(_traces, field, t, x, rows)
            return value, trace

        return WithDivergence(Attached(field, with_trace), rows)

    def attach_with_norm(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        """The same with the squared Frobenius norm of the Jacobian, exact as well."""

        def with_norm(t: Tensor, x: Tensor, *rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return self._summed(_traces_and_squares, field, t, x, rows)

        return WithDivergence(Attached(field, with_norm), rows)

    def _summed(
        self,
        contract: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        field: VectorField,
        t: Tensor,
        x: Tensor,
        rows: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(f, sums over the basis of what `contract` makes of tangents and what they became)."""
        batch, dim = x.shape
        chunk = min(self.chunk or max(1, TANGENTS // max(batch, 1)), dim)
        basis = torch.eye(dim, dtype=x.dtype, device=x.device)[:, None]

        def part(basis: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            t, x, *rows = tensors
            tangents = basis.expand(-1, len(x), -1)
            value, pushed = push(field, t, x, tangents, *rows)
            return value, *contract(tangents, pushed)

        if chunk == dim:
            value, *sums = part(basis, t, x, *rows)
            return value, tuple(sums)
        parts = [_without_graph(part, some, t, x, *rows) for some in basis.split(chunk)]
        sums = (torch.stack(terms).sum(0) for terms in list(zip(*parts, strict=True))[1:])
        return parts[0][0], tuple(sums)


TANGENTS = 2**17  # carried at once: 64 MB of a layer of 128 units in single precision


def _traces(tangents: Tensor, pushed: Tensor) -> tuple[Tensor, ...]:
    """Sums of εᵀ J ε over tangents ε, (batch,)."""
    return (torch.einsum("kbi,kbi->b", tangents, pushed),)


def _traces_and_squares(tangents: Tensor, pushed: Tensor) -> tuple[Tensor, ...]:
    """The same, and sums of ‖J ε‖²."""
    return *_traces(tangents, pushed), pushed.square().sum((0, -1))


def _without_graph(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """What the function returns, evaluated again in backward rather than kept."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False)


LAWS = ("rademacher", "gaussian", "hadamard", "orthogonal")


@dataclass(frozen=True)
class Hutchinson:
    """An unbiased estimate of the trace, mean over probes of εᵀ J ε, with ε drawn once per solve.

    probes: ≥ 1; seed: an integer draws one ε shared by all rows, the same in every solve, so that a
    row's result does not depend on its place; None draws a new ε for every row and solve from
    torch's generator, as training wants.
    law: of the probes.  Independent ones are "rademacher" (the smaller variance) or "gaussian".
    Those of "hadamard" are orthogonal: rows of a Hadamard matrix of order n, the first power of two
    ≥ dim, with random signs for the columns; the variance is that of Rademacher's times
    (n − probes) / (n − 1), and n probes are exact.  "orthogonal" draws them from all orthonormal
    systems, which is exact at probes = dim.
    Source: Hutchinson 1990; Grathwohl et al. 2019, equation 7.
    """

    probes: int = 1
    law: str = "rademacher"
    seed: int | None = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", whole_number("probes", self.probes, 1))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole_number("seed", self.seed, 0))
        if self.law not in LAWS:
            raise InputError(f"law must be one of {', '.join(LAWS)}, got {self.law!r}")

    def attach(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        def with_estimate(t: Tensor, x: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
            value, (trace,) = self._mean(_traces, field, t, x, *rows)
            return value, trace

        return WithDivergence(Attached(field, with_estimate), (*rows, self.draw(x)))

    def attach_with_norm(self, field: VectorField, x: Tensor, *rows: Tensor) -> WithDivergence:
        """The same with an unbiased estimate of the squared Frobenius norm, mean of ‖J ε‖²."""

        def with_norm(t: Tensor, x: Tensor, *rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return self._mean(_traces_and_squares, field, t, x, *rows)

        return WithDivergence(Attached(field, with_norm), (*rows, self.draw(x)))

    def _mean(
        self,
        contract: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        field: VectorField,
        t: Tensor,
        x: Tensor,
        *rows: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(f, means over the probes, the last of the rows, of what `contract` makes of them)."""
        probes = rows[-1].transpose(0, 1)
        value, pushed = push(field, t, x, probes, *rows[:-1])
        return value, tuple(total / len(probes) for total in contract(probes, pushed))

    def draw(self, x: Tensor) -> Tensor:
        """Noise of shape (batch, probes, dim) and x's dtype and device."""
        batch, dim = x.shape
        if self.seed is None:
            return row_noise(batch, lambda rows: self._noise((rows, self.probes, dim), None)).to(x)
        generator = torch.Generator().manual_seed(self.seed)
        shared = self._noise((1, self.probes, dim), generator)
        return shared.to(x).expand(batch, -1, -1)

    def _noise(self, shape: tuple[int, int, int], generator: torch.Generator | None) -> Tensor:
        batch, probes, dim = shape
        if self.law == "gaussian":
            return torch.randn(shape, generator=generator)
        if self.law == "orthogonal":
            self._check_count(dim, f"orthogonal probes fill {dim} dimensions")
            return _orthogonal(shape, generator)
        if self.law == "rademacher":
            return _signs(shape, generator)
        order = 1 << (dim - 1).bit_length()
        self._check_count(order, f"a Hadamard matrix for {dim} dimensions has {order} rows")
        chosen = torch.rand(batch, order, generator=generator).argsort(1)[:, :probes]
        return hadamard(order)[chosen][..., :dim] * _signs((batch, 1, dim), generator)

    def _check_count(self, most: int, reason: str) -> None:
        if self.probes > most:
            raise InputError(
                f"probes={self.probes} is too many, since {reason}: with {most} the trace is exact"
            )


def _signs(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


def _orthogonal(shape: tuple[int, int, int], generator: torch.Generator | None) -> Tensor:
    """Orthogonal vectors of length √dim, uniform over all such systems, (batch, probes, dim)."""
    batch, probes, dim = shape
    # in double precision: the last bits of an orthonormal system are those of an exact trace
    drawn = torch.randn(batch, dim, probes, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(drawn)
    signs = triangle.diagonal(dim1=1, dim2=2).sign()  # else QR prefers some directions
    return (basis * signs[:, None]).transpose(1, 2) * dim**0.5


@cache
def hadamard(order: int) -> Tensor:
    """The Hadamard matrix of Sylvester, of ±1 and orthogonal rows; order: a power of two.

    >>> hadamard(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


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

    if torch.is_inference_mode_enabled() and not _maps_in_inference_mode():
        with torch.inference_mode(False), torch.no_grad():
            return push(field, *(x.clone() for x in (t, x, tangents, *rows)))
    value_once: Any = (None, 0)  # the value is the same for all tangents
    along_all: Any = torch.func.vmap(along, out_dims=value_once, randomness="same")
    return along_all(tangents)


@cache
def _load_forward_mode() -> None:
    """Make torch load its rules of forward mode, which warns of torch's own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.neg, (torch.zeros(()),), (torch.zeros(()),))


@cache
def _maps_in_inference_mode() -> bool:
    """Whether torch maps forward mode over tangents in inference mode; torch 2.6 does not."""
    x = torch.zeros(1)

    def along(tangent: Tensor) -> Any:
        return torch.func.jvp(torch.neg, (x,), (tangent,))

    try:
        torch.func.vmap(along)(x[None])
    except RuntimeError:
        return False
    return True


class Attached:
    """A field with its divergence that still owns the field's parameters."""

    def __init__(
        self,
        field: Any,
        call: Callable[..., tuple[Tensor, Any]],
        pull: Callable[..., Any] | None = None,
    ) -> None:
        self._field, self._call = field, call
        self.row_wise = is_row_wise(field)
        self.pull = pull  # of cotangents, by the field's own formula; see cnf.ode.field.Pulls

    def __call__(self, t: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Any]:
        return self._call(t, x, *tensors)

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._field.parameters() if isinstance(self._field, nn.Module) else ())


def _name(field: Any) -> str:
    return getattr(field, "__name__", type(field).__name__)
