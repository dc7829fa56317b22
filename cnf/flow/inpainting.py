"""What a flow puts where an image is hidden, given what is seen: an ODE that is guided to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cnf.flow.conditioned import Conditioned
from cnf.flow.continuous import Solver, move
from cnf.ode.control import FixedStep

START = 0.02  # of the way: before that nothing is known, and the guidance is 0/0


def inpainted(
    conditioned: Conditioned, seen: Tensor, known: Tensor, noise: Tensor, steps: int
) -> Tensor:
    """Ends of paths z (batch, dim) that agree with `seen` where `known`, from normal noise.

    conditioned: the field of a flow that flow matching has trained; seen, known, noise, all
    (batch, dim).
    The velocity of the paths that lead to what is seen, v(z | seen) = v(z) + (1 − t)/t ∇ log
    p(seen | z_t), with p normal about the mean end E[z₁ | z_t] = z + (1 − t) v(z), of variance
    (1 − t)² / (t² + (1 − t)²): an approximation, exact where the data are standard normal.
    Source: Pokle et al. 2024, equations 7 and 8, for straight paths of flow matching.
    """
    at_start = torch.where(known, torch.lerp(noise, seen, START), noise)
    field = _guided(conditioned, seen, known)
    # Euler's last step lands on what is seen, where the guidance has no limit
    solver = Solver("euler", FixedStep((1 - START) / steps))
    return torch.where(known, seen, move(field, at_start, (START, 1.0), solver, conditioned.rows))


def _guided(conditioned: Conditioned, seen: Tensor, known: Tensor) -> Callable[..., Tensor]:
    def field(t: Tensor, z: Tensor, *rows: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            velocity = conditioned.field(t, z, *rows)
            mean = z + (1 - t) * velocity
            off = torch.where(known, seen - mean, 0.0).detach()
            (pulled,) = torch.autograd.grad((mean * off).sum(), z)
        spread = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        return velocity.detach() + (1 - t) / (t * spread) * pulled

    return field
