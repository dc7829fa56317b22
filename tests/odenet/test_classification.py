"""Classifying: the loss, the judgement, and whether a net depends on its solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.error import InputError
from cnf.odenet.block import ODEBlock
from cnf.odenet.classification import (
    SOLVERS,
    Classification,
    Judgement,
    depends_on_solver,
    judge,
    judge_solvers,
)
from cnf.odenet.network import ODENet, Perceptron

IMAGES, LABELS = torch.rand(20, 1, 8, 8), torch.arange(20) % 10


def small_net() -> ODENet:
    return ODENet(width=4, stem="fine", method="rk4", nfe=8)


class Reads(nn.Module):
    """Logits that stand in the images' first row."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images[:, 0, 0]


def pictured(logits: Tensor) -> Tensor:
    return logits[:, None, None, :]


# the loss -----------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_and_says_what_it_cost() -> None:
    net = small_net()
    loss = Classification(net)
    value = loss(IMAGES, LABELS)
    assert torch.allclose(value, functional.cross_entropy(net(IMAGES), LABELS))
    assert loss.error == (net(IMAGES).argmax(1) != LABELS).float().mean().item()
    assert (loss.nfe, loss.nfe_backward) == (8, 0)
    loss(IMAGES, LABELS).backward()
    assert loss.nfe_backward == 8


def test_a_net_without_an_ode_costs_no_evaluations() -> None:
    loss = Classification(Perceptron(64), smoothing=0.1)
    loss(IMAGES, LABELS).backward()
    assert loss.nfe is None and loss.nfe_backward is None


def test_the_energy_is_weighed() -> None:
    net = small_net()
    plain, weighed = Classification(net), Classification(net, energy=2.0)
    difference = weighed(IMAGES, LABELS) - plain(IMAGES, LABELS)
    assert torch.allclose(difference, 2 * net.with_energy(IMAGES)[1].mean(), atol=1e-5)
    with pytest.raises(InputError, match="Perceptron has none"):
        Classification(Perceptron(64), energy=0.1)


# the judgement ------------------------------------------------------------------------------------


def test_a_judgement_counts() -> None:
    logits = 5 * functional.one_hot(torch.tensor([0, 1, 2, 2, 1]), 3).float()
    labels = torch.tensor([0, 1, 2, 1, 1])
    found = judge(Reads(), pictured(logits), labels, batch=2)
    assert found.error == pytest.approx(0.2) and found.predictions.tolist() == [0, 1, 2, 2, 1]
    assert found.confusion.tolist() == [[1, 0, 0], [0, 2, 1], [0, 0, 1]]
    assert found.nll == pytest.approx(functional.cross_entropy(logits, labels).item())
    assert found.nfe is None and found.seconds > 0
    assert found.standard_error == pytest.approx(math.sqrt(0.2 * 0.8 / 5))


def test_judging_leaves_the_mode_and_no_graph() -> None:
    net = small_net().train()
    found = judge(net, IMAGES, LABELS, batch=6)
    assert net.training and found.nfe == 8
    assert all(p.grad is None for p in net.parameters())


def test_solvers_are_judged_with_the_same_weights_and_put_back() -> None:
    net = small_net()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    found = dict(judge_solvers(net, IMAGES, LABELS, SOLVERS))
    assert found.keys() == SOLVERS.keys()
    for name, one in found.items():
        kind, size = name.split(", ")
        assert one.nfe == float(size) if kind != "dopri5" else one.nfe > 6
    assert (net.block.method, net.block.nfe) == ("rk4", 8)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def judged(predictions: Tensor) -> Judgement:
    return Judgement(0.0, 0.0, predictions, torch.zeros(2, 2), None, 0.0)


@pytest.mark.parametrize(
    ("lost", "won", "depends"),
    [(0, 0, False), (4, 0, False), (5, 0, True), (20, 14, False), (9, 90, False)],
)
def test_a_net_depends_on_its_solver_where_a_finer_one_is_worse_beyond_chance(
    lost: int, won: int, depends: bool
) -> None:
    labels = torch.zeros(200, dtype=torch.long)
    trained, fine = torch.zeros(200, dtype=torch.long), torch.zeros(200, dtype=torch.long)
    fine[:lost] = 1
    trained[100 : 100 + won] = 1
    assert depends_on_solver(judged(trained), judged(fine), labels) is depends


def test_a_coarse_net_is_told_from_an_ode() -> None:
    """A field whose Euler step leaps over where its flow goes."""

    class Leap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.block = ODEBlock(lambda t, y: -2 * y, method="euler", step_size=1.0)

        def forward(self, images: Tensor) -> Tensor:
            return self.scale * self.block(images[:, 0, 0])  # times −1; times e⁻² for the flow

    labels = torch.arange(40) % 2
    images = pictured(-functional.one_hot(labels, 2).float())
    net = Leap()
    trained = judge(net, images, labels)
    fine = dict(judge_solvers(net, images, labels, SOLVERS))["dopri5, 1e-5"]
    assert trained.error == 0.0 and fine.error == 1.0
    assert depends_on_solver(trained, fine, labels)
