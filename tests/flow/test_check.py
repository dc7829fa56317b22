"""A check passes what can be trusted, and says of the rest what is wrong with it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import cnf
from cnf.error import InputError
from cnf.flow import check as module
from cnf.flow.check import Check, Finding, estimated_mass
from cnf.flow.flow import Flow


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(module, "CELLS", 100)
    monkeypatch.setattr(module, "ROWS", 40)


def shaken(flow: Flow, size: float = 0.3) -> Flow:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return flow


class Coupled(nn.Module):
    """A linear field whose trace is far from what one probe finds of it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(0.7 * torch.randn(dim, dim, generator=generator))

    def forward(self, t, x):
        return x @ self.matrix.T


class Wrong(Coupled):
    """The same, which claims a divergence that it has not."""

    def prepare(self):
        return (self.matrix.trace() + 1.0,)

    def with_divergence(self, t, x, trace):
        return self(t, x), trace.expand(len(x))


class Meeting(nn.Module):
    """A field in which every row is drawn to the mean of its batch."""

    def forward(self, t, x):
        return x.mean(0) - x if x.ndim > 1 else 0 * x


def found(check: Check) -> dict[str, bool | None]:
    return {finding.name: finding.passed for finding in check.findings}


@pytest.mark.parametrize("dim", [1, 2, 3, 40])
def test_a_flow_of_the_library_is_trusted(dim):
    flow = shaken(Flow(dim, hidden=(8, 8)), 0.1)
    check = flow.check(flow.sample(60, seed=0))
    assert check.passed and check.rows == 40
    assert check.verdict.startswith("These log-densities can be trusted to ")
    assert ("determinant" in found(check)) == (dim <= 32)
    assert found(check)["mass"] is not False


def test_a_conditional_flow_is_checked_given_its_contexts():
    flow = shaken(Flow(2, context=1, hidden=(8, 8)), 0.2)
    context = torch.randn(50, 1)
    assert flow.check(flow.sample(50, context, seed=0), context).passed


def test_a_density_on_a_box_has_its_mass_there():
    flow = shaken(Flow(2, hidden=(8, 8), support=(0.0, 1.0)), 0.2)
    assert flow.check(flow.sample(50, seed=0)).passed


def test_a_divergence_that_is_wrong_is_found_out():
    flow = Flow(2, field=Wrong(2))
    check = flow.check(flow.sample(50, seed=0))
    assert found(check)["determinant"] is False and found(check)["mass"] is False
    assert check.verdict == "Do not trust these log-densities: mass and determinant are off."
    assert "OFF" in str(check)


def test_a_noisy_trace_is_found_out():
    flow = Flow(5, field=Coupled(5), divergence=cnf.Hutchinson())
    check = flow.check(flow.sample(50, seed=0))
    assert found(check)["trace"] is False
    flow.divergence = "auto"
    assert found(flow.check(flow.sample(50, seed=0)))["trace"] is True


def test_a_loose_tolerance_is_found_out():
    flow = shaken(Flow(2, hidden=(8, 8), method="euler", step_size=0.5), 0.7)
    check = flow.check(flow.sample(50, seed=0))
    assert found(check)["integration"] is False and found(check)["round trip"] is False


def test_rows_that_depend_on_each_other_are_found_out():
    flow = Flow(2, field=Meeting())
    check = flow.check(torch.randn(50, 2) + torch.tensor([3.0, 0.0]))
    assert found(check)["batch"] is False


def test_modes_of_modules_stay_as_they_were():
    flow = shaken(Flow(2, hidden=(8, 8))).train()
    flow.whitening.eval()
    flow.check(torch.randn(10, 2))
    assert flow.training and flow.field.training and not flow.whitening.training


@pytest.mark.parametrize("dim", [3, 6])
def test_the_estimate_of_the_mass_is_right_within_its_error(dim):
    class Known:
        """A normal law, and three quarters of it as a density."""

        def __init__(self) -> None:
            self.dim = dim

        def sample(self, n, seed=None):
            return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))

        def log_prob(self, x):
            squares = -0.5 * x.square().sum(-1)
            return squares - 0.5 * dim * math.log(2 * math.pi) + math.log(0.75)

    mass, error, worth = estimated_mass(Known())
    assert mass == pytest.approx(0.75, abs=4 * error) and error < 0.05 and worth > 100


def test_what_cannot_be_decided_is_said_and_no_fault():
    check = Check(9, 0.002, (Finding("mass", "?", None, 1.0, 0.02),))
    assert check.passed
    expected = "These log-densities can be trusted to 0.002 nats; mass could not be decided."
    assert check.verdict == expected == check.lines()[-1]


def test_a_check_is_plain_values():
    flow = shaken(Flow(2, hidden=(8, 8)))
    values = flow.check(flow.sample(20, seed=0)).as_dict()
    assert json.loads(json.dumps(values))["passed"] is True
    assert {"rows", "off", "findings", "verdict"} <= values.keys()


def test_one_row_is_too_few():
    with pytest.raises(InputError, match="give at least 2"):
        Flow(2, hidden=(4,)).check(torch.zeros(1, 2))
