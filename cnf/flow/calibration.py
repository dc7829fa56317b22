"""Whether the draws of a conditional density are as wide as they must be: ranks and coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from torch import Tensor

from cnf.error import InputError, whole_number

LEVELS = (0.5, 0.8, 0.9, 0.95)  # of credible regions
LEAST_EXPECTED = 20  # truths in each bin of a histogram, on average
MOST_BINS = 20
ALARM = 0.01  # the chance that any histogram of a calibrated density is called uneven
ERRORS = 3.0  # binomial standard errors that a coverage may be off


class Drawable(Protocol):
    """What is judged, such as a `Flow`: draws with their log-densities, and log-densities."""

    @property
    def sample(self) -> Any: ...
    @property
    def log_prob(self) -> Any: ...


@dataclass(frozen=True)
class Calibration:
    """Where truths rank among draws that were made without knowing them.

    ranks: (rows, dim), how many of `draws` draws lie below the truth in each column; density_ranks:
    (rows,), how many of them are less dense than the truth.  All are uniform on 0 … draws where the
    draws come from the very law of the truths.  Printed it is a table and a verdict.
    """

    ranks: NDArray[np.int64]
    density_ranks: NDArray[np.int64]
    draws: int

    @property
    def bins(self) -> int:
        """Of a histogram of ranks: as many as divide the ranks evenly and hold enough truths."""
        most = min(MOST_BINS, len(self.ranks) // LEAST_EXPECTED)
        return max(count for count in range(1, most + 1) if (self.draws + 1) % count == 0)

    def histograms(self) -> NDArray[np.int64]:
        """Truths in each bin of ranks, (dim + 1, bins); those of the density are last."""
        width = (self.draws + 1) // self.bins
        columns = np.column_stack([self.ranks, self.density_ranks]) // width
        return np.stack([np.bincount(column, minlength=self.bins) for column in columns.T])

    def p_values(self) -> NDArray[np.float64]:
        """The chance of histograms as uneven as these if the draws are right, (dim + 1,).

        By Pearson's χ².
        """
        expected = len(self.ranks) / self.bins
        uneven = ((self.histograms() - expected) ** 2 / expected).sum(1)
        return chi2.sf(uneven, self.bins - 1)

    def coverage(self, level: float) -> tuple[float, float]:
        """The share of truths inside the region of highest density that holds `level` of the draws,
        and the binomial standard error of that share if the draws are right.
        """
        if not 0 < level < 1:
            raise InputError(f"level must be a share between 0 and 1, got {level!r}")
        denser = self.draws - self.density_ranks
        share = float(np.mean(denser < level * (self.draws + 1) - 1e-9))
        return share, math.sqrt(level * (1 - level) / len(denser))

    @property
    def passed(self) -> bool:
        """Whether all of it is as even as chance allows."""
        p_values = self.p_values()
        covered = [(*self.coverage(level), level) for level in LEVELS]
        return bool(p_values.min() > ALARM / len(p_values)) and all(
            abs(share - level) <= ERRORS * error for share, error, level in covered
        )

    @property
    def verdict(self) -> str:
        """The sentence."""
        if self.passed:
            return f"Calibrated, as far as {len(self.ranks)} truths can tell."
        share, _ = self.coverage(0.8)
        fault = "too narrow" if share < 0.8 else "too wide or misplaced"
        return f"Not calibrated: the draws are {fault}."

    def lines(self) -> list[str]:
        """The table and the sentence as lines of text."""
        names = [*(f"column {i}" for i in range(self.ranks.shape[1])), "density"]
        pairs = zip(names, self.p_values(), strict=True)
        ranks = [f"ranks, {name:<11}p = {p:.3f}   ({self.bins} bins)" for name, p in pairs]
        shares = [(level, *self.coverage(level)) for level in LEVELS]
        covered = [
            f"{f'{level:.0%} region':<18}holds {share:.1%} ± {error:.1%} of the truths"
            for level, share, error in shares
        ]
        return [*ranks, *covered, self.verdict]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@torch.no_grad()
def ranked(
    density: Drawable,
    truths: Tensor,
    context: Tensor | None = None,
    *,
    draws: int = 99,
    seed: int | None = None,
) -> Calibration:
    """How truths (rows, dim) rank among `draws` draws of a density, each given its own context.

    density: a `Flow`, or anything with sample(n, context, return_log_prob=True, seed=…) and
    log_prob(x, context); context: (rows, k), or None for a density without one; seed: of the draws.
    The truths and contexts must be pairs from the joint law that the density was trained on, and
    none that it has seen.  Raises InputError for fewer than 40 rows.
    Source: Talts et al. 2018, algorithm 1; the density as a test quantity: Modrák et al. 2023;
    regions of highest density: Hermans et al. 2022, section 2.

    >>> import cnf
    >>> ranked(cnf.Flow(2), torch.randn(400, 2), seed=0).passed  # an untrained flow is the base
    True
    """
    draws = whole_number("draws", draws, 1)
    rows, dim = truths.shape
    if rows < 2 * LEAST_EXPECTED:
        raise InputError(f"truths has {rows} rows; ranks need at least {2 * LEAST_EXPECTED}")
    given = None if context is None else context.repeat_interleave(draws, 0)
    drawn, log_prob = density.sample(rows * draws, given, return_log_prob=True, seed=seed)
    below = drawn.reshape(rows, draws, dim) < truths.to(drawn).unsqueeze(1)
    of_truths = density.log_prob(truths, context)
    less_dense = log_prob.reshape(rows, draws) < of_truths.to(log_prob).unsqueeze(1)
    return Calibration(below.sum(1).cpu().numpy(), less_dense.sum(1).cpu().numpy(), draws)
