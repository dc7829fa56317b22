"""Invertible maps without an ODE."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from cnf.error import InputError

SMALLEST = 1e-8  # variance in any direction, of columns of unit variance


class Whiten(nn.Module):
    """The affine map z = L⁻¹ (x − mean), so that data of covariance L Lᵀ becomes white.

    It starts as the identity; `fit` sets it from data.  x, z: (batch, dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("factor", torch.eye(dim))
        self.register_buffer("is_fitted", torch.tensor(False))
        self.is_fitted: Tensor
        self.mean: Tensor
        self.factor: Tensor

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the map from data of shape (rows, dim): full covariance, shrunk to the diagonal.

        Raises InputError for a constant column.  Source of the shrinkage: Ledoit & Wolf 2004.
        """
        data = x.detach().double().cpu().numpy()
        mean, scale = data.mean(0), data.std(0)
        flat = np.flatnonzero(scale <= 1e-12 * np.abs(mean).clip(1e-300))
        if flat.size:
            raise InputError(
                f"column {flat[0]} is constant ({mean[flat[0]]:g}), so it has no density; drop it"
            )
        standard = (data - mean) / scale
        correlation, _ = ledoit_wolf(standard, assume_centered=True)
        # columns that follow from each other, or two rows alone, leave a direction without spread
        short = max(0.0, SMALLEST - np.linalg.eigvalsh(correlation)[0])
        identity = np.eye(len(scale))
        lower = np.linalg.cholesky((correlation + short * identity) / (1 + short))
        self.mean.copy_(torch.from_numpy(mean))
        self.factor.copy_(torch.from_numpy(scale[:, None] * lower))
        if not torch.isfinite(1 / self.factor.diagonal()).all():
            raise InputError(
                f"a column's spread of {scale.min():g} is too small for {self.mean.dtype}; "
                "multiply it by a large number"
            )
        self.is_fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        # solved, not multiplied by a stored inverse: `invert` then undoes it to rounding
        return torch.linalg.solve_triangular(self.factor.T, x - self.mean, upper=True, left=False)

    def invert(self, z: Tensor) -> Tensor:
        """x from z."""
        return z @ self.factor.T + self.mean

    def logdet(self) -> Tensor:
        """log |det dz/dx|, 0-d, in float64 where the device has it."""
        diagonal = self.factor.diagonal()
        wide = diagonal if diagonal.device.type == "mps" else diagonal.double()
        return -wide.log().sum()


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of shape (batch,), for z (batch, dim)."""
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
