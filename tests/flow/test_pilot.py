"""The default field is chosen on the data where it is open, and left alone where it is not."""

from __future__ import annotations

import pytest
import torch

import cnf
from cnf.flow import pilot
from cnf.flow.pilot import Shape
from cnf.training.loop import Progress


@pytest.fixture(autouse=True)
def _small_candidates(monkeypatch):
    monkeypatch.setattr(pilot, "WIDTHS", ((16, 16), (8, 8), (24, 24)))
    monkeypatch.setattr("cnf.flow.transport.WIDTHS", pilot.WIDTHS)
    monkeypatch.setattr(pilot, "LEAST_STEPS", 2)


def waves(rows: int = 4000) -> torch.Tensor:
    """A line that is bent too often for a field without sines."""
    generator = torch.Generator().manual_seed(1)
    t = 6 * torch.rand(rows, generator=generator) - 3
    noise = torch.randn(rows, generator=generator)
    return torch.stack([t, torch.sin(9 * t) + 0.05 * noise], 1)


def fitted(flow: cnf.Flow, steps: int = 200, **settings) -> list[Progress]:
    records: list[Progress] = []
    settings = {"seed": 0, "progress": False, "batch_size": 256, **settings}
    flow.fit(waves(), steps=steps, callback=records.append, **settings)
    return records


def test_a_first_fit_tries_every_candidate_within_its_budget():
    flow = cnf.Flow(2, seed=0)
    assert flow.open_shape == (True, True) and flow.shape == Shape((16, 16), (0.5, 6.0))
    phases = [record.phase for record in fitted(flow, method="fm")]
    trials = [record for record in fitted(cnf.Flow(2, seed=0)) if record.phase == "pilot"]
    assert len(phases) == 200 and phases.count("pilot") == 24  # 12 %, six candidates
    assert sum(record.validation is not None for record in trials) == 6
    assert flow.open_shape == (False, False)


def test_what_was_given_is_left_alone():
    for given in (dict(hidden=(8, 8)), dict(bandwidth=(1.0, 2.0)), dict(bandwidth=None)):
        flow = cnf.Flow(2, seed=0, **given)
        shape = flow.shape
        records = fitted(flow, steps=100)
        assert any(record.phase == "pilot" for record in records)
        assert flow.shape.hidden == shape.hidden or "hidden" not in given
        assert flow.shape.bandwidth == shape.bandwidth or "bandwidth" not in given
    closed = cnf.Flow(2, hidden=(8, 8), bandwidth=(0.5, 6.0), seed=0)
    field = closed.field
    assert all(record.phase != "pilot" for record in fitted(closed, steps=100))
    assert closed.field is field


def test_a_field_that_has_learned_something_stays():
    flow = cnf.Flow(2, seed=0).whiten(waves())
    loss = cnf.FlowMatching(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    loss(waves(256)).backward()
    optimizer.step()
    field = flow.field
    fitted(flow, steps=100)
    assert flow.field is field


def test_a_budget_too_small_for_trials_takes_the_default(monkeypatch):
    monkeypatch.setattr(pilot, "LEAST_STEPS", 20)
    flow = cnf.Flow(2, seed=0)
    assert all(record.phase != "pilot" for record in fitted(flow, steps=100))
    assert flow.shape == Shape((16, 16), (0.5, 6.0))


@pytest.mark.parametrize("bands", [((0.5, 6.0), None), (None, (0.5, 6.0))])
def test_the_better_bandwidth_wins_whatever_the_order(bands, monkeypatch):
    monkeypatch.setattr(pilot, "BANDWIDTHS", bands)
    monkeypatch.setattr(pilot, "SHARE", 0.9)
    flow = cnf.Flow(2, hidden=(64, 64), seed=0)
    fitted(flow, steps=300)
    assert flow.shape == Shape((64, 64), (0.5, 6.0))


def test_the_chosen_field_keeps_what_it_has_learned():
    flow = cnf.Flow(2, seed=0)
    scores = [r.validation for r in fitted(flow) if r.validation is not None]
    assert min(scores[6:]) < min(scores[:6]) + 1e-6
    with torch.no_grad():
        assert flow.field.out.any()


def test_an_interrupted_trial_leaves_a_flow_that_works():
    flow = cnf.Flow(2, seed=0)

    def stop(record: Progress) -> None:
        if record.step >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.fit(waves(), steps=200, seed=0, progress=False, callback=stop)
    assert torch.isfinite(flow.log_prob(waves(10))).all()
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_the_same_seed_chooses_the_same_field():
    first, second = cnf.Flow(2, seed=3), cnf.Flow(2, seed=3)
    for flow in (first, second):
        fitted(flow, steps=100)
    assert first.shape == second.shape
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_the_shape_is_saved(tmp_path):
    flow = cnf.Flow(2, bandwidth=None, seed=0)
    fitted(flow, steps=100)
    flow.save(tmp_path / "flow.safetensors")
    loaded = cnf.Flow.load(tmp_path / "flow.safetensors")
    assert loaded.shape == flow.shape and loaded.open_shape == (False, False)
    x = waves(20)
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("bandwidth", ["wide", (1.0,), (2.0, 1.0), (0.0, 1.0), (1.0, float("inf"))])
def test_a_band_without_a_meaning_is_refused(bandwidth):
    with pytest.raises(cnf.InputError, match="bandwidth must be two angular frequencies"):
        cnf.Flow(2, bandwidth=bandwidth)
