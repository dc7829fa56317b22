"""SciPy's solvers, on the host and without a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.compat.request import Crossing, Dynamics, Request, Tolerance
from cnf.error import InputError


@dataclass(frozen=True)
class SciPySolver:
    """`scipy.integrate.solve_ivp`; the option `solver` names its method.

    The result carries no gradient; through the adjoint it is differentiated all the same.
    """

    # the last two are taken and have no effect, as ever
    settings = frozenset({"solver", "min_step", "max_step", "grid_points", "eps"})
    callbacks = frozenset[str]()

    @torch.no_grad()
    def solve(self, request: Request) -> Tensor:
        times, y = request.times, request.y.detach()
        if len(times) == 1:
            return torch.stack([y])
        from scipy.integrate import solve_ivp  # not before it is asked for: it takes a while

        found = solve_ivp(
            _on_host(request.field, y),
            (times[0], times[-1]),
            y.cpu().numpy().reshape(-1),
            t_eval=times[1:],
            method=request.options.get("solver", "LSODA"),
            rtol=_numbers(request.rtol),
            atol=_numbers(request.atol),
            **{k: request.options[k] for k in ("min_step", "max_step") if k in request.options},
        )
        if not found.success:
            raise AssertionError(f"SciPy could not solve from t={times[0]:g}: {found.message}")
        states = torch.from_numpy(np.ascontiguousarray(found.y.T)).to(y.device, y.dtype)
        return torch.cat([y[None], states.reshape(-1, *y.shape)])

    def until_event(self, request: Request, event: Crossing) -> tuple[float, Tensor]:
        raise InputError(
            "scipy_solver knows no events: take method='dopri5', or another one of this layer's own"
        )


def _on_host(field: Dynamics, y: Tensor) -> Any:
    def slope(t: float, state: np.ndarray) -> np.ndarray:
        here = torch.from_numpy(state).to(y.device, y.dtype).reshape(y.shape)
        return field(t, (here,)).slope[0].cpu().numpy().reshape(-1)

    return slope


def _numbers(tolerance: Tolerance) -> Any:
    return tolerance.cpu().numpy().reshape(-1) if isinstance(tolerance, Tensor) else tolerance
