"""The pictures of a run: what was learned, and how training went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.cli.folder import DENSITY, SAMPLES, TRAINING
from cnf.cli.source import Source
from cnf.flow.flow import Flow
from cnf.flow.report import Extent, grid_log_prob
from cnf.plot import (
    density_figure,
    digits_figure,
    line_figure,
    marginals_figure,
    save_figure,
    training_figure,
)
from cnf.training.loop import Progress

POINTS = 6000  # samples that are drawn
IMAGES = 64
CURVE = 500  # points of the density in one dimension
GRID = 200  # and on each side in two


@torch.no_grad()
def save_density(flow: Flow, source: Source, folder: Path) -> Path:
    """Draw data, samples and, in one or two dimensions, the density; the picture's path."""
    data, context = source.parts(_shown_rows(source))
    if context is not None:  # samples for the very contexts of the rows
        samples = _array(flow.sample(len(data), context, seed=0))
        figure = marginals_figure(data, samples, source.columns, source.name)
        return save_figure(figure, folder / DENSITY)
    samples = _samples(flow, IMAGES if source.shape else POINTS)
    if source.shape:
        figure = digits_figure(data[:IMAGES], samples, source.shape)
        return save_figure(figure, folder / SAMPLES)
    if flow.dim == 1:
        grid = np.linspace(*_limits(data[:, 0]), CURVE)
        density = _array(flow.log_prob(grid[:, None])).astype(float)
        figure = line_figure(grid, np.exp(density), data, samples, source.name)
    elif flow.dim == 2:
        extent = _extent(data, square=source.law is not None)
        figure = density_figure(data, *grid_log_prob(flow, extent, GRID), samples, source.name)
    else:
        figure = marginals_figure(data, samples, source.columns, source.name)
    return save_figure(figure, folder / DENSITY)


def save_training(
    history: Sequence[Progress], folder: Path, name: str, entropy: float | None
) -> Path:
    """Draw loss, validation and evaluations over the time of all phases; the picture's path."""
    scored = [
        (record.seconds, record.validation)
        for record in history
        if record.validation is not None and math.isfinite(record.validation)
    ]
    figure = training_figure(
        [record.seconds for record in history],
        [record.loss for record in history],
        [seconds for seconds, _ in scored],
        [score for _, score in scored],
        [math.nan if record.nfe is None else record.nfe for record in history],
        floor=entropy,
        phases=_phases(history),
        title=name,
    )
    return save_figure(figure, folder / TRAINING)


def _phases(history: Sequence[Progress]) -> list[tuple[float, str]]:
    """When each phase starts, and its name."""
    starts: dict[str, float] = {}
    for record in history:
        starts.setdefault(record.phase, record.seconds)
    names = {"pilot": "trials", "fm": "flow matching", "ml": "maximum likelihood"}
    return [(seconds, names[phase]) for phase, seconds in starts.items()]


def _shown_rows(source: Source) -> np.ndarray:
    """Held-out rows; where they are few, with rows that were trained on."""
    held_out = source.held_out[0].numpy()
    more = np.asarray(source.train[: max(0, POINTS - len(held_out))])
    return np.concatenate([held_out, more])


def _samples(flow: Flow, count: int) -> np.ndarray:
    return _array(flow.sample(count, seed=0))


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
