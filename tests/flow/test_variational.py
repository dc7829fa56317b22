"""Reverse KL fits a flow to a density known up to a constant."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

import cnf
from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.flow.regularizer import Regularizer
from cnf.flow.variational import ReverseKL

LOG_Z = 1.7  # what the densities below integrate to, as a logarithm
NORMAL = MultivariateNormal(torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
TWO_MODES = MixtureSameFamily(
    Categorical(torch.tensor([0.5, 0.5])),
    MultivariateNormal(torch.tensor([[-1.5, 0.0], [1.5, 0.0]]), 0.3 * torch.eye(2).expand(2, 2, 2)),
)


def unnormalized(law):
    return lambda x: law.log_prob(x) + LOG_Z


def test_the_loss_is_the_kl_less_log_z():
    flow = Flow(2, hidden=(4,), seed=0)  # untrained, q is the standard normal
    kl = torch.distributions.kl_divergence(MultivariateNormal(torch.zeros(2), torch.eye(2)), NORMAL)
    objective = ReverseKL(flow, unnormalized(NORMAL))
    losses = torch.stack([objective(2000).detach() for _ in range(20)])
    assert abs(losses.mean() - (kl - LOG_Z)) < 4 * losses.std() / 20**0.5
    assert objective.nfe > 0 and objective.terms.keys() == {"kl"}


def test_draws_of_the_base_may_be_handed_in():
    flow = Flow(2, hidden=(4,), seed=0)
    z = flow.draw_base(50, 3)
    objective = ReverseKL(flow, NORMAL.log_prob)
    assert objective(z) == objective(z)
    x, log_prob = flow.rsample(50, return_log_prob=True, seed=3)
    assert torch.allclose(objective(z), (log_prob - NORMAL.log_prob(x)).mean(), atol=1e-5)


def test_terms_are_added_to_it():
    flow = Flow(2, hidden=(4,), seed=0)
    torch.nn.init.normal_(flow.field.out)
    z = flow.draw_base(50, 3)
    plain, added = (
        ReverseKL(flow, NORMAL.log_prob, regularizer=regularizer)
        for regularizer in (None, Regularizer(kinetic=2.0))
    )
    assert torch.allclose(added(z), plain(z) + 2 * added.terms["kinetic"], atol=1e-5)
    assert added.terms["kinetic"] > 0


def test_a_normal_density_is_found():
    flow = Flow(2, hidden=(16, 16), bandwidth=None, rtol=1e-4, atol=1e-4, seed=0)
    records = []
    flow.fit_to_density(
        unnormalized(NORMAL), steps=150, batch_size=128, seed=0, lr=2e-2,
        callback=records.append, progress=False,
    )  # fmt: skip
    x, log_q = flow.sample(4000, return_log_prob=True, seed=1)
    assert (log_q - NORMAL.log_prob(x)).mean() < 0.02  # KL(q‖p) in nats
    assert torch.allclose(x.mean(0), NORMAL.mean, atol=0.1)
    assert torch.allclose(torch.cov(x.T), NORMAL.covariance_matrix, atol=0.12)
    scores = [record.validation for record in records if record.validation is not None]
    assert {record.phase for record in records} == {"kl"}
    assert min(scores) == pytest.approx(-LOG_Z, abs=0.05)  # minus the bound on log Z


def test_both_modes_are_found():
    flow = Flow(2, hidden=(32, 32), bandwidth=None, rtol=1e-4, atol=1e-4, seed=0)
    flow.fit_to_density(
        unnormalized(TWO_MODES), steps=200, batch_size=128, seed=0, lr=1e-2, progress=False
    )
    x, log_q = flow.sample(4000, return_log_prob=True, seed=1)
    assert (log_q - TWO_MODES.log_prob(x)).mean() < 0.1
    assert (x[:, 0] > 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_a_fit_never_ends_worse_than_it_began():
    flow = Flow(2, hidden=(4,), seed=0)
    law = MultivariateNormal(torch.zeros(2), torch.eye(2))  # nothing to gain
    flow.fit_to_density(law.log_prob, steps=3, lr=3.0, batch_size=16, seed=0, progress=False)
    x, log_q = flow.sample(1000, return_log_prob=True, seed=1)
    assert (log_q - law.log_prob(x)).mean() < 0.01


def test_a_module_that_is_the_target_is_not_trained():
    class Target(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            return -0.5 * (x - self.mean).square().sum(-1)

    target, flow = Target(), Flow(2, hidden=(4,), seed=0)
    assert not {id(p) for p in ReverseKL(flow, target).parameters()} & {id(target.mean)}
    flow.fit_to_density(target, steps=3, batch_size=16, seed=0, progress=False)
    assert target.mean.tolist() == [1.0, 1.0] and flow.field.out.any()


@pytest.mark.parametrize(
    "kind, words", [(cnf.GaussianMixture, "is learned and cannot"), (None, "")]
)
def test_a_base_without_gradients_serves_where_it_is_not_learned(kind, words):
    base = TWO_MODES if kind is None else kind(2, 3)
    flow = Flow(2, hidden=(4,), base=base, seed=0)
    if kind is None:
        flow.fit_to_density(NORMAL.log_prob, steps=2, batch_size=16, seed=0, progress=False)
    else:
        with pytest.raises(InputError, match=words):
            flow.fit_to_density(NORMAL.log_prob, steps=2, progress=False)


def posterior(x, c):
    """log of e^LOG_Z N(x; (2c, −c), (0.5, 0.5 + c²)²), c (n, 1)."""
    law = Normal(torch.cat([2 * c, -c], 1), torch.cat([torch.full_like(c, 0.5), 0.5 + c**2], 1))
    return law.log_prob(x).sum(-1) + LOG_Z


def test_the_loss_given_contexts_is_that_of_every_row():
    flow = Flow(2, context=1, hidden=(4,), seed=0)
    torch.nn.init.normal_(flow.field.out)
    z, c = flow.draw_base(50, 3), torch.rand(50, 1)
    x, log_prob = flow.rsample(50, c, return_log_prob=True, seed=3)
    expected = (log_prob - posterior(x, c)).mean()
    assert torch.allclose(ReverseKL(flow, posterior)(z, c), expected, atol=1e-5)
    one = ReverseKL(flow, posterior)(z, 0.5)  # one for all
    assert torch.allclose(one, ReverseKL(flow, posterior)(z, torch.full((50, 1), 0.5)))


def test_one_flow_learns_a_density_for_every_context():
    flow = Flow(2, context=1, hidden=(32, 32), bandwidth=None, rtol=1e-4, atol=1e-4, seed=0)
    contexts = torch.linspace(10.0, 12.0, 200)[:, None]  # far from 0: they are standardized

    def shifted(x, c):
        return posterior(x, c - 11.0)

    flow.fit_to_density(shifted, contexts, steps=200, batch_size=256, seed=0, progress=False)
    for c in (10.2, 11.0, 11.9):
        given = torch.full((2000, 1), c)
        x, log_prob = flow.sample(2000, given, return_log_prob=True, seed=1)
        kl = (log_prob - shifted(x, given)).mean().item() + LOG_Z
        assert 0 <= kl + 0.01 < 0.06, (c, kl)


def test_contexts_that_do_not_fit_are_refused():
    conditional = Flow(2, context=1, hidden=(4,))
    for context, words in ((None, "got no context"), (torch.zeros(0, 1), "no rows to draw from")):
        with pytest.raises(InputError, match=words):
            conditional.fit_to_density(posterior, context, steps=1, progress=False)
    with pytest.raises(InputError, match="takes no context"):
        Flow(2, hidden=(4,)).fit_to_density(posterior, torch.zeros(3, 1), steps=1, progress=False)
    with pytest.raises(InputError, match="knows no density to learn without one"):
        ReverseKL(Flow(2, context=1, context_dropout=0.1, hidden=(4,)), posterior)


def test_a_seed_fits_the_same_again_and_leaves_the_generator_alone():
    samples = []
    state = torch.get_rng_state()
    for _ in range(2):
        flow = Flow(2, hidden=(4,), seed=0)
        flow.fit_to_density(NORMAL.log_prob, steps=3, batch_size=16, seed=5, progress=False)
        samples.append(flow.sample(5, seed=0))
    assert torch.equal(*samples) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "log_density, said",
    [
        (NORMAL, "log_density must be a function of x"),
        (lambda x: x, r"must return one value a row, \(2048,\), got \(2048, 2\)"),
        (lambda x: 1.0, "must return one value a row, .* got float"),
        (lambda x: NORMAL.log_prob(x.detach()), "no gradient goes through log_density"),
    ],
)
def test_a_log_density_that_cannot_be_used_is_refused(log_density, said):
    flow = Flow(2, hidden=(4,), seed=0)
    torch.nn.init.normal_(flow.field.out)
    with pytest.raises(InputError, match=said):
        flow.fit_to_density(log_density, steps=2, progress=False)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(steps=0), "steps must be"),
        (dict(steps=1, seconds=1), "both budgets"),
        (dict(lr=-1.0), "lr must be a number > 0"),
        (dict(batch_size=0), "batch_size must be"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Flow(2, hidden=(4,)).fit_to_density(NORMAL.log_prob, progress=False, **settings)


def test_a_density_that_is_nowhere_finite_stops_with_a_sentence():
    from cnf.error import TrainingError

    with pytest.raises(TrainingError, match="batches in a row"):
        Flow(2, hidden=(4,)).fit_to_density(
            lambda x: x.sum(-1) * math.nan, steps=60, batch_size=8, progress=False
        )
