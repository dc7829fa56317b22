"""An ODE block as plain operations on a fixed grid, for devices without a solver."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from cnf.error import InputError
from cnf.ode.choice import choose_method
from cnf.ode.control import FixedStep
from cnf.ode.field import Evaluation
from cnf.ode.gradient.reversible import is_reversible
from cnf.ode.method import ExplicitRungeKutta
from cnf.ode.state import Leaves
from cnf.odenet.block import ODEBlock, blocks_of


class FixedGrid(nn.Module):
    """What an ODE block of fixed steps computes, as a chain of operations that can be exported.

    block: of an explicit method and fixed steps (step_size, or nfe), over one tensor.  The field is
    the block's own, not a copy.
    Raises InputError for blocks of adaptive steps, of times to land on, or of another method.
    """

    def __init__(self, block: ODEBlock) -> None:
        super().__init__()
        method, control = choose_method(block.method), block.control
        if not isinstance(control, FixedStep):
            raise InputError(
                "adaptive steps depend on the input and are no fixed grid; set block.nfe or "
                "block.step_size"
            )
        if control.land_on or control.jumps:
            raise InputError("a fixed grid has no steps between; leave land_on= and jumps= out")
        if is_reversible(block.gradient):
            raise InputError(
                "the reversible gradient solves by a scheme of its own, which is no plain grid; "
                "set block.gradient = 'checkpoint', and then block.nfe"
            )
        if not isinstance(method, ExplicitRungeKutta):
            raise InputError(f"{method.name} is no explicit Runge–Kutta method; set block.method")
        self.field, self._method = block.field, method
        start, end = (float(moment) for moment in block.t)
        self._steps = list(_grid(control, start, end))

    @property
    def nfe(self) -> int:
        """Evaluations of the field for each call."""
        return len(self._steps) * self._method.tableau.used_stages

    def forward(self, y: Tensor) -> Tensor:
        for t, h in self._steps:
            first = self._evaluate(t, (y,))
            (y,) = self._method.step(self._evaluate, t, h, (y,), first, False).y
        return y

    def _evaluate(self, t: float, state: Leaves) -> Evaluation:
        (y,) = state
        return Evaluation((self.field(torch.full((), t, dtype=y.dtype, device=y.device), y),), ())


def _grid(control: FixedStep, start: float, end: float) -> Iterator[tuple[float, float]]:
    """(t, h) of every step from start to end, as `solve` takes them."""
    t, direction = start, 1.0 if end > start else -1.0
    while t != end:
        remaining = abs(end - t)
        length = control.fit(control.step_size, remaining)
        yield t, direction * length
        t = end if length == remaining else t + direction * length


def unrolled(net: nn.Module) -> nn.Module:
    """A copy of the net in its evaluation mode, with a fixed grid in the place of every ODE block.

    Raises InputError as `FixedGrid` does, and for a net without an ODE.
    """
    if not blocks_of(net):
        raise InputError(f"{type(net).__name__} holds no ODE block, so it has no grid to fix")
    copied = copy.deepcopy(net).eval()
    if isinstance(copied, ODEBlock):
        return FixedGrid(copied)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ODEBlock):
                setattr(parent, name, FixedGrid(child))
    return copied


def exported(net: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """The net with its grid fixed as a torch.export program, for batches of any size.

    shape: of one input, such as (1, 28, 28).
    """
    example = torch.zeros(2, *shape, device=next(net.parameters()).device)
    batch: Any = torch.export.Dim("batch", min=1)
    return torch.export.export(unrolled(net), (example,), dynamic_shapes=({0: batch},))


def write_program(program: torch.export.ExportedProgram, file: BinaryIO) -> None:
    """Write the program as a .pt2 archive, which torch.export.load reads."""
    torch.export.save(program, file)  # type: ignore[arg-type]
