"""A small U-Net as a vector field over images, conditioned on time and class.

Most of its work is done at half and at a quarter of the resolution: an image comes in as blocks of
2 × 2 pixels, four channels for one, so that little is computed at full size and nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.nets.tangent import (
    Dual,
    added,
    halves,
    joined,
    modulated,
    multiplied,
    rearranged,
    through,
)

GROUPS = 8  # of channels that are normalized together, at the most
LEAST = 4  # channels of a group
LARGE = 16  # pixels a side from which on an image comes in as blocks of 2 × 2
NEAR = 0.02  # how close to either end of time the embedding tells times apart


class UNet(nn.Module):
    """A field f(t, x) over images as rows; t: 0-d or (batch,); x: (batch, c·h·w) → the same.

    shape: (c, h, w) of an image; width: channels at half the resolution, twice as many at a
    quarter; classes: labels that it may be told besides, f(t, x, embed(labels)), 0 for none;
    blocks: residual blocks at half the resolution, on the way in and on the way out; middle: those
    at a quarter.
    The output is gain ∘ x + shift, both of the last layer, which starts at zero: the flow starts as
    the identity, and noise that only has to be passed on is.
    Source: Ronneberger et al. 2015; blocks: Dhariwal & Nichol 2021, section 3.

    >>> field = UNet((1, 8, 8), width=8)
    >>> field(torch.tensor(0.5), torch.zeros(3, 64)).shape
    torch.Size([3, 64])
    """

    row_wise = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 32,
        classes: int = 0,
        blocks: int = 1,
        middle: int = 2,
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape) < 1 or min(width, blocks, middle) < 1 or classes < 0:
            raise ValueError(
                "expected a shape (channels, height, width), and width, blocks and middle ≥ 1, got "
                f"{tuple(shape)}, {width}, {blocks} and {middle}"
            )
        channels, height, across = self.shape = (shape[0], shape[1], shape[2])
        self.patch = 2 if min(height, across) >= LARGE and not (height % 2 or across % 2) else 1
        inner = (height // self.patch, across // self.patch)
        self.stride = 1 if inner[0] % 2 or inner[1] % 2 else 2
        inputs, signals = channels * self.patch**2, 4 * width
        self.time = _TimeEmbedding(signals)
        self.labels = nn.Embedding(classes + 1, signals) if classes else None
        block = partial(_Block, signals=signals)
        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        self.down = nn.ModuleList(block(width, width) for _ in range(blocks))
        self.into = nn.Conv2d(width * self.stride**2, 2 * width, 1)
        self.middle = nn.ModuleList(block(2 * width, 2 * width) for _ in range(middle))
        self.out_of = nn.Conv2d(2 * width, width * self.stride**2, 1)
        self.up = nn.ModuleList(block(2 * width if i == 0 else width, width) for i in range(blocks))
        self.norm = _norm(width)
        self.act = nn.SiLU()
        self.last = nn.Conv2d(width, 2 * inputs, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def embed(self, labels: Tensor) -> Tensor:
        """What labels (batch, 1), whole numbers, −1 for none, add to the embedding of the time:
        what the field takes in their place, once for each solve.
        """
        if self.labels is None:
            raise ValueError("the field is told no classes; make it with classes=")
        return self.labels(labels.squeeze(-1).long() + 1)

    def forward(self, t: Tensor, x: Tensor, given: Tensor | None = None) -> Tensor:
        return self._value(t, x, given)

    def tangent(
        self, t: Tensor, x: Tensor, tangents: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(f, J·tangents): tangents of shape (k, batch, dim) carried layer by layer beside x.

        Returns shapes (batch, dim) and (k, batch, dim).
        """
        value, pushed = self._value(t, Dual(x, tangents), given)
        return value, pushed

    def _value(self, t: Tensor, x: Any, given: Tensor | None) -> Any:
        signal = self._signal(t, given)
        image = rearranged(x, lambda rows: self._patches(rows.unflatten(1, self.shape)))
        h = through(self.stem, image)
        for block in self.down:
            h = block(h, signal)
        kept, stride = h, self.stride
        h = through(self.into, rearranged(h, lambda h: functional.pixel_unshuffle(h, stride)))
        for block in self.middle:
            h = block(h, signal)
        h = rearranged(through(self.out_of, h), lambda h: functional.pixel_shuffle(h, stride))
        h = joined(h, kept)
        for block in self.up:
            h = block(h, signal)
        gain, shift = halves(through(self.last, through(self.act, _normed(self.norm, h))))
        moved = added(multiplied(gain, image), shift)
        return rearranged(moved, lambda h: functional.pixel_shuffle(h, self.patch).flatten(1))

    def _patches(self, images: Tensor) -> Tensor:
        return functional.pixel_unshuffle(images, self.patch)

    def _signal(self, t: Tensor, given: Tensor | None) -> Tensor:
        """What all blocks are told, (batch or 1, signals)."""
        signal = self.time(t.reshape(-1, 1))
        if self.labels is not None:
            signal = signal + (self.labels.weight[0] if given is None else given)
        return functional.silu(signal)


class _Block(nn.Module):
    """A residual block of two 3 × 3 convolutions, modulated between them by the signal."""

    def __init__(self, inputs: int, outputs: int, signals: int) -> None:
        super().__init__()
        self.before = _norm(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.between = _norm(outputs)
        self.act = nn.SiLU()
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.told = nn.Linear(signals, 2 * outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Any, signal: Tensor) -> Any:
        scale, shift = self.told(signal)[:, :, None, None].chunk(2, 1)
        h = through(self.first, through(self.act, _normed(self.before, x)))
        h = modulated(_normed(self.between, h), 1 + scale, shift)
        return added(through(self.shortcut, x), through(self.second, through(self.act, h)))


class _TimeEmbedding(nn.Module):
    """A net of one hidden layer on features of t (batch, 1): waves, and how near either end is."""

    def __init__(self, outputs: int, frequencies: int = 8) -> None:
        super().__init__()
        waves = math.pi * torch.arange(1, frequencies + 1, dtype=torch.get_default_dtype())
        self.register_buffer("waves", waves, persistent=False)
        self.waves: Tensor
        self.inner = nn.Linear(2 * frequencies + 2, outputs)
        self.outer = nn.Linear(outputs, outputs)

    def forward(self, t: Tensor) -> Tensor:
        angle = t * self.waves
        # a solve may step beyond the ends: base times of a regularizer, stages of a last step
        ends = torch.log((t.clamp(0, 1) + NEAR) / (1 - t.clamp(0, 1) + NEAR)) / 4
        features = torch.cat([t - 0.5, ends, angle.cos(), angle.sin()], 1)
        return self.outer(functional.silu(self.inner(features)))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(GROUPS, channels, max(1, channels // LEAST)), channels)


def _normed(norm: nn.GroupNorm, h: Any) -> Any:
    """norm(h), of a single pixel too: its channels are values enough, which the layer denies."""
    if isinstance(h, Tensor):
        return torch.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return through(norm, h)
