"""What a log-density is worth: its value on rows it has not seen, its mass, its map's error."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cnf.data.digits import bits_per_dim

Extent = tuple[float, float, float, float]  # left, right, bottom, top
MARGIN = 0.5  # of the range that holds 99.8 % of the points, on each side: 6 σ of a normal one
TAIL = 0.001
CELLS = 400  # a side, of a report's grid
FINER = 5  # cells a side into which a block is divided where the density is
NEGLIGIBLE = 1e-8  # mass of a block of cells that need not be divided
SAMPLES = 2000  # that say how far the density reaches
INFORMED = 1000  # rows whose integration error is measured, at the price of five log-densities


class Law(Protocol):
    """A density that is known."""

    def log_prob(self, value: Tensor) -> Tensor: ...
    def entropy(self) -> Tensor: ...


class LearnedDensity(Protocol):
    """What is judged, such as a `Flow`."""

    dim: int

    @property
    def log_prob(self) -> Any: ...
    @property
    def sample(self) -> Any: ...
    @property
    def encode(self) -> Any: ...
    @property
    def decode(self) -> Any: ...


class Given:
    """A conditional flow given one context for all rows, or each row's own; a learned density."""

    def __init__(self, flow: Any, context: Tensor | None) -> None:
        self._flow, self._context = flow, context
        self.dim: int = flow.dim

    def log_prob(self, x: Tensor, **settings: Any) -> Any:
        return self._flow.log_prob(x, self._context, **settings)

    def sample(self, n: int, **settings: Any) -> Tensor:
        return self._flow.sample(n, self._context, **settings)

    def encode(self, x: Tensor) -> Tensor:
        return self._flow.encode(x, self._context)

    def decode(self, z: Tensor) -> Tensor:
        return self._flow.decode(z, self._context)


class RoundTrip(NamedTuple):
    """The largest |decode(encode(x)) − x|, in x's units and in its columns' standard deviations."""

    largest: float
    relative: float


@dataclass(frozen=True)
class Report:
    """Figures of a flow on held-out rows; an *_error is a standard error over these rows.

    nll: mean negative log-density in nats; gap: mean of log p*(x) − log p(x) in nats under the law
    of the data, from the same rows, so that it is far more precise than nll − entropy; bits: per
    dimension; mass: the integral of the density, 1 if all is well; round_trip, round_trip_relative:
    see `RoundTrip`; nfe: evaluations of the field for log_prob; divergence: the one in use;
    integration_error: nats, the mean of the solver's error; both of INFORMED rows at most, from
    end to end.
    None stands where a figure has no meaning.
    """

    rows: int
    nll: float
    nll_error: float
    round_trip: float
    round_trip_relative: float
    nfe: int
    divergence: str
    gap: float | None = None
    gap_error: float | None = None
    entropy: float | None = None
    bits: float | None = None
    bits_error: float | None = None
    mass: float | None = None
    integration_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The figures as aligned lines of text."""
        return [f"{name:<14}{figure}" for name, figure in self._figures()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _figures(self) -> list[tuple[str, str]]:
        nll = measured(self.nll, self.nll_error)
        figures = [("held-out NLL", f"{nll} nats ({self.rows:,} rows)")]
        if self.gap is not None:
            gap = measured(self.gap, self.gap_error)
            figures.append(("gap", f"{gap} nats, paired; entropy {self.entropy:.4f}"))
        if self.bits is not None:
            bound = "bits per dimension, an upper bound"
            figures.append(("bits/dim", f"{measured(self.bits, self.bits_error)} {bound}"))
        if self.mass is not None:
            figures.append(("mass", f"{self.mass:.5f} of the density on a grid; 1 is exact"))
        error = f"{self.round_trip_relative:.1e} of a column's spread"
        figures.append(("round trip", f"{self.round_trip:.1e} at most, {error}"))
        if self.integration_error is not None:
            figures.append(("integration", f"{self.integration_error:.1e} nats in the mean"))
        figures.append(("evaluations", f"{self.nfe} of the field for log p(x)"))
        figures.append(("divergence", self.divergence))
        return figures


def measured(value: float, error: float | None) -> str:
    """A value with its error: as many digits as the error's two leading ones call for."""
    if error is None or not 0 < error < math.inf:
        return f"{value:.4f}"
    digits = min(max(2, 1 - math.floor(math.log10(error))), 6)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


@torch.no_grad()
def held_out(
    flow: LearnedDensity,
    x: Tensor,
    law: Law | None = None,
    levels: int | None = None,
    context: Tensor | None = None,
) -> Report:
    """The report of a flow on rows that it was not fitted to.

    x: (rows, dim), or (draws, rows, dim) where a row was drawn with several noises: its value is
    then the mean over them; law: the density the rows come from, for the gap; levels: values a
    feature could take before noise and division by levels, for bits per dimension; context: that of
    every row of a conditional flow, (rows, columns).
    The mass is found in one and two dimensions, of a density that depends on nothing.
    """
    x = x if x.dim() == 3 else x[None]
    rows = x.flatten(0, 1)
    contexts = None if context is None else context.repeat(len(x), 1)
    density, is_conditional = _given(flow, contexts), contexts is not None
    some = torch.linspace(0, len(rows) - 1, min(len(rows), INFORMED)).round().long().unique()
    some = some.to(rows.device)
    informed = _given(flow, None if contexts is None else contexts[some])
    log_prob = density.log_prob(rows)
    _, info = informed.log_prob(rows[some], return_info=True)
    values = log_prob.cpu().double().reshape(x.shape[:2]).mean(0)
    nll, nll_error = mean_and_error(-values)
    round_trip = round_trip_error(density, rows)
    return Report(
        rows=len(values),
        nll=nll,
        nll_error=nll_error,
        round_trip=round_trip.largest,
        round_trip_relative=round_trip.relative,
        nfe=info.nfe,
        divergence=info.divergence,
        mass=grid_mass(flow, rows, CELLS) if flow.dim <= 2 and not is_conditional else None,
        integration_error=float(info.integration_error.mean()),
        **({} if law is None else _gap(values, x, law)),
        **({} if levels is None else _bits(values, flow.dim, levels)),
    )


def _given(flow: Any, context: Tensor | None) -> LearnedDensity:
    return flow if context is None else Given(flow, context)


def _gap(values: Tensor, x: Tensor, law: Law) -> dict[str, float]:
    known = law.log_prob(x.cpu().double()).mean(0)
    gap, error = mean_and_error(known - values)
    return {"gap": gap, "gap_error": error, "entropy": float(law.entropy())}


def _bits(values: Tensor, dim: int, levels: int) -> dict[str, float]:
    bits, error = mean_and_error(bits_per_dim(values, dim, levels))
    return {"bits": bits, "bits_error": error}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single value."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


@torch.no_grad()
def round_trip_error(flow: LearnedDensity, x: Tensor) -> RoundTrip:
    """How far decode(encode(x)) is from x, (rows, dim), at worst."""
    error = (flow.decode(flow.encode(x)).cpu().double() - x.cpu().double()).abs()
    spread = x.cpu().double().std(0, correction=0)
    varied = spread > 0  # few rows may agree in a column
    relative = (error[:, varied] / spread[varied]).max() if varied.any() else math.nan
    return RoundTrip(float(error.max()), float(relative))


@torch.no_grad()
def grid_log_prob(
    flow: LearnedDensity, extent: Extent, size: int = 200, *, negligible: float = 0.0
) -> tuple[np.ndarray, Extent]:
    """Log-densities in nats at the midpoints of size × size cells, (size, size); and the extent.

    flow: of two dimensions; extent: (left, right, bottom, top).  Rows go upwards from the bottom.
    negligible: where blocks of FINER × FINER cells and their neighbours hold no more mass than
    this, their cells share the value in the middle, if size is a multiple of FINER.
    """
    if negligible <= 0.0 or size % FINER:
        return _log_prob(flow, _cells(extent, size)).reshape(size, size).numpy(), extent
    blocks = size // FINER
    coarse, _ = grid_log_prob(flow, extent, blocks)
    grid = coarse.repeat(FINER, 0).repeat(FINER, 1)
    with np.errstate(over="ignore"):  # an infinite density is looked at closely
        masses = np.exp(coarse) * _area(extent) / blocks**2
    busy = _spread(~(masses <= negligible)).repeat(FINER, 0).repeat(FINER, 1)
    points = _cells(extent, size)[torch.from_numpy(busy.ravel())]
    grid[busy] = _log_prob(flow, points).numpy()
    return grid, extent


@torch.no_grad()
def grid_mass(flow: LearnedDensity, x: Tensor, size: int = 400) -> float:
    """The integral of the density over a box around data and samples, by the midpoint rule.

    flow: of one or two dimensions; x: data, (rows, dim); size: cells a side where the density is,
    ten times as many in one dimension.  The box ends well outside all but the furthest 0.2 % of
    the points.  A density with ridges thinner than a cell has a mass that is not exactly 1 here.
    """
    samples = flow.sample(SAMPLES, seed=0)
    box = [_reach(*columns) for columns in zip(x.T, samples.T, strict=True)]
    if len(box) == 1:
        (low, high), cells = box[0], 10 * size
        log_prob = _log_prob(flow, _midpoints(low, high, cells)[:, None])
        cell = (high - low) / cells
        return float(log_prob.exp().sum() * cell)
    extent = (*box[0], *box[1])
    log_prob, _ = grid_log_prob(flow, extent, size, negligible=NEGLIGIBLE)
    return float(np.exp(log_prob).sum()) * _area(extent) / size**2


def _area(extent: Extent) -> float:
    left, right, bottom, top = extent
    return (right - left) * (top - bottom)


def _cells(extent: Extent, size: int) -> Tensor:
    """The midpoints of size × size cells, (size · size, 2), bottom row first."""
    left, right, bottom, top = extent
    x, y = _midpoints(left, right, size), _midpoints(bottom, top, size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)


def _spread(marked: np.ndarray) -> np.ndarray:
    """The marked places of a grid, and those beside one."""
    from scipy.ndimage import maximum_filter  # 0.1 s that the first use of a flow need not wait

    return maximum_filter(marked, 3)


def _reach(data: Tensor, samples: Tensor) -> tuple[float, float]:
    """The ends of the box along one column."""
    ends = [np.quantile(points.cpu().numpy(), [TAIL, 1 - TAIL]) for points in (data, samples)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    margin = MARGIN * (high - low)
    return float(low - margin), float(high + margin)


def _midpoints(low: float, high: float, cells: int) -> Tensor:
    return low + (high - low) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def _log_prob(flow: LearnedDensity, points: Tensor) -> Tensor:
    return flow.log_prob(points).cpu().double()
