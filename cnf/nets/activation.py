"""Smooth activations with their derivatives, from one evaluation where that saves work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _sin(a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(a), torch.cos(a)


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(a)
    return h, 1 - h * h


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.softplus(a), torch.sigmoid(a)


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(a)
    h = a * s
    return h, s + h * (1 - s)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "tanh": torch.tanh,
    "softplus": torch.nn.functional.softplus,
    "silu": torch.nn.functional.silu,
}
# value and derivative, each of the argument's shape
DERIVATIVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "sin": _sin,
    "tanh": _tanh,
    "softplus": _softplus,
    "silu": _silu,
}
