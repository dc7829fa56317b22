"""The rows of the table: sizes, shapes, and what makes the ODE-Net one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cnf
from cnf.error import InputError
from cnf.odenet.network import ODENet, Perceptron, ResNet, parameter_count

IMAGES = torch.rand(3, 1, 28, 28)


@pytest.mark.parametrize(
    ("net", "numbers"),
    [
        (lambda: Perceptron(784, hidden=300), 238_510),
        (lambda: ResNet(blocks=6), 601_482),
        (lambda: ResNet(blocks=1), 231_562),
        (lambda: ResNet(blocks=0), 157_578),
        (lambda: ODENet(), 232_970),
        (lambda: ODENet(stem="conv"), 208_266),
        (lambda: ODENet(gradient="backprop"), 232_970),
        (lambda: ODENet(timed=False), 232_970 - 2 * 64 * 9),
    ],
)
def test_nets_have_the_papers_sizes(net, numbers: int) -> None:
    assert parameter_count(net()) == numbers


@pytest.mark.parametrize(
    "net",
    [
        Perceptron(hidden=5),
        ResNet(width=4, blocks=2),
        ResNet(width=4, blocks=0, stem="strided"),
        ODENet(width=4, method="euler", nfe=2),
        ODENet(width=4, augment=3, stem="conv", method="euler", nfe=2),
    ],
)
def test_images_become_logits_and_every_parameter_learns(net: nn.Module) -> None:
    logits = net(IMAGES)
    assert logits.shape == (3, 10)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_an_ode_net_solves_an_ode_over_its_features() -> None:
    net = ODENet(width=4, augment=2, method="rk4", nfe=4, t=(0.0, 1.0))
    features = net.features(IMAGES)
    assert features.shape == (3, 6, 7, 7) and not features[:, 4:].any()
    assert torch.allclose(net.head(net.block(features)), net(IMAGES))
    solution = cnf.solve(net.block.field, features, [0.0, 1.0], method="rk4", step_size=1.0)
    assert torch.allclose(net.block(features), solution.y[-1])
    assert net.block.stats.nfe == 4


def test_augmented_channels_are_seen_by_the_head() -> None:
    net = ODENet(width=4, augment=2, method="euler", nfe=1)
    net(IMAGES)
    assert net.head[-1].weight.shape == (10, 6)


def test_the_energy_comes_beside_the_same_logits() -> None:
    net = ODENet(width=4, method="rk4", nfe=8)
    logits, energy = net.with_energy(IMAGES)
    assert torch.allclose(logits, net(IMAGES)) and energy.shape == (3,) and (energy > 0).all()


def test_a_field_of_ones_own_takes_the_convolutions_place() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, t, x):
            return torch.tanh(self.conv(x))

    net = ODENet(width=4, field=Own(), method="euler", nfe=2)
    assert net(IMAGES).shape == (3, 10) and "block.field.conv.weight" in net.state_dict()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stem": "wide"}, "unknown stem 'wide'"),
        ({"width": 0}, "width must be a whole number"),
        ({"augment": -1}, "augment must be a whole number"),
        ({"method": "rk5"}, "unknown method"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ODENet(**settings)
