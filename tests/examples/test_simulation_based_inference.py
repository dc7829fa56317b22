"""The exact posterior is exact, and a flow fitted to simulations is calibrated and close to it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import cnf

PATH = Path(__file__).parents[2] / "examples" / "simulation_based_inference.py"
if not PATH.exists():
    pytest.skip("the examples are not part of the package", allow_module_level=True)
SPEC = importlib.util.spec_from_file_location("simulation_based_inference", PATH)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)

GAINS = [(1.0,), (1.0, -1.0)]


@pytest.mark.parametrize("gains", GAINS, ids=["linear", "sign lost"])
def test_the_posterior_is_prior_times_likelihood(gains):
    model = example.Measurement(gains)
    x = torch.tensor([0.7, -0.3, 0.4])
    theta = torch.randn(50, 2)
    means = torch.stack([gain * theta @ example.DESIGN.T for gain in gains])
    likelihoods = torch.distributions.Normal(means, example.NOISE).log_prob(x).sum(-1)
    joint = example.PRIOR.log_prob(theta) + torch.logsumexp(likelihoods, 0)
    apart = model.posterior(x).log_prob(theta) - joint
    assert apart.std() < 1e-4 * max(1.0, apart.abs().max())  # the same up to the evidence


@pytest.mark.slow
def test_fitted_to_simulations_a_flow_is_calibrated():
    flow = cnf.Flow(2, context=3, hidden=(32, 32), bandwidth=None, seed=0)
    found = example.infer(
        example.Measurement(), flow, pairs=8000, truths=400, steps=500, progress=False
    )
    assert found.exact.passed
    assert found.calibration.passed, str(found.calibration)
    assert -3 * found.gap_error < found.gap < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("gains", GAINS, ids=["linear", "sign lost"])
def test_with_its_defaults_it_is_calibrated_among_two_thousand_truths(gains):
    torch.set_num_threads(2)
    flow = cnf.Flow(2, context=3, seed=0)
    found = example.infer(
        example.Measurement(gains), flow, pairs=200_000, truths=2000, seconds=60, progress=False
    )
    assert found.exact.passed
    assert found.calibration.passed, str(found.calibration)
    assert -3 * found.gap_error < found.gap < 0.05


def test_the_script_prints_ranks_coverage_and_gap(monkeypatch, tmp_path, capsys):
    model = example.Measurement()
    exact = example.ranked(model, *model.simulate(400), seed=0)
    found = example.Inference(cnf.Flow(2, context=3), exact, exact, 0.01, 0.001)
    picture = tmp_path / "calibration.png"
    monkeypatch.setattr(example, "infer", lambda *given, **settings: found)
    monkeypatch.setattr(sys, "argv", ["example", "--quick", "--out", str(picture)])
    example.main()
    printed = capsys.readouterr().out
    assert "95% region" in printed and "0.0100 ± 0.0010 nats, paired" in printed
    assert picture.stat().st_size > 0
