"""A module's forward and backward as CUDA graphs: many small kernels, started by one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Captured:
    """Calls a module on tensors by CUDA graphs, captured at the first call, where that is possible:
    on a GPU, in training, for tensors of the shapes of the first call.  Other calls are plain.

    The module must do the same whatever the tensors hold: read no number, draw none.  A call's
    graph is overwritten by the next one, so that each must be differentiated before that.

    >>> double, once = nn.Linear(2, 2), Captured()
    >>> torch.equal(once(double, torch.ones(3, 2)), double(torch.ones(3, 2)))
    True
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._replayed: Any = None
        self._kinds: list[Any] = []

    def __call__(self, module: Any, *tensors: Tensor) -> Any:
        if not (
            isinstance(module, nn.Module)
            and torch.is_grad_enabled()
            and all(tensor.is_cuda for tensor in tensors)
        ):
            return module(*tensors)
        kinds = [(x.shape, x.dtype, x.device, x.requires_grad) for x in tensors]
        if self._module is None:
            self._module, self._kinds = module, kinds
            self._replayed = _graphed(module, tensors)
        if module is not self._module or kinds != self._kinds:
            return module(*tensors)
        return self._replayed(*tensors)


class _Whole(nn.Module):
    """A module whose call is to be replaced, in the place of one that others call too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.inner(*tensors)


def _graphed(module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in tensors)
    with warnings.catch_warnings():  # gradients are asked for, not accumulated, as it is captured
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
        # a parameter may be for calls without one of the tensors
        return torch.cuda.make_graphed_callables(_Whole(module), samples, allow_unused_input=True)
