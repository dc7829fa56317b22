"""The pictures of a run: what was learned, and how training went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cnf.cli.folder import DENSITY, SAMPLES, TRAINING
from cnf.cli.source import Source
from cnf.error import InputError
from cnf.flow.budget import Tradeoff
from cnf.flow.course import log_density_at, paths, velocity_at
from cnf.flow.flow import Flow
from cnf.flow.report import Extent, Given, LearnedDensity, grid_log_prob
from cnf.plot import (
    cell_centres,
    density_figure,
    digits_figure,
    extent_of,
    field_figure,
    flow_frames,
    line_figure,
    marginals_figure,
    save_figure,
    tradeoff_figure,
    training_figure,
    trajectory_figure,
)
from cnf.training.loop import Progress

POINTS = 6000  # samples that are drawn
IMAGES = 64
PATHS, PATH_TIMES = 300, 60  # trajectories, and points of each
ARROWS, FIELD_GRID = 16, 100  # a side, of a field's picture
FRAMES, FRAME_GRID = 40, 64  # of an animation, and cells a side of its densities
CURVE = 500  # points of the density in one dimension
NLL = "validation NLL (nats)"
GRID = 200  # and on each side in two
INVISIBLE = 1e-6  # mass of 5 × 5 cells of it
NEAREST, LEAST_NEAREST = 0.05, 50  # of the rows, by their contexts, beside one context's density


def save_density(flow: Flow, source: Source, folder: Path) -> Path:
    """Draw data, samples and, in one or two dimensions, the density; the picture's path."""
    name = SAMPLES if source.shape else DENSITY
    return save_figure(density_picture(flow, source), folder / name)


def save_training(
    history: Sequence[Progress],
    folder: Path,
    name: str,
    entropy: float | None,
    score: str = NLL,
) -> Path:
    """Draw loss, validation and evaluations over the time of all phases; the picture's path."""
    return save_figure(training_picture(history, name, entropy, score), folder / TRAINING)


@torch.no_grad()
def density_picture(
    flow: Flow, source: Source, context: Tensor | None = None, given: str = "", seed: int = 0
) -> Figure:
    """The density beside data and samples in one or two dimensions, images beside images, and
    columns in pairs in any other.

    context: (columns,), of a conditional flow, whose data are then those of the nearest contexts;
    without one its samples are drawn for the contexts of the rows; given: the end of the title;
    seed: of the samples.
    """
    if source.shape or (source.context and context is None):
        return samples_picture(flow, source, seed)
    density: LearnedDensity = flow if context is None else Given(flow, context)
    data, samples = _rows_near(source, context), _samples(density, POINTS, seed)
    title = source.name + given
    if flow.dim > 2:
        return marginals_figure(data, samples, source.columns, title)
    if flow.dim == 1:
        grid = np.linspace(*_limits(data[:, 0]), CURVE)
        at = torch.from_numpy(grid[:, None]).to(flow.device, flow.dtype)
        curve = np.exp(_array(density.log_prob(at)).astype(float))
        return line_figure(grid, curve, data, samples, title)
    extent = _extent(data, square=source.law is not None)
    grid = grid_log_prob(density, extent, GRID, negligible=INVISIBLE)
    return density_figure(data, *grid, samples, title)


def samples_picture(flow: Flow, source: Source, seed: int = 0) -> Figure:
    """Data beside samples: images in a grid, other rows by their columns."""
    if not source.shape:
        return pairs_picture(flow, source, seed)
    return digits_figure(_shown_rows(source)[:IMAGES], _samples(flow, IMAGES, seed), source.shape)


def pairs_picture(flow: Flow, source: Source, seed: int = 0) -> Figure:
    """Histograms and pairs of columns, data and samples over each other."""
    data, context = source.parts(_shown_rows(source))
    if context is None:
        samples = _samples(flow, POINTS, seed)
    else:  # for the very contexts of the rows
        samples = _array(flow.sample(len(data), context, seed=seed))
    return marginals_figure(data, samples, source.columns, source.name)


@torch.no_grad()
def trajectories_picture(
    flow: Flow, columns: Sequence[str], name: str, seed: int = 0, context: Tensor | None = None
) -> Figure:
    """The paths of some points from the base to the data, given one context (columns,) if any."""
    times = np.linspace(0.0, 1.0, PATH_TIMES)
    found = paths(flow, flow.draw_base(PATHS, seed), times, context)
    return trajectory_figure(_array(found), times, columns, name)


@torch.no_grad()
def field_picture(flow: Flow, name: str, seed: int = 0, context: Tensor | None = None) -> Figure:
    """Density, field and points at several times, of a flow in the plane."""
    _check_plane(flow, "field")
    times = (0.0, 0.25, 0.5, 0.75, 1.0)
    points = _array(paths(flow, flow.draw_base(POINTS // 3, seed), times, context))
    extent = extent_of(points)
    densities = _densities(flow, times, extent, FIELD_GRID, context)
    at = torch.from_numpy(cell_centres(extent, ARROWS)).to(flow.device, flow.dtype)
    arrows = [_array(velocity_at(flow, at, t, context)).reshape(ARROWS, ARROWS, 2) for t in times]
    return field_figure(times, densities, extent, arrows, points, name)


@torch.no_grad()
def animation_frames(
    flow: Flow, name: str, seed: int = 0, context: Tensor | None = None
) -> list[np.ndarray]:
    """The points of the base on their way to the data, in the plane with their density."""
    if flow.dim < 2:
        raise InputError(
            "--what animation moves points in a plane, and the flow has one column; try "
            "--what trajectories"
        )
    times = np.linspace(0.0, 1.0, FRAMES)
    points = _array(paths(flow, flow.draw_base(POINTS // 3, seed), times, context))[..., :2]
    extent = extent_of(points)
    in_plane = flow.dim == 2
    densities = _densities(flow, times, extent, FRAME_GRID, context) if in_plane else None
    return flow_frames(times, points, extent, densities, name)


def _densities(
    flow: Flow, times: Iterable[float], extent: Extent, cells: int, context: Tensor | None
) -> list[np.ndarray]:
    at = torch.from_numpy(cell_centres(extent, cells)).to(flow.device, flow.dtype)
    found = (_array(log_density_at(flow, at, float(t), context)) for t in times)
    return [grid.astype(float).reshape(cells, cells) for grid in found]


def _check_plane(flow: Flow, what: str) -> None:
    if flow.dim != 2:
        raise InputError(
            f"--what {what} is for flows of two columns, and this one has {flow.dim}; try "
            "--what trajectories"
        )


def training_picture(
    history: Sequence[Progress], name: str, entropy: float | None, score: str = NLL
) -> Figure:
    """Loss, validation and evaluations of the field over the time of all phases.

    score: what validation is, and its unit.
    """
    scored = [
        (record.seconds, record.validation)
        for record in history
        if record.validation is not None and math.isfinite(record.validation)
    ]
    return training_figure(
        [record.seconds for record in history],
        [record.loss for record in history],
        [seconds for seconds, _ in scored],
        [score for _, score in scored],
        [math.nan if record.nfe is None else record.nfe for record in history],
        floor=entropy,
        phases=_phases(history),
        title=name,
        score=score,
    )


def tradeoff_picture(found: Tradeoff, name: str) -> Figure:
    """Error against evaluations and time, a curve for each method."""
    *budgets, own = found.settings
    curves = {
        method: [
            (one.nfe, one.log_prob_error, one.seconds) for one in budgets if one.method == method
        ]
        for method in dict.fromkeys(one.method for one in budgets)
    }
    return tradeoff_figure(curves, (own.nfe, own.log_prob_error, own.seconds), name)


def _phases(history: Sequence[Progress]) -> list[tuple[float, str]]:
    """When each phase starts, and its name."""
    starts: dict[str, float] = {}
    for record in history:
        starts.setdefault(record.phase, record.seconds)
    names = {"pilot": "trials", "fm": "flow matching", "ml": "maximum likelihood"}
    return [(seconds, names.get(phase, phase)) for phase, seconds in starts.items()]


def _shown_rows(source: Source) -> np.ndarray:
    """Held-out rows; where they are few, with rows that were trained on."""
    held_out = source.held_out[0].numpy()
    more = np.asarray(source.train[: max(0, POINTS - len(held_out))])
    return np.concatenate([held_out, more])


def _rows_near(source: Source, context: Tensor | None) -> np.ndarray:
    """Rows to show; given a context (columns,) those whose own are nearest to it, ties included."""
    rows, contexts = source.parts(_shown_rows(source))
    if context is None:
        return rows
    spread = contexts.std(0)
    away = (contexts - _array(context)) / np.where(spread > 0, spread, 1.0)
    distance = np.square(away).sum(1)
    count = min(len(rows), max(LEAST_NEAREST, round(NEAREST * len(rows))))
    return rows[distance <= np.sort(distance)[count - 1]]


def _samples(flow: LearnedDensity, count: int, seed: int = 0) -> np.ndarray:
    return _array(flow.sample(count, seed=seed))


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Where all but the outermost 0.2 % lie, with a margin."""
    low, high = np.quantile(values, [0.001, 0.999])
    margin = 0.1 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _extent(data: np.ndarray, square: bool) -> Extent:
    """The limits of both columns; square: with one scale for both."""
    (left, right), (bottom, top) = (_limits(column) for column in data.T)
    if square:
        half = max(right - left, top - bottom) / 2
        x, y = (left + right) / 2, (bottom + top) / 2
        left, right, bottom, top = x - half, x + half, y - half, y + half
    return left, right, bottom, top
