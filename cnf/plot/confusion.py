"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cnf.plot.paper import DENSITY_MAP, INK, QUIET, new_figure


def confusion_figure(
    confusion: ArrayLike, title: str = "", names: Sequence[str] | None = None
) -> Figure:
    """How often images of each class, a row, were given each class, a column.

    confusion: counts, (classes, classes); names: of the classes, or 0, 1, …
    What lies off the diagonal is shaded by its share of the row, the diagonal is not.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"confusion has shape {counts.shape}, not (classes, classes)")
    classes = len(counts)
    labels = list(names) if names is not None else [str(i) for i in range(classes)]
    wrong = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
    np.fill_diagonal(wrong, 0.0)
    figure = new_figure(0.42 * classes + 1.2, 0.42 * classes + 1.0, title)
    axes = figure.subplots()
    axes.imshow(wrong, cmap=DENSITY_MAP, vmin=0.0, vmax=1.6 * wrong.max() or 1.0)
    for row, column in np.argwhere(counts > 0).tolist():
        right = row == column
        axes.text(
            column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=7.5,
            color=QUIET if right else INK,
        )  # fmt: skip
    axes.set_xticks(range(classes), labels)
    axes.set_yticks(range(classes), labels)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.set_xlabel("classified as", color=QUIET, fontsize=9)
    axes.set_ylabel("class", color=QUIET, fontsize=9)
    axes.spines[:].set_visible(False)
    return figure
