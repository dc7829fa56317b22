"""The methods by the names that they have in torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnf.compat.adams import SETTINGS, AdamsStepper
from cnf.compat.adaptive import AdaptiveSolver
from cnf.compat.fixed_grid import FixedGridSolver, RungeKuttaStepper
from cnf.compat.pair import DOPRI5, DOPRI8
from cnf.compat.request import Callbacks, Crossing, Layout, Request, Solver, read_request
from cnf.compat.scipy_solver import SciPySolver
from cnf.error import InputError


def _on_grid(name: str) -> FixedGridSolver:
    return FixedGridSolver(lambda request: RungeKuttaStepper(name))


def _adams(implicit: bool) -> FixedGridSolver:
    return FixedGridSolver(partial(AdamsStepper, implicit=implicit), SETTINGS)


SOLVERS: dict[str, Solver] = {
    "dopri8": AdaptiveSolver(DOPRI8),
    "dopri5": AdaptiveSolver(DOPRI5),
    "tsit5": AdaptiveSolver("tsit5"),
    "bosh3": AdaptiveSolver("bosh3"),
    "fehlberg2": AdaptiveSolver("fehlberg2"),
    "adaptive_heun": AdaptiveSolver("adaptive_heun"),
    "euler": _on_grid("euler"),
    "midpoint": _on_grid("midpoint"),
    "heun2": _on_grid("heun2"),
    "heun3": _on_grid("heun3"),
    "rk4": _on_grid("rk4_38"),
    "explicit_adams": _adams(implicit=False),
    "implicit_adams": _adams(implicit=True),
    "fixed_adams": _adams(implicit=True),
    "scipy_solver": SciPySolver(),
}
DEFAULT = "dopri5"


def read(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: Mapping[str, Any] | None,
    callbacks: Callable[[Layout], Callbacks] | None = None,
) -> Request:
    """The request that the arguments make; see `read_request`.

    callbacks: what is called back, given the state's layout; None for what func itself offers.
    """
    name = DEFAULT if method is None else method
    heard = partial(Callbacks.of, func) if callbacks is None else callbacks
    return read_request(_solver(name), name, func, y0, t, rtol, atol, options, heard)


def solve(request: Request) -> Tensor:
    """The states at all requested times, (times, *y.shape)."""
    return _solver(request.method).solve(request)


def solve_until(request: Request, event: Crossing) -> tuple[Tensor, Tensor]:
    """(event time, the states at the start and at the event, (2, *y.shape)); the time is cut from
    the graph.
    """
    moment, end = _solver(request.method).until_event(request, event)
    t = request.t
    found = torch.tensor(moment, dtype=t.dtype, device=t.device)
    return found, torch.stack([request.y, end])


def _solver(method: str) -> Solver:
    if method not in SOLVERS:
        raise InputError(f"Invalid method {method!r}. Must be one of {', '.join(SOLVERS)}")
    return SOLVERS[method]
