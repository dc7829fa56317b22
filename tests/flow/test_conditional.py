"""A conditional flow is a density for each context: exact, fitted, guided, stored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

import cnf
from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.flow.objective import FlowMatching, MaximumLikelihood, expected_velocity

F64 = torch.float64
TIGHT = dict(rtol=1e-9, atol=1e-9, logdet_atol=1e-8)
GRADIENTS = ["backprop", "checkpoint", "adjoint"]
DIVERGENCES = [cnf.ClosedForm(), cnf.Tangents(), cnf.Hutchinson(3)]


class Driven(nn.Module):
    """f(t, x, c) = A x + B c, of which everything is known."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.4, -0.9], [0.5, -0.2]], dtype=F64))
        self.drive = nn.Parameter(torch.tensor([[1.0, 0.0, -2.0], [0.5, 1.5, 0.3]], dtype=F64))

    def forward(self, t, x, context):
        return x @ self.matrix.T + context @ self.drive.T

    def law(self, context):
        forth = torch.linalg.matrix_exp(self.matrix)
        push = torch.linalg.solve(self.matrix, forth - torch.eye(2, dtype=F64)) @ self.drive
        return MultivariateNormal(context @ push.T, forth @ forth.T)


class KnownDriven(Driven):
    """The same, which knows its divergence."""

    def prepare(self):
        return (self.matrix.trace(),)

    def with_divergence(self, t, x, context, trace):
        return self(t, x, context), trace.expand(len(x))


class JointMixture(nn.Module):
    """Three Gaussians over (x, c) in R² × R, and the field that carries the normal to their law of
    x given c: E[z₁ − z₀ | z_t = x, c], all in closed form.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.mean = 1.5 * torch.randn(3, 3, generator=generator, dtype=F64)
        mixing = torch.randn(3, 3, 3, generator=generator, dtype=F64)
        self.covariance = 0.3 * mixing @ mixing.mT + 0.1 * torch.eye(3, dtype=F64)
        self.share = torch.tensor([0.5, 0.3, 0.2], dtype=F64)

    def given(self, context):
        """(log weights, means, covariances) of x given c (batch, 1): (batch, 3, …)."""
        spread = self.covariance[:, 2, 2]
        slope = self.covariance[:, :2, 2] / spread[:, None]
        inner = self.covariance[:, :2, :2] - slope[:, :, None] * self.covariance[:, None, :2, 2]
        away = context - self.mean[:, 2]
        weights = self.share.log() + Normal(0.0, spread.sqrt()).log_prob(away)
        means = self.mean[:, :2] + slope * away.unsqueeze(-1)
        return weights.log_softmax(-1), means, inner

    def log_prob(self, x, context):
        weights, means, covariances = self.given(context)
        parts = MultivariateNormal(means, covariances).log_prob(x.unsqueeze(1))
        return torch.logsumexp(weights + parts, -1)

    def forward(self, t, x, context):
        weights, means, covariances = self.given(context)
        t = t.reshape(-1, 1, 1)
        eye = torch.eye(2, dtype=F64)
        spread = t.unsqueeze(-1).square() * covariances + (1 - t.unsqueeze(-1)).square() * eye
        law = MultivariateNormal(t * means, spread)
        share = (weights + law.log_prob(x.unsqueeze(1))).softmax(-1)
        away = torch.linalg.solve(spread, (x.unsqueeze(1) - t * means).unsqueeze(-1)).squeeze(-1)
        pulled = (t.unsqueeze(-1) * covariances @ away.unsqueeze(-1)).squeeze(-1) - (1 - t) * away
        return (share.unsqueeze(-1) * (means + pulled)).sum(1)


class TwoHumps:
    """½ N(m(c), s(c)²) + ½ N(−m(c), s(c)²) of one column, with m = 2 + c and s = e^(c/2)/3."""

    @staticmethod
    def parameters(context):
        return 2 + context, (0.5 * context).exp() / 3

    def sample(self, context):
        mean, scale = self.parameters(context)
        sign = torch.randint(0, 2, context.shape) * 2.0 - 1
        return sign * mean + scale * torch.randn_like(context)

    def log_prob(self, x, context):
        mean, scale = self.parameters(context)
        both = torch.stack([Normal(sign * mean, scale).log_prob(x) for sign in (1, -1)])
        return (torch.logsumexp(both, 0) - math.log(2)).squeeze(-1)


def shaken(flow: Flow, size: float = 0.3) -> Flow:
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            share = 0.3 if ".given." in name else 1.0  # wide layers: a smooth field all the same
            parameter.add_(share * size * torch.randn_like(parameter))
    return flow


def exact(dim: int = 2, context: int = 3, **settings) -> Flow:
    flow = Flow(dim, context=context, **{"hidden": (8, 7), "seed": 0, **TIGHT, **settings})
    return shaken(flow).double()


# the density --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [Driven, KnownDriven])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_driven_linear_field_has_the_gaussians_density(field, gradient):
    flow = Flow(2, context=3, field=field(), gradient=gradient, **TIGHT).double()
    x, context = torch.randn(9, 2, dtype=F64), torch.randn(9, 3, dtype=F64, requires_grad=True)
    found, known = flow.log_prob(x, context), flow.field.law(context).log_prob(x)
    assert torch.allclose(found, known, atol=1e-7)
    wanted = [context, *flow.parameters()]
    for part, same in zip(
        torch.autograd.grad(found.sum(), wanted),
        torch.autograd.grad(known.sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(part, same, atol=1e-5)


def test_a_driven_linear_field_has_the_gaussians_samples():
    flow = Flow(2, context=3, field=Driven(), **TIGHT).double()
    context = torch.tensor([0.3, -1.0, 0.5], dtype=F64)
    draws, law = flow.sample(20_000, context, seed=0), flow.field.law(context)
    assert torch.allclose(draws.mean(0), law.mean, atol=0.05)
    assert torch.allclose(torch.cov(draws.T), law.covariance_matrix, atol=0.06)


def test_the_density_is_that_of_a_conditional_gaussian_mixture_in_closed_form():
    law = JointMixture()
    flow = Flow(2, context=1, field=law, **TIGHT).double()
    x, context = 2 * torch.randn(12, 2, dtype=F64), torch.randn(12, 1, dtype=F64)
    with torch.no_grad():
        assert torch.allclose(flow.log_prob(x, context), law.log_prob(x, context), atol=1e-6)
        draws, log_prob = flow.sample(20, context[0], seed=0, return_log_prob=True)
        assert torch.allclose(log_prob, law.log_prob(draws, context[:1].expand(20, -1)), atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES[:2], ids=type)
@pytest.mark.parametrize("hidden", [(8,), (8, 7), (8, 7, 6)])
def test_log_prob_is_the_jacobian_of_encode(hidden, divergence):
    if len(hidden) == 3 and divergence == cnf.ClosedForm():
        divergence = "auto"
    flow = exact(hidden=hidden, divergence=divergence)
    x, context = torch.randn(3, 2, dtype=F64), torch.randn(3, 3, dtype=F64)
    whole = torch.autograd.functional.jacobian(lambda x: flow.encode(x, context), x)
    logdet = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))[1]
    base = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    expected = base.log_prob(flow.encode(x, context)) + logdet
    assert torch.allclose(flow.log_prob(x, context), expected, atol=1e-6)
    z, found = flow.encode(x, context, return_logdet=True)
    assert torch.allclose(found, logdet, atol=1e-6)
    assert torch.allclose(flow.decode(z, context), x, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=type)
def test_every_gradient_method_finds_the_same_gradient(divergence):
    found = {}
    for gradient in GRADIENTS:
        torch.manual_seed(3)
        loose = dict(rtol=1e-6, atol=1e-6, logdet_atol=1e-6)
        flow = exact(gradient=gradient, divergence=divergence, **loose)
        x = torch.randn(4, 2, dtype=F64)
        context = torch.randn(4, 3, dtype=F64, requires_grad=True)
        flow.log_prob(x, context).sum().backward()
        found[gradient] = [context.grad, *(p.grad for p in flow.parameters())]
    for gradient in ("checkpoint", "adjoint"):
        for part, expected in zip(found[gradient], found["backprop"], strict=True):
            assert torch.allclose(part, expected, atol=1e-3, rtol=1e-2) and expected.any()


def test_backward_given_a_context_goes_by_the_formula_alone(monkeypatch):
    flow, graphs = exact(), []
    original = cnf.nets.BilinearMLP.with_divergence

    def noted(self, *arguments):
        graphs.append(torch.is_grad_enabled())
        return original(self, *arguments)

    monkeypatch.setattr(cnf.nets.BilinearMLP, "with_divergence", noted)
    loss = cnf.MaximumLikelihood(flow)(torch.randn(5, 2), torch.randn(5, 3))
    loss.backward()
    assert len(graphs) > 5 and not any(graphs[1:])  # the first tells what the field returns
    assert all(p.grad is not None for p in flow.parameters())


def test_the_context_matters_and_its_rows_stay_apart():
    flow = exact()
    x, context = torch.randn(5, 2, dtype=F64), torch.randn(5, 3, dtype=F64)
    whole = flow.log_prob(x, context)
    for i in range(5):
        assert torch.allclose(flow.log_prob(x[i], context[i]), whole[i], atol=1e-7)
    assert (flow.log_prob(x, context.roll(1, 0)) - whole).abs().min() > 1e-3


@pytest.mark.parametrize(
    "x, context, shape",
    [
        ((4, 2), (3,), (4,)),
        ((4, 2), (4, 3), (4,)),
        ((4, 2), (1, 3), (4,)),
        ((5, 4, 2), (4, 3), (5, 4)),
        ((5, 4, 2), (5, 1, 3), (5, 4)),
        ((2,), (3,), ()),
        ((0, 2), (3,), (0,)),
        ((0, 2), (0, 3), (0,)),
    ],
)
def test_contexts_are_broadcast(x, context, shape):
    flow = exact()
    x, context = torch.randn(x, dtype=F64), torch.randn(context, dtype=F64)
    found = flow.log_prob(x, context)
    assert found.shape == shape
    spread = context.expand(*shape, 3).reshape(-1, 3)
    each = flow.log_prob(x.reshape(-1, 2), spread) if found.numel() else found.reshape(-1)
    assert torch.allclose(found.reshape(-1), each, atol=1e-7)
    assert flow.encode(x, context).shape == x.shape == flow.decode(x, context).shape


def test_a_context_of_one_column_may_be_a_number_or_an_array():
    flow, x = exact(context=1), torch.randn(4, 2, dtype=F64)
    one = flow.log_prob(x, torch.full((4, 1), 0.7, dtype=F64))
    for same in (0.7, [0.7], np.full(4, 0.7), np.full((4, 1), 0.7), torch.full((4,), 0.7)):
        assert torch.allclose(flow.log_prob(x, same), one, atol=1e-6)
    assert flow.sample(3, 0.7).shape == (3, 2)


def test_an_untrained_conditional_flow_is_its_base():
    flow, x = Flow(2, context=2, hidden=(8, 8)), torch.randn(5, 2)
    assert torch.allclose(flow.log_prob(x, torch.randn(5, 2)), Flow(2).log_prob(x), atol=1e-5)


@pytest.mark.parametrize(
    "flow, context, said",
    [
        (lambda: Flow(2, hidden=(4,)), torch.zeros(3, 1), "takes no context; make one that does"),
        (lambda: Flow(2, context=1, hidden=(4,)), None, "is conditional and got no context"),
        (lambda: Flow(2, context=2, hidden=(4,)), torch.zeros(3, 1), "context has shape"),
        (lambda: Flow(2, context=1, hidden=(4,)), torch.zeros(4, 1), "one context for each row"),
        (
            lambda: Flow(2, context=1, hidden=(4,)),
            torch.full((3, 1), math.nan),
            "context has .*NaN",
        ),
    ],
)
def test_a_context_that_does_not_fit_is_refused(flow, context, said):
    flow = flow()
    for use in (flow.log_prob, flow.encode, flow.decode):
        with pytest.raises(InputError, match=said):
            use(torch.zeros(3, 2), context)
    with pytest.raises(InputError, match=said):
        flow.sample(3, context)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(context=-1), "context must be a whole number"),
        (dict(context=1.5), "context must be a whole number"),
        (dict(context=1, context_dropout=1.0), "context_dropout must be a share"),
        (dict(context=1, context_dropout="x"), "context_dropout must be a share"),
    ],
)
def test_settings_that_make_no_conditional_flow_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Flow(2, **settings)


# fitting ------------------------------------------------------------------------------------


def test_a_conditional_mixture_is_learned():
    torch.manual_seed(0)
    law, context = TwoHumps(), torch.rand(20_000, 1) * 2 - 1
    x = law.sample(context)
    flow = Flow(1, context=1, hidden=(32, 32), bandwidth=(0.5, 6), marginals=None, seed=0)
    flow.fit(x, 10 * context + 3, steps=500, batch_size=512, seed=0, progress=False)
    test = torch.rand(3000, 1) * 2 - 1
    points = law.sample(test)
    with torch.no_grad():
        gap = law.log_prob(points, test) - flow.log_prob(points, 10 * test + 3)
        for c in (-0.9, 0.0, 0.9):
            draws = flow.sample(2000, 10 * c + 3, seed=0)
            mean, scale = law.parameters(torch.tensor(c))
            assert (draws > 0).double().mean() == pytest.approx(0.5, abs=0.1)
            assert draws[draws > 0].mean() == pytest.approx(mean.item(), abs=0.25)
            assert draws[draws > 0].std() == pytest.approx(scale.item(), abs=0.25)
    assert gap.mean() < 0.2


@pytest.mark.parametrize("method", ["fm", "ml", "auto"])
def test_every_way_to_fit_takes_contexts(method):
    x, context = torch.randn(80, 2), torch.randn(80, 2)
    flow = Flow(2, context=2, hidden=(6, 6), context_dropout=0.2)
    assert flow.fit(x, context, method=method, steps=4, progress=False, batch_size=16) is flow
    assert torch.allclose(flow.contexts.mean, context.mean(0), atol=0.5)
    assert torch.isfinite(flow.log_prob(x, context)).all()


def test_the_pilot_looks_at_contexts_too():
    x, context = torch.randn(200, 2), torch.randn(200, 1)
    flow = Flow(2, context=1)
    flow.fit(x, context, steps=1200, batch_size=8, progress=False, method="fm",
             callback=lambda record: phases.add(record.phase))  # fmt: skip
    assert phases == {"pilot", "fm"} and flow.log_prob(x, context).shape == (200,)


phases: set[str] = set()


def test_validation_rows_bring_their_contexts():
    x, context = torch.randn(60, 2), torch.randn(60, 1)
    own = (torch.randn(20, 2), torch.randn(20, 1))
    flow = Flow(2, context=1, hidden=(4, 4))
    flow.fit(x, context, validation=own, steps=2, progress=False)
    for wrong in (own[0], (own[0], own[1][:5]), 7):
        with pytest.raises(InputError):
            flow.fit(x, context, validation=wrong, steps=2, progress=False)


@pytest.mark.parametrize(
    "context, said",
    [
        (None, "is conditional and got no context"),
        (torch.zeros(59, 1), "but x has 60 rows; give one for each"),
        (torch.zeros(60, 2), "context has shape"),
        (0.5, "but x has 60 rows"),
    ],
)
def test_contexts_that_do_not_fit_the_rows_are_refused(context, said):
    with pytest.raises(InputError, match=said):
        Flow(2, context=1, hidden=(4, 4)).fit(torch.randn(60, 2), context, steps=1, progress=False)
    with pytest.raises(InputError, match="takes no context"):
        Flow(2, hidden=(4, 4)).fit(torch.randn(60, 2), torch.zeros(60, 1), progress=False)


def test_objectives_take_contexts():
    flow, x, context = exact(**dict(rtol=1e-6, atol=1e-6)), torch.randn(9, 2), torch.randn(9, 3)
    x, context = x.double(), context.double()
    loss = MaximumLikelihood(flow)(x, context)
    assert torch.allclose(loss, -flow.log_prob(x, context).mean(), atol=1e-4)
    FlowMatching(flow)(x, context).backward()
    assert all(p.grad is not None for p in flow.field.given.parameters())


def test_only_rows_of_the_same_context_are_candidates():
    at, end, t = torch.randn(6, 2), torch.randn(6, 2), torch.rand(6) * 0.8
    told = torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None]
    apart = [expected_velocity(at[part], end[part], t[part]) for part in (slice(3), slice(3, 6))]
    assert torch.allclose(expected_velocity(at, end, t, told), torch.cat(apart), atol=1e-5)
    alone = expected_velocity(at, end, t, torch.arange(6.0)[:, None])
    start = (at - t[:, None] * end) / (1 - t[:, None])
    assert torch.allclose(alone, end - start, atol=1e-4)


def test_contexts_are_standardized_and_constant_ones_do_no_harm():
    flow = Flow(1, context=2, hidden=(4, 4))
    context = torch.cat([1e4 + 50 * torch.randn(100, 1), torch.ones(100, 1)], 1)
    flow.whiten(torch.randn(100, 1), context)
    told = flow.conditioned(context).told
    assert told[:, 0].std() == pytest.approx(1, abs=0.02) and not told[:, 1].any()


# guidance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(8, 7), (8, 7, 6)])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5, -1.0])
def test_the_guided_density_is_that_of_the_guided_map(hidden, weight):
    flow = exact(hidden=hidden, context_dropout=0.1)
    x, context = torch.randn(2, 2, dtype=F64), torch.randn(2, 3, dtype=F64)
    whole = torch.autograd.functional.jacobian(
        lambda x: flow.encode(x, context, guidance=weight), x
    )
    logdet = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))[1]
    z = flow.encode(x, context, guidance=weight)
    base = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    found = flow.log_prob(x, context, guidance=weight)
    assert torch.allclose(found, base.log_prob(z) + logdet, atol=1e-6)
    draws, log_prob = flow.sample(2, context[0], guidance=weight, seed=0, return_log_prob=True)
    assert torch.allclose(flow.log_prob(draws, context[0], guidance=weight), log_prob, atol=1e-4)


def test_guidance_of_one_is_the_field_as_it_was_learned_and_of_zero_knows_no_context():
    flow = exact(context_dropout=0.1)
    x, context = torch.randn(4, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
    plain = flow.log_prob(x, context)
    assert torch.equal(flow.log_prob(x, context, guidance=1), plain)
    none = flow.log_prob(x, context, guidance=0)
    assert torch.allclose(none, flow.log_prob(x, -context, guidance=0), atol=1e-9)
    assert (none - plain).abs().min() > 1e-4


def test_guided_gradients_reach_everything():
    flow = exact(context_dropout=0.1)
    x, context = torch.randn(4, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
    flow.log_prob(x, context, guidance=2.0).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())


def test_contexts_are_withheld_in_training_alone_and_as_often_as_said():
    flow = Flow(2, context=1, context_dropout=0.3, hidden=(4, 4))
    context = torch.ones(4000, 1)
    told = flow.conditioned(context, training=True).told
    assert told.shape == (4000, 2) and torch.equal(told[:, 0], told[:, 1])
    assert told[:, 1].mean() == pytest.approx(0.7, abs=0.03)
    assert flow.conditioned(context).told.all()
    state = torch.get_rng_state()
    flow.log_prob(torch.zeros(3, 2), context[:3], guidance=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_guided_flow_exaggerates_the_context():
    torch.manual_seed(0)
    context = torch.randint(0, 2, (4000, 1)) * 2.0 - 1
    x = context + 0.7 * torch.randn(4000, 1)
    flow = Flow(1, context=1, context_dropout=0.25, hidden=(24, 24), marginals=None, seed=0)
    flow.fit(x, context, steps=400, batch_size=256, method="fm", progress=False, seed=0)
    means = [flow.sample(2000, 1.0, seed=0, guidance=w).mean().item() for w in (0.0, 1.0, 3.0)]
    assert means[0] == pytest.approx(0, abs=0.2)
    assert means[1] == pytest.approx(1, abs=0.2)
    assert means[2] > means[1] + 0.2


@pytest.mark.parametrize(
    "settings, guidance, said",
    [
        (dict(context=1), 2.0, "make the flow with context_dropout=0.1"),
        (dict(), 2.0, "the flow takes none|takes none; use"),
        (dict(context=1, context_dropout=0.1), math.nan, "guidance must be a number"),
        (dict(context=1, context_dropout=0.1), "strong", "guidance must be a number"),
    ],
)
def test_guidance_that_cannot_be_followed_is_refused(settings, guidance, said):
    flow = Flow(2, hidden=(4, 4), **settings)
    context = torch.zeros(1) if flow.context else None
    with pytest.raises(InputError, match=said):
        flow.sample(2, context, guidance=guidance)


# files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_conditional_flow_comes_back_from_the_disk(dropout, tmp_path):
    flow = shaken(Flow(2, context=3, hidden=(6, 5), context_dropout=dropout))
    flow.whiten(torch.randn(50, 2), 5 + torch.randn(50, 3))
    flow.save(tmp_path / "flow")
    loaded = Flow.load(tmp_path / "flow")
    x, context = torch.randn(4, 2), torch.randn(4, 3)
    assert loaded.config == flow.config
    assert torch.equal(loaded.log_prob(x, context), flow.log_prob(x, context))


def test_a_conditional_field_and_base_of_ones_own_serve_together():
    base = Independent(Normal(torch.zeros(2, dtype=F64), 0.5), 1)
    flow = Flow(2, context=3, field=Driven(), base=base).double()
    context = torch.randn(3, dtype=F64)
    x, log_prob = flow.sample(6, context, return_log_prob=True, seed=0)
    assert torch.allclose(flow.log_prob(x, context), log_prob, atol=1e-3)


class Dropping(nn.Module):
    """A field whose part that is asked ahead of a solve drops units in train()."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.outer = nn.Linear(8, 2)

    def embed(self, context):
        return nn.functional.dropout(torch.tanh(self.inner(context)), 0.5, self.training)

    def forward(self, t, x, given):
        return torch.tanh(x + self.outer(given))


def test_what_is_asked_ahead_of_a_solve_does_not_depend_on_the_mode():
    flow = Flow(2, context=3, field=Dropping()).train()
    x, context = torch.randn(6, 2), torch.randn(6, 3)
    found = flow.log_prob(x, context)
    assert torch.equal(flow.log_prob(x, context), found) and flow.field.training
    assert torch.equal(flow.eval().log_prob(x, context), found)


def test_no_draws_of_a_field_of_ones_own_are_none():
    flow = Flow(2, context=3, field=Dropping())
    assert flow.sample(0, torch.zeros(0, 3)).shape == (0, 2)
    assert flow.log_prob(torch.zeros(0, 2), torch.zeros(0, 3)).shape == (0,)
