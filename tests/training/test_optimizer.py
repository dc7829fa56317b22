"""Optimizers as values: made over parameters, with decay on kernels alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnf.training.optimizer import SGD, Adam


@pytest.mark.parametrize("value", [Adam(weight_decay=0.1), SGD(weight_decay=0.1)])
def test_only_kernels_decay(value: Adam | SGD) -> None:
    kernel, shift = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = value.over([shift, kernel], 0.5)
    kernel.grad, shift.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(kernel, torch.full((2, 2), 0.95))
    assert torch.equal(shift, torch.ones(2))


@pytest.mark.parametrize("value", [Adam(), SGD()])
def test_one_kind_of_parameters_is_enough(value: Adam | SGD) -> None:
    for parameter in (nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))):
        optimizer = value.over([parameter], 0.1)
        parameter.sum().backward()
        optimizer.step()
        assert parameter.max() < 1


def test_momentum_carries_on() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD(momentum=0.5).over([parameter], 1.0)
    for gradient in (1.0, 0.0):
        parameter.grad = torch.full((1,), gradient)
        optimizer.step()
    assert parameter.item() == -1.5
