"""Invertible maps without an ODE."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnf.error import InputError

SMALLEST = 1e-8  # variance in any direction, of columns of unit variance


def refuse_constant(x: Tensor) -> None:
    """Raises InputError for the first column of (rows, dim) in which every row has one value."""
    wide = x.detach().double().cpu()
    mean, scale = wide.mean(0), wide.std(0, correction=0)
    flat = (scale <= 1e-12 * mean.abs().clamp_min(1e-300)).nonzero().flatten().tolist()
    if flat:
        raise InputError(
            f"column {flat[0]} is constant ({mean[flat[0]]:g}), so it has no density; drop it"
        )


class Whiten(nn.Module):
    """The affine map z = L⁻¹ (x − mean), so that data of covariance L Lᵀ becomes white.

    It starts as the identity; `fit` sets it from data.  x, z: (batch, dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("factor", torch.eye(dim))
        self.register_buffer("is_fitted", torch.tensor(False))
        self.is_fitted: Tensor
        self.mean: Tensor
        self.factor: Tensor

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the map from data of shape (rows, dim): full covariance, shrunk to the diagonal.

        Raises InputError for a constant column.  Source of the shrinkage: Ledoit & Wolf 2004.
        """
        data = x.detach().double().cpu().numpy()
        mean, scale = data.mean(0), data.std(0)
        refuse_constant(x)
        standard = (data - mean) / scale
        from sklearn.covariance import ledoit_wolf  # here: it takes longer than all of cnf

        correlation, _ = ledoit_wolf(standard, assume_centered=True)
        # columns that follow from each other, or two rows alone, leave a direction without spread
        short = max(0.0, SMALLEST - np.linalg.eigvalsh(correlation)[0])
        identity = np.eye(len(scale))
        lower = np.linalg.cholesky((correlation + short * identity) / (1 + short))
        factor = torch.from_numpy(scale[:, None] * lower).to(self.factor)
        if not torch.isfinite(1 / factor.diagonal()).all():
            raise InputError(
                f"a column's spread of {scale.min():g} is too small for {self.mean.dtype}; "
                "multiply it by a large number"
            )
        self.mean.copy_(torch.from_numpy(mean))
        self.factor.copy_(factor)
        self.is_fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        # solved, not multiplied by a stored inverse: `invert` then undoes it to rounding
        return torch.linalg.solve_triangular(self.factor.T, x - self.mean, upper=True, left=False)

    def invert(self, z: Tensor) -> Tensor:
        """x from z."""
        return z @ self.factor.T + self.mean

    def logdet(self) -> Tensor:
        """log |det dz/dx|, 0-d, in float64 where the device has it."""
        diagonal = self.factor.diagonal()
        wide = diagonal if diagonal.device.type == "mps" else diagonal.double()
        return -wide.log().sum()


class Support(nn.Module):
    """The map of a box, half-lines or lines onto the whole space, column by column.

    y = log((x − a)/(b − x)) between two ends, log(x − a) above one, −log(b − x) below one, and x
    where there is none; x, y: (batch, dim).
    low, high: a number or one for each column; −∞, ∞ or None for no end.
    """

    def __init__(self, dim: int, low: Any = -math.inf, high: Any = math.inf) -> None:
        super().__init__()
        self.low = _ends("low", low, dim, -math.inf)
        self.high = _ends("high", high, dim, math.inf)
        for i, (a, b) in enumerate(zip(self.low, self.high, strict=True)):
            if not a < b or a == math.inf or b == -math.inf:
                raise InputError(
                    f"support must have low < high in every column, got {a:g} and {b:g} in "
                    f"column {i}"
                )
        ends = list(zip(map(math.isfinite, self.low), map(math.isfinite, self.high), strict=True))
        self._boxed, self._above, self._below = (
            [i for i, kind in enumerate(ends) if kind == wanted]
            for wanted in ((True, True), (True, False), (False, True))
        )

    @property
    def ends(self) -> list[list[float | None]] | None:
        """[low, high] as JSON values, with None for no end; None where there is none at all."""
        if self.is_everything:
            return None
        sides = (self.low, self.high)
        return [[end if math.isfinite(end) else None for end in side] for side in sides]

    @property
    def is_everything(self) -> bool:
        return not (self._boxed or self._above or self._below)

    def contains(self, x: Tensor) -> Tensor:
        """Whether each row of (…, dim) lies inside, ends excluded."""
        wide = _wide(x)
        low, high = self._tensors(wide)
        return ((wide > low) & (wide < high)).all(-1)

    def has_at_end(self, x: Tensor) -> Tensor:
        """Whether each row of (…, dim) has a value on an end, and none beyond one."""
        wide = _wide(x)
        low, high = self._tensors(wide)
        return ((wide >= low) & (wide <= high)).all(-1) & ~self.contains(x)

    def refuse_outside(self, x: Tensor, name: str = "x", first: int = 0) -> None:
        """Raises InputError for the first value of (rows, dim) that does not lie inside.

        first: the number of the first row, where x is a part of more.
        """
        if self.is_everything or bool(self.contains(x).all()):
            return
        low, high = self._tensors(_wide(x))
        row, column = ((_wide(x) <= low) | (_wide(x) >= high)).nonzero()[0].tolist()
        value = x[row, column].item()
        raise InputError(
            f"{name} has {value:g} in row {first + row}, column {column}, which is not "
            f"inside the support ({self.low[column]:g}, {self.high[column]:g}); drop the row, or "
            "give a wider support="
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log |det dy/dx| of shape (batch,)); −∞ for a row outside, with a y that is finite."""
        wide = _wide(x)
        if self.is_everything:
            return x, wide.new_zeros(len(x))
        inside = self.contains(x)
        wide = torch.where(inside[:, None], wide, self._middle(wide))
        above, below = (distance.log() for distance in self._distances(wide))
        y, slope = wide.clone(), torch.zeros_like(wide)
        both, low, high = self._boxed, self._above, self._below
        width = (wide.new_tensor(self.high) - wide.new_tensor(self.low))[both].log()
        y[:, both] = above[:, both] - below[:, both]
        slope[:, both] = width - above[:, both] - below[:, both]
        y[:, low], slope[:, low] = above[:, low], -above[:, low]
        y[:, high], slope[:, high] = -below[:, high], -below[:, high]
        return y.to(x.dtype), torch.where(inside, slope.sum(-1), -math.inf)

    def invert(self, y: Tensor) -> Tensor:
        """x from y, inside the ends even where rounding would reach them."""
        if self.is_everything:
            return y
        wide = _wide(y)
        low, high = self._tensors(wide)
        x = wide.clone()
        for columns, inner in (
            (self._boxed, lambda y, a, b: a * torch.sigmoid(-y) + b * torch.sigmoid(y)),
            (self._above, lambda y, a, b: a + y.exp()),
            (self._below, lambda y, a, b: b - (-y).exp()),
        ):
            if columns:
                x[:, columns] = inner(wide[:, columns], low[columns], high[columns])
        first, last = self._innermost(y)
        return torch.maximum(torch.minimum(x.to(y.dtype), last), first)

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The ends, (dim,) each, of that dtype and device."""
        return like.new_tensor(self.low), like.new_tensor(self.high)

    def _middle(self, like: Tensor) -> Tensor:
        """A point inside, (dim,)."""
        ends = zip(self.low, self.high, strict=True)
        return like.new_tensor([max(min(0.0, b - 1), a + 1) if math.isinf(b - a) else (a + b) / 2
                                for a, b in ends])  # fmt: skip

    def _distances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How far x is above the lower end and below the upper one; 1 where there is none."""
        low, high = self._tensors(x)
        largest = torch.finfo(x.dtype).max / 4  # for an end at infinity: no difference is infinite
        above = torch.where(torch.isinf(low), 1.0, x - low.clamp_min(-largest))
        return above, torch.where(torch.isinf(high), 1.0, high.clamp_max(largest) - x)

    def _innermost(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last number inside, (dim,) each, that the dtype can hold."""
        low, high = self._tensors(like)
        wide_low, wide_high = self._tensors(_wide(like))
        up, down = torch.full_like(low, math.inf), torch.full_like(low, -math.inf)
        first = torch.where(_wide(low) <= wide_low, torch.nextafter(low, up), low)
        last = torch.where(_wide(high) >= wide_high, torch.nextafter(high, down), high)
        most = torch.finfo(low.dtype).max  # infinity is no number either
        return first.clamp_min(-most), last.clamp_max(most)


def _ends(name: str, values: Any, dim: int, none: float) -> tuple[float, ...]:
    if values is None or isinstance(values, list | tuple):
        several = (values,) if values is None else values
        values = [none if value is None else value for value in several]
    try:
        ends = tuple(map(float, np.broadcast_to(np.asarray(values, dtype=float), (dim,))))
    except (TypeError, ValueError):
        ends = (math.nan,)
    if any(map(math.isnan, ends)):
        raise InputError(
            f"support must be (low, high), each a number or one for each of {dim} columns, with "
            f"inf for no end, got {name}={values!r}"
        )
    return ends


class Standardize(nn.Module):
    """c ↦ (c − mean)/scale, column by column; constant columns are only shifted.

    It starts as the identity; `fit` sets it from data.  c: (batch, columns).
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        self.mean: Tensor
        self.scale: Tensor

    @property
    def is_fitted(self) -> bool:
        """Whether it is not the identity any more."""
        return bool(self.mean.any() or (self.scale != 1.0).any())

    @torch.no_grad()
    def fit(self, c: Tensor) -> None:
        """Set the map from data of shape (rows, columns)."""
        wide = c.detach().double().cpu()
        mean, scale = wide.mean(0), wide.std(0, correction=0)
        flat = scale <= 1e-12 * mean.abs().clamp_min(1e-300)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(flat, 1.0, scale))

    def forward(self, c: Tensor) -> Tensor:
        return (c - self.mean) / self.scale


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of shape (batch,), for z (batch, dim)."""
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
