"""Whitening: an affine map with a known determinant, set from data of any scale."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from cnf.error import InputError
from cnf.flow.transform import Whiten, standard_normal_log_prob

F64 = torch.float64


def correlated(rows: int = 20_000, dim: int = 4) -> torch.Tensor:
    """Normal data whose correlations are neither weak nor near 1."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(dim, dtype=F64) + 0.4 * torch.ones(dim, dim, dtype=F64).tril()
    return torch.randn(rows, dim, generator=generator, dtype=F64) @ mixing.T + 5


SCALES = {
    "unit": [1.0, 1.0, 1.0, 1.0],
    "rising": [1e-6, 1e-2, 1e2, 1e6],
    "falling": [1e6, 1e2, 1e-2, 1e-6],
    "tiny": [1e-20] * 4,
    "huge": [1e20] * 4,
}
EACH_SCALE = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


def fitted(data: torch.Tensor, dtype: torch.dtype = F64) -> Whiten:
    whiten = Whiten(data.shape[1]).to(dtype)
    whiten.fit(data)
    return whiten


def test_it_starts_as_the_identity():
    whiten, x = Whiten(3), torch.randn(5, 3)
    assert not whiten.is_fitted
    assert torch.equal(whiten(x), x) and torch.equal(whiten.invert(x), x)
    assert whiten.logdet() == 0


@EACH_SCALE
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_data_become_white(scale, dtype):
    data = correlated() * torch.tensor(scale, dtype=F64)
    whiten = fitted(data, dtype)
    z = whiten(data.to(dtype)).double()
    assert whiten.is_fitted
    assert z.mean(0).abs().max() < (1e-3 if dtype == torch.float32 else 1e-9)
    assert torch.allclose(torch.cov(z.T), torch.eye(4, dtype=F64), atol=0.01)


@EACH_SCALE
def test_the_scale_of_a_column_is_undone_and_nothing_else(scale):
    data, scales = correlated(500), torch.tensor(scale, dtype=F64)
    assert torch.allclose(fitted(data * scales)(data * scales), fitted(data)(data), atol=1e-9)


@EACH_SCALE
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_it_inverts(scale, dtype):
    data = (correlated(500) * torch.tensor(scale, dtype=F64)).to(dtype)
    whiten = fitted(data, dtype)
    there = whiten.invert(whiten(data)).double()
    error = (there - data.double()).abs() / data.double().std(0)
    assert error.max() < (2e-5 if dtype == torch.float32 else 1e-12)


@EACH_SCALE
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_logdet_is_that_of_the_jacobian(scale, dtype):
    data = correlated(500) * torch.tensor(scale, dtype=F64)
    whiten = fitted(data, dtype)
    jacobian = torch.autograd.functional.jacobian(whiten, data[:1].to(dtype))[0, :, 0].double()
    expected = jacobian.diagonal().log().sum()  # triangular; slogdet would underflow
    assert not jacobian.triu(1).any()
    assert whiten.logdet().dtype == F64
    # in float32 the Jacobian's diagonal is rounded: 1 / factor
    assert torch.allclose(whiten.logdet(), expected, rtol=1e-12 if dtype == F64 else 1e-6)
    if 1e-6 <= min(scale) <= max(scale) <= 1e6:
        assert torch.allclose(whiten.logdet(), torch.linalg.slogdet(jacobian)[1], rtol=1e-6)


def test_float32_agrees_with_float64():
    data = correlated(2000) * torch.tensor([1e-3, 1.0, 1.0, 1e3], dtype=F64)
    single, double = fitted(data, torch.float32), fitted(data)
    assert torch.allclose(single(data.float()).double(), double(data), atol=1e-4)
    assert torch.allclose(single.logdet(), double.logdet(), atol=1e-6)


def test_one_column_is_standardized():
    data = 3 + 7 * torch.randn(5000, 1, dtype=F64)
    z = fitted(data)(data)
    assert abs(z.mean()) < 1e-9 and z.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("rows", [2, 3, 10])
def test_fewer_rows_than_columns_are_enough(rows):
    data = torch.randn(rows, 20, dtype=F64)
    whiten = fitted(data)
    assert torch.isfinite(whiten(data)).all() and torch.isfinite(whiten.logdet())
    assert torch.allclose(whiten.invert(whiten(data)), data, atol=1e-10)


def test_columns_that_follow_from_each_other_are_survived():
    coin = torch.randint(0, 2, (400, 1)).double()
    normal = torch.randn(400, 1, dtype=F64)
    for columns in ([coin, coin], [coin, 1 - coin, normal], [normal, normal], [normal, -normal]):
        data = torch.cat(columns, 1)
        for dtype in (torch.float32, F64):
            whiten = fitted(data, dtype)
            there = whiten.invert(whiten(data.to(dtype))).double()
            assert torch.allclose(there, data, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e8, 1e-30])
def test_a_constant_column_is_refused_by_its_index(value):
    data = correlated(100)
    data[:, 2] = value
    with pytest.raises(InputError, match=r"column 2 is constant \(.*drop it"):
        Whiten(4).fit(data)


def test_one_row_is_refused():
    with pytest.raises(InputError, match="constant"):
        Whiten(2).fit(torch.randn(1, 2))


def test_a_spread_too_small_for_the_dtype_is_refused():
    data = correlated(50) * 1e-42
    fitted(data)  # float64 can
    with pytest.raises(InputError, match=r"too small for torch.float32; multiply it"):
        fitted(data, torch.float32)


def test_a_column_far_from_zero_is_no_constant():
    data = 1e9 + torch.randn(200, 1, dtype=F64)
    z = fitted(data)(data)
    assert z.std() == pytest.approx(1, abs=0.05) and z.abs().max() < 6


def test_it_has_no_gradient_of_its_own_but_passes_one():
    whiten = fitted(correlated(100))
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    whiten(x).sum().backward()
    assert torch.allclose(x.grad, torch.linalg.inv(whiten.factor).sum(0).expand(3, -1))
    assert not list(whiten.parameters())


def test_fitting_data_that_carry_gradients_keeps_no_graph():
    data = correlated(100).requires_grad_()
    whiten = fitted(data)
    assert not any(buffer.requires_grad for buffer in whiten.buffers())


def test_its_state_survives_copies():
    whiten, x = fitted(correlated(100)), torch.randn(3, 4, dtype=F64)
    other = Whiten(4).double()
    other.load_state_dict(whiten.state_dict())
    for twin in (other, copy.deepcopy(whiten)):
        assert torch.equal(twin(x), whiten(x)) and twin.is_fitted


@pytest.mark.parametrize("dim", [1, 2, 50])
def test_the_standard_normal_is_torchs(dim):
    z = 3 * torch.randn(7, dim, dtype=F64)
    law = torch.distributions.MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())
    assert torch.allclose(standard_normal_log_prob(z), law.log_prob(z))
    assert standard_normal_log_prob(torch.zeros(0, dim)).shape == (0,)
    assert math.isclose(
        standard_normal_log_prob(np.pi * torch.zeros(1, dim)).item(),
        -dim / 2 * math.log(2 * math.pi),
        rel_tol=1e-6,
    )
