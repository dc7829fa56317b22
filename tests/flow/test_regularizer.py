"""RNODE's terms are the integrals they claim to be, cost no step, and do what they are for."""

from __future__ import annotations

import pytest
import torch

from cnf.error import InputError
from cnf.flow.continuous import Solver, move_with_logdet
from cnf.flow.divergence import ClosedForm, Hutchinson, Tangents, WithDivergence
from cnf.flow.flow import Flow
from cnf.flow.objective import MaximumLikelihood
from cnf.flow.regularizer import Regularized, Regularizer
from cnf.flow.variational import ReverseKL
from cnf.nets.mlp import MLP, BilinearMLP
from cnf.ode.control import Adaptive
from cnf.ode.solution import solve

F64 = torch.float64
TIGHT = Solver(control=Adaptive(1e-9, 1e-9, quadrature_atol=1e-8))
DIM = 3


def shaken(module, size=0.4):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


class Residual(MLP):
    """A field that says how far it is from a potential's; what it says is only to be integrated."""

    def residual(self, t, x):
        return x.sum(-1) * torch.sin(9 * t)


@pytest.fixture
def field():
    return shaken(Residual(DIM, (8, 6))).double()


def squared_norm(field, t, x):
    whole = torch.autograd.functional.jacobian(lambda x: field(t, x), x)
    return torch.einsum("bibj->bij", whole).square().sum((1, 2))


RATES = {
    "kinetic": lambda field, t, x: 0.5 * field(t, x).square().sum(-1),
    "jacobian": squared_norm,
    "hjb": lambda field, t, x: field.residual(t, x).abs(),
}


def by_simpson(rate, field, x, times, points=801):
    """∫ rate(t, x(t)) |dt| along the paths from x, (batch,), by Simpson's rule on a grid."""
    t = torch.linspace(*times, points, dtype=F64)
    path = solve(field, x, t, rtol=1e-9, atol=1e-9).y
    values = torch.stack(
        [rate(field, moment, state) for moment, state in zip(t, path, strict=True)]
    )
    weights = torch.ones(points, dtype=F64)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return (weights @ values.detach()) * abs(times[1] - times[0]) / (points - 1) / 3


def along(field, divergence, regularizer, x, times=(1.0, 0.0)):
    return move_with_logdet(field, Regularized(divergence, regularizer), x, times, TIGHT)


@pytest.mark.parametrize("times", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.2)])
def test_every_term_is_its_integral_by_direct_quadrature(field, times):
    x = torch.randn(4, DIM, dtype=F64)
    every = Regularizer(kinetic=1.0, jacobian=1.0, hjb=1.0)
    moved = along(field, Tangents(), every, x, times)
    terms = every.measured(moved.along, times[1] - times[0])
    assert tuple(terms) == ("kinetic", "jacobian", "hjb")
    for name, found in terms.items():
        # the residual's absolute value has kinks, where both rules lose their order
        tolerance = 2e-3 if name == "hjb" else 1e-6
        expected = by_simpson(RATES[name], field, x, times).mean()
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("divergence", [Tangents(), Tangents(chunk=2), Hutchinson(2)], ids=str)
def test_the_log_determinant_stays_what_it_was(field, divergence):
    x = torch.randn(4, DIM, dtype=F64)
    alone = move_with_logdet(field, divergence, x, (1.0, 0.0), TIGHT)
    both = along(field, divergence, Regularizer(kinetic=1.0, jacobian=1.0), x)
    assert torch.allclose(alone.logdet, both.logdet, atol=1e-10)
    assert torch.equal(alone.x, both.x)


@pytest.mark.parametrize("divergence", [Tangents(), Hutchinson(1)], ids=str)
def test_terms_cost_no_evaluation_and_no_step(field, divergence):
    x = torch.randn(50, DIM, dtype=F64)
    loose = Solver(control=Adaptive(1e-4, 1e-4, quadrature_atol=1e-3))
    every = Regularizer(kinetic=1.0, jacobian=1.0)
    alone = move_with_logdet(field, divergence, x, (1.0, 0.0), loose)
    both = move_with_logdet(field, Regularized(divergence, every), x, (1.0, 0.0), loose)
    assert both.stats.calls == alone.stats.calls


@pytest.mark.parametrize(
    "divergence", [Hutchinson(1, seed=None), Hutchinson(2, "hadamard", None), ClosedForm()], ids=str
)
def test_an_estimated_norm_has_the_right_mean(divergence):
    field = shaken(BilinearMLP(DIM, (8, 6))).double()
    x = torch.randn(1, DIM, dtype=F64)
    attached = Regularized(divergence, Regularizer(jacobian=1.0)).attach(
        field, x.expand(20_000, -1)
    )
    t = torch.tensor(0.3, dtype=F64)
    with torch.no_grad():
        _, (_, found) = attached.field(t, x.expand(20_000, -1), *attached.rows, *attached.params)
    found = found * 2**20
    expected = squared_norm(field, t, x).item()
    assert abs(found.mean() - expected) < 4 * found.std() / 20_000**0.5
    assert found.std() > 0.01 * expected


def test_a_users_own_divergence_gets_a_probe_too(field):
    class Mine:
        def attach(self, field, x, *rows):
            return WithDivergence(lambda t, x, *rows: (field(t, x), 0 * x[:, 0]), rows)

    x = torch.randn(4, DIM, dtype=F64)
    moved = along(field, Mine(), Regularizer(jacobian=1.0), x)
    assert not moved.logdet.any() and moved.along[0].shape == (4,)


# losses -------------------------------------------------------------------------------------


def small(**settings):
    flow = Flow(2, hidden=(8, 8), rtol=1e-8, atol=1e-8, logdet_atol=1e-8, **settings)
    return shaken(flow, 0.3).double()


def test_the_loss_is_the_likelihood_and_the_weighted_terms():
    flow, x = small(divergence=Tangents()), torch.randn(20, 2, dtype=F64)
    loss = MaximumLikelihood(flow, regularizer=Regularizer(kinetic=0.3, jacobian=0.2))
    total, terms = loss(x), loss.terms
    assert list(terms) == ["nll", "kinetic", "jacobian"] and not terms["nll"].requires_grad
    assert torch.allclose(terms["nll"], -flow.log_prob(x).mean(), atol=1e-6)
    expected = terms["nll"] + 0.3 * terms["kinetic"] + 0.2 * terms["jacobian"]
    assert torch.allclose(total, expected)
    white = flow.white(x)[0]
    for name in ("kinetic", "jacobian"):
        direct = by_simpson(RATES[name], flow.field, white, (1.0, 0.0), 201).mean()
        assert torch.allclose(terms[name], direct, rtol=1e-5)


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop", "adjoint"])
@pytest.mark.parametrize("divergence", [Tangents(), Hutchinson(2, seed=0)], ids=str)
def test_the_gradient_of_the_terms_is_that_of_finite_differences(gradient, divergence, monkeypatch):
    flow, x = small(divergence=divergence, gradient=gradient), torch.randn(5, 2, dtype=F64)
    monkeypatch.setattr("cnf.flow.objective.fresh", lambda divergence: divergence)
    loss = MaximumLikelihood(flow, regularizer=Regularizer(kinetic=0.5, jacobian=0.5))
    weight = flow.field.out
    found = torch.autograd.grad(loss(x), weight)[0][0, 0]
    values = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            weight[0, 0] += step
            values.append(loss(x))
    assert torch.allclose(found, (values[0] - values[1]) / 2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["kinetic", "jacobian"])
def test_training_with_a_term_lowers_it(name):
    flow = shaken(Flow(2, hidden=(8, 8), seed=0), 0.5)
    x = torch.randn(64, 2)
    loss = MaximumLikelihood(flow, tolerance=1e-3, regularizer=Regularizer(**{name: 3.0}))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)
    seen = []
    for _ in range(25):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        seen.append(loss.terms[name].item())
    assert seen[-1] < 0.3 * seen[0]


def test_without_terms_the_divergence_is_left_alone():
    divergence = Hutchinson()
    assert Regularizer(steer=0.3).around(divergence) is divergence
    assert Regularizer().terms == ()


# random end times ---------------------------------------------------------------------------


def test_base_times_are_spread_over_the_interval():
    torch.manual_seed(0)
    times = torch.tensor([Regularizer(steer=0.4).base_time() for _ in range(2000)])
    assert times.abs().max() < 0.4 and times.abs().max() > 0.39
    assert abs(times.mean()) < 0.02 and times.std() == pytest.approx(0.4 / 3**0.5, rel=0.05)
    assert Regularizer().base_time() == 0.0


def test_with_steer_the_loss_is_that_of_the_drawn_end(monkeypatch):
    flow, x = small(), torch.randn(10, 2, dtype=F64)
    loss = MaximumLikelihood(flow, regularizer=Regularizer(steer=0.5))
    assert loss(x) != loss(x)
    monkeypatch.setattr(Regularizer, "base_time", lambda self: 0.25)
    moved = move_with_logdet(
        flow.field, flow.chosen_divergence(), flow.white(x)[0], (1.0, 0.25), flow.solver
    )
    normal = torch.distributions.Normal(0.0, 1.0)
    log_prob = normal.log_prob(moved.x).sum(-1) + moved.logdet + flow.white(x)[1]
    assert torch.allclose(loss(x), -log_prob.mean(), atol=1e-9)


# refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(kinetic=-1), "kinetic must be a number ≥ 0, got -1"),
        (dict(jacobian=float("inf")), "jacobian must be a number ≥ 0, got inf"),
        (dict(jacobian=float("nan")), "jacobian must be a number ≥ 0, got nan"),
        (dict(hjb="1"), "hjb must be a number ≥ 0, got '1'"),
        (dict(steer=1.0), "steer must be a number from 0 to below 1, got 1.0"),
    ],
)
def test_weights_without_a_meaning_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Regularizer(**settings)


def test_a_field_without_a_potential_has_no_hjb_term():
    flow = Flow(2, hidden=(4,))
    with pytest.raises(InputError, match="BilinearMLP does not; use PotentialField, or leave hjb"):
        MaximumLikelihood(flow, regularizer=Regularizer(hjb=1.0))(torch.zeros(3, 2))


def test_reverse_kl_has_no_random_end():
    with pytest.raises(InputError, match="steer= moves the base's end"):
        ReverseKL(Flow(2), lambda x: x.sum(-1), regularizer=Regularizer(steer=0.1))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(method="fm", regularizer=Regularizer(kinetic=1.0)), "regularizer= is for maximum"),
        (dict(method="ml", coupling="ot"), "coupling= is for flow matching"),
        (dict(coupling="best"), "unknown coupling 'best'; known are independent, ot"),
    ],
)
def test_a_fit_refuses_what_it_would_not_use(settings, said):
    with pytest.raises(InputError, match=said):
        Flow(2, hidden=(4,)).fit(torch.randn(50, 2), steps=2, progress=False, **settings)


def test_a_fit_takes_both():
    flow = Flow(2, hidden=(4,), bandwidth=None, seed=0)
    regularizer = Regularizer(kinetic=0.1, jacobian=0.1, steer=0.1)
    x = torch.randn(60, 2)
    flow.fit(x, steps=4, seed=0, progress=False, regularizer=regularizer, coupling="ot")
    assert flow.field.out.any()
