"""One training step, log_prob forward and backward: ours beside torchdiffeq, zuko and diffrax.

    python benchmarks/step.py [--rounds 7] [--quick | --overhead]

The same net, fitted for a while, and the same batch, solver and tolerance for all: see rivals.py.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product

import torch
from rivals import TOLERANCE, Rival, Run, available, diffrax, ours, points, torchdiffeq, zuko
from timing import machine, medians
from torch import Tensor, nn

import cnf


def rivals(dim: int, width: int, x: Tensor, exact: bool) -> dict[str, Rival]:
    word = "exact" if exact else "Hutchinson"
    found: dict[str, Rival] = {}
    if available("torchdiffeq"):
        for adjoint, name in ((True, "adjoint"), (False, "backprop")):
            rival = torchdiffeq(dim, width, x, exact, adjoint, fitted=True)
            found[f"torchdiffeq {name}, {word}"] = rival
    if available("zuko"):
        found[f"zuko CNF, {word}"] = zuko(dim, width, x, exact, fitted=True)
    if available("diffrax"):
        found[f"diffrax jit, {word}"] = diffrax(dim, width, x, exact, fitted=True)
    return found


def compare(dim: int, batch: int, width: int, rounds: int) -> None:
    torch.manual_seed(0)
    x = points(dim, batch)
    reference = "cnf checkpoint, exact (closed form)"
    fast = {
        reference: ours(dim, width, x, fitted=True),
        "cnf checkpoint, Hutchinson": ours(dim, width, x, cnf.Hutchinson(), fitted=True),
        **rivals(dim, width, x, exact=False),
    }
    slow = rivals(dim, width, x, exact=True)
    if dim <= 2:
        fast, slow = fast | slow, {}
    seconds = medians(steps(fast), rounds)
    if slow:  # seconds to minutes a step: fewer rounds, beside ours again
        again = medians(steps({**slow, reference: fast[reference]}), 3, 0)
        seconds |= {name: again[name] * seconds[reference] / again[reference] for name in slow}
    print(f"\nD = {dim}, batch {batch}, width {width}, dopri5, tolerance {TOLERANCE:g}")
    print(f"{'':44s} {'ms':>9s} {'ratio':>8s} {'NFE':>5s}")
    for name, value in seconds.items():
        nfe = (fast | slow)[name].nfe() or ""
        print(f"{name:44s} {value * 1e3:9.1f} {value / seconds[reference]:8.2f} {nfe!s:>5s}")


def steps(found: dict[str, Rival]) -> dict[str, Run]:
    return {name: rival.step for name, rival in found.items()}


class Counted:
    """A field that counts its evaluations."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.calls = net, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.net(y)


def solvers(field: Counted, y0: Tensor) -> dict[str, Run]:
    """The same solve by each library."""
    found: dict[str, Run] = {"cnf": lambda: cnf.solve(field, y0, [0.0, 10.0], rtol=1e-6, atol=1e-6)}
    if available("torchdiffeq"):
        import torchdiffeq

        times = torch.tensor([0.0, 10.0])
        found["torchdiffeq"] = lambda: torchdiffeq.odeint(field, y0, times, rtol=1e-6, atol=1e-6)
    return found


@torch.no_grad()
def overhead(rounds: int) -> None:
    """Wall time of a solve over NFE times the bare field's time, without gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )  # fmt: skip
    print("\noverhead: solve over NFE bare evaluations, MLP 2-64-64-2, dopri5, rtol 1e-6, no grad")
    own = torch.get_num_threads()
    for batch, threads in product((64, 1000), sorted({1, own})):
        torch.set_num_threads(threads)
        y0 = torch.randn(batch, 2) * 2
        field = Counted(net)
        runs = solvers(field, y0)
        evaluations: dict[str, int] = {}
        for name, run in runs.items():
            field.calls = 0
            run()
            evaluations[name] = field.calls
        most = max(evaluations.values())
        bare = partial(repeat, field, y0, most)
        seconds = medians({"bare": bare, **runs}, 15 * rounds)
        each = seconds.pop("bare") / most
        for name, value in seconds.items():
            ratio = value / each / evaluations[name]
            print(
                f"batch {batch:5d}, {threads} threads  {name:12s} {ratio:5.2f} "
                f"({evaluations[name]} evaluations of {each * 1e6:.0f} µs)"
            )
    torch.set_num_threads(own)


def repeat(field: Counted, y: Tensor, count: int) -> None:
    """Evaluate the field `count` times and nothing else."""
    t = torch.tensor(0.0)
    for _ in range(count):
        field(t, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="D = 2 alone")
    parser.add_argument("--overhead", action="store_true", help="the solver's overhead alone")
    arguments = parser.parse_args()
    print(machine())
    if arguments.overhead:
        overhead(arguments.rounds)
        return
    compare(2, 1000, 64, arguments.rounds)
    if not arguments.quick:
        compare(64, 256, 256, arguments.rounds)
    overhead(arguments.rounds)


if __name__ == "__main__":
    main()
