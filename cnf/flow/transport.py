"""A flow over vectors, on rows that need no checking: its parts and its maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf.error import InputError, checked_share, whole_number
from cnf.flow.base import LEARNED, LearnedBase, checked_base
from cnf.flow.batch import Kind
from cnf.flow.carrier import Carrier
from cnf.flow.continuous import Solver
from cnf.flow.divergence import Divergence
from cnf.flow.marginals import Marginals
from cnf.flow.pilot import WIDTHS, Shape
from cnf.flow.setting import checked_bandwidth, checked_widths, support_of
from cnf.flow.storage import pack
from cnf.flow.transform import Standardize, Whiten
from cnf.nets.mlp import MLP, BilinearMLP
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.gradient.problem import Gradient
from cnf.ode.method import Method
from cnf.ode.tableau import Tableau
from cnf.training.ranks import row_noise
from cnf.training.seed import seeded

OwnField = nn.Module | Callable[..., Tensor]


class Transport(Carrier):
    """The parts of a `Flow`, which says what its settings mean, and its maps of rows."""

    def __init__(
        self,
        dim: int,
        *,
        context: int = 0,
        context_dropout: float = 0.0,
        hidden: Sequence[int] | None = None,
        bandwidth: tuple[float, float] | str | None = "auto",
        field: OwnField | None = None,
        base: Distribution | LearnedBase | None = None,
        support: Any = None,
        divergence: str | Divergence = "auto",
        whiten: bool = True,
        marginals: str | None = "auto",
        method: str | Tableau | Method = "dopri5",
        step_size: float | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        logdet_atol: float = 1e-4,
        gradient: str | Gradient = "checkpoint",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = whole_number("dim", dim, 1)
        self.context = whole_number("context", context, 0)
        self.context_dropout = checked_share("context_dropout", context_dropout)
        self._open_shape = (hidden is None, isinstance(bandwidth, str))
        widths = WIDTHS[0] if hidden is None else checked_widths(hidden)
        self.shape = Shape(widths, checked_bandwidth(bandwidth))
        self.whitens = whiten
        if marginals not in ("auto", None):
            raise InputError(f"marginals must be 'auto' or None, got {marginals!r}")
        self.maps_marginals = marginals is not None
        self.divergence = divergence
        adaptive = Adaptive(rtol, atol, quadrature_atol=logdet_atol)
        control = adaptive if step_size is None else FixedStep(step_size)
        self.solver = Solver(method, control, gradient)
        self.base = checked_base(base, dim)
        self.marginals = Marginals(dim)
        self.whitening = Whiten(dim)
        self.support = support_of(support, dim)  # after tensors, whose memory a huge dim exceeds
        self.contexts = Standardize(self.context) if self.context else None
        if field is not None and not callable(field):
            raise InputError(f"field must be a function f(t, x) or a module, got {field!r}")
        self.has_own_field = field is not None
        if field is None:
            with seeded(seed, torch.get_default_device()):
                field = self.new_field(self.shape)
        else:
            self._open_shape = (False, False)
        self.field = field
        self.chosen_divergence()  # a name that does not exist is refused here

    # the maps ---------------------------------------------------------------------------------

    def white(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, (batch, dim), where the ODE ends: without edges, whitened; log |det| of that map."""
        inner, edges = self.support(x)
        y, logdet = self.marginals(inner)
        return self.whitening(y), edges + logdet + self.whitening.logdet()

    def unwhite(self, z: Tensor) -> Tensor:
        """x, (batch, dim), of what `white` made of it."""
        return self.support.invert(self.marginals.invert(self.whitening.invert(z)))

    # the field --------------------------------------------------------------------------------

    def told(self, context: Tensor | None, training: bool) -> Tensor | None:
        """Standardized contexts, and whether each is given where they can be withheld."""
        if context is None or self.contexts is None:
            return None
        told = self.contexts(context)
        if not self.context_dropout:
            return told
        given = torch.ones_like(told[:, :1])
        if training:
            kind = {"dtype": given.dtype, "device": given.device}
            chances = row_noise(len(given), lambda rows: torch.rand(rows, 1, **kind))
            given = (chances >= self.context_dropout).to(told.dtype)
        return torch.cat([told * given, given], 1)

    def told_nothing(self, told: Tensor) -> Tensor:
        return torch.zeros_like(told)

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the default field's hidden layers."""
        return self.shape.hidden

    @property
    def open_shape(self) -> tuple[bool, bool]:
        """Whether a fit may choose the widths, and the bandwidth: of an untrained field alone."""
        return (False, False) if self.is_trained else self._open_shape

    @property
    def is_trained(self) -> bool:
        """Whether the default field has learned anything; of one's own nobody can tell."""
        return not self.has_own_field and bool(self.field.out.any())  # pyright: ignore

    def new_field(self, shape: Shape) -> MLP:
        """A default field of that shape, untrained, where the flow is and of its precision."""
        kind = BilinearMLP if len(shape.hidden) <= 2 else MLP
        told = self.context + bool(self.context_dropout) if self.context else 0
        field = kind(self.dim, shape.hidden, bandwidth=shape.bandwidth, context=told)
        return field.to(self.device, self.dtype)

    def take_field(self, field: nn.Module, shape: Shape) -> None:
        """Put another default field in the place of this one; its shape is then settled."""
        self.field, self.shape, self._open_shape = field, shape, (False, False)

    def reopen_field(self, shape: Shape, open_shape: tuple[bool, bool]) -> None:
        """Put an untrained default field in the place of this one, of which so much is open."""
        self.take_field(self.new_field(shape), shape)
        self._open_shape = open_shape

    @property
    def config(self) -> dict[str, Any]:
        """The settings that make this flow again, as JSON values."""
        control = self.solver.control
        adaptive = control if isinstance(control, Adaptive) else Adaptive()
        return {
            "dim": self.dim,
            "context": self.context,
            "context_dropout": self.context_dropout,
            "hidden": list(self.shape.hidden),
            "bandwidth": self.shape.bandwidth,
            "base": pack("base", self.base) if type(self.base) in LEARNED.values() else None,
            "support": self.support.ends,
            "divergence": pack("divergence", self.divergence),
            "whiten": self.whitens,
            "marginals": "auto" if self.maps_marginals else None,
            "method": pack("method", self.solver.method),
            "step_size": control.step_size if isinstance(control, FixedStep) else None,
            "rtol": adaptive.rtol,
            "atol": adaptive.atol,
            "logdet_atol": adaptive.quadrature_atol,
            "gradient": pack("gradient", self.solver.gradient),
            "own_field": _name_of(self.field) if self.has_own_field else None,
            "own_base": (
                _name_of(self.base)
                if self.has_own_base and type(self.base) not in LEARNED.values()
                else None
            ),
        }

    @property
    def dtype(self) -> torch.dtype:
        return self.whitening.mean.dtype

    @property
    def device(self) -> torch.device:
        return self.whitening.mean.device

    @property
    def kind(self) -> Kind:
        """What rows are made to be before the flow takes them."""
        return Kind(self.dim, self.dtype, self.device)


def _name_of(value: Any) -> str:
    kind = type(value)
    return getattr(value, "__qualname__", f"{kind.__module__}.{kind.__qualname__}")
