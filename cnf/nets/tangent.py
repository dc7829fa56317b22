"""How tangents go through torch's own layers, beside the value and without forward-mode autograd.

A tangent is a direction at x, (k, batch, …) for x (batch, …): linear layers act on it without their
bias, activations multiply it by their slope, norms by the derivative of what they divide by.  One
ordinary backward pass trains a field whose tangents went this way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.nets.activation import ACTIVATIONS

Pair = tuple[Tensor, Tensor]
Rule = Callable[[Any, Tensor, Tensor], Pair]


def _linear(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
    return layer(x), tangents @ layer.weight.T


def _convolution(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
    pushed = layer._conv_forward(tangents.flatten(0, 1), layer.weight, None)
    return layer(x), pushed.unflatten(0, tangents.shape[:2])


def _activation(name: str) -> Rule:
    def rule(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
        value, slope = ACTIVATIONS[name].slope(x.clone())  # it may use the place of its argument
        return value, tangents * slope

    return rule


def _sigmoid(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
    value = torch.sigmoid(x)
    return value, tangents * (value * (1 - value))


def _softplus(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
    value = functional.softplus(x, layer.beta, layer.threshold)
    scaled = x if layer.beta == 1.0 else layer.beta * x  # a pass over large features less
    return value, tangents * torch.sigmoid(scaled)


def _group_norm(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
    groups = (layer.num_groups, x.shape[1] // layer.num_groups)
    unit, pushed = _standardized(
        x.unflatten(1, groups), tangents.unflatten(2, groups), 2, layer.eps
    )
    scale = 1.0 if layer.weight is None else _per_channel(layer.weight, x)
    shift = 0.0 if layer.bias is None else _per_channel(layer.bias, x)
    return unit.flatten(1, 2) * scale + shift, pushed.flatten(2, 3) * scale


def _layer_norm(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
    first = x.ndim - len(layer.normalized_shape)
    unit, pushed = _standardized(x, tangents, first, layer.eps)
    scale = 1.0 if layer.weight is None else layer.weight
    shift = 0.0 if layer.bias is None else layer.bias
    return unit * scale + shift, pushed * scale


def _standardized(x: Tensor, tangents: Tensor, first: int, eps: float) -> Pair:
    """(x − μ)/σ over the axes of x from `first` on, and its tangents.

    d(x̂) = (T − mean T − x̂ mean(x̂ T)) / σ.
    """
    axes = list(range(first - x.ndim, 0))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    rate = torch.rsqrt(variance + eps)
    unit = (x - mean) * rate
    centred = tangents - tangents.mean(axes, keepdim=True)
    return unit, (centred - unit * (unit * tangents).mean(axes, keepdim=True)) * rate


def _per_channel(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.reshape(-1, *[1] * (x.ndim - 2))


def _reshape(layer: Any, x: Tensor, tangents: Tensor) -> Pair:
    value = layer(x)
    return value, tangents.reshape(len(tangents), *value.shape)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Tanh: _activation("tanh"),
    nn.SiLU: _activation("silu"),
    nn.Sigmoid: _sigmoid,
    nn.Softplus: _softplus,
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
    nn.Identity: _reshape,
}


class Dual(NamedTuple):
    """A value (batch, …) and tangents at it (k, batch, …): what a net hands on in forward mode.

    The functions below do to a Dual what they do to a Tensor, so that a net is written once.
    """

    value: Tensor
    tangents: Tensor


def through(layer: Any, h: Any) -> Any:
    """layer(h), for layers of RULES."""
    return layer(h) if isinstance(h, Tensor) else Dual(*RULES[type(layer)](layer, *h))


def rearranged(h: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """how(h), for what moves the entries of a batch (batch, …) without changing them."""
    if isinstance(h, Tensor):
        return how(h)
    k = len(h.tangents)
    return Dual(how(h.value), how(h.tangents.flatten(0, 1)).unflatten(0, (k, -1)))


def modulated(h: Any, scale: Tensor, shift: Tensor) -> Any:
    """h · scale + shift, where neither depends on x."""
    if isinstance(h, Tensor):
        return torch.addcmul(shift, h, scale)
    return Dual(torch.addcmul(shift, h.value, scale), h.tangents * scale)


def added(a: Any, b: Any) -> Any:
    """a + b."""
    if isinstance(a, Tensor):
        return a + b
    return Dual(a.value + b.value, a.tangents + b.tangents)


def multiplied(a: Any, b: Any) -> Any:
    """a · b."""
    if isinstance(a, Tensor):
        return a * b
    return Dual(a.value * b.value, a.tangents * b.value + a.value * b.tangents)


def joined(a: Any, b: Any) -> Any:
    """a and b, (batch, channels, …), one after the other along the channels."""
    if isinstance(a, Tensor):
        return torch.cat([a, b], 1)
    return Dual(torch.cat([a.value, b.value], 1), torch.cat([a.tangents, b.tangents], 2))


def halves(h: Any) -> tuple[Any, Any]:
    """The first and the second half of the channels of h, (batch, channels, …)."""
    if isinstance(h, Tensor):
        first, second = h.chunk(2, 1)
        return first, second
    values, tangents = h.value.chunk(2, 1), h.tangents.chunk(2, 2)
    return Dual(values[0], tangents[0]), Dual(values[1], tangents[1])
