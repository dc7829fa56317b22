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
    training: Sequence[tuple[float, float, float]],
    title: str = "",
) -> Figure:
    """Four panels over one ODE: error, time and backward evaluations against forward evaluations,
    and evaluations over training.

    costs: nfe, error, seconds and nfe_backward at each tolerance; training: steps with their nfe
    and nfe_backward.
    """
    figure = new_figure(12.4, 3.0, title)
    panels = np.atleast_1d(figure.subplots(1, 4))
    spent = [one["nfe"] for one in costs]
    for axes, name, key in zip(
        panels, ("(a) relative error", "(b) seconds", "(c) evaluations backward"),
        ("error", "seconds", "nfe_backward"), strict=False,
    ):  # fmt: skip
        open_frame(axes, name)
        axes.plot(spent, [one[key] for one in costs], color=MODEL, linewidth=1.4, marker="o",
                  markersize=4)  # fmt: skip
        axes.set_xlabel("evaluations forward", color=QUIET, fontsize=9)
    panels[0].set_yscale("log")
    ends = np.array([0.0, max(spent)])
    for axes, key in ((panels[1], "seconds"), (panels[2], "nfe_backward")):
        axes.set_xlim(left=0.0)
        axes.set_ylim(bottom=0.0)
        each = 1.0 if key == "nfe_backward" else costs[-1][key] / costs[-1]["nfe"]
        axes.plot(ends, each * ends, color=QUIET, linewidth=0.8)
    panels[2].text(0.97 * ends[1], 0.97 * ends[1], "as many", color=QUIET, fontsize=8, ha="right")
    open_frame(panels[3], "(d) in training")
    if training:
        steps, forward, backward = np.asarray(training, dtype=np.float64).T
        curve(panels[3], steps, backward, (), DATA)
        curve(panels[3], steps, forward, (), MODEL)
        panels[3].set_ylim(0.0, 1.06 * max(forward.max(), backward.max()))
        legend(panels[3], [("forward", MODEL, "-"), ("backward", DATA, "-")], "lower right")
    panels[3].set_xlabel("step", color=QUIET, fontsize=9)
    return figure


def adjoint_figure(
    t: ArrayLike,
    a: ArrayLike,
    chains: Mapping[int, tuple[ArrayLike, ArrayLike]],
    rows: Sequence[Mapping[str, float]],
    title: str = "",
) -> Figure:
    """The adjoint along an ODE with the gradients of residual nets' layers on it, and how far
    gradients differ over the number of layers.

    t: (n,); a: (n, dim); chains: by the number of layers their times (layers + 1,) and gradients
    (layers + 1, dim); rows: layers, to_ode (the chain rule's distance to the ODE's adjoint) and
    adjoint (that of the adjoint with the same steps to the chain rule).
    """
    figure = new_figure(8.4, 3.2, title)
    left, right = figure.subplots(1, 2)
    open_frame(left)
    values = np.asarray(a, dtype=np.float64)
    for component in values.T:
        left.plot(t, component, color=MODEL, linewidth=1.6)
    shades = dict(zip(chains, [DATA, "#2e3260"], strict=False))
    for layers, (times, gradients) in chains.items():
        for component in np.asarray(gradients, dtype=np.float64).T:
            size = 4.5 if layers < 10 else 3.0
            left.plot(times, component, color=shades[layers], linestyle="none", marker="o",
                      markersize=size)  # fmt: skip
    left.set_xlabel("t", color=QUIET, fontsize=9)
    named = [(f"{layers} layers", shades[layers], "o") for layers in chains]
    legend(left, [("a(t)", MODEL, "-"), *named])
    open_frame(right, "relative difference of ∂L/∂z(0)")
    counts = [row["layers"] for row in rows]
    for key, color in (("to_ode", DATA), ("adjoint", MODEL)):
        right.loglog(counts, [row[key] for row in rows], color=color, linewidth=1.6, marker="o",
                     markersize=4)  # fmt: skip
    middle = rows[len(rows) // 2]
    for key, text, color, above in (
        ("adjoint", "adjoint by Euler, to the chain rule", MODEL, True),
        ("to_ode", "chain rule, to the ODE's a(0)", DATA, False),
    ):
        right.annotate(
            text, (middle["layers"], middle[key]), xytext=(6, 5) if above else (-6, -5),
            textcoords="offset points", color=color, fontsize=8,
            ha="left" if above else "right", va="bottom" if above else "top",
        )  # fmt: skip
    right.set_xlabel("layers", color=QUIET, fontsize=9)
    return figure


def _shades(count: int) -> list[str]:
    """Colours from amber to indigo."""
    known = [DATA, "#57b3e4", MODEL, "#2e3260"]
    return known[:count] if count <= len(known) else (known * count)[:count]
