"""The planar continuous flow: a sum of units, each of which moves points along one direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlanarField(nn.Module):
    """f(t, x) = Σ_m σ_m(t) u_m(t) tanh(w_m(t)·x + b_m(t)), x: (batch, dim) → (batch, dim).

    width: the number M of units; hidden: widths of the net of t that makes u, w, b and σ ∈ (0, 1).
    Its divergence is Σ_m σ_m u_m·w_m tanh', at the cost of the field itself.  u starts at zero: the
    flow starts as the identity.
    Source: Chen et al. 2018, section 4 and its planar flow; Rezende & Mohamed 2015, equation 10.
    """

    row_wise = True

    def __init__(self, dim: int, width: int = 32, *, hidden: int = 32) -> None:
        super().__init__()
        if min(dim, width, hidden) < 1:
            raise ValueError(f"expected dim, width and hidden ≥ 1, got {dim}, {width} and {hidden}")
        self.dim, self.width = dim, width
        self.sizes = [width * dim, width * dim, width, width]
        self.hyper = nn.Sequential(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.last = nn.Linear(hidden, sum(self.sizes))
        with torch.no_grad():
            count = width * dim
            self.last.weight[:count] = 0.0
            self.last.bias.zero_()
            self.last.bias[count : 2 * count].normal_()
            self.last.bias[2 * count : 2 * count + width].normal_()

    def units(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(σ u, w, b) at t: (width, dim) twice and (width,), after t's own shape."""
        numbers = self.last(self.hyper(t.unsqueeze(-1)))
        u, w, b, gate = numbers.split(self.sizes, -1)
        u, w = (x.unflatten(-1, (self.width, self.dim)) for x in (u, w))
        return u * torch.sigmoid(gate).unsqueeze(-1), w, b

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        u, w, b = self.units(t)
        return _from_units(torch.tanh(_to_units(x, w) + b), u)

    def prepare(self) -> tuple[Tensor, ...]:
        """Nothing is computed ahead of a solve."""
        return ()

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f, tr ∂f/∂x) of shapes (batch, dim) and (batch,)."""
        u, w, b = self.units(t)
        h = torch.tanh(_to_units(x, w) + b)
        return _from_units(h, u), ((1 - h.square()) * (u * w).sum(-1)).sum(-1)

    def tangent(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """(f, J·tangents), tangents: (k, batch, dim)."""
        u, w, b = self.units(t)
        h = torch.tanh(_to_units(x, w) + b)
        return _from_units(h, u), _from_units(_to_units(tangents, w) * (1 - h.square()), u)


def _to_units(x: Tensor, w: Tensor) -> Tensor:
    """w·x of every unit: (…, batch, width) for x (…, batch, dim)."""
    return x @ w.T if w.ndim == 2 else torch.einsum("bmd,...bd->...bm", w, x)


def _from_units(h: Tensor, u: Tensor) -> Tensor:
    """Σ_m h_m u_m: (…, batch, dim) for h (…, batch, width)."""
    return h @ u if u.ndim == 2 else torch.einsum("bmd,...bm->...bd", u, h)
