"""The ODE-Net and the networks that it is compared with, all from images to logits.

Images are (batch, channels, height, width) in [0, 1].  `standardize` holds their mean and
deviation, which `standardize.fit(images)` takes from data.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnf.error import InputError, whole_number
from cnf.nets.conv import (
    STEMS,
    ConvField,
    ResidualBlock,
    Standardize,
    Widen,
    class_head,
    image_stem,
)
from cnf.ode.field import UserField
from cnf.odenet.block import ODEBlock


class ODENet(nn.Module):
    """Logits of images: convolutions that shrink them, an ODE over the features, a linear layer.

    channels: of the images; classes: how many logits; width: channels of the features; stem:
    "residual", "conv", "strided" or "fine", see `image_stem`; augment: channels of zeros that the
    ODE gets besides; timed: whether the field sees the time; field: one's own f(t, y) over
    (batch, width + augment, h, w) instead.
    solver: settings of `ODEBlock`: t, method, rtol, atol, step_size, nfe, control, gradient.
    Source: Chen et al. 2018, section 3; augment: Dupont et al. 2019.

    >>> import torch
    >>> net = ODENet(width=8, method="rk4", nfe=8)
    >>> net(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        *,
        width: int = 64,
        stem: str = "residual",
        augment: int = 0,
        timed: bool = True,
        field: UserField | None = None,
        **solver: Any,
    ) -> None:
        super().__init__()
        _check(stem, channels, classes, width)
        inner = width + whole_number("augment", augment, 0)
        self.standardize = Standardize()
        self.stem = image_stem(stem, channels, width)
        if augment:
            self.stem.append(Widen(augment))
        self.block = ODEBlock(ConvField(inner, timed=timed) if field is None else field, **solver)
        self.head = class_head(inner, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.features(images)))

    def features(self, images: Tensor) -> Tensor:
        """The state in which the ODE starts, (batch, width + augment, h, w)."""
        return self.stem(self.standardize(images))

    def with_energy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the kinetic energy of each image's way through the ODE, (batch,)."""
        end, energy = self.block.with_energy(self.features(images))
        return self.head(end), energy


class ResNet(nn.Module):
    """Logits of images by residual blocks in the place of the ODE; with none, stem and head alone.

    blocks: how many, of `width` channels each; the rest as in ODENet.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        *,
        width: int = 64,
        stem: str = "residual",
        blocks: int = 6,
    ) -> None:
        super().__init__()
        _check(stem, channels, classes, width)
        self.standardize = Standardize()
        self.stem = image_stem(stem, channels, width)
        count = whole_number("blocks", blocks, 0)
        self.blocks = nn.Sequential(*(ResidualBlock(width, width) for _ in range(count)))
        self.head = class_head(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(self.standardize(images))))


class Perceptron(nn.Module):
    """Logits of images by one hidden layer over all pixels.

    pixels: channels × height × width; hidden: units.
    Source: LeCun et al. 1998, section III-C.
    """

    def __init__(self, pixels: int = 784, classes: int = 10, *, hidden: int = 300) -> None:
        super().__init__()
        sizes = {"pixels": pixels, "classes": classes, "hidden": hidden}
        pixels, classes, hidden = (whole_number(name, size, 1) for name, size in sizes.items())
        self.standardize = Standardize()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.standardize(images))


def parameter_count(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _check(stem: str, channels: int, classes: int, width: int) -> None:
    if stem not in STEMS:
        raise InputError(f"unknown stem {stem!r}; known are {', '.join(STEMS)}")
    for name, size in (("channels", channels), ("classes", classes), ("width", width)):
        whole_number(name, size, 1)
