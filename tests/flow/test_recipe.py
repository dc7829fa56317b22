"""Fitting: the same every time, never worse than before, and whatever ends it leaves the best."""

from __future__ import annotations

import gc
import io
import math
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import Independent, StudentT

import cnf
from cnf.data.density import toy
from cnf.error import InputError, IntegrationError
from cnf.flow import fitting
from cnf.flow.flow import Flow
from cnf.flow.split import split_rows
from cnf.training.loop import Progress, TrainingError

F64 = torch.float64
MIXING = torch.tensor([[2.0, 1.0], [0.0, 0.5]])


def banana(rows: int = 300, seed: int = 0) -> torch.Tensor:
    """Curved data far from the origin, that a normal does not fit."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack([10 + 3 * x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]], 1)


def tiny(**settings) -> Flow:
    return Flow(2, **{"hidden": (8, 8), "seed": 0, **settings})


def fit(flow: Flow | None = None, x=None, **settings) -> Flow:
    """A fit without a bar; ten steps with seed 0 unless something else is asked for."""
    flow = tiny() if flow is None else flow
    settings = {"progress": False, "seed": 0, **settings}
    if "seconds" not in settings:
        settings.setdefault("steps", 10)
    return flow.fit(banana() if x is None else x, **settings)


def records_of(flow: Flow | None = None, x=None, **settings) -> list[Progress]:
    records: list[Progress] = []
    fit(flow, x, callback=records.append, **settings)
    return records


def score(flow: Flow, x: torch.Tensor) -> float:
    with torch.no_grad():
        return -flow.log_prob(x).double().mean().item()


def weights(flow: Flow) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in flow.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Still(nn.Module):
    """A field that takes t of no dimensions alone."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.net = nn.Linear(dim, dim)

    def forward(self, t, x):
        return torch.tanh(self.net(x)) * t


class Timed(Still):
    """A field that takes t of shape (batch,) too."""

    def forward(self, t, x):
        return torch.tanh(self.net(x)) * t.unsqueeze(-1)


# what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "fm", "ml"])
def test_fitting_finds_a_better_density(method):
    held_out = banana(500, seed=1)
    flow = fit(tiny(hidden=(32, 32)), method=method, steps=120 if method == "ml" else 300)
    normal = tiny(hidden=(4, 4)).whiten(banana())
    assert score(flow, held_out) < score(normal, held_out) - 0.2
    assert flow.fit(banana(), steps=1, progress=False) is flow


@pytest.mark.slow
def test_six_seconds_are_enough_for_eight_gaussians():
    law = toy("8gaussians")
    torch.manual_seed(0)
    flow = Flow(2, seed=0).fit(law.sample((20_000,)), seconds=6, seed=0, progress=False)
    x = law.sample((10_000,))
    gap = (law.log_prob(x) - flow.log_prob(x).detach()).mean()
    assert -0.02 < gap < 0.15


def test_an_own_base_is_fitted_by_likelihood():
    base = Independent(StudentT(torch.full((2,), 5.0)), 1)
    records = records_of(tiny(base=base), steps=12)
    assert {record.phase for record in records} == {"ml"}


@pytest.mark.parametrize(
    "settings",
    [
        dict(hidden=(8,)),
        dict(hidden=(6, 5, 4)),
        dict(whiten=False),
        dict(divergence=cnf.Hutchinson()),
        dict(divergence=cnf.Hutchinson(2, "gaussian", None)),
        dict(divergence="tangents"),
        dict(gradient="adjoint"),
        dict(gradient="backprop"),
        dict(step_size=0.2, method="rk4"),
        dict(field=Timed()),
        dict(logdet_atol=None),
    ],
    ids=str,
)
def test_every_kind_of_flow_can_be_fitted(settings):
    x = banana() if settings.get("whiten", True) else torch.randn(300, 2) @ MIXING
    flow = fit(tiny(**settings), x)
    assert torch.isfinite(flow.log_prob(x)).all()
    assert flow.whitening.is_fitted == settings.get("whiten", True)


@pytest.mark.parametrize("dim", [1, 5])
def test_any_dimension_can_be_fitted(dim):
    x = torch.randn(200, dim) ** 3
    flow = Flow(dim, hidden=(8, 8), seed=0)
    assert torch.isfinite(fit(flow, x).log_prob(x)).all()


def test_a_double_flow_stays_one():
    x = banana().double()
    flow = fit(tiny().double(), x.numpy())
    assert flow.dtype == F64 and flow.log_prob(x).dtype == F64
    assert all(p.dtype == F64 for p in flow.parameters())


def test_nothing_of_training_is_left_behind():
    flow = fit()
    assert all(p.grad is None and p.requires_grad for p in flow.parameters())
    assert not flow.log_prob(banana()).isnan().any()
    assert torch.is_grad_enabled()


def test_frozen_weights_stay():
    flow = tiny()
    with torch.no_grad():
        flow.field.out.normal_(std=0.1)
    flow.field.weights[0].requires_grad_(False)
    kept = flow.field.weights[0].clone()
    fit(flow)
    assert torch.equal(flow.field.weights[0], kept)


# the same every time ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "fm", "ml"])
@pytest.mark.parametrize("divergence", ["auto", cnf.Hutchinson()])
def test_the_same_seed_gives_the_same_weights(method, divergence):
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        flow = fit(tiny(divergence=divergence), method=method, steps=15)
        results.append(weights(flow))
    assert equal(*results)
    assert not equal(results[0], weights(fit(method=method, steps=15, seed=1)))


def test_a_seeded_fit_leaves_the_generators_alone():
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    fit()
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpys).all()
    with pytest.raises(InputError):
        fit(x=banana(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unseeded_fit_takes_torchs_generator():
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(weights(fit(seed=None)))
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x.numpy(),
        lambda x: x.double().numpy(),
        lambda x: x.tolist(),
        lambda x: pd.DataFrame(x.numpy(), columns=["a", "b"]),
        lambda x: x.clone().requires_grad_(),
        lambda x: np.asfortranarray(x.numpy()),
    ],
)
def test_every_container_means_the_same(kind):
    assert equal(weights(fit(x=kind(banana()))), weights(fit()))


def test_the_data_are_not_changed():
    x = banana()
    kept = x.clone()
    fit(x=x)
    assert torch.equal(x, kept)


# going on -----------------------------------------------------------------------------------


def test_a_second_fit_keeps_the_whitening_and_goes_on():
    validation = banana(200, seed=2)
    flow = fit(validation=validation, steps=30)
    affine = [tensor.clone() for tensor in flow.whitening.buffers()]
    before, first = weights(flow), score(flow, validation)
    fit(flow, banana(seed=3) + 100, validation=validation)
    assert all(torch.equal(a, b) for a, b in zip(affine, flow.whitening.buffers(), strict=True))
    assert score(flow, validation) <= first + 1e-6
    fit(flow, validation=validation, steps=100)
    assert score(flow, validation) < first and not equal(before, weights(flow))


@pytest.mark.parametrize("lr, method", [(1e-3, "fm"), (1e-3, "ml"), (1.0, "auto"), (1e4, "ml")])
def test_a_fit_never_ends_worse_than_it_began(lr, method):
    validation = banana(200, seed=2)
    flow = fit(validation=validation, steps=40)
    before = score(flow, validation)
    fit(flow, validation=validation, lr=lr, method=method, steps=4)
    assert score(flow, validation) <= before + 1e-6


def test_a_first_fit_that_fails_leaves_the_whitened_normal():
    validation = banana(200, seed=2)
    flow = fit(validation=validation, lr=1e6, steps=5)
    normal = tiny().whiten(banana())
    assert score(flow, validation) <= score(normal, validation) + 1e-5


def test_a_map_set_before_is_kept():
    flow = tiny().whiten(banana() * 10)
    mean = flow.whitening.mean.clone()
    assert torch.equal(fit(flow).whitening.mean, mean)


def test_without_whitening_the_map_stays_the_identity():
    flow = fit(tiny(whiten=False), torch.randn(100, 2))
    assert torch.equal(flow.whitening.factor, torch.eye(2)) and not flow.whitening.mean.any()


# what is reported ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_budget_in_steps_is_shared_by_the_phases(steps):
    records = records_of(steps=steps, validation=0.2)
    phases = [record.phase for record in records]
    assert len(records) <= steps and phases == sorted(phases)  # fm before ml
    assert set(phases) == ({"fm"} if steps == 1 else {"fm", "ml"})
    planned = {record.phase: record.steps for record in records}
    assert sum(planned.values()) == steps
    assert all(record.nfe is None or record.nfe > 6 for record in records)
    seconds = [record.seconds for record in records]
    assert seconds == sorted(seconds) and records[-1].validation is not None


def test_the_score_is_that_of_the_weights_that_are_left():
    validation = banana(200, seed=2)
    flow = tiny()
    records = records_of(flow, validation=validation, steps=60)
    scores = [record.validation for record in records if record.validation is not None]
    assert score(flow, validation) == pytest.approx(min(scores), abs=1e-3)


def test_a_budget_in_seconds_is_kept():
    records = records_of(seconds=1.0)
    assert records[-1].seconds < 1.5
    assert {record.phase for record in records} == {"fm", "ml"}
    assert records_of(seconds=1e-6)[-1].validation is not None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal_alone(terminal, monkeypatch, capsys):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    one = weights(fit(progress=True, callback=lambda record: time.sleep(0.05)))
    assert ("flow matching · loss" in screen.getvalue()) == terminal
    assert terminal or screen.getvalue() == ""
    drawn = len(screen.getvalue())
    assert equal(one, weights(fit(progress=False)))
    assert len(screen.getvalue()) == drawn
    assert capsys.readouterr().out == ""


# what ends it early -------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
@pytest.mark.parametrize("at", [1, 40])
def test_an_interrupt_leaves_the_best_weights_at_once(progress, stop, at):
    validation = banana(200, seed=2)
    flow, scores = tiny(), []
    normal = score(tiny().whiten(banana()), validation)

    def callback(record):
        scores.append(math.inf if record.validation is None else record.validation)
        if record.step == at:
            raise stop

    with pytest.raises(stop) as caught:  # whose traceback holds on to everything
        fit(flow, steps=60, validation=validation, callback=callback, progress=progress)
    assert score(flow, validation) == pytest.approx(min(normal, *scores), abs=1e-4)
    assert all(p.grad is None for p in flow.parameters())
    kept = weights(flow)
    fit(flow, steps=5)
    after = weights(flow)
    del caught
    gc.collect()
    assert equal(weights(flow), after)  # nothing comes back later
    assert len(kept) == len(after)


def test_training_that_cannot_go_on_leaves_the_best_weights():
    class Fragile(Timed):
        """Fails for good after some calls with gradients."""

        calls = 0

        def forward(self, t, x):
            self.calls += torch.is_grad_enabled()
            return super().forward(t, x) * (math.nan if self.calls > 30 else 1.0)

    flow = tiny(field=Fragile())
    with pytest.raises(TrainingError, match=r"not finite .* try a smaller lr"):
        fit(flow, steps=500, method="fm")
    flow.field.calls = 0
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert torch.isfinite(flow.log_prob(banana())).all()


def test_a_batch_that_cannot_be_solved_is_skipped():
    class Rare(Timed):
        calls = 0

        def forward(self, t, x):
            self.calls += 1
            if self.calls == 3 and torch.is_grad_enabled():
                raise IntegrationError("no further")
            return super().forward(t, x)

    records = records_of(tiny(field=Rare()), method="fm", steps=12)
    assert records[-1].skipped <= 1 and len(records) == 12


# data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, said",
    [
        (banana(4), "x has 4 rows; a density needs at least 5"),
        (torch.zeros(0, 2), "x is empty"),
        (torch.cat([banana(), torch.full((1, 2), math.nan)]), "NaN or infinite .*row 300"),
        (torch.cat([banana(), torch.tensor([[math.inf, 0.0]])]), "NaN or infinite"),
        (torch.ones(100, 2), "column 0 is constant"),
        (banana() * torch.tensor([1.0, 0.0]), "column 1 is constant"),
        (torch.randn(100, 3), r"x has shape \(100, 3\), expected \(n, 2\)"),
        (torch.randn(2, 100), "transpose it with x.T"),
        (torch.randn(100), r"x has shape \(100,\)"),
        (torch.randn(10, 5, 2), "reshape it to two dimensions"),
        ("moons", "text"),
        (None, "Python objects"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused_before_training(x, said):
    flow = tiny()
    before = weights(flow)
    with pytest.raises(InputError, match=said):
        flow.fit(x, steps=3, progress=False)
    assert equal(weights(flow), before)


def test_ten_rows_are_enough():
    for method in ("fm", "ml"):
        flow = fit(x=banana(10), method=method, steps=5)
        assert torch.isfinite(flow.log_prob(banana())).all()


def test_constant_rows_without_whitening_are_survived():
    flow = fit(tiny(whiten=False), torch.ones(50, 2), steps=20)
    assert torch.isfinite(flow.log_prob(torch.ones(1, 2))).all()


def test_a_share_of_the_rows_is_held_out():
    x = banana(100)
    torch.manual_seed(0)
    split = split_rows(x, tiny(), 0.2)
    assert split.training.shape == (80, 2) and split.validation.shape == (20, 2)
    together = torch.cat([split.training, split.validation])
    assert torch.equal(together.sort(0).values, x.sort(0).values)
    assert not torch.equal(split.validation, x[:20])
    assert len(split_rows(banana(10), tiny(), 0.01).validation) == 2


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, pd.DataFrame])
def test_rows_of_ones_own_are_validated_on_and_not_trained_on(kind):
    x, own = banana(50), banana(30, seed=4)
    split = split_rows(x, tiny(), kind(own.numpy()))
    assert torch.equal(split.validation, own) and torch.equal(split.training, x)


def test_sorted_rows_of_ones_own_are_looked_at_from_end_to_end(monkeypatch):
    monkeypatch.setattr(fitting, "VALIDATION_ROWS", 10)
    own = torch.arange(100.0)[:, None].expand(-1, 2)
    assert fitting.Validation(tiny(), own, None)._rows[:, 0].tolist() == [
        11.0 * i for i in range(10)
    ]


@pytest.mark.parametrize(("rows", "are_plenty"), [(None, True), (10**6, True), (300, False)])
def test_chance_is_told_where_rows_are_plenty(rows, are_plenty):
    score = fitting.Validation(tiny(), banana(50), rows)
    found = score()
    assert (score.losses is not None) == are_plenty
    if score.losses is not None:
        assert found == pytest.approx(score.losses.mean().item())


def test_sorted_rows_are_whitened_as_a_whole(monkeypatch):
    monkeypatch.setattr("cnf.flow.split.WHITENING_ROWS", 200)
    x = banana(2000)[:, :2].sort(0).values + 0.01 * torch.randn(2000, 2)
    flow = fit(tiny(marginals=None), x, validation=banana(20), steps=1)
    assert torch.allclose(flow.whitening.mean, x.mean(0), atol=0.8)


@pytest.mark.parametrize(
    "validation, said",
    [
        (0, "validation must be a share between 0 and 1 or rows, got 0"),
        (1.0, "validation must be a share"),
        (-0.1, "validation must be a share"),
        (math.nan, "validation must be a share"),
        (True, "validation must be a share"),
        (None, "validation must be a share"),
        (0.999, "leaves 0 of 300 rows to train on; give a smaller share"),
        (torch.zeros(20, 3), r"validation has shape \(20, 3\), expected \(n, 2\)"),
        (torch.empty(0, 2), "validation is empty"),
        (torch.full((3, 2), math.nan), "validation has missing, NaN"),
        ("all", "validation holds text"),
    ],
    ids=str,
)
def test_validation_without_a_meaning_is_refused(validation, said):
    with pytest.raises(InputError, match=said):
        fit(validation=validation)


def test_numpys_share_is_a_share():
    assert equal(weights(fit(validation=np.float32(0.25))), weights(fit(validation=0.25)))


def test_batches_go_through_all_rows_again_and_again():
    x = torch.arange(40.0)[:, None].expand(-1, 2).contiguous()
    split = split_rows(x, tiny(), banana(20))
    batches = split.batches(8, tiny())
    for _ in range(3):
        rows = torch.cat([batches()[0] for _ in range(5)])
        assert torch.equal(rows[:, 0].sort().values, x[:, 0])
    assert split.batches(1000, tiny())()[0].shape == (40, 2)


@pytest.mark.parametrize("batch_size", [1, 7, 10_000, np.int64(50)])
def test_any_batch_size_serves(batch_size):
    assert torch.isfinite(fit(batch_size=batch_size).log_prob(banana())).all()


# memory maps --------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Makes a memory map that counts as too large for memory."""
    monkeypatch.setattr("cnf.flow.split.LAZY_BYTES", 0)

    def make(values):
        np.save(tmp_path / "x.npy", np.asarray(values))
        return np.load(tmp_path / "x.npy", mmap_mode="r")

    return make


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8", "i2"])
@pytest.mark.parametrize("validation", [0.1, banana(20)], ids=["share", "rows"])
def test_a_large_memory_map_is_fitted_from_disk(mapped, dtype, validation):
    x = mapped((banana() * 10).numpy().astype(dtype))
    flow = fit(x=x, validation=validation)
    assert isinstance(split_rows(x, flow, validation).training, np.memmap)
    assert torch.isfinite(flow.log_prob(x)).all()
    assert equal(weights(flow), weights(fit(x=x, validation=validation)))


def test_columns_of_a_memory_map_may_be_chosen(mapped):
    x = mapped(np.c_[banana(), banana()])[:, 1:3]
    assert torch.isfinite(fit(x=x).log_prob(x)).all()


def test_a_small_memory_map_is_read_whole(mapped, monkeypatch):
    monkeypatch.setattr("cnf.flow.split.LAZY_BYTES", 2**28)
    assert equal(weights(fit(x=mapped(banana()))), weights(fit()))


def test_a_memory_map_is_looked_through_before_training(mapped):
    bad = banana().numpy().copy()
    bad[77, 1] = np.nan
    for values, said in (
        (bad, "NaN or infinite values in 1 row .*row 77.* column '1'"),
        (banana(4), "x has 4 rows"),
        (np.zeros((100, 3)), "x must have 2 columns, got 3"),
        (banana().numpy() + 1j, "complex"),
        (np.full((100, 2), 1e35), "too large"),
    ):
        with pytest.raises(InputError, match=said):
            fit(x=mapped(values))


# settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(method="em"), "unknown method 'em'; known are auto, fm, ml"),
        (dict(method=None), "unknown method None"),
        (dict(steps=3, seconds=1), "both budgets: give one"),
        (dict(steps=0), "steps must be a whole number, at least 1, got 0"),
        (dict(steps=-1), "steps must be"),
        (dict(steps=2.5), "steps must be"),
        (dict(steps="3"), "steps must be"),
        (dict(seconds=0, steps=None), "seconds must be a number > 0, got 0"),
        (dict(seconds=-1.0, steps=None), "seconds must be"),
        (dict(seconds=math.inf, steps=None), "seconds must be"),
        (dict(seconds="1", steps=None), "seconds must be"),
        (dict(lr=0), "lr must be a number > 0, got 0"),
        (dict(lr=math.nan), "lr must be"),
        (dict(lr="fast"), "lr must be"),
        (dict(batch_size=0), "batch_size must be a whole number, at least 1"),
        (dict(batch_size=-5), "batch_size must be"),
        (dict(batch_size=1.5), "batch_size must be"),
        (dict(seed=-1), "seed must be"),
        (dict(seed="x"), "seed must be"),
        (dict(device="nowhere"), "the flow cannot be moved to device 'nowhere'"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(settings, said):
    flow = tiny()
    before = weights(flow)
    with pytest.raises(InputError, match=said):
        fit(flow, **settings)
    assert equal(weights(flow), before)


@pytest.mark.parametrize(
    "flow", [lambda: tiny(field=lambda t, x: -x), lambda: tiny().requires_grad_(False)]
)
def test_a_flow_without_weights_is_refused(flow):
    with pytest.raises(InputError, match="has no parameters to fit; make its field"):
        fit(flow())


def test_the_device_of_the_flow_can_be_named():
    assert fit(device="cpu").device == torch.device("cpu")
    assert fit(device=torch.device("cpu")).device == torch.device("cpu")


def test_flow_matching_wants_the_normal_base():
    flow = tiny(base=Independent(StudentT(torch.full((2,), 5.0)), 1))
    with pytest.raises(InputError, match="method='fm' needs the standard normal base"):
        fit(flow, method="fm")


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_a_field_without_times_by_row_falls_back_to_likelihood_with_a_warning(dim):
    x = torch.randn(60, dim)
    flow = Flow(dim, field=Still(dim))
    records = []
    with pytest.warns(UserWarning, match="give method='ml' to say so") as caught:
        flow.fit(x, steps=3, progress=False, callback=records.append)
    assert caught[0].filename == __file__  # it points at the user's line
    assert {record.phase for record in records} == {"ml"}
    with pytest.raises(InputError, match="a time for each row; use method='ml'"):
        flow.fit(x, steps=3, progress=False, method="fm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.fit(x, steps=3, progress=False, method="ml")


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_a_field_with_times_by_row_is_warmed_up_by_flow_matching(dim):
    records = records_of(Flow(dim, field=Timed(dim)), torch.randn(60, dim), steps=10)
    assert {record.phase for record in records} == {"fm", "ml"}


# laws -----------------------------------------------------------------------------------------


def test_a_law_is_drawn_from_anew_for_every_batch():
    drawn = []

    class Noted(Independent):
        def sample(self, sample_shape=()):
            drawn.append(super().sample(sample_shape))
            return drawn[-1]

    law = Noted(StudentT(torch.full((2,), 5.0)), 1)
    split = split_rows(law, tiny(), 0.1)
    batches = split.batches(7, tiny())
    first, second = batches(), batches()
    assert first.shape == (7, 2) and not torch.equal(first, second)
    assert torch.equal(split.validation, drawn[0])


def test_a_flow_is_fitted_to_a_law():
    law = toy("moons")
    flow = fit(tiny(), law, steps=30)
    normal = tiny().whiten(law.sample((1000,)))
    assert score(flow, law.sample((500,))) < score(normal, law.sample((500,)))


def test_a_law_of_another_width_is_refused():
    with pytest.raises(InputError, match=r"expected \(n, 3\)"):
        fit(Flow(3), toy("moons"))


def test_a_law_leaves_no_room_for_contexts():
    with pytest.raises(InputError, match="rows and their contexts"):
        fit(tiny(context=1), toy("moons"))


def test_a_law_is_validated_on_rows_of_ones_own():
    own = banana(50)
    assert torch.equal(split_rows(toy("moons"), tiny(), own).validation, own)


def test_the_maps_stay_under_a_field_that_was_trained_without_them():
    flow = tiny(hidden=(16, 16))
    law = torch.distributions.MultivariateNormal(torch.full((2,), 2.0), 0.1 * torch.eye(2))
    flow.fit_to_density(law.log_prob, steps=40, seed=0, progress=False)
    x = law.sample((300,))
    before = score(flow, x)
    fit(flow, x, method="ml", steps=1, lr=1e-9)
    assert abs(score(flow, x) - before) < 1e-2
    own = tiny()
    nn.init.normal_(own.field.out, std=0.1)  # by a loop of one's own
    mean = own.whitening.mean.clone()
    fit(own, x, method="ml", steps=1)
    assert torch.equal(own.whitening.mean, mean)


def test_contexts_are_standardized_where_rows_are_not_whitened():
    flow = Flow(2, context=1, hidden=(8, 8), whiten=False)
    context = 1e4 + 3 * torch.randn(300, 1)
    flow.fit(banana() / 10, context, steps=2, seed=0, progress=False)
    assert (flow.contexts(context).mean().abs(), flow.contexts(context).std()) < (0.1, 1.1)
    assert not flow.whitening.is_fitted and torch.equal(flow.whitening.factor, torch.eye(2))


def test_a_flow_whose_columns_are_changed_is_whitened_where_it_is():
    flow = Flow(1, hidden=(4, 4)).to("meta")
    with pytest.raises(NotImplementedError):  # not a mix of devices
        flow.whiten(torch.randn(500, 1).exp())


def test_a_uniform_law_may_draw_the_end_of_the_support():
    class Edge(torch.distributions.Uniform):
        def sample(self, shape=()):
            x = super().sample(shape)
            x[0] = x[0] if len(x) < 3 else 0.0
            return x

    law = torch.distributions.Independent(Edge(torch.zeros(2), torch.ones(2)), 1)
    fit(Flow(2, hidden=(4, 4), support=(0, 1)), law, steps=2)
    beyond = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
    with pytest.raises(InputError, match="which is not inside the support"):
        fit(Flow(2, hidden=(4, 4), support=(0, 1)), beyond, steps=2)


def test_a_row_of_a_memory_map_outside_the_support_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("cnf.flow.split.LAZY_BYTES", 1000)
    monkeypatch.setattr("cnf.data.rows.BLOCK", 2 * 64)
    x = np.random.default_rng(0).uniform(0.1, 0.9, (3000, 2)).astype(np.float32)
    x[2001, 1] = 5.0
    np.save(tmp_path / "x.npy", x)
    kept = np.load(tmp_path / "x.npy", mmap_mode="r")
    with pytest.raises(InputError, match="x has 5 in row 2001, column 1, which is not inside"):
        fit(Flow(2, hidden=(4, 4), support=(0, 1)), kept, steps=2)


def test_a_validation_that_carries_a_gradient_is_taken():
    fit(x=banana(), validation=banana(50, 1).requires_grad_(), steps=2)


@pytest.mark.parametrize("value", [2.0])
def test_a_constant_column_is_named_by_its_value(value):
    x = torch.rand(50, 2) + 1
    x[:, 1] = value
    with pytest.raises(InputError, match=r"column 1 is constant \(2\), so it has no density"):
        Flow(2, support="positive").whiten(x)
