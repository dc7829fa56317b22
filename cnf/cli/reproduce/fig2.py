"""Figure 2: Euler's polygon beside the exact solution, and better methods."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf.cli.training import tell
from cnf.ode.solution import solve
from cnf.plot import polygon_figure, save_figure

METHODS = {"euler": 1, "midpoint": 2, "rk4": 4}  # evaluations of a step


def polygons(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Euler's polygon and better methods beside the exact solution of y' = y cos t, y(0) = 1."""
    end, steps = 6.0, 8
    fine = torch.linspace(0, end, 400, dtype=torch.float64)
    drawn = {name: _polygon(name, end, steps) for name in METHODS}
    budgets = [2**k for k in range(3, 12)]
    errors = {
        name: [(n, _end_error(name, end, n // each)) for n in budgets if n >= each]
        for name, each in METHODS.items()
    }
    figure = polygon_figure(
        fine.numpy(), torch.exp(torch.sin(fine)).numpy(),
        {name: (t.numpy(), y.numpy()) for name, (t, y) in drawn.items()}, errors,
    )  # fmt: skip
    path = save_figure(figure, out / "fig2.png")
    tell(arguments, f"drawn in {path}")
    if not arguments.json:
        print("\n".join(_lines(errors)))
    return {"figure": str(path), "errors": errors}


def _lines(errors: dict[str, list[tuple[int, float]]]) -> list[str]:
    """The errors at the end as a table: a line for each number of evaluations."""
    found = {name: dict(pairs) for name, pairs in errors.items()}
    budgets = sorted({budget for pairs in found.values() for budget in pairs})
    head = "evaluations" + "".join(f"{name:>12}" for name in found)

    def shown(pairs: dict[int, float], budget: int) -> str:
        return f"{pairs[budget]:>12.1e}" if budget in pairs else f"{'':>12}"

    rows = ("".join(shown(pairs, n) for pairs in found.values()) for n in budgets)
    return [head, *(f"{n:>11}{row}" for n, row in zip(budgets, rows, strict=True))]


def _swing(t: Tensor, y: Tensor) -> Tensor:
    return y * torch.cos(t)


def _polygon(method: str, end: float, steps: int) -> tuple[Tensor, Tensor]:
    """Times and values at the ends of the steps."""
    t = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return t, solve(_swing, one, t, method=method, step_size=end / steps).y[:, 0]


def _end_error(method: str, end: float, steps: int) -> float:
    last = _polygon(method, end, steps)[1][-1].item()
    return abs(last - math.exp(math.sin(end)))
