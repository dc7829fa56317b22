"""Maps of columns: monotone, onto the real line, with their determinant, chosen by unseen rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import cnf
from cnf.flow import marginals
from cnf.flow.marginals import AS_IT_IS, POWER, STEPS, Marginals, Power

F64 = torch.float64


def table(rows: int = 400) -> torch.Tensor:
    """A normal column, a skewed one, one of four levels with uniform noise, and a constant."""
    rng = np.random.default_rng(3)
    levels = (rng.choice(4, rows, p=[0.6, 0.05, 0.05, 0.3]) + rng.random(rows)) / 4
    columns = [rng.normal(5, 2, rows), rng.gamma(1.5, 1.0, rows), levels, np.full(rows, 3.0)]
    return torch.from_numpy(np.stack(columns, 1))


def fitted(x: torch.Tensor, dtype: torch.dtype = F64) -> Marginals:
    maps = Marginals(x.shape[1]).to(dtype)
    maps.fit(x)
    return maps


def far_and_near(x: torch.Tensor) -> torch.Tensor:
    """Rows of the data, and rows well outside them."""
    return torch.cat([x[:50], x[:50] + 10 * (x[:50] - x.mean(0))])


def test_they_start_as_the_identity():
    maps, x = Marginals(3), torch.randn(5, 3)
    y, logdet = maps(x)
    assert maps.is_identity and y is x and maps.invert(x) is x
    assert torch.equal(logdet, torch.zeros(5, dtype=F64))


def test_each_column_gets_the_map_that_its_law_calls_for():
    assert fitted(table()).kinds.tolist() == [AS_IT_IS, POWER, STEPS, AS_IT_IS]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_map_is_undone(dtype):
    x = far_and_near(table()).to(dtype)
    maps = fitted(table(), dtype)
    y, _ = maps(x)
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert torch.allclose(maps.invert(y), x, rtol=tolerance, atol=tolerance)


def test_the_determinant_is_that_of_the_jacobian():
    maps, x = fitted(table()), far_and_near(table())
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda r: maps(r[None])[0][0], row) for row in x]
    )
    assert torch.allclose(maps(x)[1], torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)


def test_columns_become_nearly_normal():
    x = table(3900)

    def moments(columns: torch.Tensor) -> torch.Tensor:
        z = (columns - columns.mean(0)) / columns.std(0)
        return torch.stack([z.pow(3).mean(0), z.pow(4).mean(0) - 3]).abs()

    before, after = moments(x[:, 1:3]), moments(fitted(x)(x)[0][:, 1:3])
    assert before[0, 0] > 1.2 and after[0, 0] < 0.2  # the skewed one
    assert before[1, 1] > 1.2 and after[:, 1].max() < 0.1  # the one of levels


def test_every_point_of_the_line_is_reached():
    y = torch.linspace(-30, 30, 201, dtype=F64)[:, None].expand(-1, 4)
    maps = fitted(table())
    x = maps.invert(y)
    assert torch.isfinite(x).all() and (x.diff(dim=0) > 0).all()
    assert torch.allclose(maps(x)[0], y, atol=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 1e-9, 1.0, 2.0])
def test_a_power_is_smooth_where_its_formula_is_0_over_0(exponent):
    change = Power(*torch.tensor([[0.0], [1.0], [exponent]], dtype=F64))
    x = torch.tensor([[-3.0], [-1e-12], [0.0], [1e-12], [3.0]], dtype=F64)
    y, log_slope = change.forward(x)
    assert torch.isfinite(y).all() and torch.isfinite(log_slope).all()
    assert torch.allclose(change.invert(y), x, atol=1e-12)
    if exponent == 1.0:
        assert torch.equal(y, x) and not log_slope.any()


def test_many_rows_of_few_columns_keep_their_edges(monkeypatch):
    x = torch.rand(4000, 3, dtype=F64)
    assert STEPS not in fitted(x).kinds
    monkeypatch.setattr(marginals, "ROWS_A_COLUMN", 10_000)
    assert fitted(x).kinds.tolist() == [STEPS] * 3
    assert STEPS not in fitted(x[:, :2]).kinds  # in the plane a density is looked at


@pytest.mark.parametrize("rows", [2, 10, 19])
def test_a_few_rows_decide_nothing(rows):
    assert fitted(table(400)[:rows]).is_identity


def test_a_map_survives_state_dict_copy_and_precision():
    maps, x = fitted(table()), table()
    fresh = Marginals(4).to(F64)
    fresh.load_state_dict(maps.state_dict())
    for other in (fresh, copy.deepcopy(maps)):
        assert torch.equal(other(x)[0], maps(x)[0])
    assert torch.allclose(maps.float()(x.float())[0].double(), fresh(x)[0], atol=1e-3)


def skewed_flow() -> tuple[cnf.Flow, torch.Tensor]:
    x = table(600)[:, :3].float()
    return cnf.Flow(3, hidden=(8, 8), seed=0).whiten(x), x


@torch.no_grad()
def test_the_flows_density_counts_the_maps():
    """A flow that is the identity but for its maps: its mass, by its samples' importance."""
    flow, x = skewed_flow()
    assert not flow.marginals.is_identity
    draws, log_prob = flow.sample(2000, return_log_prob=True, seed=0)
    assert torch.allclose(flow.log_prob(draws), log_prob, atol=1e-3)
    plain = cnf.Flow(3, hidden=(8, 8), marginals=None, seed=0).whiten(x)
    ratio = plain.log_prob(draws) - log_prob
    assert plain.marginals.is_identity and float(ratio.double().exp().mean()) == pytest.approx(
        1, abs=0.1
    )
    assert flow.log_prob(x).mean() > plain.log_prob(x).mean() + 0.1


def test_the_flow_maps_back_and_forth():
    flow, x = skewed_flow()
    assert torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-4)


def test_the_maps_are_saved_with_the_flow(tmp_path):
    flow, x = skewed_flow()
    flow.save(tmp_path / "flow.safetensors")
    loaded = cnf.Flow.load(tmp_path / "flow.safetensors")
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x)) and loaded.maps_marginals


def test_another_choice_is_refused():
    with pytest.raises(cnf.InputError, match="marginals must be 'auto' or None, got 'normal'"):
        cnf.Flow(2, marginals="normal")
