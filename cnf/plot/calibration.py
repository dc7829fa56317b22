"""Whether draws are as wide as they must be: histograms of ranks, and coverage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.paper import MODEL, QUIET, new_figure, open_frame

BAND = 2.0  # standard errors, to each side


def calibration_figure(
    ranks: ArrayLike,
    density_ranks: ArrayLike,
    draws: int,
    names: Sequence[str],
    bins: int = 20,
    title: str = "",
) -> Figure:
    """Histograms of the truths' ranks, and how often regions of highest density hold the truth.

    ranks: (rows, quantities), whole numbers 0 … draws, of quantities with these names;
    density_ranks: (rows,), how many draws are less dense than the truth; bins: of the histograms, a
    divisor of draws + 1.  Bands are two standard errors of what chance does to right draws.
    """
    table, rising = np.asarray(ranks), np.asarray(density_ranks)
    if len(names) != table.shape[1]:
        raise ValueError(f"{len(names)} names for {table.shape[1]} quantities")
    if (draws + 1) % bins:
        raise ValueError(f"{bins} bins do not divide the {draws + 1} ranks evenly")
    columns = [*zip(table.T, names, strict=True), (rising, "density")]
    figure = new_figure(2.5 * (len(columns) + 1), 2.5, title)
    panels = np.atleast_1d(figure.subplots(1, len(columns) + 1))
    edges = np.arange(bins + 1) * ((draws + 1) // bins)
    for axes, (column, name) in zip(panels, columns, strict=False):
        open_frame(axes, name)
        _histogram(axes, column, edges)
    open_frame(panels[-1], "coverage less its level")
    _coverage(panels[-1], draws - rising, draws)
    return figure


def _histogram(axes: Axes, ranks: np.ndarray, edges: np.ndarray) -> None:
    share = 1 / (len(edges) - 1)
    expected, error = len(ranks) * share, np.sqrt(len(ranks) * share * (1 - share))
    axes.axhspan(expected - BAND * error, expected + BAND * error, color=QUIET, alpha=0.25, lw=0)
    axes.stairs(np.histogram(ranks, edges)[0], edges, color=MODEL, linewidth=1.4)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("rank of the truth", color=QUIET, fontsize=9)


def _coverage(axes: Axes, denser: np.ndarray, draws: int) -> None:
    """denser: how many draws are denser than the truth, (rows,)."""
    counts = np.arange(draws + 2)
    level = counts / (draws + 1)
    share = np.searchsorted(np.sort(denser), counts) / len(denser)
    error = BAND * np.sqrt(level * (1 - level) / len(denser))
    axes.fill_between(level, -error, error, color=QUIET, alpha=0.25, linewidth=0)
    axes.plot(level, share - level, color=MODEL, linewidth=1.4)
    axes.set_xlabel("level of the region", color=QUIET, fontsize=9)
