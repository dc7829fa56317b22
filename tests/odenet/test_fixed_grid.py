"""A block of fixed steps as plain operations: the same numbers, and a program to export."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from torch import nn

from cnf.error import InputError
from cnf.ode.control import FixedStep
from cnf.odenet.block import ODEBlock
from cnf.odenet.fixed_grid import FixedGrid, exported, unrolled, write_program
from cnf.odenet.network import ODENet, Perceptron


def field(t, y):
    return torch.sin(3 * y + t)


@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, -0.5)])
@pytest.mark.parametrize("steps", [{"nfe": 13}, {"step_size": 0.3}])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5", "tsit5"])
def test_it_computes_what_the_block_computes(method: str, steps: dict, t: tuple) -> None:
    block = ODEBlock(field, t, method=method, **steps)
    grid, y = FixedGrid(block), torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(grid(y), block(y), rtol=1e-13, atol=1e-13)  # sums in another order
    assert block.stats is not None and grid.nfe == block.stats.nfe


def test_what_has_no_fixed_grid_is_refused() -> None:
    with pytest.raises(InputError, match="adaptive steps depend on the input"):
        FixedGrid(ODEBlock(field))
    with pytest.raises(InputError, match="trapezoid is no explicit"):
        FixedGrid(ODEBlock(field, method="trapezoid", step_size=0.5))
    with pytest.raises(InputError, match="holds no ODE block"):
        unrolled(Perceptron())


def test_a_copy_is_unrolled_and_the_net_stays() -> None:
    net = ODENet(width=4, method="rk4", nfe=8).train()
    copied = unrolled(net)
    assert isinstance(net.block, ODEBlock) and net.training and not copied.training
    images = torch.rand(3, 1, 28, 28)
    assert torch.allclose(copied(images), net(images), atol=1e-5)
    assert isinstance(unrolled(nn.Sequential(net))[0].block, FixedGrid)


def test_a_program_takes_batches_of_any_size() -> None:
    net = ODENet(width=4, stem="fine", augment=2, method="midpoint", nfe=4)
    file = BytesIO()
    write_program(exported(net, (1, 8, 8)), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for count in (1, 2, 5):
        images = torch.rand(count, 1, 8, 8)
        assert torch.allclose(program(images), net(images), atol=1e-5)


def test_steps_that_are_no_plain_grid_are_refused() -> None:
    with pytest.raises(InputError, match="the reversible gradient solves by a scheme of its own"):
        FixedGrid(ODEBlock(field, method="midpoint", nfe=8, gradient="reversible"))
    for more in ({"land_on": (0.3,)}, {"jumps": (0.3,)}):
        block = ODEBlock(field, method="midpoint", control=FixedStep(0.25, **more))
        with pytest.raises(InputError, match="leave land_on= and jumps= out"):
            FixedGrid(block)
