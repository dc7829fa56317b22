"""A density in the plane."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.array import table, thin
from cnf.plot.course import draw_density
from cnf.plot.paper import DATA, MODEL, Extent, closed_frame, dots, new_figure


def density_figure(
    data: ArrayLike,
    log_density_grid: ArrayLike,
    extent: Extent,
    samples: ArrayLike,
    title: str = "",
) -> Figure:
    """Data, model density and samples side by side, with the same limits.

    data, samples: (n, 2) and (m, 2); log_density_grid: nats, (rows, columns), the first row at the
    bottom; extent: (left, right, bottom, top) of the grid.  Where the log-density is not a number
    the panel is grey; -inf is a density of zero.

    >>> import numpy as np
    >>> points = np.zeros((3, 2))
    >>> len(density_figure(points, np.zeros((4, 4)), (-1, 1, -1, 1), points).axes)
    3
    """
    figure = new_figure(9.6, 3.4, title)
    panels = np.atleast_1d(figure.subplots(1, 3))
    for axes, name in zip(panels, ("data", "model density", "samples"), strict=True):
        closed_frame(axes, name, extent)
    dots(panels[0], thin(table(data, "data", 2)), DATA)
    dots(panels[2], thin(table(samples, "samples", 2)), MODEL)

    draw_density(panels[1], np.asarray(log_density_grid, dtype=np.float64), extent)
    return figure
