"""A continuous normalizing flow: a density with an ODE between it and a simple base.

Time runs from t = 0, the base, to t = 1, the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf.data.rows import as_rows
from cnf.error import InputError, whole_number
from cnf.flow.continuous import Solver, move, move_with_logdet
from cnf.flow.divergence import Divergence, choose_divergence
from cnf.flow.marginals import Marginals
from cnf.flow.pilot import BANDWIDTHS, WIDTHS, Bandwidth, Shape
from cnf.flow.recipe import fit_flow
from cnf.flow.storage import damaged, fill, pack, read, write
from cnf.flow.transform import Whiten, standard_normal_log_prob
from cnf.nets.mlp import MLP, BilinearMLP
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.gradient.problem import Gradient
from cnf.ode.integrate import Stats
from cnf.ode.method import Method
from cnf.ode.tableau import Tableau
from cnf.training.loop import Progress
from cnf.training.seed import seeded

TO_BASE, TO_DATA = (1.0, 0.0), (0.0, 1.0)
CHUNK = 16_384  # rows solved together where no gradient ties them


@dataclass(frozen=True)
class Info:
    """How log-densities came about: evaluations of the field (the most of any chunk of rows), and
    the divergence that was used.
    """

    nfe: int
    divergence: str


class Flow(nn.Module):
    """A density over vectors of `dim` features; as a module, forward(x) is log_prob(x).

    hidden: widths of the default field, (128, 128) until the first fit, which tries others if none
    are given; bandwidth: (low, high), the angular frequencies of its first layer's sines per
    standard deviation, None for no sines, "auto" likewise for (0.5, 6) until the first fit;
    field: one's own f(t, x) → dx/dt instead, x (batch, dim), t 0-d or (batch,); base: a torch
    distribution over vectors, by default the standard normal; divergence: "auto" (the closed form
    where the field has one, else exact tangents), or a ClosedForm, Tangents or Hutchinson; whiten:
    whether `fit` puts the data's affine whitening inside the flow; marginals: "auto" lets it put a
    monotone map of every column before that where rows held out say so (skewed columns, columns
    with edges), None does not; method, step_size, rtol, atol, gradient: as for `solve`;
    logdet_atol: the tolerance of log-densities in nats per step; seed: of the initial weights.
    An untrained flow is the identity: its density is the base's.
    Source: Chen et al. 2018, section 4; Grathwohl et al. 2019.

    >>> flow = Flow(2, seed=0)
    >>> flow.log_prob(torch.zeros(1, 2)).tolist()  # −log 2π
    [-1.8378770351409912]
    >>> flow.sample(3, seed=0).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] | None = None,
        bandwidth: tuple[float, float] | str | None = "auto",
        field: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        base: Distribution | None = None,
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
        self._open_shape = (hidden is None, isinstance(bandwidth, str))
        self.shape = Shape(_checked_widths(hidden), _checked_bandwidth(bandwidth))
        self.whitens = whiten
        if marginals not in ("auto", None):
            raise InputError(f"marginals must be 'auto' or None, got {marginals!r}")
        self.maps_marginals = marginals is not None
        self.divergence = divergence
        adaptive = Adaptive(rtol, atol, quadrature_atol=logdet_atol)
        control = adaptive if step_size is None else FixedStep(step_size)
        self.solver = Solver(method, control, gradient)
        self.base = _checked_base(base, dim)
        self.marginals = Marginals(dim)
        self.whitening = Whiten(dim)
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

    def forward(self, x: Tensor) -> Tensor:
        return self.log_prob(x)

    @overload
    def log_prob(
        self, x: Any, *, return_info: Literal[False] = False, chunk: int = ...
    ) -> Tensor: ...
    @overload
    def log_prob(
        self, x: Any, *, return_info: Literal[True], chunk: int = ...
    ) -> tuple[Tensor, Info]: ...
    def log_prob(
        self, x: Any, *, return_info: bool = False, chunk: int = CHUNK
    ) -> Tensor | tuple[Tensor, Info]:
        """Log-density in nats, of shape (…) for x of shape (…, dim); differentiable.

        x: tensor, array or data frame; chunk: rows solved together; return_info: return
        (log_prob, Info).  Raises InputError for a wrong width or values that are not finite.
        """
        rows, shape = self._rows(x)
        divergence = self.chosen_divergence()
        parts, nfe = [], 0
        for x in self._chunks(rows, whole_number("chunk", chunk, 1)):
            solver = self.solver.for_rows(self.field, x)
            part, stats = self.log_prob_of_rows(x, divergence, solver)
            parts.append(part)
            nfe = max(nfe, stats.calls)
        log_prob = torch.cat(parts).reshape(shape)
        return (log_prob, Info(nfe, type(divergence).__name__)) if return_info else log_prob

    def log_prob_of_rows(
        self, x: Tensor, divergence: Divergence, solver: Solver
    ) -> tuple[Tensor, Stats]:
        """Log-density of rows (batch, dim) by a divergence and a solver, unchecked; the cost."""
        z, logdet = self.white(x)
        moved = move_with_logdet(self.field, divergence, z, TO_BASE, solver)
        log_prob = self._base_log_prob(moved.x) + moved.logdet + logdet
        return log_prob.to(x.dtype), moved.stats

    @overload
    def sample(
        self, n: int, *, return_log_prob: Literal[False] = False, seed: int | None = ...
    ) -> Tensor: ...
    @overload
    def sample(
        self, n: int, *, return_log_prob: Literal[True], seed: int | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    @torch.no_grad()
    def sample(
        self, n: int, *, return_log_prob: bool = False, seed: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """n draws of shape (n, dim), without gradients; with their log-densities if asked for.

        seed: the same draws every time; None draws from torch's generator.
        """
        if return_log_prob:
            return self.rsample(n, return_log_prob=True, seed=seed)
        return self.rsample(n, seed=seed)

    @overload
    def rsample(
        self, n: int, *, return_log_prob: Literal[False] = False, seed: int | None = ...
    ) -> Tensor: ...
    @overload
    def rsample(
        self, n: int, *, return_log_prob: Literal[True], seed: int | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    def rsample(
        self, n: int, *, return_log_prob: bool = False, seed: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """n draws of shape (n, dim), differentiable by the flow's parameters.

        With return_log_prob=True (draws, log-densities (n,)) from one solve.
        """
        z = self._draw_base(whole_number("n", n, 0), seed)
        parts = [self._decode(rows, return_log_prob) for rows in z.split(CHUNK)]
        x = torch.cat([part for part, _ in parts])
        if not return_log_prob:
            return x
        return x, torch.cat([log_prob for _, log_prob in parts])

    def encode(self, x: Any) -> Tensor:
        """The base's points, (…, dim), that the flow carries to x (…, dim)."""
        rows, shape = self._rows(x)
        parts = [
            move(self.field, self.white(part)[0], TO_BASE, self.solver.for_rows(self.field, part))
            for part in self._chunks(rows, CHUNK)
        ]
        return torch.cat(parts).reshape(*shape, self.dim)

    def decode(self, z: Any) -> Tensor:
        """The points x, (…, dim), to which the flow carries the base's z (…, dim)."""
        rows, shape = self._rows(z, "z")
        parts = [self._decode(part, False)[0] for part in self._chunks(rows, CHUNK, "z")]
        return torch.cat(parts).reshape(*shape, self.dim)

    def fit(
        self,
        x: Any,
        *,
        method: str = "auto",
        seconds: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        validation: float | Any = 0.1,
        callback: Callable[[Progress], None] | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> Self:
        """This flow, fitted to rows x of shape (rows, dim); a second fit goes on from here.

        method: "fm" (flow matching), "ml" (maximum likelihood), or "auto": the first as a warm
        start, then the second.  What is open of the default field is chosen first, by short trials
        that are judged on the validation rows.  seconds or steps: the budget, by default 50
        seconds; validation: a share of the rows, or rows of their own, on which the best weights
        are chosen; callback: is given a Progress record after every step; progress: a bar on
        stderr.
        Raises InputError for data that cannot be fitted; IntegrationError or TrainingError where
        training cannot go on.
        """
        fit_flow(
            self,
            x,
            method=method,
            seconds=seconds,
            steps=steps,
            seed=seed,
            lr=lr,
            batch_size=batch_size,
            validation=validation,
            callback=callback,
            device=device,
            progress=progress,
        )
        return self

    def whiten(self, x: Any) -> Self:
        """This flow with its maps set from data (rows, dim): the columns' own, if any are called
        for, then an affine one of full covariance, shrunk.
        """
        rows = as_rows(x, self.dim, dtype=self.dtype)
        if self.maps_marginals:
            self.marginals.fit(rows)
        self.whitening.fit(self.marginals(rows)[0])
        return self

    def white(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, (batch, dim), where the ODE ends: whitened; log |det| of that map, (batch,)."""
        y, logdet = self.marginals(x)
        return self.whitening(y), logdet + self.whitening.logdet()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings to one .safetensors file, atomically."""
        write(path, self, self.config)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        field: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        base: Distribution | None = None,
    ) -> Self:
        """The flow in a file that `save` wrote; no code of the file is run.

        field, base: one's own, where the saved flow had them.  Raises InputError for a file that
        is missing, damaged or of another kind.
        """
        settings, tensors = read(path)
        for name, own in (("field", field), ("base", base)):
            if (stored := settings.pop(f"own_{name}", None)) and own is None:
                raise InputError(
                    f"{path} was saved with a {name} of its own, {stored}; hand it in "
                    f"again: Flow.load(path, {name}=…)"
                )
        try:
            flow = cls(**settings, field=field, base=base)
            flow.to(tensors["whitening.mean"].dtype)
            flow.marginals.take_shapes(tensors, "marginals.")
        except InputError:
            raise  # a base= that does not fit, say
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(path) from error
        fill(flow, tensors, path)
        return flow

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the default field's hidden layers."""
        return self.shape.hidden

    @property
    def open_shape(self) -> tuple[bool, bool]:
        """Whether a fit may choose the widths, and the bandwidth: of an untrained field alone."""
        open_to_fit = any(self._open_shape) and not self.field.out.any()  # pyright: ignore
        return self._open_shape if open_to_fit else (False, False)

    def new_field(self, shape: Shape) -> MLP:
        """A default field of that shape, untrained, where the flow is and of its precision."""
        kind = BilinearMLP if len(shape.hidden) <= 2 else MLP
        field = kind(self.dim, shape.hidden, bandwidth=shape.bandwidth)
        return field.to(self.device, self.dtype)

    def take_field(self, field: nn.Module, shape: Shape) -> None:
        """Put another default field in the place of this one; its shape is then settled."""
        self.field, self.shape, self._open_shape = field, shape, (False, False)

    def chosen_divergence(self) -> Divergence:
        """The divergence in use: what "auto" stands for with this field."""
        return choose_divergence(self.divergence, self.field)

    @property
    def config(self) -> dict[str, Any]:
        """The settings that make this flow again, as JSON values."""
        control = self.solver.control
        adaptive = control if isinstance(control, Adaptive) else Adaptive()
        return {
            "dim": self.dim,
            "hidden": list(self.shape.hidden),
            "bandwidth": self.shape.bandwidth,
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
            "own_base": _name_of(self.base) if self.has_own_base else None,
        }

    @property
    def has_own_base(self) -> bool:
        return self.base is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.whitening.mean.dtype

    @property
    def device(self) -> torch.device:
        return self.whitening.mean.device

    def _decode(self, z: Tensor, with_log_prob: bool) -> tuple[Tensor, Tensor]:
        solver = self.solver.for_rows(self.field, z)
        if not with_log_prob:
            x = self._unwhite(move(self.field, z, TO_DATA, solver))
            return x, x.new_empty(0)
        moved = move_with_logdet(self.field, self.chosen_divergence(), z, TO_DATA, solver)
        x = self._unwhite(moved.x)
        log_prob = self._base_log_prob(z) - moved.logdet + self.white(x)[1]
        return x, log_prob.to(z.dtype)

    def _unwhite(self, z: Tensor) -> Tensor:
        return self.marginals.invert(self.whitening.invert(z))

    def _base_log_prob(self, z: Tensor) -> Tensor:
        if self.base is None or len(z) == 0:  # torch's Independent fails without rows
            return standard_normal_log_prob(z)
        return self.base.log_prob(z)

    def _draw_base(self, n: int, seed: int | None) -> Tensor:
        with seeded(seed, self.device):
            if self.base is None:
                return torch.randn(n, self.dim, dtype=self.dtype).to(self.device)
            drawn = self.base.rsample((n,)) if self.base.has_rsample else self.base.sample((n,))
            return drawn.to(self.device, self.dtype)

    def _rows(self, x: Any, name: str = "x") -> tuple[Any, torch.Size]:
        """x as checked rows (batch, dim), and the shape of what is said of each."""
        if isinstance(x, np.memmap) and x.ndim == 2 and x.shape[1] == self.dim:
            return x, torch.Size([len(x)])  # read chunk by chunk, and checked there
        if isinstance(x, list | tuple):
            with suppress(ValueError, TypeError, RuntimeError):  # ragged: as_rows says what of it
                x = np.asarray(x)
        shape = tuple(getattr(x, "shape", ()))
        if shape[-1:] != (self.dim,):
            rows = as_rows(x, self.dim, name=name, dtype=self.dtype, device=self.device)
            return rows, torch.Size([len(rows)])
        if len(shape) != 2:
            x = (x if isinstance(x, Tensor) else np.asarray(x)).reshape(-1, self.dim)
        if 0 in shape:
            empty = x if isinstance(x, Tensor) else torch.empty(0, self.dim)
            return empty.to(self.device, self.dtype), torch.Size(shape[:-1])
        rows = as_rows(x, self.dim, name=name, dtype=self.dtype, device=self.device)
        return rows, torch.Size(shape[:-1])

    def _chunks(self, rows: Any, size: int, name: str = "x") -> Iterator[Tensor]:
        """Consecutive rows, `size` at a time, as tensors of the flow's; one if there are none."""
        for start in range(0, max(len(rows), 1), size):
            part = rows[start : start + size]
            if isinstance(part, Tensor):
                yield part
            else:
                place = f"{name}[{start}:{start + len(part)}]"
                yield as_rows(part, self.dim, name=place, dtype=self.dtype, device=self.device)


def _name_of(value: Any) -> str:
    kind = type(value)
    return getattr(value, "__qualname__", f"{kind.__module__}.{kind.__qualname__}")


def _checked_widths(hidden: Sequence[int] | None) -> tuple[int, ...]:
    if hidden is None:
        return WIDTHS[0]
    try:
        widths = tuple(whole_number("each width in hidden", width, 1) for width in hidden)
    except TypeError:
        widths = ()
    if not widths:
        raise InputError(f"hidden must hold one width or more, such as (128, 128), got {hidden!r}")
    return widths


def _checked_bandwidth(bandwidth: Any) -> Bandwidth:
    if bandwidth is None:
        return None
    if bandwidth == "auto":
        return BANDWIDTHS[0]
    try:
        low, high = (float(value) for value in bandwidth)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise InputError(
            "bandwidth must be two angular frequencies 0 < low ≤ high such as (0.5, 6.0), None or "
            f"'auto', got {bandwidth!r}"
        )
    return low, high


def _checked_base(base: Distribution | None, dim: int) -> Distribution | None:
    if base is None:
        return None
    if not isinstance(base, Distribution):
        raise InputError(f"base must be a torch distribution, got {base!r}")
    if tuple(base.event_shape) != (dim,) or base.batch_shape:
        raise InputError(
            f"base must be one distribution over vectors of {dim}, event_shape ({dim},) and "
            f"batch_shape (), got {tuple(base.event_shape)} and {tuple(base.batch_shape)}; wrap it "
            "in torch.distributions.Independent"
        )
    return base
