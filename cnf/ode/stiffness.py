"""Whether a problem is stiff somewhere: asked once an explicit method has failed there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.ode.jacobian import Layout
from cnf.ode.method import Evaluate
from cnf.ode.state import Leaves
from cnf.ode.tableau import Tableau

_TURNS = 30
_REAL = 0.8  # of an eigenvalue's size, which its real part is at least to be called damping
# h λ over the stability limit where stability, and not accuracy, chooses the steps: around 1
_LOWEST, _HIGHEST = 0.65, 3.0


def stiffness(found: Sequence[float], tableau: Tableau) -> float | None:
    """The typical |h λ| of some steps where it says that the problem is stiff, else None.

    found: of each step; see `damping`.
    """
    typical = float(np.median(found)) if len(found) else 0.0
    share = typical / stability_limit(tableau)
    return typical if _LOWEST <= share <= _HIGHEST else None


@torch.no_grad()
def damping(field: Evaluate, t: Any, h: Any, y: Leaves) -> np.ndarray:
    """|h λ| of the Jacobian's largest eigenvalue λ at (t, y) where it damps, else 0; one number, or
    one for each row, where t and h have shape (rows,).

    By the power method on differences of the field, since it may be no field for autograd.
    """
    rows = len(h) if isinstance(h, Tensor) else 1
    layout = Layout(y, rows)
    start = layout.vector(y)
    length = h.to(start.dtype)[:, None] if isinstance(h, Tensor) else h
    slope = layout.vector(field(t, y).slope)
    size = _norm(start)
    distance = torch.finfo(start.dtype).eps ** 0.5 * torch.where(size > 0, size, 1.0)
    v = torch.cos(torch.arange(start.numel(), dtype=start.dtype, device=start.device))
    v = _unit(v.reshape(start.shape))
    grown = before = torch.zeros_like(v)
    for _ in range(_TURNS):
        ahead = layout.vector(field(t, layout.leaves(start + distance * v)).slope)
        grown = (ahead - slope) * (length / distance)
        v, before = _unit(grown), v
    real, whole = (before * grown).sum(-1), _norm(grown)[:, 0]
    found = torch.where(real <= -_REAL * whole, whole, 0.0)
    return torch.nan_to_num(found, 0.0, 0.0, 0.0).double().cpu().numpy()


@cache
def stability_limit(tableau: Tableau) -> float:
    """The largest x such that the method is stable for all h λ from −x to 0."""
    s = tableau.stages
    a = np.array([[*row, *[0.0] * (s - len(row))] for row in tableau.a])
    powers, stage = [1.0], np.ones(s)
    for _ in range(s):  # R(z) = 1 + Σ z^k bᵀ A^(k−1) 1
        powers.append(float(np.array(tableau.b) @ stage))
        stage = a @ stage
    x = np.linspace(0.0, 50.0, 50_001)
    unstable = np.abs(np.polynomial.Polynomial(powers)(-x)) > 1.0 + 1e-9
    return float(x[np.argmax(unstable)]) if unstable.any() else math.inf


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True)


def _unit(v: Tensor) -> Tensor:
    size = _norm(v)
    return v / torch.where(size > 0, size, 1.0)
