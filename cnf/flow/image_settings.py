"""What an image flow and its training are made of: plain values, which need no torch to be read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from cnf.error import InputError, whole_number
from cnf.odenet.settings import DATASETS

FIELDS = ("unet", "mlp", "multiscale")
DEQUANTIZATIONS = ("uniform", "variational")
PRECISIONS = ("single", "mixed")
METHODS = ("auto", "fm", "ml")


@dataclass(frozen=True)
class ImageSettings:
    """One training of an `ImageFlow`, from images to weights.

    dataset: of DATASETS; conditional: whether the flow is told the images' classes.
    field: of FIELDS; width: of its channels, or of the MLP's two layers; label_dropout: share of
    the images whose label is withheld; dequantization, alpha, equalize: what is done to pixels
    before the ODE; precision: of the field in training.
    method: "fm", "ml", or "auto", the first and then the second; late: share of the times in flow
    matching that are drawn close to the images; steps: of all of it; steps_ml: of them those of
    maximum likelihood where it comes second, None for a share; batch_size;
    lr: of flow matching, lr_ml: of maximum likelihood; memory: of the averaged weights, as a share
    of the steps taken; kinetic, jacobian: weights of RNODE's regularizers in maximum likelihood;
    validation: images held back to select by; seed: of weights, split, batches and noise.
    """

    dataset: str = "mnist"
    conditional: bool = True
    field: str = "unet"
    width: int = 32
    label_dropout: float = 0.1
    dequantization: str = "uniform"
    alpha: float = 1e-6
    equalize: bool = True
    precision: str = "single"
    method: str = "fm"
    late: float = 0.0
    steps: int = 20_000
    steps_ml: int | None = None
    batch_size: int = 128
    lr: float = 2e-3
    lr_ml: float = 3e-4
    memory: float = 0.08
    kinetic: float = 0.01
    jacobian: float = 0.01
    validation: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("dataset", DATASETS), ("field", FIELDS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}; known are {', '.join(known)}"
                )
        for name in ("width", "steps", "batch_size", "validation"):
            whole_number(name, getattr(self, name), 1)
        if self.steps_ml is not None and self.method != "auto":
            raise InputError(
                f"steps_ml= is for method='auto', and method={self.method!r} has one phase alone; "
                "leave it out"
            )
        if self.steps_ml is not None and not 0 < self.steps_ml < self.steps:
            raise InputError(
                f"steps_ml={self.steps_ml} of steps={self.steps} leaves nothing for one of both "
                "phases; give a number between"
            )

    @property
    def name(self) -> str:
        """Of the run: mnist-flow."""
        return f"{self.dataset}-flow"


DIGITS: dict[str, Any] = {
    "width": 16, "steps": 1600, "batch_size": 128, "lr": 4e-3, "validation": 270
}  # fmt: skip


def image_settings(given: dict[str, Any]) -> ImageSettings:
    """The settings, with those given in the place of the defaults for the size of the images.

    Raises InputError for a name that is none.
    """
    unknown = given.keys() - {one.name for one in fields(ImageSettings)}
    if unknown:
        raise InputError(f"{sorted(unknown)[0]!r} is no setting; see ImageSettings for them")
    small = DIGITS if given.get("dataset") == "digits" else {}
    return ImageSettings(**(small | given))
