"""A flow inside Pyro: as a guide, and as a likelihood."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cnf

pyro = pytest.importorskip("pyro")
dist = pyro.distributions

MIX = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, -1.0]])
SPREAD = 0.5
SEEN = torch.tensor([1.0, -0.5, 2.0])


@pytest.fixture(autouse=True)
def own_store():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def law(flow: cnf.Flow, *after: object) -> object:
    """The flow's law as Pyro's `sample` takes it."""
    base = dist.Normal(torch.zeros(flow.dim), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [flow.transform.with_cache(), *after])


def posterior() -> tuple[Tensor, Tensor]:
    """Mean and covariance of θ given what was seen, in closed form."""
    precision = torch.eye(2) + MIX.T @ MIX / SPREAD**2
    covariance = torch.linalg.inv(precision)
    return covariance @ MIX.T @ SEEN / SPREAD**2, covariance


def model() -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(theta @ MIX.T, SPREAD).to_event(1), obs=SEEN)


def test_a_flow_as_guide_finds_the_conjugate_posterior():
    flow = cnf.Flow(2, hidden=(16,), method="rk4", step_size=0.25, seed=0)

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("theta", law(flow))

    elbo = pyro.infer.Trace_ELBO(num_particles=128, vectorize_particles=True)
    rates = {"lr": 3e-2, "lrd": 0.985}
    svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam(rates), loss=elbo)
    losses = [svi.step() for _ in range(200)]
    mean, covariance = posterior()
    drawn = flow.sample(20_000, seed=0)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.06, rtol=0.0)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, atol=0.06, rtol=0.0)
    seen = torch.distributions.MultivariateNormal(
        torch.zeros(3), MIX @ MIX.T + SPREAD**2 * torch.eye(3)
    )
    evidence = seen.log_prob(SEEN).item()
    assert -sum(losses[-20:]) / 20 == pytest.approx(evidence, abs=0.05)


def test_a_flow_as_likelihood_gives_the_conjugate_posterior():
    noise = torch.distributions.MultivariateNormal(
        torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    )
    gaussian = noise.sample((50_000,))
    flow = cnf.Flow(2, method="rk4", step_size=0.5, seed=0).whiten(gaussian)  # and no more
    data = noise.sample((40,)) + torch.tensor([2.0, -1.0])

    def shifted() -> None:
        place = pyro.sample("place", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        shift = dist.transforms.AffineTransform(place, 1.0, event_dim=1)
        with pyro.plate("rows", len(data)):
            pyro.sample("x", law(flow, shift), obs=data)

    guide = pyro.infer.autoguide.AutoMultivariateNormal(shifted)
    svi = pyro.infer.SVI(
        shifted, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), pyro.infer.Trace_ELBO()
    )
    for _ in range(300):
        svi.step()
    precision = len(data) * noise.precision_matrix + torch.eye(2) / 100
    mean = torch.linalg.solve(precision, len(data) * noise.precision_matrix @ data.mean(0))
    found = guide.get_posterior()
    torch.testing.assert_close(found.mean.detach(), mean, atol=0.1, rtol=0.0)


def test_the_divergence_of_two_flows_is_estimated_by_draws():
    rows = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    one = cnf.Flow(2, seed=0).whiten(rows).dist()
    other = cnf.Flow(2, seed=0).whiten(2 * rows + 1).dist()
    with torch.no_grad():
        x, log_prob = one.rsample_and_log_prob((20_000,))
        divergence = (log_prob - other.log_prob(x)).mean().item()
    gaussians = [
        torch.distributions.MultivariateNormal(place.mean(0), torch.cov(place.T))
        for place in (rows, 2 * rows + 1)
    ]
    exact = torch.distributions.kl_divergence(*gaussians).item()
    assert divergence == pytest.approx(exact, abs=0.02)


def test_a_transformed_distribution_is_the_flows_law():
    flow = cnf.Flow(2, seed=0).whiten(torch.randn(1000, 2) * 3 + 1)
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(2), torch.ones(2)), 1
    )
    same = torch.distributions.TransformedDistribution(base, flow.transform)
    x = flow.sample(50, seed=0)
    torch.testing.assert_close(same.log_prob(x), flow.log_prob(x))
