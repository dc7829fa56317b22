"""Classifying images: the loss to train with, and what a trained net is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.error import InputError
from cnf.ode.integrate import Stats
from cnf.odenet.block import blocks_of
from cnf.training.mode import InMode
from cnf.training.ranks import current

BATCH = 500  # images that are judged at once


class Classification(nn.Module):
    """The mean cross-entropy of a batch (images, labels) under a net, in nats, 0-d.

    net: images (batch, …) → logits (batch, classes); smoothing: share of the label that is spread
    over all classes; energy: weight of the mean kinetic energy, for nets that offer `with_energy`.
    After a call nfe and nfe_backward are what the net's ODEs cost, None where it has none, and
    error is the share of the batch that was classified wrongly.
    """

    def __init__(self, net: nn.Module, *, smoothing: float = 0.0, energy: float = 0.0) -> None:
        super().__init__()
        if energy and not hasattr(net, "with_energy"):
            raise InputError(
                f"energy={energy:g} weighs the kinetic energy of an ODE, and {type(net).__name__} "
                "has none; leave it out"
            )
        self.net, self.smoothing, self.energy = net, smoothing, energy
        self.error: float | None = None
        self._stats: list[Stats] = []  # of the last call: judging in between makes new ones

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.energy:
            logits, energy = self.net.with_energy(images)  # type: ignore[operator]
            penalty = self.energy * energy.mean()
        else:
            logits, penalty = self.net(images), 0.0
        self._stats = stats_of(self.net)
        with torch.no_grad():
            self.error = (logits.argmax(1) != labels).float().mean().item()
        return functional.cross_entropy(logits, labels, label_smoothing=self.smoothing) + penalty

    @property
    def nfe(self) -> int | None:
        """Evaluations of the field in the last call."""
        return spent(self._stats, "nfe")

    @property
    def nfe_backward(self) -> int | None:
        """The same of its `backward()`."""
        return spent(self._stats, "nfe_backward")


def stats_of(net: nn.Module) -> list[Stats]:
    """What the last call of each of a net's ODE blocks cost."""
    return [block.stats for block in blocks_of(net) if block.stats is not None]


def spent(stats: Sequence[Stats], count: str) -> int | None:
    """The sum of one of the counts, None of no ODE."""
    return int(sum(getattr(one, count) for one in stats)) if stats else None


@dataclass(frozen=True)
class Judgement:
    """What a net is worth on images that it was not trained on.

    error: the share that it classifies wrongly; nll: mean cross-entropy in nats; predictions: (n,),
    int64; confusion: how many images of class i were called j, (classes, classes), int64; nfe: mean
    evaluations of the field for a batch, None without an ODE; seconds: of the whole.
    """

    error: float
    nll: float
    predictions: Tensor = field(repr=False)
    confusion: Tensor = field(repr=False)
    nfe: float | None
    seconds: float

    @property
    def standard_error(self) -> float:
        """Of the error, over images."""
        return math.sqrt(self.error * (1 - self.error) / len(self.predictions))


@torch.no_grad()
def judge(net: nn.Module, images: Tensor, labels: Tensor, batch: int = BATCH) -> Judgement:
    """The judgement of a net in its evaluation mode, batch by batch on the net's device.

    images: (n, channels, height, width) in [0, 1]; labels: (n,).  Of ranks that train together each
    takes its share of the images, and all know the whole; nfe is of that share.
    """
    start = time.perf_counter()
    device = next(net.parameters()).device
    logits, counts = [], []
    ranks = current()
    with InMode(net, training=False), ranks.agreeing():
        for part in images[ranks.share(len(images))].split(batch):
            logits.append(net(part.to(device)).cpu())
            counts.append(spent(stats_of(net), "nfe"))
    found = ranks.whole(torch.cat(logits), len(images))
    predictions, classes = found.argmax(1), found.shape[1]
    pairs = torch.bincount(classes * labels + predictions, minlength=classes**2)
    known = [count for count in counts if count is not None]
    return Judgement(
        error=(predictions != labels).double().mean().item(),
        nll=functional.cross_entropy(found.double(), labels).item(),
        predictions=predictions,
        confusion=pairs.reshape(classes, classes),
        nfe=sum(known) / len(known) if known else None,
        seconds=time.perf_counter() - start,
    )


def judge_solvers(
    net: nn.Module, images: Tensor, labels: Tensor, solvers: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Judgement]]:
    """(name, judgement) of the same weights, with each of the solvers in the place of the net's.

    solvers: settings of `ODEBlock` by name, but for the gradient.
    """
    (block,) = blocks_of(net)
    for name, settings in solvers.items():
        with block.using(gradient="checkpoint", **settings):  # reversible steps are others
            yield name, judge(net, images, labels)


SOLVERS: dict[str, dict[str, Any]] = {
    "euler, 2": {"method": "euler", "nfe": 2},
    "euler, 8": {"method": "euler", "nfe": 8},
    "midpoint, 4": {"method": "midpoint", "nfe": 4},
    "midpoint, 16": {"method": "midpoint", "nfe": 16},
    "rk4, 4": {"method": "rk4", "nfe": 4},
    "rk4, 16": {"method": "rk4", "nfe": 16},
    "dopri5, 1e-3": {"method": "dopri5", "rtol": 1e-3},
    "dopri5, 1e-5": {"method": "dopri5", "rtol": 1e-5},
}
FINE = "dopri5, 1e-5"


def depends_on_solver(trained: Judgement, fine: Judgement, labels: Tensor) -> bool:
    """Whether a fine solver classifies worse than the one that the net was trained with.

    Then the net is not an ODE but its solver's steps.  Worse by more than two standard errors of
    the paired difference: of the images that one of both gets wrong and the other right.
    Source: Ott et al. 2021, ResNet after all, section 3; McNemar 1947.
    """
    before, after = trained.predictions == labels, fine.predictions == labels
    lost = int((before & ~after).sum())
    won = int((~before & after).sum())
    return lost - won > 2 * math.sqrt(lost + won)
