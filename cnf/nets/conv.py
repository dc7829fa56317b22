"""Convolutional fields over images' features, residual blocks, and what comes before and after.

The sizes that the papers used: Chen et al. 2018, section 3, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.nets.chain import Chain

GROUPS = 32  # of channels that are normalized together, at the most


class TimeConv(nn.Module):
    """A 3 × 3 convolution of x (batch, inputs, h, w) and of the time, as one channel more.

    t: 0-d or (batch,); → (batch, outputs, h, w).  Bias and weights of the time are a parameter of
    their own: the image is convolved at its own width, which is faster.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Parameter(torch.empty(outputs, 1, 3, 3))
        bound = (9 * (inputs + 1)) ** -0.5  # that of nn.Conv2d for as many inputs
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        ones = x.new_ones(1, 1, *x.shape[2:])
        at_time = functional.conv2d(ones, self.time, padding=1)  # less at the borders
        return self.conv(x) + t.reshape(-1, 1, 1, 1) * at_time

    def tangent(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(value, J·tangents), tangents: (k, batch, inputs, h, w)."""
        pushed = functional.conv2d(tangents.flatten(0, 1), self.conv.weight, padding=1)
        return self(t, x), pushed.unflatten(0, tangents.shape[:2])


class SteadyConv(nn.Module):
    """A 3 × 3 convolution of x alone, whatever the time."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvField(nn.Module):
    """A field f(t, x) of two 3 × 3 convolutions; x: (batch, channels, h, w) → the same shape.

    GroupNorm, ReLU, convolution, twice, and a GroupNorm at the end.  t: 0-d or (batch,); timed:
    whether the convolutions see it, else the field is the same at all times.
    Source: Chen et al. 2018, the ODE function of the authors' MNIST example.
    """

    row_wise = True

    def __init__(self, channels: int, *, timed: bool = True) -> None:
        super().__init__()
        convolution = TimeConv if timed else SteadyConv
        self.before = group_norm(channels)
        self.first = convolution(channels, channels)
        self.between = group_norm(channels)
        self.second = convolution(channels, channels)
        self.after = group_norm(channels)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        x = self.first(t, functional.relu(self.before(x)))
        x = self.second(t, functional.relu(self.between(x)))
        return self.after(x)


def conv_stack(shape: Sequence[int], widths: Sequence[int] = (64, 64, 64)) -> Chain:
    """A field over flat images, (batch, c·h·w), of 3 × 3 convolutions that see the time.

    shape: (channels, height, width); widths: channels of the hidden layers, with softplus between.
    The last layer starts at 0: an ODE of the untrained field stays where it is.
    Source: Grathwohl et al. 2019, the net of the authors' image experiments.
    """
    channels = shape[0]
    layers: list[nn.Module] = [nn.Unflatten(1, tuple(shape))]
    for before, after in pairwise((channels, *widths, channels)):
        layers += [TimeConv(before, after), nn.Softplus()]
    last = layers[-2]
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return Chain(*layers[:-1], nn.Flatten())


class ResidualBlock(nn.Module):
    """x + g(x), with g of two 3 × 3 convolutions, each after GroupNorm and ReLU.

    stride: of the first; where it is not 1 the shortcut is a 1 × 1 convolution.
    Source: He et al. 2016, identity mappings, figure 4 (e).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.before = group_norm(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.between = group_norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.before(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.second(functional.relu(self.between(self.first(active))))


class Widen(nn.Module):
    """x (batch, channels, …) with `more` channels of zeros: room for the ODE to turn around in.

    Source: Dupont et al. 2019, augmented neural ODEs.
    """

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], self.more, *x.shape[2:])
        return torch.cat([x, zeros], 1)

    def extra_repr(self) -> str:
        return f"{self.more}"


class Standardize(nn.Module):
    """(x − mean) / deviation, with one mean and one deviation that come from data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.mean: Tensor
        self.deviation: Tensor

    def fit(self, x: Tensor) -> None:
        """Take mean and deviation from the values of x."""
        deviation, mean = torch.std_mean(x.double())
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def group_norm(channels: int) -> nn.GroupNorm:
    """A GroupNorm of as many groups as divide the channels, at most 32."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


STEMS = ("residual", "conv", "strided", "fine")


def image_stem(kind: str, channels: int, width: int) -> nn.Sequential:
    """Layers that turn images (batch, channels, h, w) into features (batch, width, h', w').

    kind: "residual", two residual blocks that halve the size after a convolution (28 → 26 → 7), or
    "conv", plain convolutions in their place (28 → 26 → 6), both the paper's; "strided", two
    convolutions that halve (28 → 7), a fifth of the work; "fine", for images of 8 × 8 pixels,
    which halves once.
    """
    if kind == "residual":
        return nn.Sequential(
            nn.Conv2d(channels, width, 3),
            ResidualBlock(width, width, 2),
            ResidualBlock(width, width, 2),
        )
    if kind == "conv":
        return nn.Sequential(
            nn.Conv2d(channels, width, 3),
            *(group_norm(width), nn.ReLU(), nn.Conv2d(width, width, 4, 2, padding=1)),
            *(group_norm(width), nn.ReLU(), nn.Conv2d(width, width, 4, 2, padding=1)),
        )
    if kind not in STEMS:
        raise ValueError(f"unknown stem {kind!r}; known are {', '.join(STEMS)}")
    size, stride = (5, 2) if kind == "strided" else (3, 1)
    return nn.Sequential(
        nn.Conv2d(channels, width, size, stride, padding=size // 2),
        *(group_norm(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, padding=1)),
    )


def class_head(width: int, classes: int) -> nn.Sequential:
    """Layers that turn features (batch, width, h, w) into logits (batch, classes)."""
    return nn.Sequential(
        group_norm(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )
