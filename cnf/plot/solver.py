"""What a solver does and costs: its polygon, and error, time and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.paper import DATA, MODEL, QUIET, legend, new_figure, open_frame
from cnf.plot.training import curve


def polygon_figure(
    t: ArrayLike,
    exact: ArrayLike,
    polygons: Mapping[str, tuple[ArrayLike, ArrayLike]],
    errors: Mapping[str, Sequence[tuple[float, float]]],
    title: str = "",
) -> Figure:
    """A solution, the polygons of fixed steps beside it, and their errors over evaluations.

    t, exact: (n,); polygons: times and values at the ends of each method's steps; errors: pairs of
    evaluations and error at the end.
    """
    figure = new_figure(8.4, 3.2, title)
    left, right = figure.subplots(1, 2)
    open_frame(left)  # the legend takes the place of a title
    left.plot(t, exact, color=QUIET, linewidth=4.0, alpha=0.4)
    colors = dict(zip(polygons, _shades(len(polygons)), strict=True))
    for name, (times, values) in polygons.items():
        left.plot(times, values, color=colors[name], linewidth=1.3, marker="o", markersize=3)
    left.set_xlabel("t", color=QUIET, fontsize=9)
    open_frame(right, "error at the end")
    for name, pairs in errors.items():
        spent, error = np.asarray(pairs, dtype=np.float64).T
        right.loglog(spent, error, color=colors[name], linewidth=1.6, marker="o", markersize=3)
    right.set_xlabel("field evaluations", color=QUIET, fontsize=9)
    legend(left, [("exact", QUIET, "-"), *((name, colors[name], "-") for name in polygons)])
    return figure


def cost_figure(
    costs: Sequence[Mapping[str, float]],
    training: Sequence[tuple[float, float]],
    title: str = "",
) -> Figure:
    """Four panels over one ODE: error, time and backward evaluations against forward evaluations,
    and forward evaluations over training.

    costs: nfe, error, seconds and nfe_backward at each tolerance; training: pairs of step and nfe.
    """
    figure = new_figure(12.4, 3.0, title)
    panels = np.atleast_1d(figure.subplots(1, 4))
    spent = [one["nfe"] for one in costs]
    for axes, name, key in zip(
        panels, ("relative error", "seconds", "evaluations backward"),
        ("error", "seconds", "nfe_backward"), strict=False,
    ):  # fmt: skip
        open_frame(axes, name)
        axes.plot(spent, [one[key] for one in costs], color=MODEL, linewidth=1.4, marker="o",
                  markersize=4)  # fmt: skip
        axes.set_xlabel("evaluations forward", color=QUIET, fontsize=9)
        axes.set_ylim(bottom=0.0)
    panels[0].set_yscale("log")
    panels[2].plot([0, max(spent)], [0, max(spent)], color=QUIET, linewidth=0.8)
    open_frame(panels[3], "evaluations forward")
    if training:
        steps, counts = np.asarray(training, dtype=np.float64).T
        curve(panels[3], steps, counts, (), MODEL)
    panels[3].set_xlabel("step of training", color=QUIET, fontsize=9)
    return figure


def _shades(count: int) -> list[str]:
    """Colours from amber to indigo."""
    known = [DATA, "#57b3e4", MODEL, "#2e3260"]
    return known[:count] if count <= len(known) else (known * count)[:count]
