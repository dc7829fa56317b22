"""What `compile=True` costs and brings: the first solve, and the median of later ones.

    python benchmarks/compiled.py [--rounds 15] [--device cuda]

An MLP 2-64-64-2 as the field, batches of 64 and 1,000: dopri5 at a tolerance of 1e-6 without
gradients, and 20 steps of dopri5 with backward.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import pairwise

import torch
from timing import machine, medians

import cnf


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (2, 64, 64, 2)
        layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
        self.net = torch.nn.Sequential(
            layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2]
        )

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(y)


def evaluate(field: Net, y0: torch.Tensor, compile: bool) -> None:
    with torch.no_grad():
        cnf.solve(field, y0, [0.0, 10.0], rtol=1e-6, atol=1e-6, compile=compile)
    finish(y0)


def train(field: Net, y0: torch.Tensor, compile: bool) -> None:
    field.zero_grad()
    end = cnf.solve(field, y0, [0.0, 1.0], method="dopri5", step_size=0.05, compile=compile).y[-1]
    end.square().sum().backward()
    finish(y0)


def finish(y0: torch.Tensor) -> None:
    """Wait for the device, which works behind the host."""
    if y0.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(machine())
    print(f"{'batch':>6s} {'':10s} {'first, s':>9s} {'plain, ms':>10s} {'compiled, ms':>13s}")
    for rows in (64, 1000):
        for what in (evaluate, train):
            field, y0 = Net().to(arguments.device), torch.randn(rows, 2, device=arguments.device)
            start = time.perf_counter()
            what(field, y0, True)
            first = time.perf_counter() - start
            runs = {
                "plain": partial(what, field, y0, False),
                "compiled": partial(what, field, y0, True),
            }
            plain, compiled = (s * 1e3 for s in medians(runs, arguments.rounds).values())
            print(f"{rows:6d} {what.__name__:10s} {first:9.1f} {plain:10.1f} {compiled:13.1f}")


if __name__ == "__main__":
    main()
