"""Which images are unlike the data: scores made of log-densities, and what the scores are worth.

A density alone does not tell: smooth images may be more probable than any real one, where p is
high and there is hardly any volume.  So there are scores that look at both sides, or at how much
an image has to say.
"""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError


def typicality(log_prob: Tensor, reference: Tensor) -> Tensor:
    """How far log-densities (n,) are from the mean of those of the data, in standard deviations.

    reference: log-densities of images like those that the flow was fitted to, (m,), m of 2 or more.
    Too probable is as strange as too improbable.
    Source: Nalisnick et al. 2019, Detecting out-of-distribution inputs using typicality, section 3,
    with groups of one image.
    """
    if len(reference) < 2:
        raise InputError(f"reference has {len(reference)} log-densities; give at least 2")
    deviation, mean = torch.std_mean(reference.double())
    return (log_prob.double() - mean).abs() / deviation


def complexity(pixels: Tensor) -> Tensor:
    """Nats that a general compressor needs for each image, (n,); pixels: (n, …) of 0 … 255.

    zlib's deflate at its best level, over the image and over its differences along rows, whichever
    is shorter.  log p(x) + complexity(x) is a likelihood ratio between the flow and the compressor,
    which does not favour images that say little.
    Source: Serrà et al. 2020, Input complexity and out-of-distribution detection, equation 2.
    """
    images = pixels.detach().cpu().to(torch.uint8).numpy()
    lengths = [min(map(_length, (image, np.diff(image, axis=-1, prepend=0)))) for image in images]
    return torch.tensor(lengths, dtype=torch.float64) * (8 * math.log(2))


def _length(image: np.ndarray) -> int:
    return len(zlib.compress(image.astype(np.uint8).tobytes(), 9))


class Roc(NamedTuple):
    """How well a score parts outliers from data: the share of both that is above each threshold.

    false, true: of data and of outliers, from (0, 0) to (1, 1); area: under the curve, the
    probability that an outlier scores higher than an image of the data; error: its standard error.
    """

    false: Tensor
    true: Tensor
    area: float
    error: float


def roc(data: Tensor, outliers: Tensor) -> Roc:
    """The curve of scores of data (n,) and of outliers (m,), whose scores are to be higher.

    Ties count half.  Source: Hanley and McNeil 1982, equations 1 and 2.
    """
    for name, scores in (("data", data), ("outliers", outliers)):
        if not len(scores) or torch.isnan(scores).any():
            raise InputError(f"{name} must be scores that are numbers, one or more of them")
    data, outliers = data.double().sort().values, outliers.double().sort().values
    thresholds = torch.cat([data, outliers]).unique().flip(0)
    false, true = (_reached(one, thresholds) for one in (data, outliers))
    area = float(torch.trapezoid(true, false))
    return Roc(false, true, area, _area_error(area, len(data), len(outliers)))


def _reached(scores: Tensor, thresholds: Tensor) -> Tensor:
    """The share of sorted scores at or above each threshold, and above infinity."""
    return torch.cat(
        [scores.new_zeros(1), 1 - torch.searchsorted(scores, thresholds) / len(scores)]
    )


def _area_error(area: float, data: int, outliers: int) -> float:
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (outliers - 1) * (one - area**2) + (data - 1) * (two - area**2)
    return math.sqrt(max(0.0, spread) / (data * outliers))
