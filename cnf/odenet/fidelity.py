"""What a classifier finds in drawn images: are they recognized, varied, near to real ones?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.error import InputError
from cnf.odenet.classification import BATCH
from cnf.training.mode import InMode

CHUNK = 256  # images that are compared with all others at once


class Seen(NamedTuple):
    """What a classifier makes of images: predictions (n,), and features (n, width) in float64."""

    predictions: Tensor
    features: Tensor


@torch.no_grad()
def seen(net: nn.Module, images: Tensor, batch: int = BATCH) -> Seen:
    """What the net makes of images (n, channels, height, width) in [0, 1], in evaluation mode.

    The features are what its last linear layer is given.
    """
    last = [part for part in net.modules() if isinstance(part, nn.Linear)][-1]
    device = next(net.parameters()).device
    features: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: features.append(given[0].cpu().double()))
    try:
        with InMode(net, training=False):
            logits = [net(part.to(device)).cpu() for part in images.split(batch)]
    finally:
        hook.remove()
    return Seen(torch.cat(logits).argmax(1), torch.cat(features))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|μ − ν|² + tr(Σ + Τ − 2 (ΣΤ)^½), of the means μ, ν and the covariances Σ, Τ of two samples.

    x, y: features, (n, width) and (m, width), two rows or more of each.  It falls with the number
    of rows, so that only distances of as many rows are to be compared.
    Raises InputError where there is no covariance.
    Source: Dowson and Landau 1982, equation 4; Heusel et al. 2017, equation 6.
    """
    for name, rows in (("x", x), ("y", y)):
        if len(rows) < 2:
            raise InputError(f"{name} has {len(rows)} rows, which have no covariance; give more")
    x, y = x.double(), y.double()
    own, other = (torch.cov(rows.T).reshape(rows.shape[1], -1) for rows in (x, y))
    values, vectors = torch.linalg.eigh(own)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return float(apart + own.trace() + other.trace() - 2 * cross)


def nearest(images: Tensor, others: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """(distances, indices), each (n, count), of the nearest of others (m, …) to images (n, …).

    Distances are Euclidean, over all pixels.
    """
    rows = others.flatten(1)
    parts = [
        torch.cdist(part.flatten(1), rows).topk(count, largest=False)
        for part in images.split(CHUNK)
    ]
    distances, indices = (torch.cat(found) for found in zip(*parts, strict=True))
    return distances, indices


@dataclass(frozen=True)
class Fidelity:
    """What a classifier finds in images that were drawn, or in real ones to compare with.

    recognized: the share of images given a class that it takes for that class, and its standard
    error, None where none was given; histogram: the share of each class among images of any class;
    distance: Fréchet, of their features and those of training images; nearest: the mean distance
    to the nearest training image, as a root mean square over pixels; images: how many of any class,
    given: how many of a given one.
    """

    recognized: float | None
    recognized_error: float | None
    histogram: tuple[float, ...]
    distance: float
    nearest: float
    images: int
    given: int

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


class Fidelities:
    """Judges images by a classifier and by the training images that it is handed once.

    net: images → logits (batch, classes); images: (n, channels, height, width) in [0, 1].
    """

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self.net, self.images = net, images
        self._features = seen(net, images).features

    def __call__(
        self, images: Tensor, given: Tensor | None = None, labels: Tensor | None = None
    ) -> Fidelity:
        """The figures of images of any class, and of images `given` the classes `labels`."""
        found = seen(self.net, images)
        recognized = error = None
        if given is not None and labels is not None:
            recognized, error = share_of(seen(self.net, given).predictions == labels.cpu())
        pixels = math.prod(images.shape[1:])
        return Fidelity(
            recognized,
            error,
            histogram(found.predictions, self.classes),
            frechet_distance(found.features, self._features),
            float(nearest(images, self.images)[0].mean()) / math.sqrt(pixels),
            images=len(images),
            given=0 if given is None else len(given),
        )

    @property
    def classes(self) -> int:
        """How many classes the net knows."""
        return [part for part in self.net.modules() if isinstance(part, nn.Linear)][-1].out_features


def histogram(predictions: Tensor, classes: int) -> tuple[float, ...]:
    """The share of each class among predictions (n,)."""
    counts = torch.bincount(predictions, minlength=classes)
    return tuple((counts.double() / len(predictions)).tolist())


def share_of(hits: Tensor | Sequence[bool]) -> tuple[float, float]:
    """The share of hits, and its standard error."""
    share = torch.as_tensor(hits).double().mean().item()
    return share, math.sqrt(share * (1 - share) / len(hits))
