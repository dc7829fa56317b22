"""The 1,797 handwritten 8 × 8 digits that come with scikit-learn, and bits per dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError

LEVELS = 17  # pixels are whole numbers 0 … 16
SHAPE = (8, 8)
SIZES = (1257, 270, 270)  # train, validation, test: 70, 15 and 15 percent of 1,797
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Digits:
    """Digits split into three parts.

    train, validation, test: pixels 0 … 16 as float32, shapes (1257, 64), (270, 64) and (270, 64),
    rows of the 8 × 8 image one after the other; *_labels: the digits 0 … 9 as int64, shape (n,).
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray
    validation_labels: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Digits:
    """scikit-learn's bundled digits, always split alike; nothing is downloaded.

    The rows are put in the order of `numpy.random.default_rng(0).permutation(1797)`; the first
    1,257 are for training, the next 270 for validation, the last 270 for the test.
    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test part.

    >>> load_digits().train.shape, load_digits().test_labels.shape
    ((1257, 64), (270,))
    """
    from sklearn import datasets  # a second, for those who want it

    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))
    parts = np.split(order, np.cumsum(SIZES)[:-1])
    return Digits(
        *(pixels[part].astype(np.float32) for part in parts),
        *(labels[part].astype(np.int64) for part in parts),
    )


def dequantize(
    pixels: Tensor | np.ndarray, generator: torch.Generator | None = None, levels: int = LEVELS
) -> Tensor:
    """(pixels + u) / levels with u uniform on [0, 1): values in [0, 1), the shape of pixels.

    pixels: whole numbers 0 … levels − 1, of any shape. generator: where u comes from, drawn on the
    generator's device, so that a seed gives the same u for pixels anywhere; None is torch's own.
    A flow's density of these values bounds the probability of the pixels from below.
    Raises InputError if pixels are not such whole numbers.
    Source: Theis et al. 2016, section 3.1.

    >>> noise = torch.Generator().manual_seed(0)
    >>> bool((17 * dequantize(torch.full((3,), 5.0), noise)).floor().eq(5).all())
    True
    """
    pixels = _checked_pixels(pixels, levels)
    source = torch.device("cpu") if generator is None else generator.device
    u = torch.rand(pixels.shape, generator=generator, device=source, dtype=pixels.dtype)
    below_one = 1 - torch.finfo(pixels.dtype).eps / 2  # 16 + 0.9999999 rounds to 17
    return ((pixels + u.to(pixels.device)) / levels).clamp(max=below_one)


def _checked_pixels(pixels: Tensor | np.ndarray, levels: int) -> Tensor:
    """As a floating tensor of whole numbers 0 … levels − 1."""
    try:  # torch.tensor copies: as_tensor warns of read-only arrays, such as a mapped file
        pixels = pixels if isinstance(pixels, Tensor) else torch.tensor(pixels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"pixels are a {type(pixels).__name__} that holds no numbers; pass an array or a tensor"
        ) from error
    if pixels.is_complex():
        raise InputError("pixels are complex; pass whole numbers")
    if not pixels.is_floating_point():
        pixels = pixels.to(torch.get_default_dtype())
    inside = (pixels == pixels.floor()) & (pixels >= 0) & (pixels < levels)  # false for NaN
    if not inside.all():
        value = pixels[~inside].flatten()[0].item()
        raise InputError(
            f"pixels hold the value {value:g}, expected whole numbers from 0 to "
            f"{levels - 1}; pass them before any scaling, or another levels="
        )
    return pixels


def bits_per_dim(log_prob: Tensor, dim: int, levels: int = 256) -> Tensor:
    """Negative log-likelihood in bits per dimension, shape (batch,).

    log_prob: nats, of data scaled to [0, 1], shape (batch,); dim: features; levels: quantization.
    Data left in 0 … levels has no log(levels) to add: pass levels=1.
    Raises InputError, a ValueError, if dim or levels < 1.  Source: Theis et al. 2016, section 3.1.

    The uniform density on the unit cube knows nothing, and pays log₂(levels):

    >>> bits_per_dim(torch.zeros(2), dim=64, levels=256)
    tensor([8., 8.])
    """
    if dim < 1 or levels < 1:
        raise InputError(
            f"dim is {dim} and levels is {levels}, both must be at least 1; pass the "
            "number of features and of values that a feature can take"
        )
    return -(log_prob / dim - math.log(levels)) / math.log(2)
