"""A step size per sample against one that all samples share, where their stiffness differs 50-fold.

    python benchmarks/per_sample.py [--rounds 9]

Two fields over 1,000 rows whose rates are spread evenly on a log scale from 1 to 50, solved by
dopri5 at a tolerance of 1e-5, with and without gradients: a net 2-128-128-2 times the row's rate,
where an evaluation costs what its rows cost; and damped oscillators of that frequency, a few
elementwise products, which cost the same for one row and for all.  Sample-evaluations: evaluations
of the field times the rows in each.  The error is that of the worst row, against dopri8 at 1e-10.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from timing import machine, medians
from torch import Tensor, nn

import cnf

ROWS, END = 1000, 4.0


class Counted(nn.Module):
    """A field of rows (x, v, rate) that counts the rows that it is asked for."""

    row_wise = True
    rows = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.rows += len(y)
        return torch.cat([self.slope(y[:, :2], y[:, 2:]), torch.zeros_like(y[:, 2:])], 1)

    def slope(self, x: Tensor, rate: Tensor) -> Tensor:
        raise NotImplementedError


class Net(Counted):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2)
        )
        with torch.no_grad():
            for weight in self.net.parameters():
                weight *= 2

    def slope(self, x: Tensor, rate: Tensor) -> Tensor:
        return self.net(x) * rate


class Oscillators(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.damping = nn.Parameter(torch.tensor(0.2))

    def slope(self, x: Tensor, rate: Tensor) -> Tensor:
        place, speed = x.unbind(-1)
        return torch.stack([speed, -(rate[:, 0] ** 2) * place - self.damping * speed], -1)


def start() -> Tensor:
    torch.manual_seed(1)
    rates = torch.logspace(0, 1.69897, ROWS)
    return torch.cat([torch.randn(ROWS, 2), rates[:, None]], -1)


def solve(field: Counted, y0: Tensor, control: cnf.Adaptive) -> cnf.Solution:
    return cnf.solve(field, y0, [0.0, END], control=control)


def train(field: Counted, y0: Tensor, control: cnf.Adaptive) -> None:
    field.zero_grad()
    solve(field, y0, control).y[-1].square().mean().backward()


def compare(name: str, field: Counted, rounds: int) -> None:
    y0 = start()
    controls = {own: cnf.Adaptive(1e-5, 1e-5, per_sample=own) for own in (False, True)}
    names = {False: "shared", True: "per sample"}
    with torch.no_grad():
        reference = cnf.solve(
            copy.deepcopy(field).double(), y0.double(), [0.0, END], method="dopri8",
            control=cnf.Adaptive(1e-10, 1e-10, per_sample=True),
        ).y[-1]  # fmt: skip
    evaluations, errors = {}, {}
    for own, control in controls.items():
        field.rows = 0
        with torch.no_grad():
            end = solve(field, y0, control).y[-1]
        evaluations[own] = field.rows
        errors[own] = float((end - reference).norm(dim=1).max())
    times = []
    for work in (torch.no_grad()(solve), train):
        runs = {names[own]: partial(work, field, y0, control) for own, control in controls.items()}
        found = medians(runs, rounds)
        times.append({own: found[names[own]] for own in controls})
    for own, title in names.items():
        print(
            f"{name:12s} {title:12s} {evaluations[own]:19,d} {errors[own]:12.1e} "
            f"{times[0][own] * 1e3:10.1f} {times[1][own] * 1e3:17.1f}"
        )
    ratios = [table[False] / table[True] for table in (evaluations, *times)]
    print(
        f"{name:12s} {'shared / own':12s} {ratios[0]:19.2f} {'':12s} {ratios[1]:10.2f} "
        f"{ratios[2]:17.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(machine())
    print(
        f"{'field':12s} {'steps':12s} {'sample-evaluations':>19s} {'worst error':>12s} "
        f"{'solve, ms':>10s} {'and backward, ms':>17s}"
    )
    compare("net", Net(), arguments.rounds)
    compare("oscillators", Oscillators(), arguments.rounds)


if __name__ == "__main__":
    main()
