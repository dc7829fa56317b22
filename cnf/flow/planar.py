"""The planar normalizing flow: maps in a chain, whose limit is the planar continuous flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from cnf.flow.transform import standard_normal_log_prob


class PlanarChain(nn.Module):
    """x = z + û h(w·z + b), `depth` times: invertible maps of R^dim with h = tanh.

    û is u with its part along w changed so that w·û ≥ −1, which makes every map invertible.
    Source: Rezende & Mohamed 2015, section 4.1 and appendix A.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        if min(dim, depth) < 1:
            raise ValueError(f"expected dim and depth ≥ 1, got {dim} and {depth}")
        self.u = nn.Parameter(0.1 * torch.randn(depth, dim))
        self.w = nn.Parameter(0.5 * torch.randn(depth, dim))
        self.b = nn.Parameter(torch.zeros(depth))

    @property
    def dim(self) -> int:
        return self.u.shape[1]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(x, log |det ∂x/∂z|) of shapes (batch, dim) and (batch,)."""
        along = (self.w * self.u).sum(1, keepdim=True)
        length = self.w.square().sum(1, keepdim=True)
        u = self.u + (softplus(along) - 1 - along) * self.w / length
        logdet = z.new_zeros(len(z))
        for u_k, w, b in zip(u, self.w, self.b, strict=True):
            h = torch.tanh(z @ w + b)
            logdet = logdet + torch.log1p((1 - h.square()) * (u_k @ w))
            z = z + h.unsqueeze(-1) * u_k
        return z, logdet


class ChainReverseKL(nn.Module):
    """The mean of log q(x) − log p̃(x) over draws that a chain carries from the normal, 0-d.

    See `ReverseKL`; forward(z) takes draws z (n, dim) of the standard normal.
    """

    def __init__(self, chain: PlanarChain, log_density: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.chain = chain
        self.log_density = partial(log_density)  # a module among it is no part of this one

    def forward(self, z: Tensor) -> Tensor:
        x, logdet = self.chain(z)
        return (standard_normal_log_prob(z) - logdet - self.log_density(x)).mean()
