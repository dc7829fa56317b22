"""A step size per sample against one that all samples share, where their stiffness differs 50-fold.

    python benchmarks/per_sample.py [--rounds 5]

A batch of 1,000 damped oscillators with frequencies from 1 to 50, spread evenly on a log scale,
solved to t = 10 by dopri5 at a tolerance of 1e-6, with and without gradients.  Sample-evaluations:
evaluations of the field times the rows in each.
"""

from __future__ import annotations

import argparse

import torch
from timing import machine, medians

import cnf

ROWS, END = 1000, 10.0


class Oscillators:
    """Rows (x, v, ω): ẍ = −ω² x − 0.2 ẋ; counts the rows that it is asked for."""

    row_wise = True

    def __init__(self) -> None:
        self.rows = 0
        self.damping = torch.tensor(0.2, requires_grad=True)

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.rows += len(y)
        x, v, frequency = y.unbind(-1)
        return torch.stack([v, -(frequency**2) * x - self.damping * v, 0 * x], -1)


def start() -> torch.Tensor:
    frequency = torch.logspace(0, 1.69897, ROWS)
    return torch.stack([torch.ones(ROWS), torch.zeros(ROWS), frequency], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    field, y0 = Oscillators(), start()
    controls = {
        "shared": cnf.Adaptive(1e-6, 1e-6),
        "per sample": cnf.Adaptive(1e-6, 1e-6, per_sample=True),
    }

    def solve(control: cnf.Adaptive) -> cnf.Solution:
        return cnf.solve(field, y0, [0.0, END], control=control)

    def train(control: cnf.Adaptive) -> None:
        field.damping.grad = None
        solve(control).y[-1].square().mean().backward()

    evaluations = {}
    for name, control in controls.items():
        field.rows = 0
        with torch.no_grad():
            solve(control)
        evaluations[name] = field.rows
    forward = medians(
        {name: lambda control=c: torch.no_grad()(solve)(control) for name, c in controls.items()},
        arguments.rounds,
    )
    both = medians(
        {name: lambda control=c: train(control) for name, c in controls.items()}, arguments.rounds
    )
    print(f"{'steps':12s} {'sample-evaluations':>20s} {'solve, ms':>12s} {'and backward, ms':>18s}")
    for name in controls:
        print(
            f"{name:12s} {evaluations[name]:20,d} {forward[name] * 1e3:12.1f} "
            f"{both[name] * 1e3:18.1f}"
        )
    ratios = (table["shared"] / table["per sample"] for table in (evaluations, forward, both))
    print(f"{'shared / own':12s} {next(ratios):20.2f} {next(ratios):12.2f} {next(ratios):18.2f}")


if __name__ == "__main__":
    main()
