"""Bits per dimension of images: a bound, how sure it is, and a tighter bound from several draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from cnf.flow.report import mean_and_error, measured

# (draw of the dequantization noise, draw of the trace's noise) → a bound on log P of each image
Bounds = Callable[[int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Bits:
    """Bits per dimension of images under a flow; both figures are upper bounds in the mean.

    value: the mean over images and draws of the dequantization noise, and float(bits);
    standard_error: its own, over images, draws and the trace's noise, of which image_error is that
    over images alone and draw_error, None of a single draw, the rest; per_image: the mean over
    draws, (images,), in float64; weighted: the importance-weighted bound of `draws` draws, None of
    a single one, with its own error.
    """

    value: float
    standard_error: float
    per_image: Tensor = field(repr=False)
    image_error: float
    draw_error: float | None
    weighted: float | None
    weighted_error: float | None
    draws: int

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, and how many images they are of."""
        named = {one.name: getattr(self, one.name) for one in fields(self)}
        del named["per_image"]
        return {**named, "images": len(self.per_image)}

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        figure, count = measured(self.value, self.standard_error), len(self.per_image)
        text = f"{figure}, an upper bound ({count:,} image{'s'[: count != 1]})"
        if self.weighted is None:
            return text
        weighted = measured(self.weighted, self.weighted_error)
        return f"{text}; {weighted} weighting {self.draws} draws, an upper bound too"


def measured_bits(bounds: Bounds, dim: int, draws: int = 1, exact: bool = False) -> Bits:
    """The bits per dimension of the images whose log-probability `bounds` bounds.

    bounds(i, j): for draws i of the dequantization noise and j of the trace's, (images,), in nats
    of whole-number pixels; dim: pixels of an image; exact: whether j does not matter.
    With several draws every pair of draw and image is evaluated twice, with the trace's noise anew,
    unless the trace is exact: see `weighted_bound`.
    """
    first = torch.stack([bounds(i, 2 * i).double().cpu() for i in range(draws)])
    if exact or draws == 1:
        return of_bounds(first, first, dim)
    second = torch.stack([bounds(i, 2 * i + 1).double().cpu() for i in range(draws)])
    return of_bounds(first, second, dim)


def of_bounds(first: Tensor, second: Tensor, dim: int) -> Bits:
    """The figures of bounds (draws, images) in nats, each evaluated twice."""
    bits = -(first + second) / (2 * dim * math.log(2))
    per_image = bits.mean(0)
    mean, over_images = mean_and_error(per_image)
    over_draws = weighted = weighted_error = None
    if len(bits) > 1:
        _, over_draws = mean_and_error(bits.mean(1))
        bound = weighted_bound(first, second)
        weighted, weighted_error = mean_and_error(-bound / (dim * math.log(2)))
        weighted_error = math.hypot(weighted_error, over_draws)
    return Bits(
        mean,
        math.hypot(over_images, over_draws or 0.0),
        per_image,
        over_images,
        over_draws,
        weighted,
        weighted_error,
        draws=len(bits),
    )


def weighted_bound(first: Tensor, second: Tensor) -> Tensor:
    """A lower bound on log mean exp of log-densities over draws, in the mean, (images,).

    first, second: two estimates of the log-densities, (draws, images), unbiased and independent, or
    twice the exact values, for which the bound is met.  The exponential of an estimate is biased
    upwards and would feign fewer bits.  So one estimate chooses weights w, and the other is
    averaged with them: for any weights Σ w log p + H(w) − log K is at most log (Σ p / K).
    Source: Burda et al. 2016, equation 8, for exact densities; Gibbs' inequality.
    """
    pairs = ((first, second), (second, first))
    return torch.stack([_gibbs(chosen, judged) for chosen, judged in pairs]).mean(0)


def _gibbs(chosen: Tensor, judged: Tensor) -> Tensor:
    log_weights = chosen.log_softmax(0)
    weights = log_weights.exp()
    return (weights * (judged - log_weights)).sum(0) - math.log(len(chosen))
