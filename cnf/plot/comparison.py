"""Densities side by side: a row for each thing to learn, a column for each that learned it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.course import draw_density
from cnf.plot.paper import INK, QUIET, Extent, closed_frame, new_figure


def comparison_figure(
    log_density_grids: Sequence[Sequence[ArrayLike]],
    extent: Extent,
    columns: Sequence[str],
    rows: Sequence[str],
    captions: Sequence[Sequence[str]],
    title: str = "",
) -> Figure:
    """A table of densities, each with a caption below it.

    log_density_grids: for each row and column (cells, cells) in nats, the first row at the bottom;
    extent: of all of them; captions: for each row and column, "" for none.
    """
    grids = [[np.asarray(grid, dtype=np.float64) for grid in row] for row in log_density_grids]
    shape = (len(rows), len(columns))
    for name, found in (("grids", grids), ("captions", captions)):
        if (len(found), *{len(row) for row in found}) != shape:
            raise ValueError(f"{name} do not fill {shape[0]} rows of {shape[1]} columns")
    figure = new_figure(1.7 * shape[1] + 0.3, 1.85 * shape[0], title)
    panels = figure.subplots(*shape, squeeze=False)
    for i, name in enumerate(rows):
        for j, column in enumerate(columns):
            axes = panels[i, j]
            closed_frame(axes, column if i == 0 else "", extent)
            draw_density(axes, grids[i][j], extent)
            axes.set_xlabel(captions[i][j], fontsize=8, color=QUIET)
        panels[i, 0].set_ylabel(name, fontsize=10, color=INK)
    return figure


def histogram_log_density(points: ArrayLike, extent: Extent, cells: int) -> np.ndarray:
    """log of the share of points (n, 2) in each cell over its area, (cells, cells), the first row
    at the bottom; −inf where there are none.
    """
    x, y = np.asarray(points, dtype=np.float64).T
    left, right, bottom, top = extent
    counts, _, _ = np.histogram2d(y, x, cells, [[bottom, top], [left, right]])
    area = (right - left) * (top - bottom) / cells**2
    with np.errstate(divide="ignore"):
        return np.log(counts / (len(x) * area))
