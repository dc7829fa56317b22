"""Arrays as figures need them: checked, without what is not finite, and few enough to be drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cnf.plot.paper import DRAWN_POINTS


def table(values: ArrayLike, name: str, columns: int | None = None) -> np.ndarray:
    """The values as (n, columns) in float64; raises ValueError for another shape."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or (columns is not None and rows.shape[1] != columns):
        raise ValueError(f"{name} has shape {rows.shape}, not (n, {columns or 'dim'})")
    return rows


def paired(x: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both, flat and of one length; raises ValueError where they are not."""
    first, second = np.ravel(np.asarray(x, float)), np.ravel(np.asarray(y, float))
    if len(first) != len(second):
        raise ValueError(f"{name} has {len(second)} values at {len(first)} steps")
    return first, second


def finite(values: ArrayLike) -> np.ndarray:
    """The finite values, flat."""
    flat = np.ravel(np.asarray(values, dtype=np.float64))
    return flat[np.isfinite(flat)]


def thin(points: np.ndarray, most: int = DRAWN_POINTS) -> np.ndarray:
    """At most so many of the points, evenly taken."""
    return points[:: -(-len(points) // most)] if len(points) > most else points


def relative(log_density: np.ndarray) -> np.ndarray:
    """The density over its largest finite value: a flow that collapses must not overflow."""
    known = finite(log_density)
    return np.exp(log_density - (known.max() if len(known) else 0.0))


def brightest(density: np.ndarray) -> float:
    """The density that 1 % of the mass exceeds, so that one spike does not blacken the rest."""
    ordered = np.sort(density[np.isfinite(density)])
    mass = np.cumsum(ordered)
    if not len(ordered) or not mass[-1] > 0.0:
        return 1.0
    return float(ordered[min(np.searchsorted(mass, 0.99 * mass[-1]), len(ordered) - 1)])


def limits_of(data: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Where all but the outermost 0.2 % of data lie, with a margin; without data, of samples."""
    values = finite(data) if len(finite(data)) else finite(samples)
    if not len(values):
        return -1.0, 1.0
    low, high = np.quantile(values, [0.001, 0.999])
    margin = 0.08 * (high - low) or 0.5
    return float(low - margin), float(high + margin)
