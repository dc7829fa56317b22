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


def images_figure(
    images: ArrayLike,
    shape: Sequence[int],
    columns: int,
    peak: float = 1.0,
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """One grid of images, with words beside its rows and above its columns.

    images, shape, columns, peak: see `image_grid`; rows, heads: a word for each row from the top
    and for each column from the left, "" for none.
    """
    grid = image_grid(images, shape, columns, peak)
    height, width = shape[-2:]
    gap = max(1, height // 14)
    down = (grid.shape[0] - gap) // (height + gap)
    figure = new_figure(0.5 * columns + (0.4 if rows else 0.0), 0.5 * down, title)
    axes = figure.subplots()
    axes.imshow(grid, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.xaxis.tick_top()
    axes.set_xticks([gap + i * (width + gap) + (width - 1) / 2 for i in range(len(heads))], heads)
    axes.set_yticks([gap + i * (height + gap) + (height - 1) / 2 for i in range(len(rows))], rows)
    return figure
