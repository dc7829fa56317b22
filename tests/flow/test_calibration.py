"""Right draws rank the truth evenly, and wrong ones are caught: too narrow, too wide, misplaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.distributions import Independent, Normal

import cnf
from cnf.error import InputError
from cnf.flow.calibration import LEVELS, Calibration, ranked


class Posterior:
    """N(c, (width·1)²) of two columns given c, moved by `shift`; right for width 1 and no shift."""

    def __init__(self, width: float = 1.0, shift: float = 0.0) -> None:
        self.width, self.shift = width, shift

    def law(self, context):
        mean = context + torch.tensor([self.shift, 0.0])
        return Independent(Normal(mean, self.width), 1)

    def log_prob(self, x, context):
        return self.law(context).log_prob(x)

    def sample(self, n, context, *, return_log_prob, seed):
        assert n == len(context) and return_log_prob
        torch.manual_seed(seed)
        x = self.law(context).sample()
        return x, self.log_prob(x, context)


def judged(rows: int = 1000, **wrong: float) -> Calibration:
    context = 3 * torch.randn(rows, 2)
    return ranked(Posterior(**wrong), context + torch.randn(rows, 2), context, seed=1)


def test_right_draws_are_calibrated():
    found = judged()
    assert found.passed and "Calibrated" in found.verdict
    assert found.p_values().shape == (3,) and found.p_values().min() > 0.01
    for level in LEVELS:
        share, error = found.coverage(level)
        assert abs(share - level) < 3 * error


def test_narrow_draws_are_caught():
    found = judged(width=0.8)
    assert not found.passed and "narrow" in found.verdict
    assert found.coverage(0.9)[0] < 0.85
    ends = found.histograms()[:2, [0, -1]]
    assert (ends > 1.2 * len(found.ranks) / found.bins).all()  # ∪: truths beyond the draws


def test_wide_draws_are_caught():
    found = judged(width=1.3)
    assert not found.passed and "wide" in found.verdict and found.coverage(0.5)[0] > 0.55


def test_misplaced_draws_are_caught_in_their_column():
    found = judged(shift=0.4)
    column, other, _ = found.p_values()
    assert not found.passed and column < 1e-6 < 0.01 < other


def test_a_density_without_context_is_ranked():
    flow = cnf.Flow(3)  # an untrained flow is the standard normal
    assert ranked(flow, torch.randn(400, 3), seed=0).passed
    assert not ranked(flow, 0.5 * torch.randn(400, 3), seed=0).passed


def test_ranks_count_the_draws_below():
    class Fixed:
        def sample(self, n, context, *, return_log_prob, seed):
            return torch.arange(float(n)).reshape(-1, 1) % 4, torch.zeros(n)

        def log_prob(self, x, context):
            return 1.0 - x.squeeze(-1)

    truths = torch.tensor([0.5, 9.0, -1.0, 2.5]).repeat(10).unsqueeze(-1)
    found = ranked(Fixed(), truths, draws=4)
    assert found.ranks[:4, 0].tolist() == [1, 4, 0, 3]
    assert found.density_ranks[:4].tolist() == [4, 0, 4, 0]


def test_the_p_value_is_pearsons():
    found = judged(400)
    expected = [chisquare(counts).pvalue for counts in found.histograms()]
    assert np.allclose(found.p_values(), expected)
    assert found.bins == 20 and found.histograms().sum(1).tolist() == [400] * 3


def test_few_truths_have_few_bins():
    assert judged(45).bins == 2


def test_it_prints_as_a_table_and_a_verdict():
    lines = str(judged()).splitlines()
    assert lines[0].startswith("ranks, column 0") and lines[-1] == judged().verdict
    assert any(line.startswith("95% region") and "of the truths" in line for line in lines)


@pytest.mark.parametrize("level", [0, 1, -0.5])
def test_a_level_is_a_share(level):
    with pytest.raises(InputError, match="level must be a share between 0 and 1"):
        judged(40).coverage(level)


def test_too_few_truths_are_refused():
    with pytest.raises(InputError, match="truths has 39 rows; ranks need at least 40"):
        judged(39)
