"""Problems whose solutions are known, and fields that count their calls."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from cnf.ode.solution import solve


class Pendulum(nn.Module):
    """A driven, damped pendulum: nonlinear, coupled, non-autonomous; `nfe` counts its calls."""

    start: ClassVar = [0.7, 0.4]

    def __init__(self):
        super().__init__()
        self.damping = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        angle, speed = y[..., 0], y[..., 1]
        pull = -torch.sin(angle) - self.damping * angle * speed + torch.cos(2 * t)
        return torch.stack([speed, pull], -1)

    def exact(self, t):
        """The solution at the times t, to rounding."""
        with torch.no_grad():
            y0 = torch.tensor(self.start, dtype=torch.float64)
            times = t.detach()
            return solve(self, y0, times, method="dopri8", rtol=1e-13, atol=1e-14).y


@pytest.fixture
def pendulum():
    return Pendulum()


@pytest.fixture
def start():
    return torch.tensor(Pendulum.start, dtype=torch.float64, requires_grad=True)
