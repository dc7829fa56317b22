"""`cnf mnist bpd`: bits per dimension of test images under a flow."""

from __future__ import annotations

import time
from argparse import Namespace

from cnf.cli.device import usable_device
from cnf.cli.folder import json_text
from cnf.cli.mnist.image_report import density_figures, density_lines
from cnf.cli.mnist.image_run import image_run
from cnf.cli.mnist.pixels import pixels_of
from cnf.error import InputError


def run(arguments: Namespace) -> None:
    """Measure, and print the bound with its error."""
    start = time.perf_counter()
    found = image_run(arguments, usable_device(arguments.device))
    dataset = arguments.dataset or found.dataset
    data = pixels_of(dataset, arguments, found.validation, found.seed)
    if data.shape != tuple(found.flow.shape) or data.peak != found.flow.levels - 1:
        raise InputError(
            f"{found.name} is of images {_size(tuple(found.flow.shape), found.flow.levels - 1)}, "
            f"and those of {dataset} are {_size(data.shape, data.peak)}; choose another --dataset"
        )
    figures = {"run": found.name, "data": dataset}
    figures |= density_figures(
        found.flow,
        data.test.first(arguments.images).pixels,
        draws=arguments.draws,
        probes=arguments.probes,
        nfe=arguments.nfe,
        seed=arguments.seed,
    )
    figures["seconds"] = time.perf_counter() - start
    if arguments.json:
        print(json_text(figures))
    else:
        print("\n".join(f"{name:<14}{text}" for name, text in density_lines(figures)))


def _size(shape: tuple[int, ...], peak: int) -> str:
    """Such as 28 x 28 with pixels to 255."""
    return f"{' x '.join(map(str, shape[1:]))} with pixels to {peak}"
