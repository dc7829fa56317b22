"""How training went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator
from numpy.typing import ArrayLike

from cnf.plot.array import finite, paired
from cnf.plot.paper import DATA, INK, MODEL, QUIET, legend, new_figure, open_frame


def training_figure(
    seconds: ArrayLike,
    loss: ArrayLike,
    validation_seconds: ArrayLike = (),
    validation: ArrayLike = (),
    nfe: ArrayLike = (),
    floor: float | None = None,
    phases: Sequence[tuple[float, str]] = (),
    title: str = "",
    score: str = "validation NLL (nats)",
) -> Figure:
    """Training loss, validation NLL and evaluations of the field, each over the time of training.

    seconds, loss, nfe: (n,), nfe NaN where none were counted; validation_seconds, validation:
    (k,), in nats, or in what `score` says; floor: the entropy of the data, which no NLL can beat;
    phases: the start and the name of each stretch of training.  A panel that has nothing to show is
    left out.
    """
    step, value = paired(seconds, loss, "loss")
    checked, nll = paired(validation_seconds, validation, "validation")
    names = ["training loss"]
    names += [score] if len(finite(nll)) else []
    names += ["field evaluations"] if len(finite(nfe)) else []
    figure = new_figure(max(3.6 * len(names), 4.4), 2.9, title)
    panels = _step_panels(figure, names)

    starts = [first for first, _ in phases]
    curve(panels["training loss"], step, value, starts, DATA)
    if axes := panels.get(score):
        _validation(axes, checked, nll, floor)
    if axes := panels.get("field evaluations"):
        curve(axes, *paired(seconds, nfe, "nfe"), starts, MODEL)
        axes.set_ylim(0.0, 1.06 * float(finite(nfe).max()))
    for axes in panels.values():
        _mark_phases(axes, step, phases, named=axes is panels["training loss"])
    return figure


def classifier_figure(
    seconds: ArrayLike,
    loss: ArrayLike,
    validation_seconds: ArrayLike,
    validation_error: ArrayLike,
    nfe: ArrayLike = (),
    nfe_backward: ArrayLike = (),
    title: str = "",
) -> Figure:
    """Training loss, validation error in percent and evaluations of the field over training.

    seconds, loss, nfe, nfe_backward: (n,), the counts NaN where there are none; validation_seconds,
    validation_error: (k,), the error as a share.  A panel that has nothing to show is left out.
    """
    step, value = paired(seconds, loss, "loss")
    checked, error = paired(validation_seconds, validation_error, "validation_error")
    names = ["training loss"]
    names += ["validation error (%)"] if len(finite(error)) else []
    names += ["field evaluations"] if len(finite(nfe)) else []
    figure = new_figure(max(3.6 * len(names), 4.4), 2.9, title)
    panels = _step_panels(figure, names)
    curve(panels["training loss"], step, value, (), DATA)
    if axes := panels.get("validation error (%)"):
        _validation(axes, checked, 100 * error, None)
        axes.set_yscale("log" if (finite(error) > 0).all() else "linear")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        axes.tick_params(which="minor", colors=QUIET, labelsize=7)
    if axes := panels.get("field evaluations"):
        counts = {"forward": (nfe, MODEL), "backward": (nfe_backward, DATA)}
        for counted, color in counts.values():
            if len(finite(counted)):
                curve(axes, *paired(seconds, counted, "nfe"), (), color)
        highest = max(float(finite(counted).max(initial=0.0)) for counted, _ in counts.values())
        axes.set_ylim(0.0, 1.06 * highest or 1.0)
        legend(axes, [(name, color, "-") for name, (_, color) in counts.items()])
    return figure


def _step_panels(figure: Figure, names: Sequence[str]) -> dict[str, Axes]:
    """Axes by name, side by side over the same steps."""
    row = np.atleast_1d(figure.subplots(1, len(names), sharex=True))
    for axes, name in zip(row, names, strict=True):
        open_frame(axes, name)
        axes.set_xlabel("seconds", color=QUIET, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    return dict(zip(names, row, strict=True))


def curve(
    axes: Axes, steps: np.ndarray, values: np.ndarray, starts: Sequence[float], color: str
) -> None:
    """Raw values faint, their moving mean strong; no mean crosses from one phase into the next."""
    for part in np.split(np.arange(len(steps)), np.searchsorted(steps, sorted(starts))):
        mean = _smooth(values[part], max(1, len(part) // 25)) if len(part) else values[part]
        axes.plot(steps[part], values[part], color=color, alpha=0.25, linewidth=0.7)
        axes.plot(steps[part], mean, color=color, linewidth=1.6)
    known = finite(values)
    if len(known) > 20:  # a first loss far above the rest would flatten it
        low, high = np.quantile(known, [0.0, 0.99])
        margin = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def _validation(axes: Axes, steps: np.ndarray, nll: np.ndarray, floor: float | None) -> None:
    axes.plot(steps, nll, color=MODEL, linewidth=1.6, marker="o", markersize=3)
    if floor is None:
        return
    axes.axhline(floor, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    lowest, highest = min(floor, finite(nll).min()), max(floor, finite(nll).max())
    reach = (highest - lowest) or 1.0
    axes.set_ylim(lowest - 0.14 * reach, highest + 0.06 * reach)  # room for the word below
    axes.annotate(
        f"entropy {floor:.3f}",
        (1.0, floor),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=INK,
    )


def _mark_phases(
    axes: Axes, steps: np.ndarray, phases: Sequence[tuple[float, str]], named: bool
) -> None:
    for first, name in phases:
        if len(steps) and first > steps[0]:
            axes.axvline(first, color="#c9ccd3", linewidth=0.8, zorder=0)
        if named:
            axes.annotate(
                name,
                (first, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -1),
                textcoords="offset points",
                va="top",
                fontsize=7.5,
                color=QUIET,
            )


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a centred window, of the finite values alone."""
    known = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
