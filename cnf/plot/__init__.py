"""Every figure, from plain arrays: what comes back is a matplotlib Figure, free of global state."""

from __future__ import annotations

from cnf.plot.animation import flow_frames, save_animation
from cnf.plot.comparison import comparison_figure, histogram_log_density
from cnf.plot.confusion import confusion_figure
from cnf.plot.course import cell_centres, extent_of, field_figure, trajectory_figure
from cnf.plot.density import density_figure
from cnf.plot.image import digits_figure, image_grid
from cnf.plot.marginal import line_figure, marginals_figure
from cnf.plot.paper import (
    DATA,
    DENSITY_MAP,
    INK,
    LEGEND,
    MODEL,
    QUIET,
    Extent,
    save_figure,
)
from cnf.plot.solver import adjoint_figure, cost_figure, polygon_figure
from cnf.plot.tradeoff import tradeoff_figure
from cnf.plot.training import classifier_figure, training_figure

__all__ = [
    "DATA",
    "DENSITY_MAP",
    "INK",
    "LEGEND",
    "MODEL",
    "QUIET",
    "Extent",
    "adjoint_figure",
    "cell_centres",
    "classifier_figure",
    "comparison_figure",
    "confusion_figure",
    "cost_figure",
    "density_figure",
    "digits_figure",
    "extent_of",
    "field_figure",
    "flow_frames",
    "histogram_log_density",
    "image_grid",
    "line_figure",
    "marginals_figure",
    "polygon_figure",
    "save_animation",
    "save_figure",
    "tradeoff_figure",
    "training_figure",
    "trajectory_figure",
]
