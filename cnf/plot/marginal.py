"""Columns one by one and in pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from cnf.plot.array import finite, limits_of, table, thin
from cnf.plot.paper import (
    DATA,
    DRAWN_POINTS,
    INK,
    MODEL,
    QUIET,
    dots,
    legend,
    new_figure,
    open_frame,
)


def line_figure(
    grid: ArrayLike, density: ArrayLike, data: ArrayLike, samples: ArrayLike, title: str = ""
) -> Figure:
    """The density of one variable as a curve, over histograms of data and samples.

    grid, density: (points,), the density itself and not its logarithm; data, samples: any shape,
    taken flat.
    """
    x, curve = np.ravel(np.asarray(grid)), np.ravel(np.asarray(density))
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    open_frame(axes, title)
    _histograms(axes, finite(data), finite(samples), (float(x.min()), float(x.max())))
    axes.plot(x, curve, color=MODEL, linewidth=1.8)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("density", color=QUIET, fontsize=9)
    legend(axes, [("data", DATA, "s"), ("samples", MODEL, "_"), ("model density", MODEL, "-")])
    return figure


def marginals_figure(
    data: ArrayLike, samples: ArrayLike, names: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Histograms and pairs of the first five columns, data and samples drawn over each other.

    data, samples: (n, dim) and (m, dim); names: of the columns, or x1, x2, …
    """
    real, drawn = table(data, "data"), table(samples, "samples")
    if real.shape[1] != drawn.shape[1]:
        raise ValueError(f"data has {real.shape[1]} columns, samples have {drawn.shape[1]}")
    shown = min(real.shape[1], 5)
    labels = list(names) if names is not None else [f"x{i + 1}" for i in range(shown)]
    if len(labels) < shown:
        raise ValueError(f"{len(labels)} names for {real.shape[1]} columns")
    limits = [limits_of(real[:, i], drawn[:, i]) for i in range(shown)]

    size = max(1.75 * shown, 4.0)
    figure = new_figure(size, size, title)
    grid = np.atleast_2d(figure.subplots(shown, shown, squeeze=False))
    for row in range(shown):
        for column in range(shown):
            axes = grid[row, column]
            if column > row:
                axes.set_visible(False)
                continue
            open_frame(axes)
            if column == row:
                _histograms(axes, finite(real[:, row]), finite(drawn[:, row]), limits[row])
                axes.spines["left"].set_visible(False)
                axes.set_yticks([])
            else:
                _overlay(axes, real[:, [column, row]], drawn[:, [column, row]])
                axes.set_ylim(limits[row])
            axes.set_xlim(limits[column])
            _label_outside(axes, row, column, shown, labels)
    figure.align_labels()
    place = figure if shown > 1 else grid[0, 0]
    legend(place, [("data", DATA, "o"), ("samples", MODEL, "o")])
    return figure


def _overlay(axes: Axes, data: np.ndarray, samples: np.ndarray) -> None:
    """Both clouds in one shuffled order, so that neither hides the other."""
    most = DRAWN_POINTS // 4
    first, second = thin(data, most), thin(samples, most)
    points = np.concatenate([first, second])
    colors = [DATA] * len(first) + [MODEL] * len(second)
    order = np.random.default_rng(0).permutation(len(points))
    dots(axes, points[order], [colors[i] for i in order])


def _histograms(
    axes: Axes, data: np.ndarray, samples: np.ndarray, limits: tuple[float, float]
) -> None:
    """Both on the same bins, as densities of all their values: what lies outside counts too."""
    fewest = min((len(values) for values in (data, samples) if len(values)), default=1)
    edges = np.linspace(*limits, int(np.clip(2.5 * fewest ** (1 / 3), 10, 50)) + 1)
    if len(data):
        axes.stairs(_heights(data, edges), edges, fill=True, color=DATA, alpha=0.4)
    if len(samples):
        outline = _heights(samples, edges)
        axes.stairs(outline, edges, baseline=None, color=MODEL, linewidth=1.2)
    axes.set_xlim(limits)
    axes.set_ylim(bottom=0.0)


def _heights(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, edges)[0] / (len(values) * np.diff(edges))


def _label_outside(axes: Axes, row: int, column: int, shown: int, labels: Sequence[str]) -> None:
    if row == shown - 1:
        axes.set_xlabel(labels[column], color=INK, fontsize=9)
    else:
        axes.tick_params(labelbottom=False)
    if column == 0 and row > 0:
        axes.set_ylabel(labels[row], color=INK, fontsize=9)
    elif column > 0:
        axes.tick_params(labelleft=False)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    if column != row:
        axes.yaxis.set_major_locator(MaxNLocator(3))
