"""The gradient field of a potential: what moves mass by the shortest way is a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PotentialField(nn.Module):
    """f(t, x) = −∇ₓΦ(t, x), x: (batch, dim) → (batch, dim), with Φ(s) = w·N(s) + ½|A s|² + b·s for
    s = (x, t) and N a residual net.

    width: m, of the net; depth: its layers, u₀ = σ(K₀ s + b₀), u_i = u_{i−1} + h σ(K_i u_{i−1} +
    b_i) with h = 1/(depth − 1) and σ(a) = log 2cosh a, whose slope is tanh; rank: rows of A.
    The trace of the Hessian is exact and closed, O(depth · width² · dim) a row.  The field of an
    optimal transport is one of these, along straight paths; there `residual` is 0, which
    `Regularizer(hjb=…)` asks for.  Untrained, the flow is nearly the identity.
    Source: Onken et al. 2021, sections 3 and 4.
    """

    row_wise = True

    def __init__(
        self, dim: int, width: int = 32, depth: int = 2, *, rank: int | None = None
    ) -> None:
        super().__init__()
        rank = min(10, dim) if rank is None else rank
        if min(dim, width, depth, rank) < 1:
            raise ValueError(
                f"expected dim, width, depth and rank ≥ 1, got {dim}, {width}, {depth} and {rank}"
            )
        self.dim, self.step = dim, 1 / max(depth - 1, 1)
        self.first = nn.Linear(dim + 1, width)
        self.inner: Any = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Parameter(torch.zeros(width))
        self.quadratic = nn.Parameter(0.01 * torch.randn(rank, dim + 1))
        self.linear = nn.Parameter(torch.zeros(dim + 1))

    def potential(self, t: Tensor, x: Tensor) -> Tensor:
        """Φ(t, x), (batch,)."""
        s = _with_time(t, x)
        u = _log_two_cosh(self.first(s))
        for layer in self.inner:
            u = u + self.step * _log_two_cosh(layer(u))
        return u @ self.out + 0.5 * (s @ self.quadratic.T).square().sum(-1) + s @ self.linear

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self._gradient(*self._climb(t, x))[0][:, : self.dim]

    def residual(self, t: Tensor, x: Tensor) -> Tensor:
        """∂Φ/∂t − ½‖∇Φ‖², (batch,): 0 where the field obeys the Hamilton–Jacobi–Bellman equation,
        and points move straight on at constant speed.
        """
        slope = self._gradient(*self._climb(t, x))[0]
        return slope[:, -1] - 0.5 * slope[:, : self.dim].square().sum(-1)

    def prepare(self) -> tuple[Tensor, ...]:
        """Nothing is computed ahead of a solve."""
        return ()

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f, tr ∂f/∂x) of shapes (batch, dim) and (batch,)."""
        s, slopes = self._climb(t, x)
        gradient, costates = self._gradient(s, slopes)
        into = self.first.weight[:, : self.dim]
        bend = (1 - slopes[0].square()) * costates[0]
        trace = bend @ into.square().sum(1) + self.quadratic[:, : self.dim].square().sum()
        rate = slopes[0].unsqueeze(-1) * into  # ∂u/∂x, (batch, width, dim)
        for layer, slope, costate in zip(self.inner, slopes[1:], costates[1:], strict=True):
            moved = layer.weight @ rate
            bend = (1 - slope.square()) * costate
            trace = trace + self.step * (bend * moved.square().sum(-1)).sum(-1)
            rate = rate + self.step * slope.unsqueeze(-1) * moved
        return -gradient[:, : self.dim], -trace

    def _climb(self, t: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """s = (x, t), and the slope σ' = tanh of every layer."""
        s = _with_time(t, x)
        a = self.first(s)
        slopes, u = [torch.tanh(a)], _log_two_cosh(a)
        for layer in self.inner:
            a = layer(u)
            slopes.append(torch.tanh(a))
            u = u + self.step * _log_two_cosh(a)
        return s, slopes

    def _gradient(self, s: Tensor, slopes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """∇Φ by x and t, (batch, dim + 1), and the gradient of Φ by what every layer adds."""
        costate = self.out.expand(len(s), -1)
        costates = [costate]
        for layer, slope in zip(reversed(self.inner), reversed(slopes[1:]), strict=True):
            costate = costate + self.step * (slope * costate) @ layer.weight
            costates.append(costate)
        costates.reverse()
        gradient = (slopes[0] * costate) @ self.first.weight + self.linear
        return gradient + (s @ self.quadratic.T) @ self.quadratic, costates


def _with_time(t: Tensor, x: Tensor) -> Tensor:
    return torch.cat([x, t.expand(len(x)).unsqueeze(-1)], -1)


def _log_two_cosh(a: Tensor) -> Tensor:
    """log(eᵃ + e⁻ᵃ), which overflows nowhere."""
    return torch.logaddexp(a, -a)
