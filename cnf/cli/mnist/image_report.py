"""What a flow over images is worth: bits per dimension, and its samples beside real images."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cnf.cli.finished import finished
from cnf.cli.folder import CLASSIFIER
from cnf.cli.mnist.classifier import read_classifier
from cnf.cli.mnist.image_picture import class_samples
from cnf.cli.mnist.pixels import Pixels
from cnf.error import InputError
from cnf.flow.image import ImageFlow
from cnf.flow.report import measured
from cnf.odenet.fidelity import Fidelities

REFERENCE = 10_000  # training images whose features are compared with
SHORTER = ["--epochs", "30"]  # enough for 8 x 8 digits, where the whole is a matter of seconds
NAMES = {
    "value": "bits_per_dim",
    "standard_error": "bits_per_dim_error",
    "weighted": "weighted_bits_per_dim",
    "weighted_error": "weighted_bits_per_dim_error",
}


def judging_net(folder: Path, data: Pixels, arguments: Namespace) -> tuple[nn.Module, str]:
    """A classifier of such images and its folder: the one named, else trained in the run's folder.

    Raises InputError for a classifier of images of another shape.
    """
    if arguments.classifier is not None:
        place = Path(arguments.classifier)
    else:
        place = folder / CLASSIFIER
        given = ["--dataset", data.name, "--device", arguments.device]
        given += SHORTER if data.name == "digits" else []
        given += ["--data", arguments.data] if arguments.data else []
        given += ["--no-download"] if arguments.no_download else []
        finished(place, tuple(given), arguments)
    return named_classifier(place, data).to(arguments.device), str(place)


def named_classifier(place: str | Path, data: Pixels) -> nn.Module:
    """The classifier in a run folder.  Raises InputError for one of images of another shape."""
    net, settings, shape = read_classifier(place)
    if shape != data.shape or settings.dataset != data.name:
        raise InputError(
            f"{place} classifies images of {settings.dataset}, not of {data.name}; name another "
            "--classifier, or leave it out"
        )
    return net


def sample_figures(
    flow: ImageFlow, net: nn.Module, data: Pixels, arguments: Namespace
) -> dict[str, Any]:
    """What the classifier finds in samples, and in as many test images.

    arguments: --samples, how many of any class and how many of given ones; --guidance, --nfe.
    """
    count = min(arguments.samples, len(data.test))  # a distance depends on how many there are
    judged = Fidelities(net, data.train.first(REFERENCE).scaled(data.peak))
    samples = _scaled(flow.sample(count, seed=1, nfe=arguments.nfe), data)
    given = labels = None
    if flow.classes:
        each = -(-count // flow.classes)
        drawn, labels = class_samples(flow, each, arguments.guidance, 2, arguments.nfe)
        given = _scaled(drawn, data)
    real = data.test.first(count)
    images = real.scaled(data.peak)
    return {
        "samples": judged(samples, given, labels).as_dict(),
        "test": judged(images, images, real.labels).as_dict(),
        "guidance": arguments.guidance,
    }


def _scaled(pixels: Tensor, data: Pixels) -> Tensor:
    return pixels.cpu().float() / data.peak


def sample_lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of `sample_figures` in words, by name."""
    drawn, real = figures["samples"], figures["test"]
    if drawn["recognized"] is not None:
        own, other = (
            f"{measured(100 * one['recognized'], 100 * one['recognized_error'])} %"
            for one in (drawn, real)
        )
        yield "recognized", f"{own} of {drawn['given']:,} samples of a given class; test {other}"
    shares = [
        f"{100 * min(one['histogram']):.1f} to {100 * max(one['histogram']):.1f} %"
        for one in (drawn, real)
    ]
    yield "classes", f"{shares[0]} each of {drawn['images']:,} samples of any; test {shares[1]}"
    yield "Fréchet", f"{drawn['distance']:.3g}; test {real['distance']:.3g} (classifier's features)"
    nearest = f"{drawn['nearest']:.4f}; test {real['nearest']:.4f}"
    yield "nearest", f"{nearest} (to a training image, root mean square of pixels)"


def density_figures(flow: ImageFlow, pixels: Tensor, **how: Any) -> dict[str, Any]:
    """Bits per dimension of images; how: arguments of `ImageFlow.bits_per_dim`.

    Of a flow with classes it is the density without a class: no label is told.
    """
    found = flow.bits_per_dim(pixels, **how).as_dict()
    return {NAMES.get(name, name): value for name, value in found.items()} | how


def density_lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of `density_figures` in words, by name."""
    value = measured(figures["bits_per_dim"], figures["bits_per_dim_error"])
    yield "bits/dim", f"{value}, an upper bound, of {figures['images']:,} test images"
    if figures["weighted_bits_per_dim"] is not None:
        value = measured(figures["weighted_bits_per_dim"], figures["weighted_bits_per_dim_error"])
        yield "", f"{value} weighting {figures['draws']} draws, an upper bound too"
