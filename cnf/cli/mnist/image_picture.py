"""The pictures of a flow over images: samples, by class, in between, and what they resemble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.cli.folder import BETWEEN, CLASSES, NEIGHBOURS, SAMPLES
from cnf.cli.mnist.pixels import Pixels
from cnf.flow.image import ImageFlow
from cnf.odenet.fidelity import nearest
from cnf.plot import images_figure, save_figure

IMAGES = 64
EACH = 10  # samples of each class
PAIRS, STEPS = 8, 10  # that are drawn between, and images from one to the other
DRAWN, NEAREST = 10, 7  # samples, and training images beside each


def save_pictures(
    flow: ImageFlow,
    data: Pixels,
    folder: Path,
    guidance: float | None = None,
    nfe: int | None = None,
) -> None:
    """Draw samples, samples of each class, ways between test images, and samples' neighbours."""
    samples = flow.sample(IMAGES, seed=0, nfe=nfe)
    shape, peak = data.shape, data.peak
    side = round(IMAGES**0.5)
    save_figure(images_figure(_array(samples), shape, side, peak), folder / SAMPLES)
    if flow.classes:
        by_class, labels = class_samples(flow, EACH, guidance, seed=0, nfe=nfe)
        names = [str(int(label)) for label in labels[::EACH]]
        figure = images_figure(_array(by_class), shape, EACH, peak, names)
        save_figure(figure, folder / CLASSES)
    save_figure(
        images_figure(_array(_between(flow, data, nfe)), shape, STEPS, peak), folder / BETWEEN
    )
    beside = _beside(samples[:DRAWN], data)
    heads = ["drawn", "nearest"]
    save_figure(images_figure(beside, shape, NEAREST + 1, peak, heads=heads), folder / NEIGHBOURS)


def class_samples(
    flow: ImageFlow,
    each: int,
    guidance: float | None = None,
    seed: int | None = None,
    nfe: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(`each` samples of every class, their labels), class by class."""
    labels = torch.arange(flow.classes).repeat_interleave(each)
    return flow.sample(len(labels), labels, guidance=guidance, seed=seed, nfe=nfe), labels


def _between(flow: ImageFlow, data: Pixels, nfe: int | None) -> Tensor:
    """From one test image to another of another class, in the base's space, pair by pair."""
    first, second = _pairs(data.test.labels)
    pixels = data.test.pixels
    way = flow.interpolate(pixels[first], pixels[second], steps=STEPS)
    return way.transpose(0, 1).flatten(0, 1)


def _pairs(labels: Tensor) -> tuple[list[int], list[int]]:
    """Indices of images of neighbouring classes, the first of each class."""
    classes = labels.unique().tolist()
    firsts = [int((labels == label).nonzero()[0, 0]) for label in classes]
    return firsts[:PAIRS], [*firsts[1:], firsts[0]][:PAIRS]


def _beside(samples: Tensor, data: Pixels) -> np.ndarray:
    """Every sample followed by the training images nearest to it."""
    train = data.train.scaled(data.peak)
    _, indices = nearest(samples.cpu().float() / data.peak, train, NEAREST)
    found = data.train.pixels[indices]
    return _array(torch.cat([samples.cpu()[:, None], found], 1).flatten(0, 1))


def _array(images: Tensor) -> np.ndarray:
    return images.cpu().numpy()
