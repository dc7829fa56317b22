"""Images in a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.paper import INK, new_figure


def image_grid(
    images: ArrayLike, shape: Sequence[int], columns: int | None = None, peak: float = 1.0
) -> np.ndarray:
    """Images tiled into one, (height, width) or (height, width, 3), values in [0, 1].

    images: (n, ...) with the pixels of `shape` in any layout; shape: (height, width) or
    (channels, height, width) with 1 or 3 channels; columns: by default a square;
    peak: the value shown white.

    >>> image_grid(np.zeros((4, 64)), (8, 8)).shape
    (19, 19)
    """
    channels, height, width = (1, *shape) if len(shape) == 2 else tuple(shape)
    if channels not in (1, 3):
        raise ValueError(f"an image has 1 or 3 channels, not {channels}")
    pixels = np.asarray(images, dtype=np.float64).reshape(-1, channels, height, width)
    pixels = np.clip(np.nan_to_num(pixels, nan=0.0) / peak, 0.0, 1.0)
    across = columns or max(1, int(np.ceil(np.sqrt(len(pixels)))))
    down = max(1, -(-len(pixels) // across))

    gap = max(1, height // 14)
    tiled = np.ones((channels, down * (height + gap) + gap, across * (width + gap) + gap))
    for index, image in enumerate(pixels):
        top = gap + (index // across) * (height + gap)
        left = gap + (index % across) * (width + gap)
        tiled[:, top : top + height, left : left + width] = image
    return tiled[0] if channels == 1 else tiled.transpose(1, 2, 0)


def digits_figure(
    data: ArrayLike,
    samples: ArrayLike,
    shape: Sequence[int],
    columns: int | None = None,
    peak: float = 1.0,
    title: str = "",
) -> Figure:
    """A grid of data beside a grid of samples; the arguments are those of `image_grid`."""
    figure = new_figure(8.0, 4.2, title)
    named = (("data", data), ("samples", samples))
    for axes, (name, images) in zip(np.atleast_1d(figure.subplots(1, 2)), named, strict=True):
        axes.imshow(
            image_grid(images, shape, columns, peak),
            cmap="gray",
            vmin=0.0,
            vmax=1.0,
            interpolation="nearest",
        )
        axes.set_axis_off()
        axes.set_title(name, fontsize=10, color=INK)
    return figure
