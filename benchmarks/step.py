"""One training step, log_prob forward and backward: ours beside torchdiffeq, zuko and diffrax.

    python benchmarks/step.py [--rounds 7] [--quick]

The same net (two hidden layers of tanh), batch, solver (dopri5) and tolerance (1e-5) for all, whose
weights are drawn so that the flow is far from the identity.  The rivals' own classes are used where
they have one (zuko); otherwise the augmented dynamics that their users write.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from timing import machine, medians
from torch import Tensor, nn

import cnf
from cnf.flow.continuous import Solver
from cnf.nets.mlp import BilinearMLP
from cnf.ode.control import Adaptive

TOLERANCE = 1e-5
SCALE = 2.0  # of the output layer: some 40 evaluations for a solve
Run = Callable[[], object]


class Net(nn.Module):
    """The rivals' field: time concatenated to x, two hidden layers of tanh."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, dim),
        )  # fmt: skip
        with torch.no_grad():
            for layer in self.layers[::2]:
                layer.weight.normal_(std=layer.in_features**-0.5)
            self.layers[-1].weight.mul_(SCALE)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.expand(len(x), 1)], -1))


def standard_normal(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def ours(dim: int, width: int, x: Tensor, divergence: object) -> Run:
    torch.manual_seed(0)
    net = Net(dim, width)
    field = BilinearMLP(dim, (width, width), bandwidth=None, activation="tanh", frequencies=0)
    with torch.no_grad():  # the same function of t and x: time enters the first layer's shift alone
        first, second, last = net.layers[::2]
        field.weights[0].copy_(first.weight[:, :dim])
        field.weights[1].copy_(second.weight)
        field.out.copy_(last.weight)
        shifts = field.time.bias.split(field.time.sizes)
        shifts[0].copy_(first.bias + 0.5 * first.weight[:, dim])
        shifts[1].copy_(second.bias)
        shifts[-1].copy_(last.bias)
        field.time.weight[:width, 0] = first.weight[:, dim]
        z, t = torch.randn(5, dim), torch.tensor(0.3)
        torch.testing.assert_close(field(t, z), net(t, z), rtol=1e-4, atol=1e-5)
    flow = cnf.Flow(dim, field=field, divergence=divergence)
    # the rivals' log-determinant shares the state's norm; ours has its own tolerance, the default
    flow.solver = Solver("dopri5", Adaptive(TOLERANCE, TOLERANCE, quadrature_atol=1e-4))
    loss = cnf.MaximumLikelihood(flow)

    def step() -> None:
        flow.zero_grad()
        loss(x).backward()

    step.nfe = lambda: loss.nfe  # type: ignore[attr-defined]
    return step


def torchdiffeq_step(dim: int, width: int, x: Tensor, exact: bool, adjoint: bool) -> Run:
    import torchdiffeq

    odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint

    class Dynamics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(dim, width)
            self.nfe = 0

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            self.nfe += 1
            with torch.enable_grad():
                z = state[0].requires_grad_(True)
                dz = self.net(t, z)
                if exact:
                    trace = torch.stack([
                        torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i]
                        for i in range(dim)
                    ]).sum(0)  # fmt: skip
                else:
                    pulled = torch.autograd.grad(dz, z, self.noise, create_graph=True)[0]
                    trace = (pulled * self.noise).sum(-1)
            return dz, trace

    torch.manual_seed(0)
    dynamics = Dynamics()
    times = torch.tensor([1.0, 0.0])

    def step() -> None:
        dynamics.zero_grad()
        dynamics.nfe = 0
        dynamics.noise = torch.randint(0, 2, x.shape) * 2.0 - 1.0
        start = (x.clone(), torch.zeros(len(x)))
        z, integral = odeint(
            dynamics, start, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE
        )
        step.forward = dynamics.nfe  # type: ignore[attr-defined]
        (-(standard_normal(z[-1]) + integral[-1]).mean()).backward()

    step.nfe = lambda: step.forward  # type: ignore[attr-defined]
    return step


def zuko_step(dim: int, width: int, x: Tensor, exact: bool) -> Run:
    import zuko

    torch.manual_seed(0)
    flow = zuko.flows.CNF(
        dim, hidden_features=(width, width), activation=nn.Tanh, atol=TOLERANCE, rtol=TOLERANCE,
        exact=exact,
    )  # fmt: skip
    with torch.no_grad():
        layers = list(flow.transform.ode)[::2]
        for layer in layers:
            layer.weight.normal_(std=layer.weight.shape[1] ** -0.5)
        layers[-1].weight.mul_(SCALE)

    def step() -> None:
        flow.zero_grad()
        (-flow().log_prob(x).mean()).backward()

    return step


def diffrax_step(dim: int, width: int, x: Tensor, exact: bool) -> Run:
    import diffrax
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    sizes = [(dim + 1, width), (width, width), (width, dim)]
    scales = [(dim + 1) ** -0.5, width**-0.5, SCALE * width**-0.5]
    weights = [
        (jax.random.normal(key, size) * scale, jnp.zeros(size[1]))
        for key, size, scale in zip(keys, sizes, scales, strict=False)
    ]

    def net(weights, t, z):
        h = jnp.concatenate([z, jnp.ones((len(z), 1)) * t], -1)
        for matrix, bias in weights[:-1]:
            h = jnp.tanh(h @ matrix + bias)
        return h @ weights[-1][0] + weights[-1][1]

    def dynamics(t, state, args):
        weights, noise = args
        dz, pull = jax.vjp(lambda z: net(weights, t, z), state[0])
        if exact:
            basis = jnp.eye(dim)
            rows = jax.vmap(lambda e: pull(jnp.broadcast_to(e, dz.shape))[0])(basis)
            return dz, jnp.einsum("ibi->b", rows)
        return dz, (pull(noise)[0] * noise).sum(-1)

    def loss(weights, x, noise):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(dynamics), diffrax.Dopri5(), 1.0, 0.0, None, (x, jnp.zeros(len(x))),
            args=(weights, noise),
            stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        )  # fmt: skip
        z, integral = solution.ys[0][-1], solution.ys[1][-1]
        log_prob = -0.5 * (z**2).sum(-1) - 0.5 * dim * math.log(2 * math.pi) + integral
        return -log_prob.mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    data = jnp.asarray(x.numpy())
    noise = jax.random.rademacher(keys[3], data.shape).astype(jnp.float32)
    return lambda: jax.block_until_ready(gradient(weights, data, noise))


def available(package: str) -> bool:
    return find_spec(package) is not None


def rivals(dim: int, width: int, x: Tensor, exact: bool) -> dict[str, Run]:
    word = "exact" if exact else "Hutchinson"
    found: dict[str, Run] = {}
    if available("torchdiffeq"):
        for adjoint, name in ((True, "adjoint"), (False, "backprop")):
            # one exact step by adjoint at D = 64 takes minutes: it is left to backprop's 6 seconds
            if not (adjoint and exact and dim > 2):
                run = torchdiffeq_step(dim, width, x, exact, adjoint)
                found[f"torchdiffeq {name}, {word}"] = run
    if available("zuko"):
        found[f"zuko CNF, {word}"] = zuko_step(dim, width, x, exact)
    if available("diffrax"):
        found[f"diffrax jit, {word}"] = diffrax_step(dim, width, x, exact)
    return found


def compare(dim: int, batch: int, width: int, rounds: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, dim)
    reference = "cnf checkpoint, exact (closed form)"
    runs = {
        reference: ours(dim, width, x, "auto"),
        "cnf checkpoint, Hutchinson": ours(dim, width, x, cnf.Hutchinson()),
    }
    fast = runs | rivals(dim, width, x, exact=False)
    slow = rivals(dim, width, x, exact=True)
    if dim <= 2:
        fast, slow = fast | slow, {}
    seconds = medians(fast, rounds)
    if slow:  # seconds a step: fewer rounds, beside ours again
        seconds |= {k: v for k, v in medians({**slow, reference: runs[reference]}, 3, 1).items()
                    if k != reference}  # fmt: skip
    print(f"\nD = {dim}, batch {batch}, width {width}, dopri5, tolerance {TOLERANCE:g}")
    print(f"{'':44s} {'ms':>9s} {'ratio':>8s} {'NFE':>5s}")
    for name, value in seconds.items():
        run = (fast | slow)[name]
        nfe = run.nfe() if hasattr(run, "nfe") else ""
        print(f"{name:44s} {value * 1e3:9.1f} {value / seconds[reference]:8.2f} {nfe!s:>5s}")


class Counted:
    """A field that counts its evaluations."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.calls = net, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.net(y)


def solvers(field: Counted, y0: Tensor) -> dict[str, Run]:
    """The same solve by each library."""
    found: dict[str, Run] = {"cnf": lambda: cnf.solve(field, y0, [0.0, 3.0], rtol=1e-6, atol=1e-6)}
    if available("torchdiffeq"):
        import torchdiffeq

        times = torch.tensor([0.0, 3.0])
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
    for batch in (64, 1000):
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
                f"batch {batch:5d}  {name:12s} {ratio:5.2f} "
                f"({evaluations[name]} evaluations of {each * 1e6:.0f} µs)"
            )


def repeat(field: Counted, y: Tensor, count: int) -> None:
    """Evaluate the field `count` times and nothing else."""
    t = torch.tensor(0.0)
    for _ in range(count):
        field(t, y)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="D = 2 alone")
    arguments = parser.parse_args()
    print(machine())
    compare(2, 1000, 64, arguments.rounds)
    if not arguments.quick:
        compare(64, 256, 256, arguments.rounds)
    overhead(arguments.rounds)
