"""The one restriction of a flow: its steps in t must be small enough.

    python benchmarks/step_size.py [--seconds 20] [--out docs/step_size.png]

Fits two moons, then maps held-out points to the base and back with fixed steps of many sizes, in
float64: the round trip's error and the log-determinant's, against the step size, for methods of
order 1 to 5.  The reference is dopri5 at a tolerance of 1e-10.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure
from timing import machine

import cnf
from cnf.ode.control import Adaptive, FixedStep
from cnf.plot import save_figure

METHODS = ("euler", "midpoint", "rk4", "dopri5")
COUNTS = tuple(2**k for k in range(1, 10))


def errors(flow: cnf.Flow, x: torch.Tensor) -> dict[str, np.ndarray]:
    """For each method (counts, 2): mean |decode(encode(x)) − x| and mean |log p − reference|."""
    solver = flow.solver
    flow.solver = replace(solver, control=Adaptive(1e-10, 1e-10, quadrature_atol=1e-10))
    reference = flow.log_prob(x)
    table = {}
    for method in METHODS:
        rows = []
        for count in COUNTS:
            flow.solver = replace(solver, method=method, control=FixedStep(1 / count))
            log_prob = flow.log_prob(x)
            back = flow.decode(flow.encode(x))
            rows.append([(back - x).abs().mean(), (log_prob - reference).abs().mean()])
        table[method] = np.array(rows)
    flow.solver = solver
    return table


def draw(table: dict[str, np.ndarray]) -> Figure:
    """Both errors against the step size, one line for each method."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    names = ("mean |decode(encode(x)) − x|", "mean error of log p(x), nats")
    for i, (axes, name) in enumerate(zip(figure.subplots(1, 2), names, strict=True)):
        for method, rows in table.items():
            axes.loglog([1 / count for count in COUNTS], rows[:, i], marker="o", ms=3, label=method)
        axes.set_xlabel("step size")
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of a trained flow against the step size.")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", default="docs/step_size.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    law = cnf.data.toy("moons")
    flow = cnf.Flow(2, seed=0)
    flow.fit(law.sample((100_000,)), seconds=arguments.seconds, seed=0, progress=False)
    with torch.no_grad():
        table = errors(flow.double(), law.sample((1000,)).double())
    print(machine())
    print(f"{'steps':>6s}" + "".join(f"{name + ' round trip, log p':>32s}" for name in METHODS))
    for i, count in enumerate(COUNTS):
        cells = (f"{table[m][i, 0]:.1e}, {table[m][i, 1]:.1e}" for m in METHODS)
        print(f"{count:6d}" + "".join(f"{cell:>32s}" for cell in cells))
    save_figure(draw(table), arguments.out)


if __name__ == "__main__":
    main()
