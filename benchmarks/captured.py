"""On a GPU: a training step of a neural ODE as it is, compiled, and captured as a CUDA graph.

    python benchmarks/captured.py [--rounds 30] [--batch 1000]

An MLP 2-64-64-2 as the field, forward and backward of a loss of the end state, float32; beside
torchdiffeq's, where it is installed.  dopri5 at a tolerance of 1e-5, and in fixed steps, as
that many of dopri5: torchdiffeq has no fixed steps of dopri5, its rk4 gets as many evaluations.
A graph is captured once, of the whole step with backward, and replayed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
from rivals import available
from timing import machine, medians
from torch import Tensor, nn

import cnf

END, TOLERANCE = 3.0, 1e-5
Step = Callable[[], Tensor]


class Net(nn.Module):
    """f(t, y) of two dimensions, bent enough for some fifteen steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (2, 64, 64, 2)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.mul_(3.0)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


def step_of(net: Net, end: Callable[[], Tensor]) -> Step:
    """Loss and gradients, in the parameters' own memory."""

    def step() -> Tensor:
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss = end().square().mean()
        loss.backward()
        return loss.detach()

    return step


def captured(step: Step) -> Step:
    """The same step as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1000)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA graph needs a GPU, and there is none here")
    torch.manual_seed(1)
    y0 = torch.randn(arguments.batch, 2, device="cuda")
    net = Net().to("cuda")
    with torch.no_grad():
        stats = cnf.solve(net, y0, [0.0, END], rtol=TOLERANCE, atol=TOLERANCE).stats
    steps = stats.accepted

    def ours(**how: object) -> Step:
        return step_of(net, lambda: cnf.solve(net, y0, [0.0, END], **how).y[-1])  # type: ignore

    adaptive: dict[str, object] = {"rtol": TOLERANCE, "atol": TOLERANCE}
    fixed: dict[str, object] = {"step_size": END / steps}
    found: dict[str, Step] = {
        "cnf, adaptive": ours(**adaptive),
        "cnf, fixed": ours(**fixed),
        "cnf, fixed, compiled": ours(**fixed, compile=True),
        "cnf, fixed, captured": captured(ours(**fixed)),
        "cnf, fixed, compiled and captured": captured(ours(**fixed, compile=True)),
        "cnf, fixed, backprop, captured": captured(ours(**fixed, gradient="backprop")),
    }
    if available("torchdiffeq"):
        import torchdiffeq

        t = torch.tensor([0.0, END], device="cuda")
        dopri5 = {"method": "dopri5", "rtol": TOLERANCE, "atol": TOLERANCE}
        # an evaluation for each that dopri5 makes anew, at four a step of rk4
        rk4 = {"method": "rk4", "options": {"step_size": END / (steps * 6 / 4)}}
        for name, how in (("adaptive", dopri5), ("rk4", rk4)):
            for gradient, solver in (
                ("adjoint", torchdiffeq.odeint_adjoint),
                ("backprop", torchdiffeq.odeint),
            ):
                found[f"torchdiffeq, {name}, {gradient}"] = step_of(
                    net, lambda solver=solver, how=how: solver(net, y0, t, **how)[-1]
                )
    print(f"{machine()}, {torch.cuda.get_device_name()}")
    print(f"batch {arguments.batch}, {steps} steps of dopri5, {stats.nfe} evaluations")
    runs = {name: (lambda step=step: step().item()) for name, step in found.items()}
    losses = {name: run() for name, run in runs.items()}
    for name, value in medians(runs, arguments.rounds).items():
        print(f"{name:36s} {value * 1e3:8.2f} ms   loss {losses[name]:.6f}")


if __name__ == "__main__":
    main()
