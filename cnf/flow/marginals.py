"""A monotone map for every column, chosen from data: it makes the columns' own laws nearly normal.

What remains for the flow is how the columns depend on each other.  A table of a few hundred rows
says little about that, and a skewed column or one with edges costs a smooth field more than all of
it.  Which map a column gets is decided by the likelihood of rows that the map has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

AS_IT_IS, POWER, STEPS = 0, 1, 2
SMALL = 1e-8  # an exponent that is 0
Law = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (values seen, others) → log-density of these
JUDGED_ROWS = 4000  # that choose the maps
POWER_ROWS = 20_000  # that set the exponents
FOLDS = 5
LEAST_GAIN = {POWER: 0.02, STEPS: 0.05}  # nats a row, over the simpler map
DOUBTS = {POWER: 0.0, STEPS: 3.0}  # the gain in its standard errors: steps are the best of many
BINS = (*range(1, 21), 24, 32, 48, 64)
ROWS_A_COLUMN = 1000  # with more of them the flow learns edges by itself
PRIOR = 0.5  # of a row, in every bin


class Marginals(nn.Module):
    """y = m(x), column by column: as it is, a power, or steps; x, y: (batch, dim).

    power: y = sign(u) ((1 + |u|)^μ − 1)/μ of u = (x − center)/spread, μ = λ or 2 − λ by the sign of
    u, 0 ≤ λ ≤ 2.  steps: y = Φ⁻¹(F(x)) with F linear between knots, a law that is constant between
    them; beyond the outer ones y is linear in x.  Both reach all of ℝ.
    It starts as the identity; `fit` sets it from data.
    Source: Yeo & Johnson 2000, equation 1; with steps the flow is a copula's, Sklar 1959.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name, value in _empty(dim).items():
            self.register_buffer(name, value)
        self.kinds: Tensor
        self.center: Tensor
        self.spread: Tensor
        self.exponent: Tensor
        self.knots: Tensor
        self.below: Tensor
        self._index()

    @property
    def is_identity(self) -> bool:
        return not (self._power or self._steps)

    def fit(self, x: Tensor) -> None:
        """Choose and set every column's map from data of shape (rows, dim)."""
        data = x.detach().double().cpu().numpy()
        chosen = choose_maps(data)
        self._take({name: torch.from_numpy(value) for name, value in chosen._asdict().items()})

    def take_shapes(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Make room for stored maps, so that `load_state_dict` finds tensors of their shapes."""
        stored = {name: tensors[prefix + name] for name in _empty(1) if prefix + name in tensors}
        if len(stored) == len(_empty(1)):
            self._take(stored)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log |det dy/dx| of shape (batch,)); float64 inside where the device has it."""
        wide = _wide(x)
        logdet = wide.new_zeros(len(x))
        if self.is_identity:
            return x, logdet
        y = wide.clone()
        for columns, change in self._changes():
            y[:, columns], log_slope = change.forward(wide[:, columns])
            logdet = logdet + log_slope.sum(-1)
        return y.to(x.dtype), logdet

    def invert(self, y: Tensor) -> Tensor:
        """x from y."""
        if self.is_identity:
            return y
        wide = _wide(y)
        x = wide.clone()
        for columns, change in self._changes():
            x[:, columns] = change.invert(wide[:, columns])
        return x.to(y.dtype)

    def _changes(self) -> list[tuple[list[int], Power | Steps]]:
        """The columns that are changed, and how."""
        powers = Power(_wide(self.center), _wide(self.spread), _wide(self.exponent))
        steps = Steps(_wide(self.knots), _wide(self.below))
        both = ((self._power, powers), (self._steps, steps))
        return [(columns, change) for columns, change in both if columns]

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.center
        for name, value in tensors.items():
            value = value.to(own.device, own.dtype if value.is_floating_point() else None)
            setattr(self, name, value)
        self._index()

    def _index(self) -> None:
        """The columns of each kind, on the host: they are asked for in every call."""
        kinds = self.kinds.tolist()
        self._power = [i for i, kind in enumerate(kinds) if kind == POWER]
        self._steps = [i for i, kind in enumerate(kinds) if kind == STEPS]

    def _load_from_state_dict(self, state_dict, prefix, *arguments):  # type: ignore[no-untyped-def]
        self.take_shapes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._index()


class Power(NamedTuple):
    """Powers of columns (rows, columns); center, spread, exponent: (columns,)."""

    center: Tensor
    spread: Tensor
    exponent: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log dy/dx)"""
        u = (x - self.center) / self.spread
        power, growth = self._power(u), torch.log1p(u.abs())
        small = power.abs() < SMALL
        safe = torch.where(small, 1.0, power)
        size = torch.where(small, growth, torch.expm1(safe * growth) / safe)
        return u.sign() * size, (power - 1) * growth - self.spread.log()

    def invert(self, y: Tensor) -> Tensor:
        """x"""
        power, size = self._power(y), y.abs()
        small = power.abs() < SMALL
        safe = torch.where(small, 1.0, power)
        growth = torch.where(small, size, torch.log1p(safe * size) / safe)
        return self.center + self.spread * y.sign() * torch.expm1(growth)

    def _power(self, u: Tensor) -> Tensor:
        return torch.where(u >= 0, self.exponent, 2 - self.exponent)


class Steps(NamedTuple):
    """Columns (rows, columns) whose law is constant between knots, made normal.

    knots, below: (columns, bins + 1), rising; a column of fewer bins repeats its last knot.
    """

    knots: Tensor
    below: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z, log dz/dx)"""
        inside = torch.clamp(x, self.knots[:, 0], self.knots[:, -1])
        left, right, lower, upper = self._bin(inside, self.knots)
        density = (upper - lower) / (right - left)
        low, high = lower + density * (inside - left), (1 - upper) + density * (right - inside)
        # each tail by its own small mass: 1 − 1e-17 would be 1
        z = torch.where(low < high, torch.special.ndtri(low), -torch.special.ndtri(high))
        log_slope = density.log() + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)
        beyond, tail = x - inside, self._tail()
        return z + tail * beyond, torch.where(beyond == 0, log_slope, tail.log())

    def invert(self, z: Tensor) -> Tensor:
        """x"""
        first, last = torch.special.ndtri(self.below[:, 0]), torch.special.ndtri(self.below[:, -1])
        inside = torch.clamp(z, first, last)
        left, right, lower, upper = self._bin(torch.special.ndtr(inside), self.below)
        above = (1 - lower) - torch.special.ndtr(-inside)
        passed = torch.where(inside < 0, torch.special.ndtr(inside) - lower, above)
        share = (passed / (upper - lower)).clamp(0, 1)
        return left + (right - left) * share + (z - inside) / self._tail()

    def _tail(self) -> Tensor:
        """dz/dx beyond the outer knots: a standard deviation is a quarter of their distance."""
        return 4 / (self.knots[:, -1] - self.knots[:, 0])

    def _bin(self, values: Tensor, edges: Tensor) -> tuple[Tensor, ...]:
        """(left, right, F(left), F(right)) of the bin that each value falls into by these edges."""
        # a memory layout of (columns, rows), as searchsorted wants it
        rising = values.detach().T.clone(memory_format=torch.contiguous_format)
        found = torch.searchsorted(edges.contiguous(), rising, right=True).T
        last = (edges < edges[:, -1:]).sum(-1) - 1
        index = torch.minimum((found - 1).clamp(min=0), last)
        column = torch.arange(len(edges), device=edges.device).expand_as(index)
        ends = (index, index + 1)
        return tuple(table[column, end] for table in (self.knots, self.below) for end in ends)


class Maps(NamedTuple):
    """The tensors of `Marginals`: kinds (dim,); center, spread, exponent (powers,), of the columns
    with a power; knots, below (steps, bins + 1): where the steps are, and the mass below each.
    """

    kinds: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    exponent: np.ndarray
    knots: np.ndarray
    below: np.ndarray


def choose_maps(x: np.ndarray) -> Maps:
    """The maps of all columns of x, (rows, dim)."""
    rows = _drawn(x, JUDGED_ROWS)
    with_steps = x.shape[1] > 2 and len(x) < ROWS_A_COLUMN * x.shape[1]
    chosen = [_choose(column, with_steps) for column in rows.T]
    kinds = np.array([kind for kind, _ in chosen], dtype=np.uint8)
    powers = [_fit_power(column) for column in _drawn(x, POWER_ROWS)[:, kinds == POWER].T]
    bins = [count for kind, count in chosen if kind == STEPS]
    steps = [_fit_steps(*pair) for pair in zip(x[:, kinds == STEPS].T, bins, strict=True)]
    center, spread, exponent = np.array(powers).reshape(-1, 3).T
    widest = max(bins, default=0) + 1
    knots, below = np.array(
        [[np.pad(row, (0, widest - len(row)), "edge") for row in pair] for pair in steps]
    ).reshape(-1, 2, widest).transpose(1, 0, 2)  # fmt: skip
    return Maps(kinds, center, spread, exponent, knots, below)


def _drawn(x: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, the same every time."""
    if len(x) <= count:
        return x
    return x[np.random.default_rng(0).choice(len(x), count, replace=False)]


def _choose(column: np.ndarray, with_steps: bool) -> tuple[int, int]:
    """(kind, bins) of the map under which unseen rows are most likely, by cross-validation."""
    if len(column) < 4 * FOLDS or column.min() == column.max():
        return AS_IT_IS, 0
    kind, best = AS_IT_IS, _unseen(column, _normal_law)
    power = _unseen(column, _power_law)
    if _is_better(power, best, POWER):
        kind, best = POWER, power
    if with_steps:
        scores = {bins: _unseen(column, _steps_law(bins)) for bins in BINS}
        bins = max(scores, key=lambda bins: scores[bins].mean())
        if _is_better(scores[bins], best, STEPS):
            return STEPS, bins
    return kind, 0


def _is_better(values: np.ndarray, simpler: np.ndarray, kind: int) -> bool:
    """Whether a map's log-densities are better than the simpler one's beyond doubt."""
    gain = values - simpler
    doubt = DOUBTS[kind] * gain.std() / math.sqrt(len(gain))
    return bool(gain.mean() > max(LEAST_GAIN[kind], doubt))


def _unseen(column: np.ndarray, law: Law) -> np.ndarray:
    """Log-density of each value by a law that was fitted without it, nats."""
    found = np.full(len(column), -math.inf)
    for i in range(FOLDS):
        inside = np.arange(len(column)) % FOLDS == i
        seen = column[~inside]
        if seen.min() < seen.max():
            found[inside] = law(seen, column[inside])
    return found


def _normal_law(seen: np.ndarray, fold: np.ndarray) -> np.ndarray:
    spread = seen.std()
    return _log_normal((fold - seen.mean()) / spread) - math.log(spread)


def _power_law(seen: np.ndarray, fold: np.ndarray) -> np.ndarray:
    change = Power(*torch.tensor([_fit_power(seen)]).T)
    (y, _), (z, log_slope) = (change.forward(torch.from_numpy(v)[:, None]) for v in (seen, fold))
    return _normal_law(y.numpy()[:, 0], z.numpy()[:, 0]) + log_slope.numpy()[:, 0]


def _steps_law(bins: int) -> Law:
    from scipy.special import ndtri  # here: slow to load

    def law(seen: np.ndarray, fold: np.ndarray) -> np.ndarray:
        knots, below = _fit_steps(seen, bins)
        width = (knots[-1] - knots[0]) / bins
        place = ((fold - knots[0]) / width).astype(int).clip(0, bins - 1)
        beyond = fold - fold.clip(knots[0], knots[-1])
        density = np.log(np.diff(below) / width)[place]
        slope = 4 / (bins * width)
        tail = _log_normal(ndtri(below[0]) - slope * np.abs(beyond)) + math.log(slope)
        return np.where(beyond == 0, density, tail)

    return law


def _log_normal(z: np.ndarray) -> np.ndarray:
    return -0.5 * z**2 - 0.5 * math.log(2 * math.pi)


def _fit_power(column: np.ndarray) -> tuple[float, float, float]:
    """(center, spread, exponent) by maximum likelihood, on standardized values."""
    center, spread = float(column.mean()), float(column.std())
    u = torch.from_numpy(column)[:, None]

    def cost(exponent: float) -> float:
        change = Power(*torch.tensor([[center], [spread], [exponent]], dtype=torch.float64))
        y, log_slope = change.forward(u)
        return float(y.std(correction=0).log() - log_slope.mean())

    from scipy.optimize import minimize_scalar  # here: slow to load

    found = minimize_scalar(cost, bounds=(0.0, 2.0), method="bounded")
    return center, spread, float(found.x)  # type: ignore[attr-defined]


def _fit_steps(column: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(knots, mass below them), each (bins + 1,): bins of equal width, none of them empty."""
    knots = np.linspace(column.min(), column.max(), bins + 1)
    counts = np.histogram(column, knots)[0] + PRIOR / bins
    outside = 1 / (len(column) + 2)  # on each side, as of a value yet to come
    mass = (1 - 2 * outside) * counts / counts.sum()
    return knots, outside + np.concatenate([[0.0], np.cumsum(mass)])


def _empty(dim: int) -> dict[str, Tensor]:
    """The tensors of maps that leave every column as it is."""
    none, table = torch.zeros(0), torch.zeros(0, 1)
    kinds = torch.full((dim,), AS_IT_IS, dtype=torch.uint8)
    return dict(zip(Maps._fields, (kinds, none, none, none, table, table), strict=True))


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()
