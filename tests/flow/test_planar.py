"""The planar chain is invertible whatever its weights, and knows its determinant."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from cnf.flow.planar import ChainReverseKL, PlanarChain

F64 = torch.float64


def chain(dim=2, depth=4, size=3.0):
    made = PlanarChain(dim, depth).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_log_determinant_is_that_of_the_jacobian(dim):
    made, z = chain(dim), torch.randn(6, dim, dtype=F64)
    _, found = made(z)
    whole = torch.autograd.functional.jacobian(lambda z: made(z)[0], z)
    expected = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))
    assert torch.allclose(found, expected[1], atol=1e-9)
    assert (expected[0] > 0).all()


def test_one_map_keeps_the_order_along_its_direction():
    made = chain(1, 1, 10.0)
    x, _ = made(torch.linspace(-5, 5, 1000, dtype=F64).unsqueeze(-1))
    assert (x[:, 0].diff() > 0).all()


def test_the_loss_is_the_mean_of_what_it_says():
    """KL(q‖p) of a chain of one map, by the change of variables written out."""
    made, z = chain(2, 1, 1.0), torch.randn(50, 2, dtype=F64)
    law = MultivariateNormal(torch.ones(2, dtype=F64), 2 * torch.eye(2, dtype=F64))
    x, logdet = made(z)
    normal = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    expected = (normal.log_prob(z) - logdet - law.log_prob(x)).mean()
    assert torch.allclose(ChainReverseKL(made, law.log_prob)(z), expected)


def test_a_chain_learns_a_normal_that_is_elsewhere():
    torch.manual_seed(0)
    made = PlanarChain(1, 8)
    law = torch.distributions.Normal(1.0, 1.0)
    objective = ChainReverseKL(made, lambda x: law.log_prob(x[:, 0]))
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        objective(torch.randn(256, 1)).backward()
        optimizer.step()
    with torch.no_grad():
        loss = objective(torch.randn(20_000, 1))
    start = kl_divergence(torch.distributions.Normal(0.0, 1.0), law)
    assert loss < 0.1 * start
