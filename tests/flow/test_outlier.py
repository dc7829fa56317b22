"""Outlier scores and what they are worth."""

from __future__ import annotations

import statistics

import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from cnf.error import InputError
from cnf.flow.outlier import complexity, roc, typicality


def scores(*shift: float, count: int = 60) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(count, generator=draw) + each for each in shift]


def test_too_probable_is_as_strange_as_too_improbable() -> None:
    (reference,) = scores(-100.0, count=1000)
    low, mean, high = typicality(torch.tensor([-110.0, -100.0, -90.0]), reference).tolist()
    assert low == pytest.approx(10.0, rel=0.1) and high == pytest.approx(low, rel=0.1)
    assert mean < 0.2
    with pytest.raises(InputError, match="reference has 1"):
        typicality(reference, reference[:1])


def test_noise_is_more_complex_than_a_plain_image() -> None:
    noise = torch.randint(256, (1, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    ramp = torch.arange(28).expand(1, 1, 28, 28)
    empty = torch.zeros(1, 1, 28, 28)
    none, some, most = (float(complexity(images)) for images in (empty, ramp, noise))
    assert none < some < most
    assert most / (8 * 0.6931) > 784 * 0.95  # noise is not compressed


def test_the_curve_is_scikit_learns() -> None:
    data, outliers = scores(0.0, 1.0)
    truth = torch.cat([torch.zeros(60), torch.ones(60)])
    both = torch.cat([data, outliers])
    found = roc(data, outliers)
    assert found.area == pytest.approx(roc_auc_score(truth, both))
    false, true, _ = roc_curve(truth, both, drop_intermediate=False)
    assert found.false == pytest.approx(torch.from_numpy(false))
    assert found.true == pytest.approx(torch.from_numpy(true))


def test_ties_count_half() -> None:
    assert roc(torch.zeros(4), torch.zeros(3)).area == pytest.approx(0.5)
    assert roc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).area == pytest.approx(0.875)


def test_perfect_and_reversed_scores() -> None:
    data, outliers = scores(0.0, 50.0)
    found = roc(data, outliers)
    assert (found.area, found.error) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))
    assert roc(outliers, data).area == pytest.approx(0.0)


def test_the_error_of_the_area_is_its_spread_over_samples() -> None:
    areas, errors = [], []
    for seed in range(200):
        draw = torch.Generator().manual_seed(seed)
        found = roc(torch.randn(50, generator=draw), torch.randn(40, generator=draw) + 1)
        areas.append(found.area)
        errors.append(found.error)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(areas), rel=0.15)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="outliers must be scores"):
        roc(torch.zeros(3), torch.tensor([0.0, float("nan")]))
