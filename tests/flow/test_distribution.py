"""A flow is a torch distribution and a torch transform, with all that these promise."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    Normal,
    TransformedDistribution,
    constraints,
    kl_divergence,
)

import cnf
from cnf.error import InputError
from cnf.flow.flow import Flow

F64 = torch.float64


def shaken(flow: Flow, size: float = 0.3) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return flow.double()


def plain(**settings) -> Flow:
    return shaken(
        Flow(2, hidden=(8, 7), seed=0, rtol=1e-8, atol=1e-8, logdet_atol=1e-7, **settings)
    )


CONTEXTS = {"()": (), "(4,)": (4,), "(3, 4)": (3, 4)}


@pytest.fixture(params=["none", *CONTEXTS])
def dist(request) -> Distribution:
    """Without a context, and with contexts of every batch shape."""
    if request.param == "none":
        return plain().dist()
    return plain(context=3).dist(torch.randn(*CONTEXTS[request.param], 3, dtype=F64))


def test_it_has_the_shapes_of_a_distribution(dist):
    assert isinstance(dist, Distribution) and dist.has_rsample
    assert dist.event_shape == (2,) and dist.support is constraints.real_vector
    for shape in ((), (5,), (2, 1)):
        x = dist.sample(torch.Size(shape))
        assert x.shape == (*shape, *dist.batch_shape, 2) and not x.requires_grad
        assert dist.log_prob(x).shape == (*shape, *dist.batch_shape)


def test_its_density_is_the_flows(dist):
    x = dist.sample((5,))
    assert torch.allclose(dist.log_prob(x), dist.flow.log_prob(x, dist.context), atol=1e-9)
    one = torch.zeros(2, dtype=F64)
    assert dist.log_prob(one).shape == dist.batch_shape


def test_draws_carry_gradients_and_their_densities(dist):
    x, log_prob = dist.rsample_and_log_prob((6,))
    assert x.requires_grad and x.shape == (6, *dist.batch_shape, 2)
    assert torch.allclose(dist.log_prob(x), log_prob, atol=1e-5)
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None for p in dist.flow.field.parameters())


def test_a_seeded_draw_is_the_same_again(dist):
    torch.manual_seed(4)
    x = dist.sample((3,))
    torch.manual_seed(4)
    assert torch.equal(dist.rsample((3,)).detach(), x)


def test_it_expands(dist):
    wide = dist.expand((6, *dist.batch_shape))
    assert wide.batch_shape == (6, *dist.batch_shape) and wide.event_shape == (2,)
    x = wide.sample()
    assert x.shape == (6, *dist.batch_shape, 2)
    assert torch.allclose(wide.log_prob(x), dist.log_prob(x), atol=1e-9)
    assert len({tuple(row.tolist()) for row in x.reshape(-1, 2)}) == x.numel() // 2


def test_it_can_be_wrapped_as_any_distribution():
    dist = plain(context=3).dist(torch.randn(4, 3, dtype=F64))
    joint = Independent(dist, 1)
    x = joint.sample((5,))
    assert torch.allclose(joint.log_prob(x), dist.log_prob(x).sum(-1))
    moved = TransformedDistribution(dist, AffineTransform(1.0, 2.0, event_dim=1))
    expected = dist.log_prob((x - 1) / 2) - 2 * torch.tensor(2.0, dtype=F64).log()
    assert torch.allclose(moved.log_prob(x), expected, atol=1e-6)


def test_values_that_are_none_are_refused_where_arguments_are_validated():
    dist = plain(support=(0.0, None)).dist(validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        dist.log_prob(torch.tensor([-1.0, 1.0], dtype=F64))
    with pytest.raises(ValueError, match="event_shape"):
        dist.log_prob(torch.zeros(3, dtype=F64))
    silent = plain(support=(0.0, None)).dist(validate_args=False)
    assert silent.log_prob(torch.tensor([-1.0, 1.0], dtype=F64)) == -torch.inf


def test_a_base_without_rsample_makes_a_distribution_without_it():
    assert not plain(base=cnf.GaussianMixture(2, 3)).dist().has_rsample
    assert plain(base=cnf.StudentT(2)).dist().has_rsample


def test_guidance_is_part_of_the_distribution():
    flow, context = plain(context=3, context_dropout=0.1), torch.randn(3, dtype=F64)
    x = torch.randn(4, 2, dtype=F64)
    found = flow.dist(context, guidance=2.0).log_prob(x)
    assert torch.allclose(found, flow.log_prob(x, context, guidance=2.0))


def test_a_conditional_flow_needs_a_context_to_be_a_distribution():
    with pytest.raises(InputError, match="got no context"):
        plain(context=3).dist()
    with pytest.raises(InputError, match="got no context"):
        _ = plain(context=3).transform
    with pytest.raises(InputError, match="takes no context"):
        plain().dist(torch.zeros(3))


# the transform ------------------------------------------------------------------------------


def test_the_transform_is_the_map_with_its_determinant():
    flow = plain()
    z = torch.randn(4, 2, dtype=F64)
    x = flow.transform(z)
    assert torch.allclose(x, flow.decode(z)) and torch.allclose(flow.transform.inv(x), z, atol=1e-6)
    whole = torch.autograd.functional.jacobian(flow.transform, z)
    known = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))[1]
    assert torch.allclose(flow.transform.log_abs_det_jacobian(z, x), known, atol=1e-6)
    assert flow.transform.bijective and flow.transform.domain is constraints.real_vector
    cached = flow.transform.with_cache()
    assert cached.inv(cached(z)) is z


def test_a_transformed_normal_is_the_flow():
    flow = plain()
    base = Independent(Normal(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), 1)
    law = TransformedDistribution(base, [flow.transform])
    x = law.rsample((6,))
    assert x.requires_grad
    assert torch.allclose(law.log_prob(x), flow.log_prob(x), atol=1e-6)


def test_a_conditional_transform_belongs_to_its_distribution():
    flow, context = plain(context=3), torch.randn(3, dtype=F64)
    z = torch.randn(4, 2, dtype=F64)
    assert torch.allclose(flow.dist(context).transform(z), flow.decode(z, context))


def test_without_a_rule_there_is_no_divergence_between_them():
    with pytest.raises(NotImplementedError):
        kl_divergence(plain().dist(), plain().dist())
