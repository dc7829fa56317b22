"""Losses: the likelihood is the flow's, and flow matching aims at the true mean velocity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import cnf
from cnf.error import InputError
from cnf.flow.divergence import ClosedForm, Hutchinson, Tangents
from cnf.flow.flow import Flow
from cnf.flow.objective import (
    LATE_EDGE,
    FlowMatching,
    MaximumLikelihood,
    drawn_late,
    expected_velocity,
    fresh,
)

F64 = torch.float64


def shaken(flow: Flow, size: float = 0.3) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return flow


def small(dim: int = 2, **settings) -> Flow:
    return shaken(Flow(dim, hidden=(8, 8), **settings))


# maximum likelihood -------------------------------------------------------------------------


TIGHT = dict(rtol=1e-9, atol=1e-9, logdet_atol=1e-8)


def test_the_loss_is_the_mean_negative_log_density():
    flow, x = small(**TIGHT).double(), torch.randn(20, 2).double()
    objective = MaximumLikelihood(flow)
    assert objective.nfe is None
    loss = objective(x)
    assert torch.allclose(loss, -flow.log_prob(x).mean(), atol=1e-6) and loss.ndim == 0
    assert objective.nfe > 20


def test_the_loss_has_the_gradients_of_the_log_density():
    flow, x = small(**TIGHT).double(), torch.randn(20, 2).double()
    parameters = list(flow.parameters())
    found = torch.autograd.grad(MaximumLikelihood(flow)(x), parameters)
    expected = torch.autograd.grad(-flow.log_prob(x).mean(), parameters)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_tolerance_of_its_own_costs_less_and_leaves_the_flows_alone():
    flow, x = small(rtol=1e-8, atol=1e-8, logdet_atol=1e-7).double(), torch.randn(20, 2).double()
    solver = flow.solver
    loose, exact = MaximumLikelihood(flow, tolerance=1e-2), MaximumLikelihood(flow)
    assert torch.allclose(loose(x), exact(x), atol=0.1)
    assert loose.nfe < exact.nfe / 2
    assert flow.solver == solver


def test_hutchinsons_noise_is_drawn_anew_in_training():
    flow, x = small(divergence=Hutchinson(seed=0)), torch.randn(20, 2)
    assert flow.log_prob(x).mean() == flow.log_prob(x).mean()
    assert MaximumLikelihood(flow)(x) != MaximumLikelihood(flow)(x)
    assert flow.divergence == Hutchinson(seed=0)


def test_hutchinsons_loss_has_the_right_mean():
    flow = small(divergence=Hutchinson(), rtol=1e-3, atol=1e-3, logdet_atol=1e-2)
    x = torch.randn(1, 2).expand(2000, -1)
    with torch.no_grad():
        estimates = -flow.log_prob_of_rows(x, fresh(flow.divergence), flow.solver)[0]
        flow.divergence = ClosedForm()
        exact = MaximumLikelihood(flow)(x[:1])
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / 2000**0.5 + 1e-3


@pytest.mark.parametrize("divergence", [ClosedForm(), Tangents()])
def test_fresh_changes_nothing_that_draws_no_noise(divergence):
    assert fresh(divergence) is divergence
    assert fresh(Hutchinson(3, "gaussian", 7)) == Hutchinson(3, "gaussian", None)


# expected velocity --------------------------------------------------------------------------


def brute_force(at, end, t):
    """E[z₁ − z₀ | z_t] row by row, by Bayes' rule over the candidates."""
    rows = []
    for point, moment in zip(at, t, strict=True):
        start = (point - moment * end) / (1 - moment)  # of each candidate's path through the point
        weights = torch.softmax(-0.5 * start.square().sum(-1), 0)
        rows.append(((end - start) * weights[:, None]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("dim", [1, 2, 20])
def test_the_expected_velocity_is_the_posterior_mean(dim):
    end, start = torch.randn(30, dim, dtype=F64), torch.randn(30, dim, dtype=F64)
    t = torch.linspace(0, 0.99, 30, dtype=F64)
    at = torch.lerp(start, end, t[:, None])
    assert torch.allclose(expected_velocity(at, end, t), brute_force(at, end, t), atol=1e-9)


def test_groups_are_separate_in_the_expected_velocity():
    end, at, t = (torch.randn(3, 10, 2, dtype=F64) for _ in range(2)), None, None
    end, at = end
    t = torch.rand(3, 10, dtype=F64)
    apart = torch.stack([brute_force(at[i], end[i], t[i]) for i in range(3)])
    assert torch.allclose(expected_velocity(at, end, t), apart, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("moment", [0.0, 1e-12, 0.5, 1 - 1e-3, 1 - 1e-7, 1.0])
def test_the_expected_velocity_is_finite_up_to_both_ends(moment, dtype):
    end = 5 * torch.randn(40, 3, dtype=dtype)
    start = torch.randn(40, 3, dtype=dtype)
    t = torch.full((40,), moment, dtype=dtype)
    velocity = expected_velocity(torch.lerp(start, end, t[:, None]), end, t)
    assert torch.isfinite(velocity).all()
    if moment == 0.0:  # nothing is known of the end yet
        assert torch.allclose(velocity, end.mean(0) - start, atol=1e-5)


def test_single_precision_is_enough_near_the_end():
    end, start = torch.randn(64, 2, dtype=F64), torch.randn(64, 2, dtype=F64)
    t = torch.linspace(0.9, 0.999, 64, dtype=F64)
    at = torch.lerp(start, end, t[:, None])
    exact = expected_velocity(at, end, t)
    single = expected_velocity(at.float(), end.float(), t.float()).double()
    assert (single - exact).abs().median() < 1e-3


def test_with_one_candidate_it_is_the_paths_own_velocity():
    end, start = torch.randn(1, 2, dtype=F64), torch.randn(1, 2, dtype=F64)
    t = torch.tensor([0.4], dtype=F64)
    at = torch.lerp(start, end, t[:, None])
    assert torch.allclose(expected_velocity(at, end, t), end - start)


def test_many_equal_candidates_count_as_one():
    end = torch.ones(5, 2, dtype=F64)
    start, t = torch.randn(5, 2, dtype=F64), torch.full((5,), 0.3, dtype=F64)
    at = torch.lerp(start, end, t[:, None])
    assert torch.allclose(expected_velocity(at, end, t), end - start)


# flow matching ------------------------------------------------------------------------------


def test_with_one_neighbour_the_target_is_end_minus_start(monkeypatch):
    flow = Flow(2, hidden=(4,))  # a zero field: the loss is the target's mean square
    x, start = torch.randn(50, 2), torch.randn(50, 2)
    monkeypatch.setattr(torch, "randn_like", lambda end: start)
    loss = FlowMatching(flow, neighbours=1)(x)
    assert torch.allclose(loss, (x - start).square().sum(-1).mean())


@pytest.mark.parametrize("neighbours", [1, 7, 64])
def test_the_gradient_is_unbiased_whatever_the_neighbours(neighbours):
    """The mean gradient of a linear field's weights is that of independent pairs, to 4 errors."""
    data = torch.randn(64, 2) * torch.tensor([2.0, 0.5])

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.4]]))

        def forward(self, t, x):
            return x @ self.weight.T * (1 + t[:, None])

    flow = Flow(2, field=Linear())
    objective = FlowMatching(flow, neighbours=neighbours)
    found = []
    for _ in range(300):
        chosen = data[torch.randint(0, 64, (64,))]
        found.append(torch.autograd.grad(objective(chosen), flow.field.weight)[0])
    gradients = torch.stack(found).flatten(1)
    # E over t, start and end in closed form: a quadratic in Gaussian and empirical moments
    second = data.T @ data / 64
    t = (torch.arange(20_000) + 0.5) / 20_000
    weight = flow.field.weight.detach()
    at_at = ((1 + t) ** 2 * (1 - t) ** 2).mean() * torch.eye(2)
    at_at = at_at + ((1 + t) ** 2 * t**2).mean() * second
    velocity_at = ((1 + t) * t).mean() * second - ((1 + t) * (1 - t)).mean() * torch.eye(2)
    expected = 2 * (weight @ at_at - velocity_at).flatten()
    error = gradients.std(0) / 300**0.5
    assert ((gradients.mean(0) - expected).abs() < 4 * error).all()


def test_neighbours_lower_the_variance():
    flow, x = small(), torch.randn(128, 2)
    spread = []
    for neighbours in (1, 64):
        objective = FlowMatching(flow, neighbours=neighbours)
        spread.append(torch.stack([objective(x).detach() for _ in range(60)]).std())
    assert spread[1] < 0.8 * spread[0]


@pytest.mark.parametrize("batch", [1, 2, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("neighbours", [1, 2, 64])
def test_any_batch_and_any_group_go_together(batch, neighbours):
    flow = small()
    loss = FlowMatching(flow, neighbours=neighbours)(torch.randn(batch, 2))
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4)])
def test_the_gradient_reaches_every_weight(hidden):
    flow = shaken(Flow(3, hidden=hidden))
    FlowMatching(flow)(torch.randn(100, 3)).backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())


def test_it_sees_the_data_whitened():
    flow = Flow(2, hidden=(4,)).whiten(torch.randn(500, 2) * 100 + 1000)
    losses = [FlowMatching(flow)(torch.randn(500, 2) * 100 + 1000).item() for _ in range(5)]
    assert 0.5 < sum(losses) / 5 < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_times_are_spread_evenly_and_in_no_order(dtype):
    seen = []

    class Spy(nn.Module):
        def forward(self, t, x):
            seen.append(t)
            return torch.zeros_like(x)

    flow = Flow(2, field=Spy()).to(dtype)
    FlowMatching(flow)(torch.randn(400, 2, dtype=dtype))
    (t,) = seen
    assert t.shape == (400,) and t.dtype == dtype
    gaps = t.sort().values.diff()
    assert t.min() >= 0 and t.max() < 1
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / 400), atol=1e-5)
    assert not torch.equal(t, t.sort().values)


def test_the_best_linear_field_moves_a_normal_onto_data_of_another_width():
    """Fitted to N(0, 2²) without whitening, the loss's minimum carries N(0, 1) there."""
    flow = Flow(1, hidden=(16, 16), whiten=False, seed=0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    objective = FlowMatching(flow)
    for _ in range(250):
        optimizer.zero_grad()
        objective(2 * torch.randn(256, 1)).backward()
        optimizer.step()
    x = flow.sample(4000, seed=0)
    assert x.std() == pytest.approx(2, abs=0.2)
    entropy = math.log(2 * math.sqrt(2 * math.pi * math.e))
    with torch.no_grad():
        assert -flow.log_prob(2 * torch.randn(4000, 1)).mean() == pytest.approx(entropy, abs=0.1)


# what a loop of one's own hands over --------------------------------------------------------


@pytest.mark.parametrize("kind", [MaximumLikelihood, FlowMatching])
def test_arrays_and_frames_are_batches_too(kind):
    flow, x = Flow(2, hidden=(4,), context=1), torch.randn(8, 2)
    torch.manual_seed(0)
    expected = kind(flow)(x, torch.ones(8, 1))
    torch.manual_seed(0)
    assert kind(flow)(x.double().numpy(), [1.0]) == expected


@pytest.mark.parametrize("kind", [MaximumLikelihood, FlowMatching])
@pytest.mark.parametrize(
    ("columns", "batch", "said"),
    [
        (0, (torch.zeros(4, 3),), r"x has shape \(4, 3\), expected \(n, 2\)"),
        (0, (torch.full((4, 2), math.nan),), "x has missing, NaN or infinite values in 4 rows"),
        (0, (torch.zeros(4, 2), torch.zeros(4, 1)), "the flow takes no context"),
        (3, (torch.zeros(4, 2),), "the flow is conditional and got no context"),
        (3, (torch.zeros(4, 2), torch.zeros(4, 2)), r"context has shape \(4, 2\)"),
        (3, (torch.zeros(4, 2), torch.zeros(5, 3)), "give one context for each row"),
    ],
)
def test_batches_that_do_not_fit_are_refused(kind, columns, batch, said):
    with pytest.raises(InputError, match=said):
        kind(Flow(2, hidden=(4,), context=columns))(*batch)


def test_flow_matching_refuses_a_base_that_it_would_not_see():
    flow = Flow(2, hidden=(4,), base=cnf.StudentT(2, df=5))
    with pytest.raises(InputError, match="a base of its own; train it with MaximumLikelihood"):
        FlowMatching(flow)(torch.zeros(4, 2))


@pytest.mark.parametrize("late", [0.0, 0.3, 0.9])
def test_a_share_of_the_times_is_close_to_the_data(late):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = drawn_late(u, late)
    assert t.min() >= 0 and t.max() <= 1
    for bound in (0.1, 0.5, 0.9, 0.99):
        close = math.log((1 + LATE_EDGE - bound) / LATE_EDGE) / math.log1p(1 / LATE_EDGE)
        expected = late * close + (1 - late) * (1 - bound)
        assert (t > bound).double().mean() == pytest.approx(expected, abs=1e-4)


def test_a_field_is_learned_from_late_times_too():
    flow, x = Flow(2, hidden=(8, 8), seed=0), torch.randn(200, 2)
    FlowMatching(flow, late=0.5, capture=True)(x).backward()  # capture: plain on the CPU
    assert all(p.grad is not None for p in flow.field.parameters())
    with pytest.raises(InputError, match=r"late must be a share from 0 to below 1, got 1\.5"):
        FlowMatching(flow, late=1.5)


@pytest.mark.parametrize("loss", [FlowMatching, MaximumLikelihood])
def test_rows_outside_the_support_are_refused(loss):
    objective = loss(Flow(2, hidden=(4, 4), support=(0, 1)))
    with pytest.raises(InputError, match="x has 5 in row 1, column 0, which is not inside"):
        objective(torch.tensor([[0.3, 0.3], [5.0, 0.3]]))
