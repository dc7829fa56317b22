"""From settings to a trained net: presets, splits, nets and plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cnf.data.idx import Images
from cnf.error import InputError
from cnf.odenet.network import ODENet, Perceptron, ResNet, parameter_count
from cnf.odenet.recipe import ImageTraining, build, plan, solver, split
from cnf.odenet.settings import NETS, PRESETS, Settings, chosen
from cnf.training.optimizer import SGD

SHAPE = (1, 28, 28)


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of a bright row, whose height is the class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, count)
    images = draw.integers(0, 60, (count, 8, 8), dtype=np.uint8)
    images[np.arange(count), 2 * labels] = 250
    return images, labels.astype(np.int64)


DATA = Images("bars", *bars(300, 0), *bars(50, 1), classes=4)
SMALL = Settings(
    width=8, stem="fine", steps=100, batch_size=32, validation=60, shift=0, method="euler", nfe=2,
    lr=0.02,
)  # fmt: skip


def test_parts_are_disjoint_and_follow_the_seed() -> None:
    parts, again = split(DATA, 60, 0), split(DATA, 60, 0)
    assert parts.images.shape == (240, 1, 8, 8) and parts.validation_images.shape == (60, 1, 8, 8)
    assert torch.equal(parts.images, again.images)
    assert not torch.equal(parts.validation_images, split(DATA, 60, 1).validation_images)
    together = torch.cat([parts.images, parts.validation_images]).flatten(1)
    assert len(together.unique(dim=0)) == 300
    assert parts.images.max() <= 1 and parts.test_images.shape == (50, 1, 8, 8)
    assert parts.shape == (1, 8, 8)
    with pytest.raises(InputError, match="validation=300 leaves none"):
        split(DATA, 300, 0)


@pytest.mark.parametrize(
    ("net", "kind", "numbers"),
    [
        ("odenet", ODENet, 232_970),
        ("rk-net", ODENet, 232_970),
        ("resnet", ResNet, 601_482),
        ("one-block", ResNet, 231_562),
        ("no-block", ResNet, 157_578),
        ("mlp", Perceptron, 238_510),
    ],
)
def test_the_papers_preset_has_the_papers_nets(net: str, kind: type, numbers: int) -> None:
    made = build(chosen("paper", {"net": net}), SHAPE, 10)
    assert isinstance(made, kind) and parameter_count(made) == numbers


def test_the_papers_recipe() -> None:
    settings = chosen("paper", {})
    found = plan(settings, 55_000)
    assert found.steps == 160 * 55_000 // 128 and found.optimizer == SGD()
    epochs = (round(epoch * found.steps / 160) for epoch in (0, 59, 61, 101, 141))
    rates = [found.rate(step, found.steps) for step in epochs]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001])
    assert solver(settings) == {"method": "dopri5", "rtol": 1e-3, "gradient": "adjoint"}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_every_net(preset: str, net: str) -> None:
    made = build(chosen(preset, {"net": net, "width": 8}), SHAPE, 10)
    assert made(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_quick_preset_is_a_cycle_over_few_evaluations() -> None:
    settings = chosen("quick", {})
    net = build(settings, SHAPE, 10)
    net(torch.rand(2, 1, 28, 28))
    assert isinstance(net, ODENet) and net.block.stats.nfe == 4
    found = plan(settings, 55_000)
    rates = [found.rate(step, found.steps) for step in (0, found.steps // 5, found.steps - 1)]
    assert rates[0] < 0.01 * rates[1] and rates[2] < 0.01 * rates[1]


def test_digits_get_what_small_images_need() -> None:
    small = chosen("quick", {"dataset": "digits"})
    assert small.stem == "fine" and small.validation < 1000
    assert chosen("quick", {"dataset": "digits", "shift": 0}).shift == 0


@pytest.mark.parametrize("way", [{"rtol": 1e-4}, {"step_size": 0.5}, {"nfe": 6}])
def test_a_way_to_say_how_long_steps_are_takes_the_others_place(way: dict) -> None:
    for preset in PRESETS:
        settings = chosen(preset, {"method": "dopri5", **way})
        given = {name for name in ("rtol", "step_size", "nfe") if getattr(settings, name)}
        assert given == set(way)


def test_rk_net_is_the_ode_net_differentiated_by_backprop() -> None:
    assert solver(chosen("paper", {"net": "rk-net"}))["gradient"] == "backprop"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dataset": "cifar"}, "unknown dataset 'cifar'"),
        ({"net": "vgg"}, "unknown net 'vgg'"),
        ({"optimizer": "lbfgs"}, "unknown optimizer"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"net": "mlp", "augment": 2}, "mlp has none"),
        ({"depth": 3}, "'depth' is no setting"),
    ],
)
def test_wrong_settings_are_refused(given: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        chosen("quick", given)


@pytest.mark.parametrize("net", ["odenet", "no-block"])
def test_training_learns_and_selects_on_the_images_held_back(net: str) -> None:
    parts = split(DATA, 60, 0)
    made = build(replace(SMALL, net=net), parts.shape, parts.classes)
    training = ImageTraining(made, parts, replace(SMALL, net=net))
    assert made.standardize.mean.item() == pytest.approx(parts.images.mean().item(), abs=1e-5)
    records = list(training)
    assert len(records) == 100 and records[-1].validation is not None
    assert records[-1].error is not None
    expected = (2, 2) if net == "odenet" else (None, None)
    assert all((record.nfe, record.nfe_backward) == expected for record in records)
    training.select()
    best = min(judgement.error for judgement in training.judgements)
    assert best < 0.2
    assert torch.equal(training.parameters[0], training.best.weights[0])


def test_an_epoch_is_once_through_the_images() -> None:
    assert plan(replace(SMALL, steps=None, epochs=3), 240).steps == 3 * 240 // 32
    assert plan(replace(SMALL, steps=None, epochs=2, batch_size=1000), 240).steps == 2
