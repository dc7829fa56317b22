"""Fields put together from layers, with exact tangents layer by layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnf.nets.tangent import RULES


class Chain(nn.Module):
    """A field f(t, x) of layers one after the other; t: 0-d or (batch,); x: (batch, …).

    layers: torch's Linear, Conv1d to Conv3d, GroupNorm, LayerNorm, Tanh, SiLU, Softplus, Sigmoid,
    Flatten, Unflatten, Identity and Sequential, called as layer(x); and any that offer
    `tangent(t, x, tangents)`, called as layer(t, x): those of `conditioning`, or a Chain.
    Raises ValueError for a layer without a rule for tangents.

    >>> import torch
    >>> field = Chain(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> field(torch.tensor(0.5), torch.zeros(3, 2)).shape
    torch.Size([3, 2])
    """

    row_wise = True

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        flat = [part for layer in layers for part in _parts(layer)]
        for i, layer in enumerate(flat):
            if not (_is_timed(layer) or type(layer) in RULES):
                raise ValueError(
                    f"layer {i} is {type(layer).__name__}, through which no tangents are known to "
                    "go; give it tangent(t, x, tangents), or use the net as a plain module"
                )
        self.layers = nn.ModuleList(flat)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(t, x) if _is_timed(layer) else layer(x)
        return x

    def tangent(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(f, J·tangents): tangents of shape (k, batch, …) carried layer by layer beside x."""
        for layer in self.layers:
            if _is_timed(layer):
                known: Any = layer
                x, tangents = known.tangent(t, x, tangents)
            else:
                x, tangents = RULES[type(layer)](layer, x, tangents)
        return x, tangents


class Residual(Chain):
    """A Chain g as the field x + g(t, x); what goes in and comes out has the same shape."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x + super().forward(t, x)

    def tangent(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        value, pushed = super().tangent(t, x, tangents)
        return x + value, tangents + pushed


def _is_timed(layer: nn.Module) -> bool:
    """Whether the layer takes t, and carries tangents itself."""
    return callable(getattr(layer, "tangent", None))


def _parts(layer: nn.Module) -> list[nn.Module]:
    if type(layer) is not nn.Sequential:
        return [layer]
    return [part for inner in layer for part in _parts(inner)]
