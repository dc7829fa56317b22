"""Every figure, from plain arrays: what comes back is a matplotlib Figure, free of global state.

Two colours throughout: amber is what was measured (data, training loss), blue what the model says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, MaxNLocator
from numpy.typing import ArrayLike

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
    figure = _figure(9.6, 3.4, title)
    panels = np.atleast_1d(figure.subplots(1, 3))
    for axes, name in zip(panels, ("data", "model density", "samples"), strict=True):
        _frame(axes, name, extent)
    _dots(panels[0], _thin(_table(data, "data", 2)), DATA)
    _dots(panels[2], _thin(_table(samples, "samples", 2)), MODEL)

    density = _relative(np.asarray(log_density_grid, dtype=np.float64))
    panels[1].imshow(
        density,
        origin="lower",
        extent=extent,
        cmap=DENSITY_MAP,
        vmin=0.0,
        vmax=1.2 * _brightest(density),  # headroom: a flat density is blue, not black
        interpolation="bilinear",
        aspect="auto",
    )
    return figure


def line_figure(
    grid: ArrayLike, density: ArrayLike, data: ArrayLike, samples: ArrayLike, title: str = ""
) -> Figure:
    """The density of one variable as a curve, over histograms of data and samples.

    grid, density: (points,), the density itself and not its logarithm; data, samples: any shape,
    taken flat.
    """
    x, curve = np.ravel(np.asarray(grid)), np.ravel(np.asarray(density))
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    _open_frame(axes, title)
    _histograms(axes, _finite(data), _finite(samples), (float(x.min()), float(x.max())))
    axes.plot(x, curve, color=MODEL, linewidth=1.8)
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("density", color=QUIET, fontsize=9)
    _legend(axes, [("data", DATA, "s"), ("samples", MODEL, "_"), ("model density", MODEL, "-")])
    return figure


def marginals_figure(
    data: ArrayLike, samples: ArrayLike, names: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Histograms and pairs of the first five columns, data and samples drawn over each other.

    data, samples: (n, dim) and (m, dim); names: of the columns, or x1, x2, …
    """
    real, drawn = _table(data, "data"), _table(samples, "samples")
    if real.shape[1] != drawn.shape[1]:
        raise ValueError(f"data has {real.shape[1]} columns, samples have {drawn.shape[1]}")
    shown = min(real.shape[1], 5)
    labels = list(names) if names is not None else [f"x{i + 1}" for i in range(shown)]
    if len(labels) < shown:
        raise ValueError(f"{len(labels)} names for {real.shape[1]} columns")
    limits = [_limits(real[:, i], drawn[:, i]) for i in range(shown)]

    size = max(1.75 * shown, 4.0)
    figure = _figure(size, size, title)
    grid = np.atleast_2d(figure.subplots(shown, shown, squeeze=False))
    for row in range(shown):
        for column in range(shown):
            axes = grid[row, column]
            if column > row:
                axes.set_visible(False)
                continue
            _open_frame(axes)
            if column == row:
                _histograms(axes, _finite(real[:, row]), _finite(drawn[:, row]), limits[row])
                axes.spines["left"].set_visible(False)
                axes.set_yticks([])
            else:
                _overlay(axes, real[:, [column, row]], drawn[:, [column, row]])
                axes.set_ylim(limits[row])
            axes.set_xlim(limits[column])
            _label_outside(axes, row, column, shown, labels)
    figure.align_labels()
    place = figure if shown > 1 else grid[0, 0]
    _legend(place, [("data", DATA, "o"), ("samples", MODEL, "o")])
    return figure


def training_figure(
    seconds: ArrayLike,
    loss: ArrayLike,
    validation_seconds: ArrayLike = (),
    validation: ArrayLike = (),
    nfe: ArrayLike = (),
    floor: float | None = None,
    phases: Sequence[tuple[float, str]] = (),
    title: str = "",
) -> Figure:
    """Training loss, validation NLL and evaluations of the field, each over the time of training.

    seconds, loss, nfe: (n,), nfe NaN where none were counted; validation_seconds, validation:
    (k,), in nats; floor: the entropy of the data, which no NLL can beat; phases: the start and the
    name of each stretch of training.  A panel that has nothing to show is left out.
    """
    step, value = _pair(seconds, loss, "loss")
    checked, nll = _pair(validation_seconds, validation, "validation")
    names = ["training loss"]
    names += ["validation NLL (nats)"] if len(_finite(nll)) else []
    names += ["field evaluations"] if len(_finite(nfe)) else []
    figure = _figure(max(3.6 * len(names), 4.4), 2.9, title)
    panels = _step_panels(figure, names)

    starts = [first for first, _ in phases]
    _curve(panels["training loss"], step, value, starts, DATA)
    if axes := panels.get("validation NLL (nats)"):
        _validation(axes, checked, nll, floor)
    if axes := panels.get("field evaluations"):
        _curve(axes, *_pair(seconds, nfe, "nfe"), starts, MODEL)
        axes.set_ylim(0.0, 1.06 * float(_finite(nfe).max()))
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
    step, value = _pair(seconds, loss, "loss")
    checked, error = _pair(validation_seconds, validation_error, "validation_error")
    names = ["training loss"]
    names += ["validation error (%)"] if len(_finite(error)) else []
    names += ["field evaluations"] if len(_finite(nfe)) else []
    figure = _figure(max(3.6 * len(names), 4.4), 2.9, title)
    panels = _step_panels(figure, names)
    _curve(panels["training loss"], step, value, (), DATA)
    if axes := panels.get("validation error (%)"):
        _validation(axes, checked, 100 * error, None)
        axes.set_yscale("log" if (_finite(error) > 0).all() else "linear")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        axes.tick_params(which="minor", colors=QUIET, labelsize=7)
    if axes := panels.get("field evaluations"):
        counts = {"forward": (nfe, MODEL), "backward": (nfe_backward, DATA)}
        for counted, color in counts.values():
            if len(_finite(counted)):
                _curve(axes, *_pair(seconds, counted, "nfe"), (), color)
        highest = max(float(_finite(counted).max(initial=0.0)) for counted, _ in counts.values())
        axes.set_ylim(0.0, 1.06 * highest or 1.0)
        _legend(axes, [(name, color, "-") for name, (_, color) in counts.items()])
    return figure


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
    figure = _figure(8.4, 3.2, title)
    left, right = figure.subplots(1, 2)
    _open_frame(left)  # the legend takes the place of a title
    left.plot(t, exact, color=QUIET, linewidth=4.0, alpha=0.4)
    colors = dict(zip(polygons, _shades(len(polygons)), strict=True))
    for name, (times, values) in polygons.items():
        left.plot(times, values, color=colors[name], linewidth=1.3, marker="o", markersize=3)
    left.set_xlabel("t", color=QUIET, fontsize=9)
    _open_frame(right, "error at the end")
    for name, pairs in errors.items():
        spent, error = np.asarray(pairs, dtype=np.float64).T
        right.loglog(spent, error, color=colors[name], linewidth=1.6, marker="o", markersize=3)
    right.set_xlabel("field evaluations", color=QUIET, fontsize=9)
    _legend(left, [("exact", QUIET, "-"), *((name, colors[name], "-") for name in polygons)])
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
    figure = _figure(12.4, 3.0, title)
    panels = np.atleast_1d(figure.subplots(1, 4))
    spent = [one["nfe"] for one in costs]
    for axes, name, key in zip(
        panels, ("relative error", "seconds", "evaluations backward"),
        ("error", "seconds", "nfe_backward"), strict=False,
    ):  # fmt: skip
        _open_frame(axes, name)
        axes.plot(spent, [one[key] for one in costs], color=MODEL, linewidth=1.4, marker="o",
                  markersize=4)  # fmt: skip
        axes.set_xlabel("evaluations forward", color=QUIET, fontsize=9)
        axes.set_ylim(bottom=0.0)
    panels[0].set_yscale("log")
    panels[2].plot([0, max(spent)], [0, max(spent)], color=QUIET, linewidth=0.8)
    _open_frame(panels[3], "evaluations forward")
    if training:
        steps, counts = np.asarray(training, dtype=np.float64).T
        _curve(panels[3], steps, counts, (), MODEL)
    panels[3].set_xlabel("step of training", color=QUIET, fontsize=9)
    return figure


def _shades(count: int) -> list[str]:
    """Colours from amber to indigo."""
    known = [DATA, "#57b3e4", MODEL, "#2e3260"]
    return known[:count] if count <= len(known) else (known * count)[:count]


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
    figure = _figure(0.42 * classes + 1.2, 0.42 * classes + 1.0, title)
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


def image_grid(
    images: ArrayLike, shape: Sequence[int], columns: int | None = None, peak: float = 1.0
) -> np.ndarray:
    """Images tiled into one, (height, width) or (height, width, 3), values in [0, 1].

    images: (n, ...) with the pixels of `shape` in any layout; shape: (height, width) or
    (channels, height, width) with 1 or 3 channels; columns: by default a square;
    peak: the value shown white.

    >>> image_grid(np.zeros((4, 64)), (8, 8)).shape
    (19, 19)
    """
    channels, height, width = (1, *shape) if len(shape) == 2 else tuple(shape)
    if channels not in (1, 3):
        raise ValueError(f"an image has 1 or 3 channels, not {channels}")
    pixels = np.asarray(images, dtype=np.float64).reshape(-1, channels, height, width)
    pixels = np.clip(np.nan_to_num(pixels, nan=0.0) / peak, 0.0, 1.0)
    across = columns or max(1, int(np.ceil(np.sqrt(len(pixels)))))
    down = max(1, -(-len(pixels) // across))

    gap = max(1, height // 14)
    tiled = np.ones((channels, down * (height + gap) + gap, across * (width + gap) + gap))
    for index, image in enumerate(pixels):
        top = gap + (index // across) * (height + gap)
        left = gap + (index % across) * (width + gap)
        tiled[:, top : top + height, left : left + width] = image
    return tiled[0] if channels == 1 else tiled.transpose(1, 2, 0)


def digits_figure(
    data: ArrayLike,
    samples: ArrayLike,
    shape: Sequence[int],
    columns: int | None = None,
    peak: float = 1.0,
    title: str = "",
) -> Figure:
    """A grid of data beside a grid of samples; the arguments are those of `image_grid`."""
    figure = _figure(8.0, 4.2, title)
    named = (("data", data), ("samples", samples))
    for axes, (name, images) in zip(np.atleast_1d(figure.subplots(1, 2)), named, strict=True):
        axes.imshow(
            image_grid(images, shape, columns, peak),
            cmap="gray",
            vmin=0.0,
            vmax=1.0,
            interpolation="nearest",
        )
        axes.set_axis_off()
        axes.set_title(name, fontsize=10, color=INK)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """The path of the picture, written whole or not at all; its suffix names the format."""
    target = Path(path)
    with replacing(target) as file:
        figure.savefig(file, format=target.suffix[1:] or "png", dpi=150)
    return target


# --- arrays ---------------------------------------------------------------------------------------


def _table(values: ArrayLike, name: str, columns: int | None = None) -> np.ndarray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or (columns is not None and table.shape[1] != columns):
        raise ValueError(f"{name} has shape {table.shape}, not (n, {columns or 'dim'})")
    return table


def _pair(x: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.ravel(np.asarray(x, float)), np.ravel(np.asarray(y, float))
    if len(first) != len(second):
        raise ValueError(f"{name} has {len(second)} values at {len(first)} steps")
    return first, second


def _finite(values: ArrayLike) -> np.ndarray:
    flat = np.ravel(np.asarray(values, dtype=np.float64))
    return flat[np.isfinite(flat)]


def _thin(points: np.ndarray, most: int = DRAWN_POINTS) -> np.ndarray:
    return points[:: -(-len(points) // most)] if len(points) > most else points


def _relative(log_density: np.ndarray) -> np.ndarray:
    """The density over its largest finite value: a flow that collapses must not overflow."""
    finite = _finite(log_density)
    return np.exp(log_density - (finite.max() if len(finite) else 0.0))


def _brightest(density: np.ndarray) -> float:
    """The density that 1 % of the mass exceeds, so that one spike does not blacken the rest."""
    ordered = np.sort(density[np.isfinite(density)])
    mass = np.cumsum(ordered)
    if not len(ordered) or not mass[-1] > 0.0:
        return 1.0
    return float(ordered[min(np.searchsorted(mass, 0.99 * mass[-1]), len(ordered) - 1)])


def _limits(data: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Where all but the outermost 0.2 % of data lie, with a margin; without data, of samples."""
    values = _finite(data) if len(_finite(data)) else _finite(samples)
    if not len(values):
        return -1.0, 1.0
    low, high = np.quantile(values, [0.001, 0.999])
    margin = 0.08 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a centred window, of the finite values alone."""
    known = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)


# --- marks on paper -------------------------------------------------------------------------------


def _figure(width: float, height: float, title: str = "") -> Figure:
    figure = Figure(figsize=(width, height + (0.3 if title else 0.0)), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.07, h_pad=0.07)
    if title:
        figure.suptitle(title, fontsize=12, color=INK, fontweight="bold")
    return figure


def _frame(axes: Axes, title: str, extent: Extent) -> None:
    axes.set_xlim(extent[0], extent[1])
    axes.set_ylim(extent[2], extent[3])
    axes.set_box_aspect(1)
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#c9ccd3", linewidth=0.8)


def _open_frame(axes: Axes, title: str = "") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#c9ccd3", linewidth=0.8)
    axes.tick_params(colors=QUIET, labelsize=8, width=0.8, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left")


def _dots(axes: Axes, points: np.ndarray, colors: str | list[str]) -> None:
    """Points of a size and opacity at which as many are still told apart."""
    crowd = min(max(len(points), 1) / DRAWN_POINTS, 1.0)
    size, alpha = 14.0 - 11.0 * crowd**0.3, 0.9 - 0.5 * crowd**0.5
    axes.scatter(points[:, 0], points[:, 1], s=size, c=colors, alpha=alpha, linewidths=0.0)


def _overlay(axes: Axes, data: np.ndarray, samples: np.ndarray) -> None:
    """Both clouds in one shuffled order, so that neither hides the other."""
    most = DRAWN_POINTS // 4
    first, second = _thin(data, most), _thin(samples, most)
    points = np.concatenate([first, second])
    colors = [DATA] * len(first) + [MODEL] * len(second)
    order = np.random.default_rng(0).permutation(len(points))
    _dots(axes, points[order], [colors[i] for i in order])


def _histograms(
    axes: Axes, data: np.ndarray, samples: np.ndarray, limits: tuple[float, float]
) -> None:
    """Both on the same bins, as densities of all their values: what lies outside counts too."""
    fewest = min((len(values) for values in (data, samples) if len(values)), default=1)
    edges = np.linspace(*limits, int(np.clip(2.5 * fewest ** (1 / 3), 10, 50)) + 1)
    if len(data):
        axes.stairs(_heights(data, edges), edges, fill=True, color=DATA, alpha=0.4)
    if len(samples):
        outline = _heights(samples, edges)
        axes.stairs(outline, edges, baseline=None, color=MODEL, linewidth=1.2)
    axes.set_xlim(limits)
    axes.set_ylim(bottom=0.0)


def _heights(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, edges)[0] / (len(values) * np.diff(edges))


def _label_outside(axes: Axes, row: int, column: int, shown: int, labels: Sequence[str]) -> None:
    if row == shown - 1:
        axes.set_xlabel(labels[column], color=INK, fontsize=9)
    else:
        axes.tick_params(labelbottom=False)
    if column == 0 and row > 0:
        axes.set_ylabel(labels[row], color=INK, fontsize=9)
    elif column > 0:
        axes.tick_params(labelleft=False)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    if column != row:
        axes.yaxis.set_major_locator(MaxNLocator(3))


def _legend(place: Axes | Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """Names beside marks: "o" a dot, "s" a patch, "_" an outline, "-" a line."""
    handles = []
    for name, color, mark in entries:
        line = Line2D([], [], color=color, label=name)
        line.set_linestyle("-" if mark in "-_" else "none")
        line.set_linewidth(1.8 if mark == "-" else 1.0)
        if mark in "os":
            line.set(marker=mark, markersize=5 if mark == "o" else 8)
            line.set(alpha=0.4 if mark == "s" else 1.0, markeredgewidth=0.0)
        handles.append(line)
    if isinstance(place, Figure):
        place.legend(handles=handles, loc="upper right", **LEGEND)
    else:  # above the axes: nothing drawn is covered
        above = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(handles)}
        place.legend(handles=handles, borderaxespad=0.2, columnspacing=1.2, **above, **LEGEND)


def _step_panels(figure: Figure, names: Sequence[str]) -> dict[str, Axes]:
    """Axes by name, side by side over the same steps."""
    row = np.atleast_1d(figure.subplots(1, len(names), sharex=True))
    for axes, name in zip(row, names, strict=True):
        _open_frame(axes, name)
        axes.set_xlabel("seconds", color=QUIET, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    return dict(zip(names, row, strict=True))


def _curve(
    axes: Axes, steps: np.ndarray, values: np.ndarray, starts: Sequence[float], color: str
) -> None:
    """Raw values faint, their moving mean strong; no mean crosses from one phase into the next."""
    for part in np.split(np.arange(len(steps)), np.searchsorted(steps, sorted(starts))):
        mean = _smooth(values[part], max(1, len(part) // 25)) if len(part) else values[part]
        axes.plot(steps[part], values[part], color=color, alpha=0.25, linewidth=0.7)
        axes.plot(steps[part], mean, color=color, linewidth=1.6)
    known = _finite(values)
    if len(known) > 20:  # a first loss far above the rest would flatten it
        low, high = np.quantile(known, [0.0, 0.99])
        margin = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def _validation(axes: Axes, steps: np.ndarray, nll: np.ndarray, floor: float | None) -> None:
    axes.plot(steps, nll, color=MODEL, linewidth=1.6, marker="o", markersize=3)
    if floor is None:
        return
    axes.axhline(floor, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    lowest, highest = min(floor, _finite(nll).min()), max(floor, _finite(nll).max())
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
