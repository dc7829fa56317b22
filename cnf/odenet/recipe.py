"""How a classifier is trained: a split, a net, an objective and a plan, all from `Settings`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.data.digits import load_digits
from cnf.data.idx import Images, mnist
from cnf.error import InputError, IntegrationError
from cnf.odenet.classification import Classification, Judgement, judge
from cnf.odenet.network import ODENet, Perceptron, ResNet
from cnf.odenet.settings import ODE_NETS, SOLVER, Settings
from cnf.training.batches import Shuffled, shifted
from cnf.training.loop import Best, Plan, Training, put
from cnf.training.optimizer import SGD, Adam

Net = ODENet | ResNet | Perceptron
BLOCKS = {"resnet": 6, "one-block": 1, "no-block": 0}
TIE = 1e-3  # of the cross-entropy, added to an error: far less than one image


def images_of(dataset: str, root: str | None, download: bool) -> Images:
    """The images of a data set; root, download: see `mnist`."""
    if dataset != "digits":
        return mnist(root, name=dataset, download=download)
    digits = load_digits()
    train = np.concatenate([digits.train, digits.validation])
    labels = np.concatenate([digits.train_labels, digits.validation_labels])
    train, test = (part.reshape(-1, 8, 8).astype(np.uint8) for part in (train, digits.test))
    return Images("digits", train, labels, test, digits.test_labels, peak=16)


@dataclass(frozen=True, eq=False)
class Split:
    """Images (n, 1, height, width) in [0, 1] and labels (n,), to train on, select by, judge by."""

    images: Tensor
    labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image, (channels, height, width)."""
        return tuple(self.images.shape[1:])


def split(data: Images, validation: int, seed: int) -> Split:
    """The training images split at random, `validation` of them held back; the test as it is.

    Raises InputError where nothing would be left to train on.
    """
    rest, held = held_back(len(data.train), validation, seed)
    return Split(
        _scaled(data.train[rest], data.peak),
        torch.from_numpy(data.train_labels[rest]),
        _scaled(data.train[held], data.peak),
        torch.from_numpy(data.train_labels[held]),
        _scaled(data.test, data.peak),
        torch.from_numpy(data.test_labels),
        data.classes,
    )


def held_back(count: int, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held back) of as many images, at random, both in order.

    Raises InputError where nothing would be left to train on.
    """
    if validation >= count:
        raise InputError(
            f"validation={validation} leaves none of {count} images to train on; hold fewer back"
        )
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[validation:]), np.sort(order[:validation])


def _scaled(pixels: np.ndarray, peak: int) -> Tensor:
    return torch.from_numpy(pixels).unsqueeze(1).float().div_(peak)


def build(settings: Settings, shape: Sequence[int], classes: int) -> Net:
    """The net of the settings, with its weights drawn by torch's generator.

    shape: of an image, (channels, height, width).
    Raises InputError for settings that no net can have.
    """
    channels, height, width = shape
    if settings.net == "mlp":
        return Perceptron(channels * height * width, classes)
    if settings.net in ODE_NETS:
        return ODENet(
            channels,
            classes,
            width=settings.width,
            stem=settings.stem,
            augment=settings.augment,
            timed=settings.timed,
            **solver(settings),
        )
    return ResNet(
        channels, classes, width=settings.width, stem=settings.stem, blocks=BLOCKS[settings.net]
    )


def solver(settings: Settings) -> dict[str, Any]:
    """The settings of the ODE block."""
    given = {name: getattr(settings, name) for name in SOLVER}
    if settings.net == "rk-net":
        given["gradient"] = "backprop"
    return {name: value for name, value in given.items() if value is not None}


class ImageTraining(Training):
    """A training of a net of `build`, on the net's device; `select` puts in the best weights.

    judgements: of the images held back, whenever they were judged.
    """

    def __init__(self, net: Net, split: Split, settings: Settings) -> None:
        device = next(net.parameters()).device
        shift = settings.shift
        net.standardize.fit(split.images)
        self.net, self.split = net, split
        self.judgements: list[Judgement] = []
        super().__init__(
            Classification(net, smoothing=settings.smoothing, energy=settings.energy),
            Shuffled(
                (split.images, split.labels),
                settings.batch_size,
                change=(lambda images: shifted(images, shift)) if shift else None,
                device=device,
            ),
            plan(settings, len(split.labels)),
            validate=self._validate,
            best=Best(),
        )

    def _validate(self) -> float:
        try:
            judgement = judge(self.net, self.split.validation_images, self.split.validation_labels)
        except IntegrationError:  # of weights that are lost, or of a step that is too long
            return math.inf
        self.judgements.append(judgement)
        return judgement.error + TIE * min(0.1, judgement.nll)  # 0.1 where it is NaN

    def select(self) -> None:
        """Put the weights with the lowest error on the validation images into the net."""
        if self.best.weights:
            put(self.parameters, self.best.weights)


def plan(settings: Settings, rows: int) -> Plan:
    """The plan of a training on that many images."""
    batch = min(settings.batch_size, rows)
    kind = Adam if settings.optimizer == "adam" else SGD
    return Plan(
        "classify",
        steps=settings.steps or max(1, settings.epochs * rows // batch),
        lr=settings.lr,
        warmup=0.2,
        memory=settings.memory,
        validations=max(10, settings.epochs) if settings.steps is None else 10,
        optimizer=kind(weight_decay=settings.weight_decay),
        drops=settings.drops,
    )
