"""The flows that come with the package."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import Any

from cnf.error import InputError
from cnf.flow.image import ImageFlow

NAMES = ("mnist",)


def pretrained(name: str = "mnist") -> ImageFlow:
    """A flow over images, trained with the command that `pretrained_config(name)` holds.

    name: "mnist", digits of 28 × 28 pixels, by class or of any.
    Raises InputError for another name, and where the installation lacks the weights.
    """
    with as_file(_file(name, ".safetensors")) as path:
        return ImageFlow.load(path)


def pretrained_config(name: str = "mnist") -> dict[str, Any]:
    """What it takes to repeat the training: command, settings and versions."""
    return json.loads(_file(name, ".json").read_text(encoding="utf-8"))


def pretrained_metrics(name: str = "mnist") -> dict[str, Any]:
    """What the flow is worth, as its training reported it."""
    return json.loads(_file(name, ".metrics.json").read_text(encoding="utf-8"))


def _file(name: str, suffix: str) -> Traversable:
    if name not in NAMES:
        raise InputError(f"no flow {name!r} comes with cnf; there is {', '.join(NAMES)}")
    file = files("cnf") / "pretrained" / f"{name}{suffix}"
    if not file.is_file():
        raise InputError(
            f"this installation of cnf lacks {file.name}; train a flow by `cnf mnist generate` and "
            "name its run folder, or install a release"
        )
    return file
