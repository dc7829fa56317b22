"""The same flow in every library: log_prob of one batch, and a training step on it.

The same net (two hidden layers of tanh), batch, solver (dopri5) and tolerance (1e-5) for all.  Its
weights are random, so that the flow is far from the identity, or, with fitted=True, those of a flow
on its way: 1,000 steps of flow matching to eight Gaussians, in every pair of dimensions anew.  The
rivals' own classes are used where they have one (zuko, whose own net of the same size gets the same
weights or training); otherwise the augmented dynamics that their users write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cnf
from cnf.flow.continuous import Solver
from cnf.nets.mlp import BilinearMLP
from cnf.ode.control import Adaptive
from cnf.ode.tableau import TABLEAUS

TOLERANCE = 1e-5
SCALE = 2.0  # of a random output layer: some 40 evaluations for a solve
STEPS, ROWS = 1000, 512  # of flow matching
Run = Callable[[], object]


class Rival(NamedTuple):
    """What a library does with the batch that it was built for.

    log_prob: without gradients; step: log_prob forward and backward; nfe: evaluations of the last
    solve forward; planned: bytes that "log_prob" or "step" needs, where the library's compiler
    knows; share: the part of the batch that is run, where the whole would take too long.
    """

    log_prob: Run
    step: Run
    nfe: Callable[[], int | None] = lambda: None
    planned: Callable[[str], int | None] = lambda run: None
    share: float = 1.0


class Net(nn.Module):
    """The rivals' field: time concatenated to x, two hidden layers of tanh."""

    def __init__(self, dim: int, width: int, fitted: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, dim),
        )  # fmt: skip
        with torch.no_grad():
            for layer in self.layers[::2]:
                layer.weight.normal_(std=layer.in_features**-0.5)
            self.layers[-1].weight.mul_(0.0 if fitted else SCALE)
        if fitted:
            match(lambda t, x: self.layers(torch.cat([x, t[:, None]], -1)), self, dim)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.expand(len(x), 1)], -1))


def points(dim: int, rows: int) -> Tensor:
    """Eight Gaussians of unit variance in every pair of dimensions, (rows, dim)."""
    pairs = [cnf.data.toy("8gaussians").sample((rows,)) / 2.03 for _ in range((dim + 1) // 2)]
    return torch.cat(pairs, -1)[:, :dim]


def match(velocity: Callable[[Tensor, Tensor], Tensor], net: nn.Module, dim: int) -> None:
    """Train velocity(t, x), t (rows,) from base to data, by flow matching; the seed is 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = points(dim, 50_000)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
            end = data[torch.randint(len(data), (ROWS,))]
            start, t = torch.randn_like(end), torch.rand(ROWS)
            at = torch.lerp(start, end, t[:, None])
            optimizer.zero_grad()
            (velocity(t, at) - (end - start)).square().mean().backward()
            optimizer.step()
        net.zero_grad()


def available(package: str) -> bool:
    return find_spec(package) is not None


def standard_normal(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def ours(
    dim: int, width: int, x: Tensor, divergence: object = "auto", fitted: bool = False
) -> Rival:
    torch.manual_seed(0)
    net = Net(dim, width, fitted)
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

    return Rival(torch.no_grad()(lambda: loss(x)), step, lambda: loss.nfe)


def torchdiffeq(
    dim: int, width: int, x: Tensor, exact: bool, adjoint: bool = False, fitted: bool = False
) -> Rival:
    import torchdiffeq

    odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint

    class Dynamics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(dim, width, fitted)
            self.nfe = 0

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            self.nfe += 1
            keep = torch.is_grad_enabled()  # no second graph where nobody needs it
            with torch.enable_grad():
                z = state[0].requires_grad_(True)
                dz = self.net(t, z)
                if exact:
                    trace = torch.stack([
                        torch.autograd.grad(
                            dz[:, i].sum(), z, create_graph=keep, retain_graph=True
                        )[0][:, i]
                        for i in range(dim)
                    ]).sum(0)  # fmt: skip
                else:
                    pulled = torch.autograd.grad(dz, z, self.noise, create_graph=keep)[0]
                    trace = (pulled * self.noise).sum(-1)
            return (dz, trace) if keep else (dz.detach(), trace)

    torch.manual_seed(0)
    dynamics = Dynamics()
    times = torch.tensor([1.0, 0.0])
    forward = 0  # evaluations: adjoint's backward counts too

    def log_prob() -> Tensor:
        nonlocal forward
        dynamics.nfe = 0
        dynamics.noise = torch.randint(0, 2, x.shape) * 2.0 - 1.0
        start = (x.clone(), torch.zeros(len(x)))
        z, integral = odeint(
            dynamics, start, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE
        )
        forward = dynamics.nfe
        return standard_normal(z[-1]) + integral[-1]

    def step() -> None:
        dynamics.zero_grad()
        (-log_prob().mean()).backward()

    return Rival(torch.no_grad()(log_prob), step, lambda: forward)


def zuko(dim: int, width: int, x: Tensor, exact: bool, fitted: bool = False) -> Rival:
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
        layers[-1].weight.mul_(0.0 if fitted else SCALE)
    if fitted:  # its time runs from data to base
        match(lambda t, x: -flow.transform.f(1 - t, x), flow, dim)

    def step() -> None:
        flow.zero_grad()
        (-flow().log_prob(x).mean()).backward()

    return Rival(torch.no_grad()(lambda: flow().log_prob(x)), step)


def diffrax(dim: int, width: int, x: Tensor, exact: bool, fitted: bool = False) -> Rival:
    import diffrax
    import jax
    import jax.numpy as jnp

    torch.manual_seed(0)
    layers = Net(dim, width, fitted).layers[::2]
    weights = [
        (jnp.asarray(layer.weight.detach().T.numpy()), jnp.asarray(layer.bias.detach().numpy()))
        for layer in layers
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

    data = jnp.asarray(x.numpy())
    noise = jax.random.rademacher(jax.random.PRNGKey(0), data.shape).astype(jnp.float32)

    @cache
    def program(run: str):
        wanted = jax.value_and_grad(loss) if run == "step" else loss
        return jax.jit(wanted).lower(weights, data, noise).compile()

    def planned(run: str) -> int:
        plan = program(run).memory_analysis()
        return plan.temp_size_in_bytes + plan.output_size_in_bytes

    def call(run: str) -> object:
        return jax.block_until_ready(program(run)(weights, data, noise))

    return Rival(lambda: call("log_prob"), lambda: call("step"), planned=planned)


def slogdet(dim: int, width: int, x: Tensor, most: int = 2048) -> Rival:
    """The change of variables as it is written: log |det| of the whole map's Jacobian.

    The map is dopri5 with as many equal steps as ours takes; its Jacobian is pushed forward with
    `dim` tangents for each sample, then decomposed in O(dim³).  The first rows alone are run, so
    that rows · dim ≤ most: time and memory of this method are proportional to rows.
    """
    rows = x[: min(len(x), max(2, most // dim))]
    pilot = ours(dim, width, x[:16])
    pilot.log_prob()
    torch.manual_seed(0)
    net = Net(dim, width)
    dopri5 = TABLEAUS["dopri5"]
    count = round((pilot.nfe() or 0) / 6)  # the seventh stage is the next step's first

    def arrive(z: Tensor) -> tuple[Tensor, Tensor]:
        h = -1.0 / count
        for n in range(count):
            slopes: list[Tensor] = []
            for c, row in zip(dopri5.c[:6], dopri5.a, strict=False):
                y = z + h * sum(a * k for a, k in zip(row, slopes, strict=True))
                slopes.append(net(torch.tensor(1.0 + (n + c) * h), y[None])[0])
            z = z + h * sum(b * k for b, k in zip(dopri5.b, slopes, strict=False))
        return z, z

    def log_prob() -> Tensor:
        jacobian, z = torch.func.vmap(torch.func.jacfwd(arrive, has_aux=True))(rows)
        return standard_normal(z) + torch.linalg.slogdet(jacobian)[1]

    def step() -> None:
        net.zero_grad()
        (-log_prob().mean()).backward()

    return Rival(torch.no_grad()(log_prob), step, share=len(rows) / len(x))
