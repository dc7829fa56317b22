"""A flow in Pyro and among torch's distributions: guide, likelihood, divergence, transform."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.distributions import MultivariateNormal, TransformedDistribution, kl_divergence

from cnf.flow.distribution import FlowDistribution
from cnf.flow.flow import Flow

pyro = pytest.importorskip("pyro")
dist = pytest.importorskip("pyro.distributions")


@pytest.fixture(autouse=True)
def _no_parameters_of_others():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def flow() -> Flow:
    """A flow that is no identity."""
    flow = Flow(2, hidden=(8,), seed=0)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return flow


def test_a_law_is_pyro_s_as_well_where_pyro_is_there(flow):
    law = flow.dist()
    assert isinstance(law, FlowDistribution) and isinstance(law, dist.TorchDistribution.__mro__[2])
    assert law().shape == law.shape() == (2,)
    assert law.event_dim == 1
    wide = law.expand([3])
    assert type(wide) is type(law) and wide().shape == (3, 2)
    assert wide.to_event(1).log_prob(wide()).shape == ()
    assert wide.mask(torch.tensor([True, False, True])).log_prob(wide())[1] == 0


def test_without_pyro_it_is_torch_s_and_pyro_is_not_loaded():
    code = (
        "import sys, cnf; law = cnf.Flow(1, hidden=(4,)).dist(); "
        "print(type(law).__name__, 'pyro' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["FlowDistribution", "False"]


def test_a_flow_as_the_likelihood_learns_the_data_s_density(flow):
    torch.manual_seed(0)
    data = 0.5 * torch.randn(200, 2) + torch.tensor([1.0, -1.0])
    flow.whiten(data + 0.2)

    def model(data):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(data)):
            pyro.sample("x", flow.dist(), obs=data)

    def guide(data):
        pass

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    losses = [svi.step(data) for _ in range(15)]
    assert losses[-1] < losses[0] - 5
    expected = -flow.log_prob(data).sum().item()
    assert svi.evaluate_loss(data) == pytest.approx(expected, rel=1e-4)


def test_a_conditional_flow_is_a_likelihood_given_a_latent():
    flow = Flow(1, context=1, hidden=(8,), seed=0)

    def model():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
            pyro.sample("x", flow.dist(z), obs=torch.zeros(5, 1))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (5,)


def test_pyro_s_transformed_distribution_takes_the_flow_s_transform(flow):
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    law = dist.TransformedDistribution(base, [flow.transform])
    x = law.sample((6,))
    torch.testing.assert_close(law.log_prob(x), flow.log_prob(x), atol=1e-4, rtol=1e-4)


def test_torch_s_transformed_distribution_goes_on_from_the_flow(flow):
    law = TransformedDistribution(flow.dist(), [torch.distributions.AffineTransform(1.0, 2.0, 1)])
    x = law.rsample((6,))
    expected = flow.log_prob((x - 1) / 2) - 2 * math.log(2)
    torch.testing.assert_close(law.log_prob(x), expected)


def test_the_divergence_from_a_normal_is_a_mean_over_draws():
    flow = Flow(2, seed=0)  # untrained: a standard normal
    other = MultivariateNormal(torch.tensor([1.0, 0.0]), torch.eye(2))
    x, log_q = flow.dist().rsample_and_log_prob((20_000,))
    found = (log_q - other.log_prob(x)).mean()
    exact = kl_divergence(MultivariateNormal(torch.zeros(2), torch.eye(2)), other)
    assert abs(found - exact) < 0.03
    with pytest.raises(NotImplementedError):  # no formula: nothing random under that name
        kl_divergence(flow.dist(), other)
