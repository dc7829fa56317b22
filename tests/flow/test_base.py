"""Learned bases are distributions, start where they say, learn, and are stored with their flow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

import cnf
from cnf.error import InputError
from cnf.flow.flow import Flow

F64 = torch.float64
BASES = {
    "diagonal": lambda: cnf.DiagonalGaussian(2),
    "student": lambda: cnf.StudentT(2, df=4.0),
    "mixture": lambda: cnf.GaussianMixture(2, 5),
}
EACH_BASE = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def shaken(module: torch.nn.Module, size: float = 0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


@EACH_BASE
def test_a_base_integrates_to_one(make):
    base = shaken(make()).requires_grad_(False)
    axis = torch.linspace(-60, 60, 1601)
    density = base.log_prob(torch.cartesian_prod(axis, axis)).double().exp()
    assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=2e-3)


@EACH_BASE
def test_draws_follow_the_law(make):
    base = shaken(make())
    draws = base.sample((40_000,))
    law = base.distribution
    assert draws.shape == (40_000, 2) and not draws.requires_grad
    assert torch.allclose(draws.mean(0), law.mean, atol=0.08)
    assert -base.log_prob(draws).mean() > -base.log_prob(base.sample((40_000,))).mean() - 0.05


def test_bases_start_where_they_say():
    x = torch.randn(9, 2)
    normal = distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    student = distributions.StudentT(4.0).log_prob(x).sum(-1)
    assert torch.allclose(cnf.DiagonalGaussian(2).log_prob(x), normal, atol=1e-5)
    assert torch.allclose(cnf.StudentT(2, df=4).log_prob(x), student, atol=1e-5)
    one = cnf.GaussianMixture(2, 1)
    assert torch.allclose(
        one.log_prob(x), distributions.Normal(one.mean, 1.0).log_prob(x).sum(-1), atol=1e-5
    )


@EACH_BASE
def test_a_flow_starts_from_it(make):
    flow = Flow(2, base=make(), hidden=(8, 8))
    x = torch.randn(7, 2)
    assert torch.allclose(flow.log_prob(x), flow.base.log_prob(x), atol=1e-4)
    shaken(flow)
    draws, log_prob = flow.sample(20, return_log_prob=True, seed=0)
    assert torch.allclose(flow.log_prob(draws), log_prob, atol=2e-2)
    assert {name.split(".")[0] for name, _ in flow.named_parameters()} == {"base", "field"}


@EACH_BASE
def test_every_parameter_gets_its_gradient(make):
    flow = shaken(Flow(2, base=make(), hidden=(4, 4)))
    flow.log_prob(torch.randn(20, 2)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())
    flow.zero_grad()
    flow.rsample(20, seed=0).square().sum().backward()
    reached = all(p.grad is not None and p.grad.any() for p in flow.base.parameters())
    assert reached == flow.base.has_rsample == (not isinstance(flow.base, cnf.GaussianMixture))


@EACH_BASE
def test_it_is_learned_with_the_flow(make):
    x = 3 + 2 * torch.randn(400, 2)
    flow = Flow(2, base=make(), hidden=(4, 4), whiten=False, marginals=None)
    before = flow.log_prob(x).mean()
    flow.fit(x, steps=60, lr=0.05, batch_size=200, progress=False, seed=0)
    assert flow.log_prob(x).mean() > before + 1


@EACH_BASE
def test_it_comes_back_from_the_disk(make, tmp_path):
    flow = shaken(Flow(2, base=make(), hidden=(4, 4)))
    flow.save(tmp_path / "flow")
    loaded = Flow.load(tmp_path / "flow")
    x = torch.randn(5, 2)
    assert type(loaded.base) is type(flow.base) and loaded.config == flow.config
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    assert torch.equal(loaded.sample(3, seed=0), flow.sample(3, seed=0))


@EACH_BASE
def test_it_follows_the_flow_to_double_precision(make):
    flow = shaken(Flow(2, base=make(), hidden=(4, 4))).double()
    assert flow.log_prob(torch.zeros(2)).dtype == F64 == flow.sample(2).dtype


def test_heavy_tails_stay_heavy():
    far = torch.tensor([[60.0, 0.0]])
    heavy, light = Flow(2, base=cnf.StudentT(2), hidden=(4, 4)), Flow(2, hidden=(4, 4))
    assert heavy.log_prob(far) > -40 and light.log_prob(far) < -1000


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: cnf.StudentT(2, df=0), "df must be a number > 0"),
        (lambda: cnf.StudentT(2, df=math.nan), "df must be a number > 0"),
        (lambda: cnf.GaussianMixture(2, 0), "components must be a whole number"),
        (lambda: cnf.DiagonalGaussian(0), "dim must be a whole number"),
        (lambda: Flow(3, base=cnf.StudentT(2)), "vectors of 3"),
        (lambda: Flow(2, base=torch.nn.Linear(2, 2)), "base must be a torch distribution, or one"),
    ],
)
def test_what_makes_no_base_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()
