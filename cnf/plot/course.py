"""A flow on its way from base to data: paths, fields and densities over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.array import brightest, relative, table, thin
from cnf.plot.paper import (
    DENSITY_MAP,
    INK,
    MODEL,
    QUIET,
    Extent,
    closed_frame,
    dots,
    legend,
    new_figure,
    open_frame,
)

MARGIN = 0.05  # of the range of the points, around them
DRAWN_PATHS = 400  # more would be a cloud
PATH = "#8fb6dd"


def trajectory_figure(
    paths: ArrayLike, times: ArrayLike, names: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Points on their way from the base to the data: their first two columns, or one over time.

    paths: (times, n, dim); times: (times,); names: of the columns, or x1, x2.

    >>> trajectory_figure(np.zeros((3, 4, 2)), [0, 0.5, 1]).axes[0].get_xlabel()
    'x1'
    """
    points, moments = _paths(paths, times)
    points = points[:, :DRAWN_PATHS]
    labels = list(names) if names is not None else [f"x{i + 1}" for i in range(points.shape[2])]
    figure = new_figure(5.6, 5.2 if points.shape[2] > 1 else 4.0, title)
    axes = figure.subplots()
    open_frame(axes)
    if points.shape[2] == 1:
        clock = np.broadcast_to(moments[:, None, None], points.shape)
        points = np.concatenate([clock, points], axis=2)
        labels = ["t", *labels]
    lines = points[:, :, :2].transpose(1, 0, 2)
    axes.add_collection(LineCollection(list(lines), colors=PATH, linewidths=0.7, alpha=0.7))
    dots(axes, points[0], QUIET)
    dots(axes, points[-1], MODEL)
    axes.set_xlabel(labels[0], color=INK, fontsize=9)
    axes.set_ylabel(labels[1], color=INK, fontsize=9)
    legend(axes, [("base, t = 0", QUIET, "o"), ("data, t = 1", MODEL, "o")])
    return figure


def field_figure(
    times: ArrayLike,
    log_density_grids: ArrayLike,
    extent: Extent,
    velocities: ArrayLike,
    points: ArrayLike,
    title: str = "",
) -> Figure:
    """The density with the vector field over it, and the points, at several times side by side.

    times: (k,); log_density_grids: (k, rows, columns) in nats, the first row at the bottom;
    velocities: (k, rows, columns, 2), on a coarser grid over the same extent, cell by cell;
    points: (k, n, 2).
    """
    grids, arrows = np.asarray(log_density_grids, float), np.asarray(velocities, float)
    where, moments = _paths(points, times)
    if len(grids) != len(moments) or len(arrows) != len(moments):
        raise ValueError(
            f"{len(moments)} times, but {len(grids)} densities and {len(arrows)} fields"
        )
    figure = new_figure(2.4 * len(moments), 5.0, title)
    panels = figure.subplots(2, len(moments), squeeze=False)
    longest = np.quantile(np.linalg.norm(arrows, axis=-1), 0.98) or 1.0
    for k, moment in enumerate(moments):
        closed_frame(panels[0, k], f"t = {moment:g}", extent)
        draw_density(panels[0, k], grids[k], extent)
        _draw_arrows(panels[0, k], arrows[k] / longest, extent)
        closed_frame(panels[1, k], "", extent)
        dots(panels[1, k], thin(where[k]), MODEL)
    return figure


def draw_density(axes: Axes, log_density: np.ndarray, extent: Extent) -> None:
    """A density as ink: none is white; where it is not a number, grey."""
    density = relative(log_density)
    axes.imshow(
        density,
        origin="lower",
        extent=extent,
        cmap=DENSITY_MAP,
        vmin=0.0,
        vmax=1.2 * brightest(density),  # headroom: a flat density is blue, not black
        interpolation="bilinear",
        aspect="auto",
    )


def extent_of(paths: ArrayLike) -> Extent:
    """A square around all but the outermost points of all times, (times, n, 2)."""
    flat = np.asarray(paths, dtype=float).reshape(-1, 2)
    low, high = np.quantile(flat, [0.002, 0.998], axis=0)
    middle, half = (low + high) / 2, (0.5 + MARGIN) * (high - low).max() or 0.5
    return (
        float(middle[0] - half),
        float(middle[0] + half),
        float(middle[1] - half),
        float(middle[1] + half),
    )


def cell_centres(extent: Extent, cells: int) -> np.ndarray:
    """The centres of cells × cells cells of an extent, (cells · cells, 2), bottom row first."""
    left, right, bottom, top = extent
    steps = (np.arange(cells) + 0.5) / cells
    x, y = np.meshgrid(left + (right - left) * steps, bottom + (top - bottom) * steps)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _draw_arrows(axes: Axes, arrows: np.ndarray, extent: Extent) -> None:
    """Arrows of length ≤ 1 for most, each as long as its cell."""
    cells = len(arrows)
    where = cell_centres(extent, cells)
    u, v = arrows.reshape(-1, 2).T
    scale = cells / (extent[1] - extent[0])  # arrows a unit of the axes
    axes.quiver(
        where[:, 0], where[:, 1], u, v, color=INK, alpha=0.8, width=0.006, pivot="mid",
        angles="xy", scale_units="xy", scale=scale,
    )  # fmt: skip


def _paths(values: ArrayLike, times: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    points, moments = np.asarray(values, dtype=np.float64), np.ravel(np.asarray(times, float))
    if points.ndim != 3 or len(points) != len(moments):
        raise ValueError(
            f"points have shape {points.shape}, not ({len(moments)}, n, dim) for as many times"
        )
    table(points[0], "points")
    return points, moments
