"""What evaluations of the field buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from cnf.plot.paper import DATA, INK, MODEL, QUIET, legend, new_figure


def tradeoff_figure(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    own: tuple[float, float, float],
    title: str = "",
) -> Figure:
    """Error against evaluations and against time, on log scales, a curve for each method.

    curves: by method's name (evaluations, error in nats, seconds) of each setting; own: the same of
    the flow's own solver, drawn as a dot.  An error of 0 is left out.
    """
    figure = new_figure(8.4, 3.4, title)
    panels = np.atleast_1d(figure.subplots(1, 2, sharey=True))
    colors = [QUIET, "#7fb3dd", MODEL, INK, "#8a6bb8", "#3f9c7a"]
    for axes, column, name in zip(panels, (0, 2), ("evaluations", "seconds"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.xaxis.label.set(color=QUIET, fontsize=9)
        for color, points in zip(cycle(colors), curves.values(), strict=False):
            shown = np.asarray([point for point in points if point[1] > 0]).reshape(-1, 3)
            axes.plot(shown[:, column], shown[:, 1], color=color, marker="o", markersize=3.5)
        if own[1] > 0:
            axes.plot(own[column], own[1], color=DATA, marker="o", markersize=8, linestyle="")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=QUIET, labelsize=8, width=0.8, length=3)
    panels[0].set_ylabel("error of log p (nats)", color=QUIET, fontsize=9)
    entries = [(name, color, "-") for name, color in zip(curves, cycle(colors), strict=False)]
    legend(panels[1], [*entries, ("the flow's own", DATA, "o")])
    return figure
