"""Bits per dimension: standard errors, and a weighted bound that stays one."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.flow.bits import measured_bits, of_bounds, weighted_bound

DIM = 4
LOG2 = math.log(2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def test_a_bound_in_nats_becomes_bits_a_dimension() -> None:
    found = measured_bits(lambda i, j: torch.full((5,), -8 * DIM * LOG2), DIM)
    assert found.value == float(found) == pytest.approx(8.0)
    assert (len(found.per_image), found.draws, found.weighted) == (5, 1, None)
    assert found.standard_error == pytest.approx(0.0)
    assert found.as_dict()["images"] == 5 and "per_image" not in found.as_dict()


def test_the_error_covers_images_draws_and_the_trace() -> None:
    images, by_draw = normal(400), normal(6, seed=1)
    found = of_bounds(images + by_draw[:, None], images + by_draw[:, None], DIM)
    scale = DIM * LOG2
    assert found.image_error == pytest.approx(float(images.std()) / 20 / scale)
    assert found.draw_error == pytest.approx(float(by_draw.std()) / math.sqrt(6) / scale)
    assert found.standard_error == pytest.approx(
        math.hypot(found.image_error, found.draw_error or 0.0)
    )


def test_of_a_single_draw_the_error_is_that_over_images() -> None:
    found = measured_bits(lambda i, j: normal(50), DIM)
    assert found.draw_error is None and found.standard_error == found.image_error


def test_the_noise_of_the_trace_is_drawn_twice_for_each_draw() -> None:
    asked = []

    def bounds(draw: int, noise: int) -> torch.Tensor:
        asked.append((draw, noise))
        return normal(3, seed=noise)

    measured_bits(bounds, DIM, draws=2)
    assert sorted(asked) == [(0, 0), (0, 1), (1, 2), (1, 3)]
    asked.clear()
    measured_bits(bounds, DIM, draws=2, exact=True)
    assert len(asked) == 2


def test_exact_densities_give_the_logarithm_of_their_mean() -> None:
    values = 3 * normal(7, 100)
    expected = values.logsumexp(0) - math.log(7)
    torch.testing.assert_close(weighted_bound(values, values), expected)


def test_more_weighted_draws_are_a_tighter_bound() -> None:
    values = normal(16, 2000)
    bounds = [of_bounds(values[:k], values[:k], DIM).weighted for k in (2, 4, 16)]
    unweighted = of_bounds(values, values, DIM).value
    assert bounds == sorted(bounds, reverse=True) and bounds[0] < unweighted


def test_noise_in_the_trace_does_not_feign_fewer_bits() -> None:
    exact = normal(8, 5000)
    first, second = (exact + 2 * normal(8, 5000, seed=seed) for seed in (1, 2))
    truth = (exact.logsumexp(0) - math.log(8)).mean()
    feigned = (first.logsumexp(0) - math.log(8)).mean()
    assert feigned > truth + 1.0  # what an estimate's exponential would have claimed
    assert weighted_bound(first, second).mean() < truth


def test_the_figures_in_words_say_that_they_are_bounds() -> None:
    text = str(of_bounds(normal(3, 9), normal(3, 9), DIM))
    assert text.count("upper bound") == 2 and "3 draws" in text and "9 images" in text
