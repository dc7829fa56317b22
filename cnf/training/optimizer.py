"""Optimizers as values: what to step with, before there are parameters to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from cnf.training import soap


class Optimizer(Protocol):
    """Makes a torch optimizer over parameters."""

    def over(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer: ...


@dataclass(frozen=True)
class Adam:
    """Adam; weight_decay: decoupled from the gradient, of matrices and kernels alone.

    Sources: Kingma and Ba 2015; Loshchilov and Hutter 2019.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def over(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        groups = _groups(parameters, self.weight_decay)
        fused = all(p.is_cuda for p in parameters) or None  # one kernel for all of them
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, fused=fused)


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum; weight_decay: added to gradients of matrices and kernels."""

    momentum: float = 0.9
    weight_decay: float = 0.0

    def over(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            _groups(parameters, self.weight_decay), lr=lr, momentum=self.momentum
        )


@dataclass(frozen=True)
class SOAP:
    """Adam in the eigenbases of the gradients of matrices, see `cnf.training.soap`."""

    betas: tuple[float, float] = (0.9, 0.99)

    def over(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return soap.SOAP(parameters, lr, self.betas)


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with decay, and without: shifts and scales are not to shrink."""
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = ({"params": kernels, "weight_decay": weight_decay},
              {"params": others, "weight_decay": 0.0})  # fmt: skip
    return [group for group in groups if group["params"]]
