"""Adams' methods on a grid, of an order that grows with what is known of the past.

Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section III.1 (constant
steps) and III.5 (steps of any length).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.compat.fixed_grid import Moment, RungeKuttaStepper
from cnf.compat.request import Request
from cnf.error import whole_number
from cnf.ode.field import Evaluation
from cnf.ode.method import Evaluate

SETTINGS = frozenset({"max_order", "max_iters"})
_LEAST_ORDER, _HIGHEST_ORDER = 4, 12
_MOST_CORRECTIONS = 4


class AdamsStepper:
    """Adams–Bashforth, or with implicit=True the same corrected by Adams–Moulton until it settles.

    The first steps are those of the 3/8 rule, until three slopes are known.  The weights follow the
    lengths of the steps, so that the order holds on an uneven grid too.
    """

    def __init__(self, request: Request, implicit: bool) -> None:
        options = request.options
        self._request, self._implicit = request, implicit
        self._iterations = whole_number("max_iters", options.get("max_iters", _MOST_CORRECTIONS), 1)
        most = whole_number("max_order", int(options.get("max_order", _HIGHEST_ORDER)), 1)
        if most > _HIGHEST_ORDER:
            raise AssertionError(f"max_order must be at most {_HIGHEST_ORDER}, got {most}")
        if most < _LEAST_ORDER:
            warnings.warn(
                f"max_order is below {_LEAST_ORDER}, so the solver reduces to `rk4`", stacklevel=2
            )
        self._history: deque[tuple[Moment, Tensor]] = deque(maxlen=most - 1)  # the latest first
        self._start = RungeKuttaStepper("rk4_38")

    def __call__(
        self, field: Evaluate, t: Moment, h: Moment, y: Tensor, first: Evaluation
    ) -> Tensor:
        self._history.appendleft((t, first.slope[0]))
        if len(self._history) < _LEAST_ORDER - 1:
            return self._start(field, t, h, y, first)
        nodes = [(moment - t) / h for moment, _ in self._history]
        slopes = [slope for _, slope in self._history]
        rise = _integral(h, adams_weights(nodes), slopes)
        if self._implicit:
            rise = self._corrected(field, t, h, y, rise, nodes, slopes)
        return y + rise

    def _corrected(
        self,
        field: Evaluate,
        t: Moment,
        h: Moment,
        y: Tensor,
        rise: Tensor,
        nodes: Sequence[Moment],
        slopes: Sequence[Tensor],
    ) -> Tensor:
        """The rise that agrees with the slope at the step's end, by iteration."""
        here, *weights = adams_weights([1.0, *nodes])
        known = _integral(h, weights, slopes)
        for _ in range(self._iterations):
            before = rise
            slope = field(t + h, (y + before,)).slope[0]
            rise = known + _integral(h, [here], [slope])
            if self._settled(before, rise):
                return rise
        warnings.warn(
            f"Functional iteration did not converge in {self._iterations} evaluations, and the "
            "corrector holds only roughly: take shorter steps, a larger rtol or more `max_iters`",
            stacklevel=2,
        )
        self._history.pop()  # the next step is of a lower order
        return rise

    @torch.no_grad()
    def _settled(self, before: Tensor, after: Tensor) -> bool:
        """Whether no entry changed by more than the tolerance: one device-to-host read."""
        request = self._request
        scale = request.atol + request.rtol * torch.maximum(before.abs(), after.abs())
        return bool(((after - before).abs() <= scale).all())


def adams_weights(nodes: Sequence[Moment]) -> list[Moment]:
    """w_j with ∫₀¹ p(s) ds = Σ w_j p(s_j), for polynomials p of a degree below the nodes' number.

    nodes: s_j, distinct; floats, or 0-d tensors, which the weights follow.
    Gauss–Legendre quadrature of Lagrange's polynomials, which needs no system to be solved.
    """
    tensors = [node for node in nodes if isinstance(node, Tensor)]
    if not tensors:
        return _weights(torch.tensor(nodes, dtype=torch.float64, device="cpu")).tolist()
    like = {"dtype": tensors[0].dtype, "device": tensors[0].device}
    s = torch.stack([torch.as_tensor(node, **like) for node in nodes])
    return list(_weights(s).unbind())


def _weights(s: Tensor) -> Tensor:
    points, shares = (torch.from_numpy(part).to(s) for part in _gauss(len(s) // 2 + 1))
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    above = points[:, None, None] - s  # (points, 1, k): x − s_k
    below = s[:, None] - s  # (j, k): s_j − s_k
    factors = torch.where(itself, 1.0, above / torch.where(itself, 1.0, below))
    return shares @ factors.prod(-1)


@cache
def _gauss(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1), exact for polynomials of degree 2·count − 1."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return (points + 1) / 2, weights / 2


def _integral(h: Moment, weights: Sequence[Moment], slopes: Sequence[Tensor]) -> Tensor:
    """h Σ w_j slope_j."""
    terms = (
        slope * _plain(h * weight, slope) for weight, slope in zip(weights, slopes, strict=True)
    )
    return sum(terms, start=torch.zeros_like(slopes[0]))


def _plain(factor: Any, like: Tensor) -> Any:
    return factor.to(like.real.dtype) if isinstance(factor, Tensor) else factor
