"""A report's figures against densities whose figures are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cnf.flow.flow import Flow
from cnf.flow.report import (
    INFORMED,
    Report,
    grid_log_prob,
    grid_mass,
    held_out,
    measured,
    round_trip_error,
)


class Normal:
    """N(0, scale²) in every column, as a law and as a learned density with a sloppy inverse."""

    def __init__(self, dim: int, scale: float = 1.0, slip: float = 0.0, mass: float = 1.0) -> None:
        self.dim, self.scale, self.slip, self.mass = dim, scale, slip, mass

    def log_prob(self, value: Tensor, return_info: bool = False) -> Any:
        normal = torch.distributions.Normal(0.0, self.scale)
        log_prob = normal.log_prob(value).sum(-1) + math.log(self.mass)
        if not return_info:
            return log_prob
        exact = torch.zeros(len(log_prob))
        return log_prob, SimpleNamespace(nfe=7, divergence="Known", integration_error=exact)

    def entropy(self) -> Tensor:
        return torch.tensor(self.dim * (0.5 * math.log(2 * math.pi * math.e * self.scale**2)))

    def sample(self, n: int, seed: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed or 0)
        return self.scale * torch.randn(n, self.dim, generator=generator)

    def encode(self, x: Tensor) -> Tensor:
        return x / self.scale

    def decode(self, z: Tensor) -> Tensor:
        return z * self.scale + self.slip


def test_the_true_density_has_no_gap_and_the_law_s_entropy() -> None:
    law = Normal(3, 0.5)
    report = held_out(law, law.sample(4000), law)
    assert report.gap == pytest.approx(0, abs=1e-5) and report.gap_error == pytest.approx(
        0, abs=1e-5
    )
    assert report.entropy is not None
    assert abs(report.nll - report.entropy) < 4 * report.nll_error
    assert (report.nfe, report.divergence, report.mass) == (7, "Known", None)


def test_the_gap_is_the_divergence_between_densities() -> None:
    law, learned = Normal(1, 1.0), Normal(1, 2.0)
    report = held_out(learned, law.sample(20_000), law)
    exact = math.log(2) + 1 / 8 - 1 / 2  # KL of N(0, 1) from N(0, 4)
    assert report.gap is not None and report.gap_error is not None
    assert abs(report.gap - exact) < 4 * report.gap_error


def test_errors_are_standard_errors_over_rows() -> None:
    law = Normal(2)
    x = law.sample(100)
    values = -law.log_prob(x).double().numpy()
    report = held_out(law, x)
    assert report.nll == pytest.approx(values.mean())
    assert report.nll_error == pytest.approx(values.std(ddof=1) / 10)
    assert report.gap is None and report.bits is None


def test_draws_of_a_row_count_as_one_row() -> None:
    law = Normal(2)
    x = law.sample(60).reshape(3, 20, 2)
    report = held_out(law, x)
    values = -law.log_prob(x).double().mean(0).numpy()
    assert report.rows == 20
    assert report.nll == pytest.approx(values.mean())
    assert report.nll_error == pytest.approx(values.std(ddof=1) / 20**0.5)


def test_bits_count_the_levels() -> None:
    law = Normal(4)
    report = held_out(law, law.sample(50), levels=256)
    assert report.bits == pytest.approx((report.nll / 4 + math.log(256)) / math.log(2))
    assert report.bits_error == pytest.approx(report.nll_error / 4 / math.log(2))


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_the_mass_is_the_integral(dim: int, mass: float) -> None:
    law = Normal(dim, 3.0, mass=mass)
    assert grid_mass(law, law.sample(2000), 60) == pytest.approx(mass, abs=1e-4)


def test_the_box_holds_a_flow_that_strayed_from_the_data() -> None:
    learned = Normal(2, 5.0)
    assert grid_mass(learned, Normal(2, 0.5).sample(2000), 200) == pytest.approx(1, abs=1e-3)


def test_the_grid_has_its_first_row_at_the_bottom() -> None:
    law = Normal(2)
    grid, extent = grid_log_prob(law, (0.0, 4.0, -8.0, 0.0), size=4)
    assert grid.shape == (4, 4) and extent == (0.0, 4.0, -8.0, 0.0)
    corner = law.log_prob(torch.tensor([[0.5, -7.0]]))  # the midpoint of the lowest left cell
    assert grid[0, 0] == pytest.approx(float(corner))
    assert grid.argmax() == 12  # highest at the top left, nearest to the origin


def test_a_grid_is_fine_where_the_density_is() -> None:
    class Counting(Normal):
        rows = 0

        def log_prob(self, value: Tensor, return_info: bool = False) -> Any:
            self.rows += len(value)
            return super().log_prob(value, return_info)

    law, extent = Counting(2, 0.4), (-4.0, 4.0, -4.0, 4.0)
    whole, _ = grid_log_prob(law, extent, 100)
    law.rows = 0
    grid, _ = grid_log_prob(law, extent, 100, negligible=1e-6)
    assert law.rows < 4000
    visible = whole > whole.max() - 9
    assert np.array_equal(grid[visible], whole[visible]) and visible.sum() > 500
    assert (grid[~visible] < whole.max() - 8).all()
    assert np.exp(grid).sum() * 0.08**2 == pytest.approx(1.0, abs=1e-4)


def test_what_is_not_a_number_is_looked_at_closely() -> None:
    class Torn(Normal):
        def log_prob(self, value: Tensor, return_info: bool = False) -> Any:
            found = super().log_prob(value)
            return torch.where(value[:, 0] > 2.0, math.nan, found)

    whole, _ = grid_log_prob(Torn(2, 0.3), (-4.0, 4.0, -4.0, 4.0), 50)
    grid, _ = grid_log_prob(Torn(2, 0.3), (-4.0, 4.0, -4.0, 4.0), 50, negligible=1e-6)
    assert np.array_equal(np.isnan(grid), np.isnan(whole)) and np.isnan(grid).any()


def test_the_integration_error_is_that_of_rows_from_end_to_end() -> None:
    class Rising(Normal):
        def log_prob(self, value: Tensor, return_info: bool = False) -> Any:
            found = super().log_prob(value, return_info)
            if return_info:
                assert len(value) <= INFORMED
                found[1].integration_error = value[:, 0]
            return found

    x = torch.linspace(0.0, 1.0, 5 * INFORMED)[:, None]
    report = held_out(Rising(1), x)
    assert report.rows == 5 * INFORMED
    assert report.integration_error == pytest.approx(0.5, abs=1e-3)


def test_the_round_trip_is_the_worst_one_in_both_units() -> None:
    x = torch.stack([torch.linspace(-1, 1, 50), torch.linspace(-100, 100, 50)], 1)
    worst = round_trip_error(Normal(2, slip=0.25), x)
    assert worst.largest == pytest.approx(0.25, rel=1e-4)
    assert worst.relative == pytest.approx(0.25 / float(x[:, 0].std(correction=0)), rel=1e-4)


def test_one_row_has_figures_without_errors() -> None:
    report = held_out(Normal(2), torch.zeros(1, 2))
    assert math.isnan(report.nll_error) and report.rows == 1
    assert "±" not in report.lines()[0]


def test_a_flow_is_reported_without_a_graph() -> None:
    flow = Flow(2, hidden=(8, 8), seed=0)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    report = held_out(flow, x, Normal(2))
    assert report.gap == pytest.approx(0, abs=1e-4)  # untrained it is the identity
    assert report.mass == pytest.approx(1, abs=1e-3)
    assert report.divergence == "ClosedForm"
    assert all(weight.grad is None for weight in flow.parameters())


def test_lines_are_aligned_and_complete() -> None:
    report = Report(100, 2.41234, 0.0123, 1e-5, 2e-6, 38, "ClosedForm", 0.0213, 0.0011, 2.39, 1.5,
                    0.02, 0.9998, 3e-5)  # fmt: skip
    lines = report.lines()
    assert {line[:14].strip() for line in lines} == {
        "held-out NLL", "gap", "bits/dim", "mass", "round trip", "integration", "evaluations",
        "divergence",
    }  # fmt: skip
    assert all(line[13] == " " and line[14] != " " for line in lines)
    assert lines[0].endswith("2.412 ± 0.012 nats (100 rows)")
    assert str(report) == "\n".join(lines)
    assert report.as_dict()["nll"] == 2.41234


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(2.41234, 0.0123, "2.412 ± 0.012"), (19.5312, 0.7, "19.53 ± 0.70"),
     (1234.5, 12.0, "1234.50 ± 12.00"), (0.5, 0.0, "0.5000"), (0.5, math.nan, "0.5000"),
     (math.inf, None, "inf"), (0.1, 1e-12, "0.100000 ± 0.000000")],
)  # fmt: skip
def test_digits_follow_the_error(value: float, error: float | None, text: str) -> None:
    assert measured(value, error) == text


def test_numbers_are_plain() -> None:
    report = held_out(Normal(1), Normal(1).sample(10), Normal(1), levels=17)
    assert all(value is None or type(value) in (int, float, str)
               for value in report.as_dict().values())  # fmt: skip
    assert not isinstance(report.nll, np.floating)


def test_two_points_are_enough_to_find_the_box() -> None:
    assert grid_mass(Normal(2), torch.zeros(2, 2), 60) == pytest.approx(1, abs=1e-4)


def test_the_mass_is_one_far_from_the_origin():
    """There single precision has no point between two of the grid."""
    flow = Flow(2, hidden=(4, 4)).double()
    flow.whiten(1e8 + torch.randn(500, 2, dtype=torch.float64))
    assert abs(grid_mass(flow, 1e8 + torch.randn(500, 2, dtype=torch.float64), 60) - 1) < 1e-3
