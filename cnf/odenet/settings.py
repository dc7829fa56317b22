"""What a training of a classifier is made of: plain values, which need no torch to be read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cnf.error import InputError, whole_number

DATASETS = ("mnist", "fashion", "kmnist", "digits")
NETS = ("odenet", "rk-net", "resnet", "one-block", "no-block", "mlp")
ODE_NETS = ("odenet", "rk-net")
SOLVER = ("method", "rtol", "step_size", "nfe", "gradient")


@dataclass(frozen=True)
class Settings:
    """One training, from data to weights.

    dataset: of DATASETS; net: of NETS: the ODE-Net, RK-Net (the same, differentiated by backprop
    through the solver), residual nets of six, one and no block, and one hidden layer.
    width, stem, augment, timed, method, rtol, step_size, nfe, gradient: of the ODE-Net; a way to
    say how long steps are takes the place of the others.  energy: weight of the kinetic energy.
    epochs: times through the training images, or steps in their place; batch_size, lr, optimizer
    ("adam" or "sgd"), weight_decay; drops: shares of the steps at which lr falls to a tenth, none
    for one cycle of a linear rise and half a cosine; smoothing: of the labels; shift: pixels that
    images are moved by at random; validation: training images that are held back to select by;
    memory: of the averaged weights, as a share of the steps; seed: of weights, split and batches.
    """

    dataset: str = "mnist"
    net: str = "odenet"
    width: int = 32
    stem: str = "strided"
    augment: int = 0
    timed: bool = True
    method: str = "midpoint"
    rtol: float | None = None
    step_size: float | None = None
    nfe: int | None = 4
    gradient: str = "checkpoint"
    energy: float = 0.0
    epochs: int = 14
    steps: int | None = None
    batch_size: int = 128
    lr: float = 1e-2
    optimizer: str = "adam"
    weight_decay: float = 0.02
    drops: tuple[float, ...] = ()
    smoothing: float = 0.05
    shift: int = 2
    validation: int = 5000
    memory: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("dataset", DATASETS), ("net", NETS), ("optimizer", ("adam", "sgd"))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}; known are {', '.join(known)}"
                )
        for name in ("epochs", "batch_size", "validation"):
            whole_number(name, getattr(self, name), 1)
        if self.net not in ODE_NETS and (self.energy or self.augment):
            raise InputError(
                f"energy and augment are for nets with an ODE, and {self.net} has none; leave them "
                "out"
            )

    def changed(self, **given: Any) -> Settings:
        """The same with other values; of the ways to say how long steps are, those given hold."""
        ways = {"rtol": None, "step_size": None, "nfe": None}
        if given.keys() & ways.keys():
            given = ways | given
        return replace(self, **given)

    @property
    def name(self) -> str:
        """Of the run: mnist-odenet."""
        return f"{self.dataset}-{self.net}"


PAPER: dict[str, Any] = {
    "width": 64,
    "stem": "residual",
    "method": "dopri5",
    "rtol": 1e-3,
    "nfe": None,
    "gradient": "adjoint",
    "epochs": 160,
    "lr": 0.1,
    "optimizer": "sgd",
    "weight_decay": 0.0,
    "drops": (60 / 160, 100 / 160, 140 / 160),
    "smoothing": 0.0,
    "shift": 4,
}
DIGITS: dict[str, Any] = {
    "stem": "fine", "shift": 1, "validation": 270, "epochs": 60, "batch_size": 32
}  # fmt: skip
QUICK = "quick"  # the preset where none is named
PRESETS: dict[str, dict[str, Any]] = {QUICK: {}, "paper": PAPER}


def chosen(preset: str | None, given: dict[str, Any]) -> Settings:
    """The settings of a preset, fit for the size of the images, and what was given besides.

    preset: "quick" or None, an ODE-Net for minutes on a CPU, or "paper", Chen et al.'s sizes and
    recipe.
    """
    unknown = given.keys() - {one.name for one in fields(Settings)}
    if unknown:
        raise InputError(f"{sorted(unknown)[0]!r} is no setting; see Settings for those there are")
    small = DIGITS if given.get("dataset") == "digits" else {}
    return Settings(**(PRESETS[preset or QUICK] | small)).changed(**given)
