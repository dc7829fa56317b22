"""Densities in the plane that are known up to a constant and cannot be sampled.

Those of Rezende & Mohamed 2015, table 1, on which Chen et al. 2018 compare flows in figure 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Energy:
    """An unnormalized density exp(−U(x)) of x in the plane."""

    name: str
    potential: Callable[[Tensor], Tensor]

    def log_prob(self, x: Tensor) -> Tensor:
        """−U(x), (…,), for x (…, 2): the log-density up to a constant."""
        return -self.potential(x)

    def log_integral(self, reach: float = 12.0, cells: int = 1200) -> float:
        """log ∫ exp(−U), by the midpoint rule on a square of ± reach."""
        side = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * reach / cells) - reach
        x = torch.cartesian_prod(side, side)
        return (torch.logsumexp(self.log_prob(x), 0) + 2 * math.log(2 * reach / cells)).item()


def _two_moons(x: Tensor) -> Tensor:
    """A ring of radius 2 with its left and right thickened."""
    radius = torch.linalg.vector_norm(x, dim=-1)
    return 0.5 * ((radius - 2) / 0.4) ** 2 - _log_sum(
        -0.5 * ((x[..., 0] - 2) / 0.6) ** 2, -0.5 * ((x[..., 0] + 2) / 0.6) ** 2
    )


def _wave(x: Tensor) -> Tensor:
    return 0.5 * ((x[..., 1] - _sine(x)) / 0.4) ** 2 + _walls(x)


def _split_wave(x: Tensor) -> Tensor:
    """Two waves that part in the middle."""
    bump = 3 * torch.exp(-0.5 * ((x[..., 0] - 1) / 0.6) ** 2)
    above = x[..., 1] - _sine(x)
    return _walls(x) - _log_sum(-0.5 * (above / 0.35) ** 2, -0.5 * ((above + bump) / 0.35) ** 2)


def _forked_wave(x: Tensor) -> Tensor:
    """Two waves, the second of which steps down in the middle."""
    step = 3 * torch.sigmoid((x[..., 0] - 1) / 0.3)
    above = x[..., 1] - _sine(x)
    return _walls(x) - _log_sum(-0.5 * (above / 0.4) ** 2, -0.5 * ((above + step) / 0.35) ** 2)


def _sine(x: Tensor) -> Tensor:
    return torch.sin(0.5 * math.pi * x[..., 0])


def _walls(x: Tensor, half: float = 4.0, thickness: float = 0.2) -> Tensor:
    """What keeps a wave, which would go on for ever, within |x₁| ≤ half, and gives it a mass."""
    out = softplus((x[..., 0].abs() - half) / thickness)
    return out**2


def _log_sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.logaddexp(a, b)


ENERGIES = {
    energy.name: energy
    for energy in (
        Energy("ring", _two_moons),
        Energy("wave", _wave),
        Energy("split wave", _split_wave),
        Energy("forked wave", _forked_wave),
    )
}
