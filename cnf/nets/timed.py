"""Nets of any depth whose layers depend on time in one of several ways, plain and residual."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from cnf.nets.chain import Chain, Residual
from cnf.nets.conditioning import layer_of

LAYERS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "silu": nn.SiLU, "softplus": nn.Softplus}


class TimedMLP(Chain):
    """A multilayer perceptron f(t, x), x: (batch, dim) → (batch, dim).

    hidden: widths, one or more; conditioning: how its layers depend on time, "concat",
    "concatsquash", "hyper" or "fourier"; activation: "tanh", "silu" or "softplus".
    The last layer starts at zero: the flow starts as the identity.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        conditioning: str = "concatsquash",
        activation: str = "tanh",
    ) -> None:
        if dim < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"expected dim ≥ 1 and hidden widths ≥ 1, got {dim} and {hidden}")
        kind, act = layer_of(conditioning), _activation(activation)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((dim, *hidden)):
            layers += [kind(inputs, outputs), act()]
        last = kind(hidden[-1], dim)
        last.silence()
        super().__init__(*layers, last)


class ResidualMLP(Chain):
    """A residual net f(t, x), x: (batch, dim) → (batch, dim), in pre-activation order.

    width: of all layers; blocks: each adds two layers to what it is given; conditioning,
    activation: as for `TimedMLP`.  The last layer starts at zero, and so does every block.
    Source: He et al. 2016.
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        blocks: int = 2,
        *,
        conditioning: str = "concatsquash",
        activation: str = "tanh",
    ) -> None:
        if min(dim, width, blocks) < 1:
            raise ValueError(f"expected dim, width and blocks ≥ 1, got {dim}, {width} and {blocks}")
        kind, act = layer_of(conditioning), _activation(activation)
        layers: list[nn.Module] = [kind(dim, width)]
        for _ in range(blocks):
            last = kind(width, width)
            last.silence()
            layers.append(Residual(act(), kind(width, width), act(), last))
        last = kind(width, dim)
        last.silence()
        super().__init__(*layers, act(), last)


def _activation(name: str) -> type[nn.Module]:
    if name not in LAYERS:
        raise ValueError(f"unknown activation {name!r}; known are {', '.join(LAYERS)}")
    return LAYERS[name]
