"""How well scores part outliers from data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.paper import DATA, INK, LEGEND, MODEL, QUIET, new_figure, open_frame

COLORS = (MODEL, DATA, INK, "#3f9b6c", "#8a5aa8")
Curve = tuple[ArrayLike, ArrayLike, float]  # shares of data and of outliers, and the area


def roc_figure(
    curves: Mapping[str, Mapping[str, Curve]], title: str = "", across: int = 4
) -> Figure:
    """A panel for each kind of outliers, and in it a curve for each score.

    curves: panel → score → (share of data that is taken for outliers, share of outliers that is
    found, area under the curve); across: panels in a row.
    """
    across = min(across, len(curves))
    down = -(-len(curves) // across)
    figure = new_figure(2.5 * across, 3.0 * down, title)
    places = np.atleast_1d(figure.subplots(down, across, sharex=True, sharey=True)).ravel()
    for axes, (name, scores) in zip(places, curves.items(), strict=False):
        open_frame(axes, name)
        axes.plot([0, 1], [0, 1], color="#c9ccd3", linewidth=0.8)
        for color, (score, (false, true, area)) in zip(COLORS, scores.items(), strict=False):
            label = f"{score} {area:.3f}"
            axes.plot(np.asarray(false), np.asarray(true), color=color, linewidth=1.6, label=label)
        axes.set_box_aspect(1)
        axes.legend(**(LEGEND | {"loc": "lower right", "fontsize": 7.5}))
        axes.set_xlabel("data taken for outliers", color=QUIET, fontsize=8)
    places[0].set_ylabel("outliers found", color=QUIET, fontsize=8)
    for axes in places[len(curves) :]:
        axes.set_axis_off()
    return figure
