"""The whole-number pixels of a data set: to train on, to select by and to judge by."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnf.odenet.recipe import held_back, images_of


@dataclass(frozen=True, eq=False)
class Part:
    """Images: pixels (n, channels, height, width), uint8, and labels (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Part:
        """As many of them, or all."""
        return Part(self.pixels[:count], self.labels[:count])

    def scaled(self, peak: int) -> Tensor:
        """The pixels in [0, 1], as a classifier takes them."""
        return self.pixels.float() / peak


@dataclass(frozen=True, eq=False)
class Pixels:
    """A data set in three parts; peak: the largest value that a pixel can have."""

    name: str
    train: Part
    validation: Part
    test: Part
    peak: int
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image, (channels, height, width)."""
        return tuple(self.test.pixels.shape[1:])


def pixels_of(dataset: str, arguments: Namespace, validation: int, seed: int) -> Pixels:
    """The images of a data set, `validation` of the training images held back by the seed.

    arguments: --data, the folder that holds them, and --no-download.
    """
    data = images_of(dataset, arguments.data, not (arguments.no_download or arguments.data))
    rest, held = held_back(len(data.train), validation, seed)
    return Pixels(
        data.name,
        _part(data.train[rest], data.train_labels[rest]),
        _part(data.train[held], data.train_labels[held]),
        _part(data.test, data.test_labels),
        data.peak,
        data.classes,
    )


def _part(pixels: np.ndarray, labels: np.ndarray) -> Part:
    return Part(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(labels))
