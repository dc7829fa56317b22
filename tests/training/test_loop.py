"""The loop trains whatever returns a loss: here a parabola, which knows nothing of flows."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from cnf.error import IntegrationError
from cnf.training import loop
from cnf.training.loop import (
    PATIENCE_BATCHES,
    Average,
    Best,
    Plan,
    TrainingError,
    put,
    schedule,
    train,
    weights_in_place,
)

TARGET = torch.tensor([1.0, -2.0, 3.0])


class Parabola(nn.Module):
    """(w − a batch's mean)², with a frozen weight that must be left alone."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.weight = nn.Parameter(torch.full((3,), start))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, batch):
        return (self.weight + self.bias - batch.mean(0)).square().sum()

    @property
    def error(self) -> float:
        return (self.weight + self.bias - TARGET).square().sum().item()


def noisy(size: int = 16):
    """Batches around TARGET."""
    return lambda: TARGET + torch.randn(size, 3)


def run(module, batches=None, *, validate=None, best=None, **plan):
    """All records of a training."""
    plan = Plan("demo", **{"steps": 100, "lr": 0.05, **plan})
    validate = (lambda: module.error) if validate is None else validate
    best = Best() if best is None else best
    return list(train(module, batches or noisy(), plan, validate=validate, best=best))


# what it does -------------------------------------------------------------------------------


def test_it_converges():
    module, best = Parabola(), Best()
    run(module, steps=400, best=best)
    put([module.weight, module.bias], best.weights)
    assert module.error == best.score < 0.01
    assert torch.equal(module.frozen, torch.ones(2))


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_budget_in_steps_is_exact(steps):
    calls = 0

    def batches():
        nonlocal calls
        calls += 1
        return TARGET.expand(4, 3)

    records = run(Parabola(), batches, steps=steps)
    assert [r.step for r in records] == list(range(1, steps + 1))
    assert {r.steps for r in records} == {steps} and calls == steps
    assert records[-1].remaining == 0
    assert all(a.seconds <= b.seconds for a, b in pairwise(records))
    assert all(r.phase == "demo" and r.skipped == 0 and r.nfe is None for r in records)
    assert all(math.isfinite(r.loss) and r.lr > 0 for r in records)


def test_the_last_step_is_always_validated():
    for steps in (1, 3, 10, 37):
        assert run(Parabola(), steps=steps)[-1].validation is not None


@pytest.mark.parametrize("validations", [1, 5, 10])
def test_validations_are_spread_over_the_whole(validations):
    records = run(Parabola(), steps=100, validations=validations)
    measured = [r.step for r in records if r.validation is not None]
    assert validations - 1 <= len(measured) <= validations + 1
    gaps = [b - a for a, b in zip([0, *measured], measured, strict=False)]
    assert max(gaps) <= 100 / validations + 1


@pytest.mark.parametrize("seconds", [0.3, 0.8])
def test_a_budget_in_seconds_is_kept(seconds):
    class Slow(Parabola):
        def forward(self, batch):
            time.sleep(0.004)
            return super().forward(batch)

    start = time.perf_counter()
    records = run(Slow(), steps=None, seconds=seconds)
    took = time.perf_counter() - start
    assert 0.7 * seconds < took < seconds + 0.5
    assert records[-1].step == records[-1].steps and records[-1].validation is not None
    assert records[-1].lr < 0.1 * max(r.lr for r in records)
    assert all(r.step <= r.steps for r in records)


def test_a_budget_too_short_for_one_step_takes_one_and_validates_it():
    records = run(Parabola(), steps=None, seconds=1e-9)
    assert [r.step for r in records] == [1] and records[0].validation is not None


def test_time_that_the_caller_takes_does_not_cost_the_last_validation():
    module = Parabola()
    plan = Plan("demo", seconds=0.3)
    records = []
    for record in train(module, noisy(), plan, validate=lambda: module.error, best=Best()):
        records.append(record)
        time.sleep(0.12)
    assert len(records) < 8 and records[-1].validation is not None


def test_slow_validations_do_not_eat_the_budget():
    module = Parabola()

    def validate():
        time.sleep(0.1)
        return module.error

    start = time.perf_counter()
    records = run(module, validate=validate, steps=None, seconds=1.0, validations=50)
    assert time.perf_counter() - start < 1.6
    assert sum(r.validation is not None for r in records) < 9


def test_the_same_seed_gives_the_same_bits():
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        module, best = Parabola(), Best()
        records = run(module, best=best)
        results.append((module.weight.detach(), *best.weights, [r.loss for r in records]))
    for one, other in zip(*results, strict=True):
        assert one == other if isinstance(one, list) else torch.equal(one, other)


def test_evaluations_of_the_field_are_reported_where_they_are_counted():
    module = Parabola()
    module.nfe = 17
    assert {r.nfe for r in run(module, steps=3)} == {17}


# batches that fail --------------------------------------------------------------------------


class Failing(Parabola):
    """A parabola whose batches 3, 6, 9 … fail in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, batch):
        self.calls += 1
        loss = super().forward(batch)
        if self.calls % 3:
            return loss
        if self.how == "raise":
            raise IntegrationError("no further")
        if self.how == "gradient":
            return loss + (self.weight - self.weight.detach()).abs().sqrt().sum()  # ∞·0
        return loss * float(self.how)


@pytest.mark.parametrize("how", ["nan", "inf", "raise", "gradient"])
def test_a_batch_that_fails_is_skipped_and_counted(how):
    module, best = Failing(how), Best()
    records = run(module, steps=300, best=best)
    assert len(records) == 300
    assert [r.skipped for r in records] == [r.step // 3 for r in records]
    assert all(math.isnan(r.loss) == (r.step % 3 == 0) for r in records)
    assert torch.isfinite(module.weight).all() and best.score < 0.05


@pytest.mark.parametrize("how", ["nan", "raise", "gradient"])
def test_a_skipped_batch_changes_no_weight(how):
    module = Failing(how)
    plan = Plan("demo", steps=9, lr=0.1)
    before = None
    for record in train(module, noisy(), plan, validate=lambda: 0.0, best=Best()):
        if record.step % 3 == 0:
            assert torch.equal(module.weight, before)
        before = module.weight.detach().clone()


def test_too_many_failures_in_a_row_end_it_in_a_sentence():
    module, best, records = Parabola(), Best(), []
    good, done = noisy(), 0

    def batches():
        nonlocal done
        done += 1
        return good() * (math.nan if done > 30 else 1.0)

    plan = Plan("demo", steps=1000, lr=0.05, validations=100)
    with pytest.raises(TrainingError, match=f"^{PATIENCE_BATCHES} batches in a row .* smaller lr"):
        for record in train(module, batches, plan, validate=lambda: module.error, best=best):
            records.append(record)
    assert len(records) == 30 + PATIENCE_BATCHES - 1
    assert torch.isfinite(module.weight).all()
    assert best.weights and all(torch.isfinite(w).all() for w in best.weights)


@pytest.mark.parametrize(("steps", "which"), [(1, "the only batch"), (7, "7 batches in a row")])
def test_a_training_without_a_batch_of_use_is_none(steps, which):
    plan = Plan("demo", steps=steps, lr=0.1)
    with pytest.raises(TrainingError, match=f"^{which} had a loss or gradient that is not finite"):
        list(
            train(Parabola(), lambda: noisy()() * math.nan, plan, validate=lambda: 0.0, best=Best())
        )


def test_it_trains_where_gradients_are_switched_off():
    best = Best()
    with torch.no_grad():
        run(Parabola(), steps=200, best=best)
        assert not torch.is_grad_enabled()
    assert best.score < 0.05


def test_other_errors_are_not_swallowed():
    class Broken(Parabola):
        def forward(self, batch):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Broken())


def test_an_endless_score_is_never_the_best():
    for score in (math.inf, math.nan):
        best = Best()
        assert run(Parabola(), validate=lambda score=score: score, best=best)
        assert best.weights == [] and best.score == math.inf


def test_large_gradients_are_clipped():
    class Steep(Parabola):
        def forward(self, batch):
            return 1e6 * super().forward(batch)

    steps = []
    for clip in (1e-3, 1e12):
        module = Steep()
        run(module, steps=1, clip=clip)
        steps.append(module.weight.grad.norm())
    assert steps[0] <= 1.1e-3 and steps[1] > 1e5


# stopping -----------------------------------------------------------------------------------


def test_it_stops_early_when_nothing_improves():
    best = Best()
    scores = iter([5.0, 4.0, 3.0, *[9.0] * 97])
    records = run(Parabola(), validate=lambda: next(scores), best=best, validations=50, patience=4)
    measured = [r.validation for r in records if r.validation is not None]
    assert measured == [5.0, 4.0, 3.0, 9.0, 9.0, 9.0, 9.0]
    assert best.score == 3.0 and records[-1].step < 100


def test_without_patience_it_goes_on():
    assert len(run(Parabola(), validate=lambda: 9.0, patience=None)) == 100


def test_a_score_from_before_is_only_replaced_by_a_better_one():
    best = Best()
    kept = [torch.full((3,), 7.0), torch.zeros(3)]
    best.offer(-1.0, kept)
    run(Parabola(), best=best)
    assert best.score == -1.0 and torch.equal(best.weights[0], kept[0])


def test_closing_it_early_leaves_the_modules_own_weights():
    module, best = Parabola(), Best()
    plan = Plan("demo", steps=100, lr=0.05, validations=100)
    records = train(module, noisy(), plan, validate=lambda: module.error, best=best)
    last = [next(records) for _ in range(20)][-1]
    weight = module.weight.detach().clone()
    records.close()
    assert torch.equal(module.weight, weight)
    assert last.validation is not None and best.weights
    assert list(records) == []


def test_an_error_in_a_validation_leaves_the_modules_own_weights():
    module = Parabola()

    def validate():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(module, validate=validate, steps=1)
    one_step = module.weight.abs().max().item()  # of Adam: lr long
    assert one_step == pytest.approx(0.05, rel=1e-3)


# weights ------------------------------------------------------------------------------------


def test_validation_sees_the_averaged_weights():
    module, seen = Parabola(), []
    best = Best()

    def validate():
        seen.append(module.weight.detach().clone())
        return -float(len(seen))  # always better

    run(module, steps=20, validate=validate, best=best, validations=1)
    assert torch.equal(best.weights[0], seen[-1])
    assert not torch.equal(module.weight, seen[-1])


@pytest.mark.parametrize("memory", [0.05, 0.1, 0.5])
def test_the_average_weighs_the_past_by_a_power_of_time(memory):
    parameter = nn.Parameter(torch.tensor([100.0], dtype=torch.float64))
    average, power, count = Average([parameter], memory), 1 / memory, 400
    values = torch.randn(count, dtype=torch.float64)
    for value in values:
        put([parameter], [value[None]])
        average.update()
    # θ̂_t = β_t θ̂_{t−1} + (1 − β_t) θ_t with β_t = (1 − 1/t)^(1 + 1/memory), unrolled
    keep = (1 - 1 / torch.arange(1, count + 1, dtype=torch.float64)) ** (1 + power)
    after = torch.cat([keep.flip(0).cumprod(0).flip(0)[1:], torch.ones(1).double()])
    assert torch.allclose(average.weights[0], ((1 - keep) * after * values).sum())
    assert ((1 - keep) * after).sum() == pytest.approx(1)
    # most of the weight lies within about `memory` of the steps
    recent = ((1 - keep) * after)[-max(1, round(memory * count)) :].sum()
    assert 0.4 < recent < 0.9


def test_the_average_forgets_the_start_and_is_no_alias():
    parameter = nn.Parameter(torch.full((2,), 100.0))
    average = Average([parameter], 0.1)
    put([parameter], [torch.zeros(2)])
    average.update()
    assert not average.weights[0].any()
    put([parameter], [torch.ones(2)])
    assert not average.weights[0].any() and not average.weights[0].requires_grad


def test_best_keeps_copies():
    weights, best = [torch.zeros(2)], Best()
    best.offer(1.0, weights)
    weights[0] += 5
    assert not best.weights[0].any()


# chance -------------------------------------------------------------------------------------

NOISE = torch.linspace(-1, 1, 100)  # of the difference of two scores: its error is 0.058


def offered(best: Best, excess: float, noise: torch.Tensor | float = NOISE) -> bool:
    """Whether weights are kept whose rows' losses are those of 5 and some more."""
    losses = 5 + excess + noise * torch.ones(100)
    weights = [torch.rand(2)]
    best.offer(losses.mean().item(), weights, losses)
    return torch.equal(best.weights[0], weights[0])


def test_later_weights_are_kept_where_chance_may_have_made_them_worse():
    best = Best()
    assert offered(best, 0.0, 0.0)
    assert offered(best, 0.05)
    assert best.score == pytest.approx(5.05) and best.age == 0
    assert not offered(best, 0.07)
    assert best.score == pytest.approx(5.05) and best.age == 1


def test_beyond_doubt_worse_weights_are_not_kept_however_little_they_are():
    best = Best()
    assert offered(best, 0.0, 0.0)
    assert not offered(best, 1e-3, 1e-3)


def test_many_small_losses_do_not_add_up():
    best = Best()
    kept = [offered(best, 0.02 * i, NOISE if i else 0.0) for i in range(10)]
    assert kept == [True] * 3 + [False] * 7
    assert best.lowest == pytest.approx(5.0) and best.age == 7


def test_without_rows_a_higher_score_is_worse():
    best, weights = Best(), [torch.zeros(2)]
    best.offer(1.0, weights)
    best.offer(1.0 + 1e-9, [torch.ones(2)], None)
    assert not best.weights[0].any() and best.age == 1


def test_rows_without_a_density_are_beyond_doubt():
    best = Best()
    assert offered(best, 0.0, 0.0)
    for lost in (math.inf, math.nan):
        assert not offered(best, lost)


def test_a_training_offers_the_rows_that_its_score_is_made_of():
    class Score:
        losses = torch.zeros(0)

        def __call__(self) -> float:
            self.losses = torch.tensor([1.0, 3.0]) + 0.1 * len(seen) * torch.tensor([1.0, -0.5])
            seen.append(self.losses)
            return self.losses.mean().item()

    seen, best = [], Best()
    run(Parabola(), validate=Score(), best=best, validations=4)
    assert torch.equal(best.losses, seen[0])
    assert best.lowest < best.score == pytest.approx(seen[-1].mean().item())


def test_weights_in_place_come_back_even_after_an_error():
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ZeroDivisionError), weights_in_place([parameter], [torch.ones(2)]):
        assert torch.equal(parameter, torch.ones(2))
        raise ZeroDivisionError
    assert not parameter.any() and parameter.requires_grad


# schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5])
def test_the_schedule_rises_to_at_most_one_and_falls_to_nearly_zero(steps, warmup):
    shares = [schedule(step, steps, warmup) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    peak = shares.index(max(shares))
    assert all(a <= b for a, b in pairwise(shares[: peak + 1]))
    assert all(a >= b for a, b in pairwise(shares[peak:]))
    assert peak <= warmup * steps + 1
    assert schedule(steps, steps, warmup) == pytest.approx(0, abs=1e-12)
    if steps == 1000:
        assert shares[-1] < 1e-4 and shares[0] == pytest.approx(1 / max(1, warmup * 1000), rel=0.01)


def test_the_records_show_the_schedule():
    records = run(Parabola(), steps=50, lr=0.1)
    assert [r.lr for r in records] == [0.1 * schedule(i, 50, 0.02) for i in range(50)]


def test_the_loop_needs_no_flow():
    assert not any("flow" in name for name in vars(loop))
