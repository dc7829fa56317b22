"""Smooth activations with their derivatives, from one evaluation where that saves work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """φ as functions on tensors of any shape.

    value: a ↦ φ(a); slope: a ↦ (φ(a), φ'(a)); curve: (a, φ(a), φ'(a)) ↦ φ''(a).
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    curve: Callable[[Tensor, Tensor, Tensor], Tensor]


def _sin_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(a), torch.cos(a)


def _tanh_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(a)
    return h, torch.addcmul(h.new_ones(()), h, h, value=-1)


def _softplus(a: Tensor) -> Tensor:
    # torch's threshold of 20 puts a step of 2e-9 into the slope, which float64 sees
    return torch.nn.functional.softplus(a, threshold=40.0)


def _softplus_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    return _softplus(a), torch.sigmoid(a)


def _silu_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(a)
    h = a * gate
    return h, gate + h * (1 - gate)


def _silu_curve(a: Tensor, h: Tensor, s: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return gate * (1 - gate) * (2 + a * (1 - 2 * gate))


ACTIVATIONS: dict[str, Activation] = {
    "sin": Activation(torch.sin, _sin_slope, lambda a, h, s: -h),
    "tanh": Activation(torch.tanh, _tanh_slope, lambda a, h, s: (h * s).mul_(-2)),
    "softplus": Activation(_softplus, _softplus_slope, lambda a, h, s: s * (1 - s)),
    "silu": Activation(torch.nn.functional.silu, _silu_slope, _silu_curve),
}
