"""Smooth activations with their derivatives, in as few passes over memory as they allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """φ as functions on tensors of any shape.

    value: a ↦ φ(a); slope: a ↦ (φ(a), φ'(a)), in the place of a where no graph is wanted;
    pull: (a, φ(a), φ'(a), p, q) ↦ p φ'(a) + q φ''(a), the cotangent of a where p and q are those of
    φ and φ', in the place of p.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    pull: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _in_place(a: Tensor) -> bool:
    return not (torch.is_grad_enabled() and a.requires_grad)


def _sin_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    slope = torch.cos(a)
    return (a.sin_() if _in_place(a) else torch.sin(a)), slope


def _sin_pull(a: Tensor, h: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return p.mul_(s).addcmul_(q, h, value=-1)


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def _tanh_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    h = a.tanh_() if _in_place(a) else torch.tanh(a)
    return h, torch.addcmul(_one(h.dtype, h.device), h, h, value=-1)


def _tanh_pull(a: Tensor, h: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return p.addcmul_(q, h, value=-2).mul_(s)


def _softplus(a: Tensor) -> Tensor:
    # torch's threshold of 20 puts a step of 2e-9 into the slope, which float64 sees
    return torch.nn.functional.softplus(a, threshold=40.0)


def _softplus_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    return _softplus(a), torch.sigmoid(a)


def _softplus_pull(a: Tensor, h: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return p.addcmul_(q, 1 - s).mul_(s)


def _silu_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(a)
    h = a * gate
    return h, gate + h * (1 - gate)


def _silu_pull(a: Tensor, h: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return p.mul_(s).addcmul_(q, gate * (1 - gate) * (2 + a * (1 - 2 * gate)))


ACTIVATIONS: dict[str, Activation] = {
    "sin": Activation(torch.sin, _sin_slope, _sin_pull),
    "tanh": Activation(torch.tanh, _tanh_slope, _tanh_pull),
    "softplus": Activation(_softplus, _softplus_slope, _softplus_pull),
    "silu": Activation(torch.nn.functional.silu, _silu_slope, _silu_pull),
}
