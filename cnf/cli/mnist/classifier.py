"""Classifiers in run folders: weights as safetensors, with the settings that made the net."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cnf.cli.folder import MODEL
from cnf.error import InputError
from cnf.flow.storage import Model, damaged, fill, read, write
from cnf.odenet.recipe import build
from cnf.odenet.settings import Settings

CLASSIFIER = Model(
    "classifier", "`cnf mnist classify`", "train again", "is it of a run of another version?"
)


def write_classifier(
    folder: Path, net: nn.Module, settings: Settings, shape: tuple[int, ...], classes: int
) -> None:
    """Write the model file of a net that `build` made; shape: of an image, with its channels."""
    made = {"settings": asdict(settings), "shape": list(shape), "classes": classes}
    write(folder / MODEL, net, {"classifier": made}, CLASSIFIER)


def read_classifier(path: str | Path) -> tuple[nn.Module, Settings, tuple[int, ...]]:
    """(net, settings, shape of an image) of a run of `cnf mnist classify`.

    Raises InputError for a folder that is none, and for a damaged file.
    """
    folder = Path(path)
    if not (folder / MODEL).is_file():
        raise InputError(
            f"{folder} holds no {MODEL}; name the folder of a finished run of `cnf mnist classify`"
        )
    stored = read(folder / MODEL, CLASSIFIER)
    made = stored.settings.get("classifier")
    if not isinstance(made, dict):
        raise InputError(f"{folder} holds a flow and no classifier; see `cnf mnist classify`")
    try:
        settings, shape = settings_of(made["settings"]), tuple(made["shape"])
        net = build(settings, shape, made["classes"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise damaged(folder / MODEL, CLASSIFIER) from error
    fill(net, stored.tensors, folder / MODEL, CLASSIFIER)
    return net.eval(), settings, shape


def settings_of(stored: dict[str, Any]) -> Settings:
    """Settings that were written as JSON, where tuples are lists."""
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()
    }
    try:
        return Settings(**values)
    except TypeError as error:
        raise InputError(f"the settings are of another version ({error}); train anew") from error


def images_like(shape: tuple[int, ...], count: int) -> torch.Tensor:
    """Noise in the place of images, (count, *shape), the same every time."""
    noise = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
    return torch.from_numpy(noise)
