"""What is done to pixels before an ODE: noise between whole numbers, and maps to the whole line.

Pixels are whole numbers 0 … levels − 1, kept as rows (batch, dim).  Dequantized, (k + u)/levels,
they are rows of the unit cube, in float64 where the device has it: a logit near an end wants it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnf.error import InputError
from cnf.training.ranks import row_noise

PRIOR = 0.5  # of a pixel, in every level
SLACK = 1e-3  # of a level, that scaled pixels may be off by rounding


# --- pixels ---------------------------------------------------------------------------------------


def as_pixels(images: Any, shape: Sequence[int], levels: int, name: str = "images") -> Tensor:
    """Images as rows of whole numbers 0 … levels − 1, uint8 or int32, (n, c·h·w), on their device.

    images: (n, c, h, w), or (n, h, w) for one channel, of whole numbers in an integer dtype or of
    floats 0 … 1 in steps of 1/(levels − 1).
    Raises InputError for any others: a float of 200 could be a level or an image left unscaled.
    """
    given = images if isinstance(images, Tensor) else _as_tensor(images, name)
    shape = tuple(shape)
    if tuple(given.shape[1:]) not in ((shape, shape[1:]) if shape[0] == 1 else (shape,)):
        raise InputError(
            f"{name} must be of shape (n, {', '.join(map(str, shape))}), got {tuple(given.shape)}; "
            "a single image goes in as images[None]"
        )
    if given.dtype == torch.bool or given.is_complex():
        raise InputError(
            f"{name} are of {given.dtype}; give whole numbers 0 … {levels - 1} or floats 0 … 1"
        )
    given = given.detach()
    if given.is_floating_point():
        given = _whole(given, levels, name)
    elif given.numel() and not 0 <= int(given.min()) <= int(given.max()) < levels:
        value = next(int(v) for v in (given.min(), given.max()) if not 0 <= int(v) < levels)
        raise InputError(
            f"{name} hold {value}, expected whole numbers 0 … {levels - 1}; give another levels="
        )
    return given.to(torch.uint8 if levels <= 256 else torch.int32).reshape(len(given), -1)


def _as_tensor(images: Any, name: str) -> Tensor:
    try:
        array = np.asarray(images)
        return torch.tensor(array.astype(np.int64) if array.dtype.kind == "u" else array)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} are a {type(images).__name__} that holds no numbers; give an array or tensor"
        ) from error


def _whole(given: Tensor, levels: int, name: str) -> Tensor:
    """Floats 0 … 1 as whole numbers."""
    scaled = given.double() if given.device.type != "mps" else given
    outside = ~((scaled >= 0) & (scaled <= 1))  # NaN is outside too
    if outside.any():
        value = scaled[outside].flatten()[0].item()
        raise InputError(
            f"{name} are floats and hold {value:g}: floats are read as 0 … 1; divide by "
            f"{levels - 1}, or give whole numbers in an integer dtype such as torch.uint8"
        )
    scaled = scaled * (levels - 1)
    between = (scaled - scaled.round()).abs() > max(
        SLACK, 8 * torch.finfo(given.dtype).eps * levels
    )
    if between.any():
        value = given[between].flatten()[0].item()
        raise InputError(
            f"{name} hold {value:g}, which is no multiple of 1/{levels - 1}: the noise of "
            "dequantization is added inside; give the pixels without any"
        )
    return scaled.round().long()


# --- noise ----------------------------------------------------------------------------------------


def dequantized(pixels: Tensor, noise: Tensor, levels: int) -> Tensor:
    """(pixels + noise)/levels, rows of the unit cube."""
    return (pixels.to(noise.dtype) + noise) / levels


def fresh_noise(pixels: Tensor) -> Tensor:
    """Noise uniform on [0, 1) from torch's generator, of the pixels' shape, as training wants."""
    kind = torch.float32 if pixels.device.type == "mps" else torch.float64

    def draw(rows: int) -> Tensor:
        return torch.rand(rows, *pixels.shape[1:], dtype=kind, device=pixels.device)

    return row_noise(len(pixels), draw)


def quantized(x: Tensor, levels: int) -> Tensor:
    """The whole numbers whose cells rows of the unit cube lie in, uint8 or int32."""
    kind = torch.uint8 if levels <= 256 else torch.int32
    return (x * levels).floor().clamp(0, levels - 1).to(kind)


# --- maps to the whole line -----------------------------------------------------------------------


class Logit(nn.Module):
    """y = (logit(α + (1 − 2α) x) − shift)/scale of rows x of the unit cube, (batch, dim).

    shift, scale: 0 and 1 until `fit`, numbers for all pixels.  α: 0 ≤ alpha < ½, how far the ends
    stay from infinity.  Source: Dinh et al. 2017, section 4.1.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        try:
            self.alpha = math.nan if isinstance(alpha, bool) else float(alpha)
        except (TypeError, ValueError):
            self.alpha = math.nan
        if not 0 <= self.alpha < 0.5:
            raise InputError(f"alpha must be a number from 0 to below 0.5, got {alpha!r}")
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("is_fitted", torch.tensor(False))
        self.shift: Tensor
        self.scale: Tensor
        self.is_fitted: Tensor

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set shift and scale from rows of the unit cube: mean 0 and deviation 1 over all of it."""
        deviation, mean = torch.std_mean(self._logit(x)[0])
        self.shift.copy_(mean)
        self.scale.copy_(deviation.clamp_min(1e-6))
        self.is_fitted.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log |det dy/dx| of shape (batch,))."""
        y, slope = self._logit(x)
        scale = self.scale.to(y.dtype)
        logdet = slope.sum(-1) - x.shape[-1] * scale.log()
        return (y - self.shift) / scale, logdet

    def invert(self, y: Tensor) -> Tensor:
        """x from y, in the unit cube."""
        s = torch.sigmoid(y * self.scale + self.shift)
        return ((s - self.alpha) / (1 - 2 * self.alpha)).clamp(0, 1)

    def _logit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the logit, the logarithm of its slope), pixel by pixel."""
        s = self.alpha + (1 - 2 * self.alpha) * x
        above, below = s.log(), torch.log1p(-s)
        return above - below, math.log1p(-2 * self.alpha) - above - below


class Equalize(nn.Module):
    """y = Φ⁻¹(F(x)) of rows x of the unit cube, (batch, dim), with F the law of all pixels pooled.

    F's density is constant in every level, so that dequantized pixels become normal, each by
    itself: what is left to a flow is how they depend on each other, and no edge between levels that
    are often taken and those that are not has to be learned.
    It is the identity of nothing until `fit`: `is_fitted` says whether there is a law.
    Source: histogram equalization, Gonzalez & Woods, to a normal law; for flows as in Sklar 1959.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("mass", torch.full((levels,), 1.0 / levels))
        self.register_buffer("is_fitted", torch.tensor(False))
        self.mass: Tensor
        self.is_fitted: Tensor

    @torch.no_grad()
    def fit(self, pixels: Tensor) -> None:
        """Set the law from pixels, whole numbers of any shape."""
        counts = torch.bincount(pixels.reshape(-1).long().cpu(), minlength=self.levels) + PRIOR
        self.mass.copy_(counts.double() / counts.sum())
        self.is_fitted.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log |det dy/dx| of shape (batch,))."""
        mass, below = self._law(x)
        scaled = x * self.levels
        level = scaled.floor().clamp(0, self.levels - 1).long()
        share = torch.addcmul(below[level], scaled - level, mass[level])
        smallest = torch.finfo(share.dtype).eps / 2
        y = torch.special.ndtri(share.clamp(smallest, 1 - smallest))
        slope = (self.levels * mass).log()[level] + 0.5 * y.square() + 0.5 * math.log(2 * math.pi)
        return y, slope.sum(-1)

    def invert(self, y: Tensor) -> Tensor:
        """x from y, in the unit cube."""
        share = torch.special.ndtr(y)
        mass, below = self._law(share)
        level = torch.searchsorted(below[1:-1].contiguous(), share, right=True)
        within = ((share - below[level]) / mass[level]).clamp(0, 1 - 1e-9)
        return (level + within) / self.levels

    def _law(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mass of every level, mass below it and all of it last), of that dtype and device."""
        mass = self.mass.to(like)
        mass = mass / mass.sum()
        return mass, torch.cat([mass.new_zeros(1), mass.cumsum(0)])
