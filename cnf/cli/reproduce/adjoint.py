"""The adjoint a(t) of an ODE beside the chain rule through residual layers: Chen et al. 2018,
equations 4 to 6.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.cli.training import tell
from cnf.ode.sensitivity import adjoint_state
from cnf.odenet.block import ODEBlock
from cnf.plot import adjoint_figure, save_figure
from cnf.training.seed import seeded

END = 4.0
LAYERS = (4, 8, 16, 32, 64, 128, 256)  # the first of step one
SHOWN = (4, 16)
F64 = torch.float64


class Layer(nn.Module):
    """tanh(W z + t b), the same weights at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2, dtype=F64))
        self.b = nn.Parameter(torch.randn(2, dtype=F64) / END)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w + t * self.b)


class Chain(NamedTuple):
    """∂L/∂z_k of every layer, (layers + 1, 2), and of the weights, by the chain rule."""

    by_state: Tensor
    by_weight: Tensor


def loss(z: Tensor) -> Tensor:
    """½ |z|², which every state has a share in."""
    return 0.5 * z.square().sum()


def adjoints(out: Path, arguments: Namespace) -> dict[str, Any]:
    """a(t) along an ODE, ∂L/∂z_k of residual nets of more and more layers, and how they differ."""
    with seeded(arguments.seed, torch.device("cpu")):
        field, z0 = Layer(), torch.randn(2, dtype=F64)
    fine = adjoint_state(
        field, z0, torch.linspace(0, END, 201, dtype=F64), loss, rtol=1e-9, atol=1e-10
    )
    chains = {layers: chain_rule(field, z0, layers) for layers in LAYERS}
    rows = []
    for layers, chain in chains.items():
        by_state, by_weight = euler_adjoint(field, z0, layers)
        rows.append(
            {
                "layers": layers,
                "step": END / layers,
                "to_ode": apart(chain.by_state[0], fine.a[0]),
                "adjoint": apart(by_state, chain.by_state[0]),
                "adjoint_weights": apart(by_weight, chain.by_weight),
            }
        )
    figure = adjoint_figure(
        fine.t.numpy(), fine.a.numpy(),
        {n: (torch.linspace(0, END, n + 1).numpy(), chains[n].by_state.numpy()) for n in SHOWN},
        rows,
    )  # fmt: skip
    path = save_figure(figure, out / "adjoint.png")
    tell(arguments, f"drawn in {path}")
    if not arguments.json:
        print("\n".join(_lines(rows)))
    return {"figure": str(path), "rows": rows}


def chain_rule(field: Layer, z0: Tensor, layers: int) -> Chain:
    """Gradients of the residual net z_{k+1} = z_k + h f(t_k, z_k), layer by layer."""
    h = END / layers
    states = [z0.clone().requires_grad_()]
    for k in range(layers):
        t = torch.tensor(k * h, dtype=F64)
        states.append(states[-1] + h * field(t, states[-1]))
    *by_state, by_weight = torch.autograd.grad(loss(states[-1]), [*states, field.w])
    return Chain(torch.stack(by_state), by_weight)


def euler_adjoint(field: Layer, z0: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Gradients by z0 and by the weights by the continuous adjoint, with Euler's steps."""
    block = ODEBlock(field, (0.0, END), method="euler", step_size=END / layers, gradient="adjoint")
    start = z0.clone().requires_grad_()
    by_state, by_weight = torch.autograd.grad(loss(block(start)), [start, field.w])
    return by_state, by_weight


def apart(one: Tensor, other: Tensor) -> float:
    """The distance of two gradients over the size of the second."""
    return float((one - other).norm() / other.norm())


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    heads = ("layers", "step", "chain rule to a(0)", "adjoint to chain rule", "of weights")
    lines = ["".join(f"{head:<24}" for head in heads).rstrip()]
    for row in rows:
        values = [f"{row['layers']}", f"{row['step']:g}"]
        values += [f"{row[name]:.2%}" for name in ("to_ode", "adjoint", "adjoint_weights")]
        lines.append("".join(f"{value:<24}" for value in values).rstrip())
    return lines
