"""What all figures share: colours, frames, dots, legends, and how a figure becomes a file.

Two colours throughout: amber is what was measured (data, training loss), blue what the model says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cnf.replace import replacing

DATA = "#d9772b"
MODEL = "#226bb8"
INK = "#2b2f38"
QUIET = "#8a909c"
NOT_A_NUMBER = "#d4d6da"

# white to indigo in equal steps of OKLab lightness: no density is no ink
DENSITY_MAP = LinearSegmentedColormap.from_list(
    "cnf.density",
    [
        "#ffffff",
        "#cfe9f7",
        "#97d0ef",
        "#57b3e4",
        "#2391d2",
        "#2a6cb4",
        "#324d8c",
        "#2e3260",
        "#1d183e",
    ],
).with_extremes(bad=NOT_A_NUMBER)

LEGEND = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handletextpad": 0.5}
DRAWN_POINTS = 6000  # more would hide each other
Extent = tuple[float, float, float, float]


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of that size in inches, white, with its title above."""
    figure = Figure(figsize=(width, height + (0.3 if title else 0.0)), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.07, h_pad=0.07)
    if title:
        figure.suptitle(title, fontsize=12, color=INK, fontweight="bold")
    return figure


def closed_frame(axes: Axes, title: str, extent: Extent) -> None:
    """A square of the plane without ticks: a picture rather than a graph."""
    axes.set_xlim(extent[0], extent[1])
    axes.set_ylim(extent[2], extent[3])
    axes.set_box_aspect(1)
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#c9ccd3", linewidth=0.8)


def open_frame(axes: Axes, title: str = "") -> None:
    """A graph: ticks, few, at the left and below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#c9ccd3", linewidth=0.8)
    axes.tick_params(colors=QUIET, labelsize=8, width=0.8, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left")


def dots(axes: Axes, points: np.ndarray, colors: str | list[str]) -> None:
    """Points of a size and opacity at which as many are still told apart."""
    crowd = min(max(len(points), 1) / DRAWN_POINTS, 1.0)
    size, alpha = 14.0 - 11.0 * crowd**0.3, 0.9 - 0.5 * crowd**0.5
    axes.scatter(points[:, 0], points[:, 1], s=size, c=colors, alpha=alpha, linewidths=0.0)


def legend(
    place: Axes | Figure, entries: Sequence[tuple[str, str, str]], inside: str | None = None
) -> None:
    """Names beside marks: "o" a dot, "s" a patch, "_" an outline, "-" a line.

    inside: where in the axes nothing is drawn, such as "lower right"; None for above them.
    """
    handles = []
    for name, color, mark in entries:
        line = Line2D([], [], color=color, label=name)
        line.set_linestyle("-" if mark in "-_" else "none")
        line.set_linewidth(1.8 if mark == "-" else 1.0)
        if mark in "os":
            line.set(marker=mark, markersize=5 if mark == "o" else 8)
            line.set(alpha=0.4 if mark == "s" else 1.0, markeredgewidth=0.0)
        handles.append(line)
    where: dict[str, Any] = {"loc": inside}
    if isinstance(place, Figure):
        where = {"loc": "upper right"}
    elif inside is None:  # above the axes: nothing drawn is covered
        where = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(handles)}
        where |= {"borderaxespad": 0.2, "columnspacing": 1.2}
    place.legend(handles=handles, **where, **LEGEND)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """The path of the picture, written whole or not at all; its suffix names the format."""
    target = Path(path)
    with replacing(target) as file:
        figure.savefig(file, format=target.suffix[1:] or "png", dpi=150)
    return target
