"""Flows over images: of a run folder, or the one that comes with the package."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnf.cli.folder import CONFIG, MODEL, read_json
from cnf.error import InputError
from cnf.flow.image import ImageFlow
from cnf.flow.pretrained import pretrained, pretrained_config


@dataclass(frozen=True, eq=False)
class ImageRun:
    """A flow over images; name: of its place; dataset: what it was trained on; validation, seed:
    how many of the training images were held back, and by what seed.
    """

    name: str
    flow: ImageFlow
    dataset: str
    validation: int
    seed: int


def image_run(arguments: Namespace, device: torch.device) -> ImageRun:
    """The flow of RUN, or with --pretrained the one that comes with the package.

    Raises InputError where neither or both are named, and for a folder that holds none.
    """
    if (arguments.run_folder is None) != arguments.pretrained:
        raise InputError(
            "name either a run folder of `cnf mnist generate` or --pretrained; see "
            f"cnf mnist {arguments.task} --help"
        )
    if arguments.pretrained:
        return _run("--pretrained", pretrained(), pretrained_config(), device)
    return read_image_run(Path(arguments.run_folder), device)


def read_image_run(folder: Path, device: torch.device) -> ImageRun:
    """The finished run in a folder."""
    if not (folder / MODEL).is_file():
        raise InputError(
            f"{folder} holds no {MODEL}; name the folder of a run of `cnf mnist generate` whose "
            "training has ended"
        )
    flow = ImageFlow.load(folder / MODEL)
    return _run(str(folder), flow, read_json(folder / CONFIG), device)


def _run(name: str, flow: ImageFlow, config: dict[str, Any], device: torch.device) -> ImageRun:
    try:
        settings = config["settings"]
        dataset, validation, seed = (settings[key] for key in ("dataset", "validation", "seed"))
    except (LookupError, TypeError) as error:
        raise InputError(f"{name}: {CONFIG} is damaged; restore it or train anew") from error
    return ImageRun(name, flow.to(device).eval(), dataset, validation, seed)
