"""Layers that are affine in x and depend on time: y = g(t) ∘ W(t) x + u(t)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Affine(NamedTuple):
    """y = gate ∘ W x + shift at one time, or at a time for each row.

    weight: (out, in) or (batch, out, in); gate, shift: (out,) or (batch, out).
    """

    weight: Tensor
    gate: Tensor | None
    shift: Tensor

    def linear(self, x: Tensor) -> Tensor:
        """gate ∘ W x for x (…, batch, in)."""
        if self.weight.ndim == 2:
            y = x @ self.weight.T
        else:
            y = torch.einsum("boi,...bi->...bo", self.weight, x)
        return y if self.gate is None else y * self.gate


class TimedLinear(nn.Module):
    """A layer that is affine in x at any time t, 0-d or (batch,); x: (batch, in) → (batch, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        if inputs < 1 or outputs < 1:
            raise ValueError(f"expected widths ≥ 1, got {inputs} and {outputs}")
        self.inputs, self.outputs = inputs, outputs

    def at(self, t: Tensor) -> Affine:
        """The layer at time t."""
        raise NotImplementedError

    def silence(self) -> None:
        """Set the parameters so that the layer returns 0 and yet learns."""
        raise NotImplementedError

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        affine = self.at(t)
        return affine.linear(x) + affine.shift

    def tangent(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(y, J·tangents), tangents: (k, batch, in)."""
        affine = self.at(t)
        return affine.linear(x) + affine.shift, affine.linear(tangents)


class ConcatLinear(TimedLinear):
    """W x + b + t w: time as one more input.  Source: Grathwohl et al. 2019, appendix B."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight, self.bias = _weights(inputs, outputs)
        self.slope = nn.Parameter(torch.zeros(outputs))

    def at(self, t: Tensor) -> Affine:
        return Affine(self.weight, None, torch.addcmul(self.bias, t.unsqueeze(-1), self.slope))

    def silence(self) -> None:
        _zero(self.weight, self.bias, self.slope)


class ConcatSquashLinear(TimedLinear):
    """(W x + b) ∘ σ(t g + c) + t s.  Source: Grathwohl et al. 2019, appendix B."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight, self.bias = _weights(inputs, outputs)
        self.gate_slope, self.gate_bias, self.slope = (
            nn.Parameter(torch.zeros(outputs)) for _ in range(3)
        )

    def at(self, t: Tensor) -> Affine:
        t = t.unsqueeze(-1)
        gate = torch.sigmoid(torch.addcmul(self.gate_bias, t, self.gate_slope))
        return Affine(self.weight, gate, torch.addcmul(self.bias * gate, t, self.slope))

    def silence(self) -> None:
        _zero(self.weight, self.bias, self.slope)


class HyperLinear(TimedLinear):
    """W(t) x + b(t), all of them outputs of a small net of t.

    hidden: the net's width.  Source: Ha et al. 2017; Grathwohl et al. 2019, appendix B.
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: int = 16) -> None:
        super().__init__(inputs, outputs)
        self.first, self.last = nn.Linear(1, hidden), nn.Linear(hidden, outputs * (inputs + 1))
        with torch.no_grad():  # at the start, a linear layer's weights that hardly change with t
            self.last.weight.mul_(0.1 * inputs**-0.5)
            self.last.bias.zero_()
            self.last.bias[: outputs * inputs].normal_(std=inputs**-0.5)

    def at(self, t: Tensor) -> Affine:
        numbers = self.last(torch.tanh(self.first(t.unsqueeze(-1))))
        weight, shift = numbers.split([self.outputs * self.inputs, self.outputs], -1)
        return Affine(weight.unflatten(-1, (self.outputs, self.inputs)), None, shift)

    def silence(self) -> None:
        _zero(self.last.weight, self.last.bias)


class FourierLinear(TimedLinear):
    """g(t) ∘ W x + u(t), g and u linear in t − ½, cos πkt and sin πkt for k up to `frequencies`."""

    def __init__(self, inputs: int, outputs: int, *, frequencies: int = 4) -> None:
        super().__init__(inputs, outputs)
        self.weight, _ = _weights(inputs, outputs)
        waves = math.pi * torch.arange(1, frequencies + 1, dtype=torch.get_default_dtype())
        self.register_buffer("waves", waves, persistent=False)
        self.waves: Tensor
        self.time = nn.Linear(2 * frequencies + 1, 2 * outputs)
        with torch.no_grad():
            _zero(self.time.weight, self.time.bias)
            self.time.bias[:outputs] = 1.0  # open gates

    def at(self, t: Tensor) -> Affine:
        t = t.unsqueeze(-1)
        angle = t * self.waves
        gate, shift = self.time(torch.cat([t - 0.5, angle.cos(), angle.sin()], -1)).chunk(2, -1)
        return Affine(self.weight, gate, shift)

    def silence(self) -> None:
        _zero(self.weight)


CONDITIONINGS: dict[str, type[TimedLinear]] = {
    "concat": ConcatLinear,
    "concatsquash": ConcatSquashLinear,
    "hyper": HyperLinear,
    "fourier": FourierLinear,
}


def layer_of(conditioning: str) -> type[TimedLinear]:
    """The layer of that name; raises ValueError for a name that is none."""
    if conditioning not in CONDITIONINGS:
        known = ", ".join(CONDITIONINGS)
        raise ValueError(f"unknown conditioning {conditioning!r}; known are {known}")
    return CONDITIONINGS[conditioning]


def _weights(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    return nn.Parameter(weight), nn.Parameter(torch.zeros(outputs))


@torch.no_grad()
def _zero(*parameters: Tensor) -> None:
    for parameter in parameters:
        parameter.zero_()
