"""What a flow does on the way agrees with where it starts and where it ends."""

from __future__ import annotations

import pytest
import torch

from cnf.flow.course import log_density_at, paths, velocity_at
from cnf.flow.flow import Flow

F64 = torch.float64
GIVEN = torch.tensor([0.5, -1.0, 3.0], dtype=F64)


def untrained(context=0):
    torch.manual_seed(0)
    tight = {"rtol": 1e-8, "atol": 1e-8, "logdet_atol": 1e-8}
    flow = Flow(2, context=context, hidden=(8, 8), bandwidth=None, **tight).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow.whiten(
        torch.randn(200, 2, dtype=F64) @ torch.tensor([[2.0, 0.5], [0, 1.0]]).double(),
        torch.randn(200, context, dtype=F64) if context else None,
    )


@pytest.fixture
def flow():
    return untrained()


def test_paths_lead_from_the_base_to_the_data(flow):
    z = torch.randn(5, 2, dtype=F64)
    found = paths(flow, z, [0.0, 0.4, 1.0])
    assert found.shape == (3, 5, 2)
    assert torch.allclose(found[0], flow.unwhite(z))
    assert torch.allclose(found[2], flow.decode(z), atol=1e-6)


def test_the_density_at_the_end_is_the_flows_and_at_the_start_the_bases(flow):
    x = torch.randn(5, 2, dtype=F64)
    assert torch.allclose(log_density_at(flow, x, 1.0), flow.log_prob(x), atol=1e-9)
    z, logdet = flow.white(x)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + logdet
    assert torch.allclose(log_density_at(flow, x, 0.0), expected)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_the_density_on_the_way_has_mass_one(flow, t):
    side = torch.linspace(-14, 14, 141, dtype=F64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = log_density_at(flow, grid, t).exp().sum() * (side[1] - side[0]) ** 2
    assert mass == pytest.approx(1.0, abs=1e-3)


def test_velocities_are_the_slopes_of_the_paths(flow):
    z = torch.randn(5, 2, dtype=F64)
    before, at, after = paths(flow, z, [0.0, 0.4 - 1e-3, 0.4, 0.4 + 1e-3])[1:]
    assert torch.allclose(velocity_at(flow, at, 0.4), (after - before) / 2e-3, atol=1e-4)


def test_a_conditional_flow_is_looked_at_given_a_context():
    flow, x = untrained(context=3), torch.randn(5, 2, dtype=F64)
    found = paths(flow, x, [0.0, 0.5 - 1e-3, 0.5, 0.5 + 1e-3, 1.0], GIVEN)
    assert torch.allclose(found[-1], flow.decode(x, GIVEN), atol=1e-6)
    assert torch.allclose(log_density_at(flow, x, 1.0, GIVEN), flow.log_prob(x, GIVEN), atol=1e-9)
    slopes = (found[3] - found[1]) / 2e-3
    assert torch.allclose(velocity_at(flow, found[2], 0.5, GIVEN), slopes, atol=1e-4)
    other = paths(flow, x, [0.0, 1.0], -GIVEN)[-1]
    assert not torch.allclose(found[-1], other, atol=1e-2)
