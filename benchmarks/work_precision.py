"""Error against evaluations and time: our methods, torchdiffeq's and SciPy's on DETEST's problems.

    python benchmarks/work_precision.py [--rounds 3] [--quick] [--out docs/work_precision.png]

Every method solves the 25 non-stiff problems of classes A to E at tolerances 1e-3 … 1e-10, absolute
and relative alike, in float64, without gradients.  The error is that of the state at t = 20, of its
worst part, against DOP853 at 1e-13.  At equal error the number of evaluations is read off each
method's own curve (log–log, monotone); ratios are geometric means over problems and errors.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from detest import END, Initial, problems
from matplotlib.figure import Figure
from rivals import available
from scipy.integrate import solve_ivp
from timing import machine

import cnf
from cnf.plot import DATA, INK, LEGEND, MODEL, QUIET, save_figure

TOLERANCES = tuple(10.0**-k for k in range(3, 11))
ERRORS = tuple(10.0**-k for k in np.arange(3.0, 8.5, 0.5))
OURS = ("bosh3", "dopri5", "tsit5", "dopri8")
TORCHDIFFEQ = ("bosh3", "dopri5", "dopri8")
SCIPY = ("RK45", "DOP853", "LSODA")


class Point(NamedTuple):
    """One solve: the error at the end, evaluations of the field, seconds."""

    error: float
    nfe: int
    seconds: float


class Counted:
    """A field that counts its evaluations."""

    def __init__(self, initial: Initial) -> None:
        self.field, self.calls = initial.field, 0

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.field(t, y)

    def on_arrays(self, t: float, y: np.ndarray) -> np.ndarray:
        moment = torch.tensor(t, dtype=torch.float64)
        return self(moment, torch.from_numpy(np.ascontiguousarray(y))).numpy()


Solve = Callable[[Counted, torch.Tensor, float], torch.Tensor]


def _ours(method: str) -> Solve:
    def solve(field: Counted, y0: torch.Tensor, tolerance: float) -> torch.Tensor:
        return cnf.solve(field, y0, [0.0, END], method=method, rtol=tolerance, atol=tolerance).y[-1]

    return solve


def _torchdiffeq(method: str) -> Solve:
    import torchdiffeq

    times = torch.tensor([0.0, END], dtype=torch.float64)

    def solve(field: Counted, y0: torch.Tensor, tolerance: float) -> torch.Tensor:
        return torchdiffeq.odeint(field, y0, times, method=method, rtol=tolerance, atol=tolerance)[
            -1
        ]

    return solve


def _scipy(method: str) -> Solve:
    def solve(field: Counted, y0: torch.Tensor, tolerance: float) -> torch.Tensor:
        found = solve_ivp(
            field.on_arrays, (0.0, END), y0.numpy(), method=method, rtol=tolerance, atol=tolerance
        )
        return torch.from_numpy(found.y[:, -1].copy())

    return solve


def methods() -> dict[str, Solve]:
    found = {f"cnf {name}": _ours(name) for name in OURS}
    if available("torchdiffeq"):
        found |= {f"torchdiffeq {name}": _torchdiffeq(name) for name in TORCHDIFFEQ}
    return found | {f"SciPy {name}": _scipy(name) for name in SCIPY}


@torch.no_grad()
def measure(rounds: int, names: list[str]) -> dict[str, dict[str, list[Point]]]:
    """For each method and problem a point at every tolerance; methods in turn in every round."""
    table: dict[str, dict[str, list[Point]]] = {name: {} for name in methods()}
    for problem in names:
        initial = problems()[problem]
        reference = _reference(initial)
        for tolerance in TOLERANCES:
            solves = {name: [] for name in table}
            for _ in range(rounds):
                for name, solve in methods().items():
                    solves[name].append(_point(solve, initial, tolerance, reference))
            for name, points in solves.items():
                seconds = statistics.median(point.seconds for point in points)
                table[name].setdefault(problem, []).append(points[0]._replace(seconds=seconds))
        print(f"{problem} done", flush=True)
    return table


def _reference(initial: Initial) -> torch.Tensor:
    field = Counted(initial)
    found = solve_ivp(
        field.on_arrays, (0.0, END), initial.y0.numpy(), method="DOP853", rtol=1e-13, atol=1e-15
    )
    return torch.from_numpy(found.y[:, -1].copy())


def _point(solve: Solve, initial: Initial, tolerance: float, reference: torch.Tensor) -> Point:
    field = Counted(initial)
    start = time.perf_counter()
    end = solve(field, initial.y0, tolerance)
    seconds = time.perf_counter() - start
    return Point((end - reference).abs().max().item(), field.calls, seconds)


def at_error(points: list[Point], error: float, cost: Callable[[Point], float]) -> float:
    """The cost at which a method's curve reaches an error; NaN outside of it."""
    best = math.inf
    curve = []
    for point in sorted(points, key=lambda point: point.nfe):
        if 0 < point.error < best:  # a tighter tolerance that is no better costs for nothing
            best = point.error
            curve.append((math.log(point.error), math.log(cost(point))))
    if len(curve) < 2:
        return math.nan
    errors, costs = np.array(curve[::-1]).T
    wanted = math.log(error)
    if not errors[0] <= wanted <= errors[-1]:
        return math.nan
    return math.exp(np.interp(wanted, errors, costs))


def ratio(
    table: dict[str, dict[str, list[Point]]],
    ours: list[str],
    others: list[str],
    cost: Callable[[Point], float],
) -> float:
    """Geometric mean over problems and errors of our best method's cost over the others' best."""
    logs = []
    for problem in table[ours[0]]:
        for error in ERRORS:
            mine = _best(table, ours, problem, error, cost)
            theirs = _best(table, others, problem, error, cost)
            if math.isfinite(mine) and math.isfinite(theirs):
                logs.append(math.log(mine / theirs))
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def _best(
    table: dict[str, dict[str, list[Point]]],
    names: list[str],
    problem: str,
    error: float,
    cost: Callable[[Point], float],
) -> float:
    costs = [at_error(table[name][problem], error, cost) for name in names]
    return min((value for value in costs if math.isfinite(value)), default=math.nan)


def nfe(point: Point) -> float:
    return float(point.nfe)


def seconds(point: Point) -> float:
    return point.seconds


def report(table: dict[str, dict[str, list[Point]]]) -> None:
    rivals = [name for name in table if name.startswith("torchdiffeq")]
    ours = [name for name in table if name.startswith("cnf")]
    print(f"\n{'at equal error':42s} {'NFE':>8s} {'time':>8s}")
    for name in ours:
        same = name.replace("cnf", "torchdiffeq")
        if same in table:
            print(
                f"{name + ' / ' + same:42s} {ratio(table, [name], [same], nfe):8.2f} "
                f"{ratio(table, [name], [same], seconds):8.2f}"
            )
    groups = {"best of cnf / best of torchdiffeq": (ours, rivals)} if rivals else {}
    groups["best of cnf / best of SciPy"] = (ours, [n for n in table if n.startswith("SciPy")])
    for title, (mine, theirs) in groups.items():
        print(
            f"{title:42s} {ratio(table, mine, theirs, nfe):8.2f} "
            f"{ratio(table, mine, theirs, seconds):8.2f}"
        )


def draw(table: dict[str, dict[str, list[Point]]]) -> Figure:
    """Median error against median cost over the problems, a line for each method."""
    figure = Figure(figsize=(9.2, 4.2), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08)
    colors = {"cnf": MODEL, "torchdiffeq": DATA, "SciPy": INK}
    dashes = {
        "bosh3": (0, (1, 1.5)), "dopri5": "-", "tsit5": (0, (5, 1.5)), "dopri8": (0, (3, 1, 1, 1)),
        "RK45": "-", "DOP853": (0, (3, 1, 1, 1)), "LSODA": (0, (1, 1.5)),
    }  # fmt: skip
    for axes, cost, title in zip(
        figure.subplots(1, 2, sharey=True),
        (nfe, seconds),
        ("evaluations of the field", "seconds"),
        strict=True,
    ):
        for name, by_problem in table.items():
            library, method = name.split()
            points = _medians(by_problem, cost)
            errors, costs = zip(*points, strict=True)
            axes.loglog(
                costs, errors, color=colors[library], linestyle=dashes[method], label=name,
                linewidth=2.0 if library == "cnf" else 1.2, marker="o", markersize=2.5,
            )  # fmt: skip
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e7e9ed", linewidth=0.6)
        axes.tick_params(colors=QUIET, labelsize=8)
    figure.axes[0].set_ylabel("median error at t = 20", color=QUIET, fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, handlelength=3.4, **LEGEND)
    return figure


def _medians(
    by_problem: dict[str, list[Point]], cost: Callable[[Point], float]
) -> list[tuple[float, float]]:
    """(error, cost) at each tolerance, medians over the problems."""
    columns = zip(*by_problem.values(), strict=True)
    return [
        (statistics.median(p.error for p in column), statistics.median(map(cost, column)))
        for column in columns
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the first problem of every class")
    parser.add_argument("--out", default="docs/work_precision.png")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    names = [name for name in problems() if not arguments.quick or name.endswith("1")]
    table = measure(arguments.rounds, names)
    report(table)
    save_figure(draw(table), arguments.out)


if __name__ == "__main__":
    main()
