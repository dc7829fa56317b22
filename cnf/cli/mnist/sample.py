"""`cnf mnist sample`: draws from a flow over images, as a picture or as pixels."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from cnf.cli.device import usable_device
from cnf.cli.folder import json_text
from cnf.cli.mnist.image_run import ImageRun, image_run
from cnf.cli.output import checked_output
from cnf.error import InputError
from cnf.plot import images_figure, save_figure
from cnf.replace import replacing

SUFFIXES = (".png", ".pdf", ".npy")


def run(arguments: Namespace) -> None:
    """Draw n images and write them."""
    output = checked_output(arguments.output, arguments.overwrite, SUFFIXES, "picture or array")
    found = image_run(arguments, usable_device(arguments.device))
    classes = _classes(arguments, found)
    pixels = found.flow.sample(
        arguments.n,
        classes,
        guidance=arguments.guidance,
        seed=arguments.seed,
        nfe=arguments.nfe,
    )
    _write(output, pixels.cpu().numpy(), found, classes)
    if arguments.json:
        named = None if classes is None else classes.tolist()
        print(json_text({"file": str(output), "shape": pixels.shape, "classes": named}))
    else:
        size = " x ".join(map(str, pixels.shape[2:]))
        print(f"{arguments.n:,} images of {size} pixels in {output}")


def _classes(arguments: Namespace, found: ImageRun) -> torch.Tensor | None:
    """A class for each image: those that were named, in turn."""
    if arguments.classes is None:
        return None
    known = found.flow.classes
    if not known:
        raise InputError(f"{found.name} was trained without classes; leave --classes out")
    for label in arguments.classes:
        if label >= known:
            raise InputError(
                f"--classes names {label}, and {found.name} knows 0 to {known - 1}; name those"
            )
    return torch.tensor(arguments.classes).repeat(arguments.n)[: arguments.n]


def _write(output: Path, pixels: np.ndarray, found: ImageRun, classes: torch.Tensor | None) -> None:
    if output.suffix.lower() == ".npy":
        with replacing(output) as file:
            np.save(file, pixels)
        return
    named = 1 if classes is None else len(classes.unique())
    columns = named if named > 1 else max(1, round(len(pixels) ** 0.5))
    figure = images_figure(pixels, pixels.shape[1:], columns, found.flow.levels - 1)
    save_figure(figure, output)
