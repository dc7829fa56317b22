"""What each log-density is worth is told, and an error that is asked for is kept, row by row."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import cnf
from cnf.error import InputError
from cnf.flow.flow import Flow

F64 = torch.float64


class Rotating(nn.Module):
    """f(t, x) = A x with a full A, whose trace Hutchinson's estimate gets wrong by its noise."""

    def __init__(self, dim: int = 6, size: float = 0.4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(size * torch.randn(dim, dim, generator=generator))

    def forward(self, t, x):
        return x @ self.matrix.T


class Dropping(nn.Module):
    """A field that drops units in train(), and normalizes over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)
        )

    def forward(self, t, x):
        return self.net(x)


def shaken(flow: Flow, size: float = 0.4) -> Flow:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return flow


def exact(flow: Flow) -> Flow:
    """The same flow in float64, to tight tolerances and with the exact trace."""
    twin = copy.deepcopy(flow).double()
    tight = cnf.Adaptive(1e-11, 1e-11, quadrature_atol=1e-10)
    twin.solver = replace(twin.solver, method="dopri5", control=tight)
    twin.divergence = "auto"
    return twin


# what a value is worth ----------------------------------------------------------------------


def test_every_row_is_told_its_cost_and_its_errors():
    flow, x = shaken(Flow(2, hidden=(8, 8))), torch.randn(3, 5, 2)
    log_prob, info = flow.log_prob(x, return_info=True)
    assert torch.equal(log_prob, flow.log_prob(x))
    for part in (info.nfe_per_sample, info.integration_error, info.trace_error):
        assert part.shape == (3, 5)
    assert info.nfe >= info.nfe_per_sample.max() and info.nfe_per_sample.min() > 6
    assert not info.trace_error.any() and info.integration_error.max() < 0.01


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_the_integration_error_is_the_distance_to_the_exact_value(tolerance):
    flow = shaken(
        Flow(2, hidden=(8, 8), rtol=tolerance, atol=tolerance, logdet_atol=10 * tolerance)
    ).double()
    x = torch.randn(60, 2, dtype=F64)
    with torch.no_grad():
        log_prob, info = flow.log_prob(x, return_info=True)
        known = (log_prob - exact(flow).log_prob(x)).abs()
    assert known.mean() > 1e-9
    assert info.integration_error.mean() == pytest.approx(known.mean().item(), rel=0.5)


def test_in_single_precision_rounding_is_part_of_the_error():
    flow, x = shaken(Flow(2, hidden=(8, 8))), 30 * torch.randn(50, 2)
    with torch.no_grad():
        log_prob, info = flow.log_prob(x, return_info=True)
        known = (log_prob.double() - exact(flow).log_prob(x)).abs()
    assert info.integration_error.mean() == pytest.approx(known.mean().item(), rel=0.5)


def test_fixed_steps_are_compared_with_shorter_ones():
    flow = shaken(Flow(2, hidden=(8, 8), method="rk4", step_size=0.25)).double()
    x = torch.randn(50, 2, dtype=F64)
    with torch.no_grad():
        log_prob, info = flow.log_prob(x, return_info=True)
        known = (log_prob - exact(flow).log_prob(x)).abs()
    assert info.integration_error.mean() == pytest.approx(known.mean().item(), rel=0.3)


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("seed", [0, None])
def test_the_trace_error_is_the_spread_over_noises(probes, seed):
    flow = Flow(6, field=Rotating(), divergence=cnf.Hutchinson(probes, seed=seed))
    x = torch.randn(40, 6)
    with torch.no_grad():
        _, info = flow.log_prob(x, return_info=True)
        flow.divergence = cnf.Hutchinson(probes, seed=None)
        spread = torch.stack([flow.log_prob(x) for _ in range(60)]).std(0)
    assert info.trace_error.mean() == pytest.approx(spread.mean().item(), rel=0.7)
    assert info.integration_error.max() < 0.01


def test_of_a_divergence_of_ones_own_nothing_is_said_of_the_trace():
    class Mine(cnf.Tangents):
        pass

    class Other:
        def attach(self, field, x, *rows):
            return cnf.Tangents().attach(field, x, *rows)

    flow = shaken(Flow(2, hidden=(8, 8), divergence=Other()))
    assert flow.log_prob(torch.zeros(2, 2), return_info=True)[1].trace_error.isnan().all()
    flow.divergence = Mine()
    assert not flow.log_prob(torch.zeros(2, 2), return_info=True)[1].trace_error.any()


def test_what_a_value_is_worth_costs_no_gradient():
    flow, x = shaken(Flow(2, hidden=(8, 8))), torch.randn(5, 2)
    log_prob, info = flow.log_prob(x, return_info=True)
    found = torch.autograd.grad(log_prob.sum(), list(flow.parameters()))
    expected = torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not info.integration_error.requires_grad


def test_no_rows_have_no_errors():
    _, info = Flow(2, hidden=(4,)).log_prob(torch.zeros(0, 2), return_info=True)
    assert info.integration_error.shape == info.nfe_per_sample.shape == (0,)


# an error that is asked for -----------------------------------------------------------------


@pytest.mark.parametrize("error", [0.1, 0.01, 1e-3, 1e-5])
def test_an_error_in_nats_is_kept(error):
    flow = shaken(Flow(2, hidden=(8, 8))).double()
    x = 2 * torch.randn(80, 2, dtype=F64)
    with torch.no_grad():
        found, info = flow.log_prob(x, error=error, return_info=True)
        known = exact(flow).log_prob(x)
    assert (found - known).abs().max() <= 1.5 * error
    assert info.integration_error.max() <= error


def test_a_smaller_error_costs_more():
    flow, x = shaken(Flow(2, hidden=(8, 8))).double(), torch.randn(40, 2, dtype=F64)
    counts = []
    for error in (0.1, 1e-3, 1e-6):
        _, info = flow.log_prob(x, error=error, return_info=True)
        counts.append(info.nfe_per_sample.double().mean().item())
    assert counts[0] < counts[1] < counts[2]


def briefly_trained() -> Flow:
    x = cnf.data.toy("8gaussians").sample((2000,))
    return Flow(2, hidden=(32, 32), bandwidth=(1.0, 12.0), seed=0).fit(
        x, steps=80, seed=0, progress=False
    )


def of_tails(df: float) -> Flow:
    return shaken(Flow(2, hidden=(16, 16), base=cnf.StudentT(2, df=df)))


AWKWARD = {
    "far out": lambda: (shaken(Flow(2, hidden=(16, 16))).double(), 40 * torch.randn(30, 2)),
    "wide tails": lambda: (of_tails(1.5), torch.distributions.StudentT(1.5).sample((30, 2))),
    "briefly trained": lambda: (briefly_trained(), 3 * torch.randn(30, 2)),
    "many dimensions": lambda: (shaken(Flow(64, hidden=(32, 32)), 0.15), torch.randn(30, 64)),
    "deep": lambda: (shaken(Flow(3, hidden=(16, 16, 16))), 2 * torch.randn(30, 3)),
    "planar": lambda: (shaken(Flow(2, field=cnf.nets.PlanarField(2, 8))), 3 * torch.randn(30, 2)),
    "potential": lambda: (
        shaken(Flow(3, field=cnf.nets.PotentialField(3)), 0.1),
        torch.randn(30, 3),
    ),
    "at an edge": lambda: (
        shaken(Flow(2, hidden=(16, 16), support=(0, 1))),
        torch.rand(30, 2) ** 8,
    ),
    "fixed steps": lambda: (
        shaken(Flow(2, hidden=(16, 16), method="rk4", step_size=0.5)),
        2 * torch.randn(30, 2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("error", [0.1, 0.01])
def test_an_error_is_kept_by_awkward_flows(name, error):
    torch.manual_seed(1)
    flow, x = AWKWARD[name]()
    with torch.no_grad():
        found, known = flow.log_prob(x, error=error), exact(flow).log_prob(x.double())
    rounding = 8 * torch.finfo(found.dtype).eps * known.abs()
    assert ((found.double() - known).abs() <= error + rounding).all()


def test_probes_are_added_until_the_trace_is_known_well_enough():
    flow = Flow(200, field=Rotating(200, 0.01), divergence=cnf.Hutchinson())
    x = torch.randn(10, 200)
    with torch.no_grad():
        known = exact(flow).log_prob(x.double())
        _, rough = flow.log_prob(x, return_info=True)
        found, info = flow.log_prob(x, error=4.0, return_info=True)
        assert info.trace_error.min() > 0 and info.trace_error.max() <= 1.0
        assert rough.trace_error.min() > 1.0
        assert (found - known).abs().max() <= 4.0
        assert (flow.log_prob(x, error=1e-2) - known).abs().max() <= 1e-2


@pytest.mark.parametrize("law", ["rademacher", "gaussian", "hadamard", "orthogonal"])
def test_an_error_is_kept_whatever_the_noise(law):
    flow, x = Flow(200, field=Rotating(200, 0.01)), torch.randn(4, 200)
    with torch.no_grad():
        known = exact(flow).log_prob(x.double())
        for seed in range(6):
            flow.divergence = cnf.Hutchinson(law=law, seed=seed)
            assert (flow.log_prob(x, error=4.0) - known).abs().max() <= 4.0


def test_where_an_estimate_would_cost_as_much_the_trace_is_exact():
    flow = Flow(6, field=Rotating(), divergence=cnf.Hutchinson())
    _, info = flow.log_prob(torch.randn(5, 6), error=0.02, return_info=True)
    assert not info.trace_error.any() and info.divergence == "Tangents"


def test_an_error_is_kept_with_fixed_steps_too():
    flow = shaken(Flow(2, hidden=(8, 8), method="midpoint", step_size=0.5)).double()
    x = torch.randn(30, 2, dtype=F64)
    with torch.no_grad():
        apart = flow.log_prob(x, error=0.01) - exact(flow).log_prob(x)
    assert apart.abs().max() <= 0.015


def test_a_value_of_a_wanted_error_has_the_gradient_of_the_density():
    flow, x = shaken(Flow(2, hidden=(8, 8))).double(), torch.randn(9, 2, dtype=F64)
    found = torch.autograd.grad(flow.log_prob(x, error=1e-6).sum(), list(flow.parameters()))
    twin = exact(flow)
    expected = torch.autograd.grad(twin.log_prob(x).sum(), list(twin.parameters()))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("error", [0, -1, math.nan, math.inf, "small", True])
def test_an_error_that_is_none_is_refused(error):
    with pytest.raises(InputError, match="error must be a number of nats > 0"):
        Flow(2, hidden=(4,)).log_prob(torch.zeros(2, 2), error=error)


def test_an_error_below_rounding_is_refused_with_the_remedy():
    flow = shaken(Flow(2, hidden=(8, 8)))
    with pytest.raises(InputError, match=r"error=1e-12 nats cannot be kept .*flow.double\(\)"):
        flow.log_prob(torch.randn(20, 2), error=1e-12)


def test_a_budget_and_an_aim_exclude_each_other():
    with pytest.raises(InputError, match="give one of them"):
        Flow(2, hidden=(4,)).log_prob(torch.zeros(2, 2), error=0.1, nfe=8)


# nothing else changes a value ---------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(hidden=(8, 8, 8)),
        dict(divergence=cnf.Hutchinson()),
        dict(context=2),
        dict(support=(-9.0, None)),
    ],
    ids=["closed form", "tangents", "hutchinson", "context", "support"],
)
@pytest.mark.parametrize("error", [None, 1e-4], ids=["tolerance", "error"])
def test_a_row_alone_shuffled_and_in_a_batch_of_a_thousand_is_the_same(settings, error):
    flow = shaken(Flow(2, **{"hidden": (8, 8), **settings}), 0.2).double()
    x = torch.randn(1000, 2, dtype=F64)
    context = torch.randn(1000, 2, dtype=F64) if flow.context else None

    def log_prob(rows):
        return flow.log_prob(x[rows], None if context is None else context[rows], error=error)

    with torch.no_grad():
        together, order = log_prob(slice(None)), torch.randperm(1000)
        assert torch.allclose(log_prob(order), together[order], rtol=0, atol=1e-6)
        for i in (0, 499, 999):
            assert torch.allclose(log_prob(slice(i, i + 1)), together[i], rtol=0, atol=1e-6)


def test_a_field_that_drops_units_has_one_density():
    flow, x = Flow(2, field=Dropping()), torch.randn(20, 2)
    flow.train()
    values = [flow.log_prob(x), flow.log_prob(x), flow.eval().log_prob(x)]
    assert all(torch.allclose(value, values[0], atol=1e-5) for value in values)
    assert flow.train().field.net[3].training and flow.encode(x).shape == (20, 2)
    assert torch.allclose(flow.log_prob(x[3]), values[0][3], atol=1e-4)


def test_a_field_in_train_mode_has_the_gradient_of_its_density():
    flow, x = Flow(2, field=Dropping()).double(), torch.randn(6, 2, dtype=F64)
    found = torch.autograd.grad(flow.train().log_prob(x).sum(), list(flow.parameters()))
    expected = torch.autograd.grad(flow.eval().log_prob(x).sum(), list(flow.parameters()))
    for part, same in zip(found, expected, strict=True):
        assert torch.allclose(part, same, atol=1e-6)


def test_training_leaves_the_field_in_its_own_mode():
    flow, x = Flow(2, field=Dropping(), method="rk4", step_size=0.5).train(), torch.randn(50, 2)
    flow.field.net[1] = nn.Identity()  # torch.func allows no running averages
    objective = cnf.MaximumLikelihood(flow)
    with torch.no_grad():
        assert objective(x) != objective(x)
        assert flow.eval() and objective(x) == objective(x)
