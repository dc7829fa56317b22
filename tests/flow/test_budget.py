"""A budget of evaluations is kept, and a trade-off tells what each budget buys."""

from __future__ import annotations

import json

import pytest
import torch

import cnf
from cnf.error import InputError
from cnf.flow import budget as module
from cnf.flow.budget import Tradeoff, with_budget
from cnf.flow.continuous import Solver
from cnf.flow.flow import Flow
from cnf.ode.control import FixedStep

F64 = torch.float64


def shaken(size: float = 0.3, **settings) -> Flow:
    flow = Flow(2, hidden=(8, 8), **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return flow.double()


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 7, 8, 9, 16, 50])
def test_no_more_evaluations_are_made_than_were_allowed(nfe):
    flow = shaken()
    log_prob, info = flow.log_prob(torch.randn(5, 2), nfe=nfe, return_info=True)
    stages = 1 if nfe == 1 else 2 if nfe < 16 else 4
    assert nfe - stages < info.nfe <= nfe
    assert (info.nfe_per_sample == info.nfe).all() and log_prob.shape == (5,)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4", "dopri5"])
def test_more_evaluations_bring_log_prob_and_samples_closer(method):
    flow, x = shaken(rtol=1e-10, atol=1e-10, logdet_atol=1e-9), torch.randn(40, 2, dtype=F64)
    with torch.no_grad():
        known, z = flow.log_prob(x), flow.encode(x)
        errors = [(flow.log_prob(x, nfe=n, method=method) - known).abs().mean() for n in (8, 64)]
        apart = [(flow.decode(z, nfe=n, method=method) - x).abs().mean() for n in (8, 64)]
    assert errors[1] < errors[0] / 3 and apart[1] < apart[0] / 3


def test_samples_of_a_budget_are_those_of_its_map():
    flow = shaken()
    draws, log_prob = flow.sample(6, nfe=8, seed=0, return_log_prob=True)
    assert torch.allclose(draws, flow.sample(6, nfe=8, seed=0), atol=1e-12)
    assert not torch.allclose(draws, flow.sample(6, seed=0), atol=1e-12)
    assert torch.allclose(flow.log_prob(draws, nfe=400), flow.log_prob(draws), atol=1e-2)
    assert torch.isfinite(log_prob).all()


def test_a_tableau_of_ones_own_has_its_budget():
    mine = cnf.Tableau("mine", 2, (0, 1), ((), (1,)), (0.5, 0.5))
    solver = with_budget(Solver(), 7, mine)
    assert solver.method is mine and solver.control == FixedStep(1 / 3)
    assert shaken().sample(3, nfe=7, method=mine).shape == (3, 2)


def test_no_budget_changes_nothing():
    solver = Solver()
    assert with_budget(solver, None) is solver


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(nfe=0), "nfe must be a whole number, at least 1"),
        (dict(nfe=2.5), "nfe must be a whole number"),
        (dict(nfe=3, method="rk4"), "nfe=3 is less than the 4 evaluations that one step of 'rk4'"),
        (dict(nfe=8, method="kvaerno5"), "must be an explicit Runge–Kutta method"),
        (dict(nfe=8, method="none"), "known are euler"),
        (dict(method="rk4"), "give nfe= too"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(settings, said):
    for use in (shaken().log_prob, shaken().decode):
        with pytest.raises(InputError, match=said):
            use(torch.zeros(2, 2), **settings)
    with pytest.raises(InputError, match=said):
        shaken().sample(2, **settings)


# the trade-off ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Tradeoff:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REPEATS", 1)
        flow = shaken()
        return flow.tradeoff(torch.randn(30, 2), nfe=(1, 4, 8, 32))


def test_a_tradeoff_has_every_method_and_the_flows_own(found):
    counts = {name: [one.nfe for one in found.settings if one.method == name]
              for name in ("euler", "midpoint", "rk4", "dopri5", "dopri5 (own)")}  # fmt: skip
    assert counts["euler"] == [1, 4, 8, 32] and counts["midpoint"] == [4, 8, 32]
    assert counts["rk4"] == [4, 8, 32] and counts["dopri5"] == [6, 30]
    assert len(counts["dopri5 (own)"]) == 1 and found.settings[-1].method == "dopri5 (own)"


def test_errors_fall_as_evaluations_rise(found):
    for name in ("euler", "midpoint", "rk4"):
        errors = [one.log_prob_error for one in found.settings if one.method == name]
        assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert all(one.seconds > 0 and one.sample_seconds > 0 for one in found.settings)
    by_name = {(one.method, one.nfe): one for one in found.settings}
    assert by_name["rk4", 32].sample_error < by_name["euler", 32].sample_error / 3


def test_the_cheapest_setting_that_is_good_enough_is_found(found):
    best = found.cheapest(1e-2)
    assert best.log_prob_error <= 1e-2
    assert all(one.nfe >= best.nfe for one in found.settings if one.log_prob_error <= 1e-2)
    with pytest.raises(InputError, match="no setting is within 1e-30 nats"):
        found.cheapest(1e-30)


def test_a_tradeoff_is_a_table_and_plain_values(found):
    lines = str(found).splitlines()
    assert len(lines) == len(found.settings) + 1 and len({len(line) for line in lines}) == 1
    assert json.loads(json.dumps(found.as_dict()))["rows"] == 30


def test_a_tradeoff_leaves_the_flow_as_it_was(monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    flow = shaken(method="rk4", step_size=0.5)
    kept = flow.solver
    own = flow.tradeoff(torch.randn(9, 2), nfe=(8,), methods=("rk4",)).settings
    assert flow.solver is kept
    assert own[0].log_prob_error == pytest.approx(own[1].log_prob_error) and own[1].nfe == 8


def test_a_conditional_flow_has_a_tradeoff(monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    flow = shaken(context=1)
    found = flow.tradeoff(torch.randn(9, 2), torch.randn(9, 1), nfe=(4, 16), methods=("rk4",))
    assert [one.nfe for one in found.settings[:2]] == [4, 16]


def test_one_row_is_too_few():
    with pytest.raises(InputError, match="give at least 2"):
        shaken().tradeoff(torch.zeros(1, 2))


@pytest.mark.parametrize("gradient", ["reversible", cnf.Reversible(every=3)])
def test_the_reversible_method_keeps_to_a_budget_and_solves_by_its_own_steps(gradient):
    flow = shaken(gradient=gradient, seed=0)
    x = torch.randn(5, 2)
    log_prob, info = flow.log_prob(x, nfe=8, return_info=True)
    assert 4 < info.nfe <= 8 and torch.isfinite(log_prob).all()
    assert torch.allclose(flow.log_prob(x), shaken(seed=0).log_prob(x), atol=5e-3)
    assert flow.sample(3, seed=0).shape == (3, 2)
    with pytest.raises(InputError, match="less than the 8 evaluations that one step of 'rk4'"):
        flow.log_prob(x, nfe=7, method="rk4")
