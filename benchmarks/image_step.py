"""One training step of FFJORD's multiscale stack: ours beside FFJORD's way on torchdiffeq.

    python benchmarks/image_step.py [--rounds 5] [--size 28] [--batch 64] [--width 64]

The same stack with the same weights, batch, solver (dopri5) and tolerance (1e-5) for all.  FFJORD's
way: its convolutions, which see the time as one channel more, the continuous adjoint, and
Hutchinson's estimate by differentiating a vector-Jacobian product once more.
"""

from __future__ import annotations

import argparse
import math
from copy import deepcopy

import torch
from rivals import available, standard_normal
from timing import machine, medians
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_unshuffle, softplus

import cnf
from cnf.flow.continuous import Solver
from cnf.flow.multiscale import Multiscale
from cnf.nets.conv import TimeConv
from cnf.ode.control import Adaptive

TOLERANCE = 1e-5
FFJORD = "torchdiffeq adjoint, double backward"


def drawn_stack(size: int, width: int, blocks: int) -> Multiscale:
    """A stack whose last layers do not start at 0, but as any convolution does; the seed is 0."""
    torch.manual_seed(0)
    stack = Multiscale((1, size, size), blocks=blocks, widths=(width,) * 3)
    for field in stack.modules():
        if isinstance(field, TimeConv):
            bound = (9 * (field.conv.in_channels + 1)) ** -0.5
            for parameter in field.parameters():
                nn.init.uniform_(parameter, -bound, bound)
    return stack


class Way:
    """A way to take a training step; nfe: evaluations of the fields, forward and backward."""

    def __init__(self, modules: nn.Module) -> None:
        self.modules = modules
        self.nfe = [0, 0]
        self._is_backward = False

    def loss(self) -> Tensor:
        raise NotImplementedError

    def count(self, *_: object) -> None:
        """Called at every evaluation of a field."""
        self.nfe[self._is_backward] += 1

    def step(self) -> None:
        self.modules.zero_grad()
        self.nfe, self._is_backward = [0, 0], False
        loss = self.loss()
        self._is_backward = True
        loss.backward()


class Ours(Way):
    """The stack as the package trains it."""

    def __init__(self, stack: Multiscale, x: Tensor, gradient: str = "checkpoint") -> None:
        self.stack, self.x = deepcopy(stack), x  # whose evaluations nobody else counts
        super().__init__(self.stack)
        control = Adaptive(TOLERANCE, TOLERANCE, quadrature_atol=1e-4)  # the flows' default
        self.solver = Solver("dopri5", control, gradient)
        for fields in self.stack.fields:
            for field in fields:
                first = next(part for part in field.modules() if isinstance(part, TimeConv))
                first.register_forward_pre_hook(self.count)

    def loss(self) -> Tensor:
        moved = self.stack.to_base(self.x, cnf.Hutchinson(seed=None), self.solver)
        return -(standard_normal(moved.x) + moved.logdet).mean()


class ConcatConv(nn.Module):
    """FFJORD's convolution, of the image and of the time as one channel more, with our weights."""

    def __init__(self, layer: TimeConv) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.time, layer.conv.weight], 1).detach())
        self.bias = nn.Parameter(layer.conv.bias.detach().clone())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        time = torch.ones_like(x[:, :1]) * t
        return conv2d(torch.cat([time, x], 1), self.weight, self.bias, padding=1)


class ConcatNet(nn.Module):
    """The field in FFJORD's layers."""

    def __init__(self, field: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        timed = [layer for layer in field.modules() if isinstance(layer, TimeConv)]
        self.layers, self.size = nn.ModuleList(map(ConcatConv, timed)), size

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.size)
        for layer in self.layers[:-1]:
            x = softplus(layer(t, x))
        return self.layers[-1](t, x).flatten(1)


class Dynamics(nn.Module):
    """FFJORD's augmented dynamics of one field: the point, and the integral of the trace."""

    def __init__(self, field: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        self.field = ConcatNet(field, size)
        self.noise = torch.empty(0)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].requires_grad_(True)
            velocity = self.field(t, x)
            pulled = torch.autograd.grad(velocity, x, self.noise, create_graph=True)[0]
            return velocity, (pulled * self.noise).sum(1)


class Theirs(Way):
    """The same stack on torchdiffeq: adjoint or backprop, the trace by double backward."""

    def __init__(self, stack: Multiscale, x: Tensor, adjoint: bool = True) -> None:
        import torchdiffeq

        self.dynamics = nn.ModuleList(
            nn.ModuleList(Dynamics(field, size) for field in fields)
            for fields, size in zip(stack.fields, stack.sizes, strict=True)
        )
        super().__init__(self.dynamics)
        self.odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        self.sizes, self.x = stack.sizes, x
        for group in self.dynamics:
            for dynamics in group:
                dynamics.register_forward_pre_hook(self.count)

    def loss(self) -> Tensor:
        x, logdet, gone = self.x.clone(), torch.zeros(len(self.x)), []
        last = len(self.sizes) - 1
        for i, (group, size) in enumerate(zip(self.dynamics, self.sizes, strict=True)):
            for dynamics in group:
                x, integral = self._carried(dynamics, x)
                logdet = logdet + integral
            if i % 2 == 0 and i < last:
                x = pixel_unshuffle(x.unflatten(1, size), 2).flatten(1)
            elif i % 2:
                x, left = x.chunk(2, 1)
                gone.insert(0, left)
        return -(standard_normal(torch.cat([x, *gone], 1)) + logdet).mean()

    def _carried(self, dynamics: Dynamics, x: Tensor) -> tuple[Tensor, Tensor]:
        dynamics.noise = torch.randint(0, 2, x.shape) * 2.0 - 1.0
        times = torch.tensor([1.0, 0.0])
        start = (x, torch.zeros(len(x)))
        found, integral = self.odeint(
            dynamics, start, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE
        )
        return found[-1], integral[-1]


def check(ours: Way, theirs: Way) -> None:
    """Both losses agree as far as two draws of the trace's noise let them."""
    with torch.no_grad():
        one, other = (torch.stack([way.loss() for _ in range(3)]) for way in (ours, theirs))
    spread = float(torch.cat([one, other]).std())
    apart = abs(float(one.mean() - other.mean()))
    assert apart <= 5 * spread + 1e-3 * abs(float(one.mean())), (one, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=28, help="pixels a side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64, help="channels of the hidden layers")
    parser.add_argument("--blocks", type=int, default=2, help="ODEs before and after a squeeze")
    arguments = parser.parse_args()

    stack = drawn_stack(arguments.size, arguments.width, arguments.blocks)
    x = torch.randn(arguments.batch, arguments.size**2)
    ways: dict[str, Way] = {
        "cnf checkpoint, Hutchinson": Ours(stack, x),
        "cnf backprop, Hutchinson": Ours(stack, x, "backprop"),
        "cnf adjoint, Hutchinson": Ours(stack, x, "adjoint"),
    }
    if available("torchdiffeq"):
        ways[FFJORD] = Theirs(stack, x)
        ways["torchdiffeq backprop, double backward"] = Theirs(stack, x, adjoint=False)
        check(Ours(stack, x), ways[FFJORD])
    seconds = medians({name: way.step for name, way in ways.items()}, arguments.rounds, 1)
    reference = seconds.get(FFJORD, math.nan)
    odes = sum(len(fields) for fields in stack.fields)
    count = sum(math.prod(parameter.shape) for parameter in stack.parameters())
    print(machine())
    print(
        f"{arguments.size} x {arguments.size} pixels, batch {arguments.batch}, {odes} ODEs, "
        f"{count:,} parameters, dopri5, tolerance {TOLERANCE:g}"
    )
    print(f"{'':44s} {'ms':>9s} {'faster':>8s} {'NFE':>5s} {'backward':>9s}")
    for name, value in seconds.items():
        nfe, backward = ways[name].nfe
        print(f"{name:44s} {value * 1e3:9.1f} {reference / value:8.2f} {nfe:5d} {backward:9d}")


if __name__ == "__main__":
    main()
