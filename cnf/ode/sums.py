"""The sums of a step on a small state, each slope added to all of them by one call.

Σ a_ij k_j of every stage still to come, Σ b_j k_j and the error's share a buffer, a row each, and
a slope is added to all rows, times its column of weights.  A call on a few thousand numbers takes
as long as on one: a step of dopri5 then has 14 of them in the place of 26.  A large state is bound
by memory, where rows that are written again and again cost more than they save.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.ode.tableau import Tableau
from cnf.ode.tangent import is_exported, is_forward, is_transformed

MOST = 4_096  # numbers of a state that is small
KEPT = 16  # buffers, each of another shape
Buffer = tuple[Tensor, tuple[Tensor, ...]]  # the sums, and each of its rows


class Columns(NamedTuple):
    """A tableau's weights, a column for each slope, shaped to multiply it.

    The rows are the sums of the stages after the first, then Σ b_j k_j if it `ends`, that is,
    unless the last stage is where the step ends, then the error's where it is asked for.
    first: the weights of the first slope; later: the c of each later stage, and the weights of its
    slope, 0 in the rows before; zero: a 0; spare: buffers by the shape of the state.
    """

    first: Tensor
    later: tuple[tuple[float, Tensor], ...]
    ends: bool
    zero: Tensor
    spare: dict[torch.Size, Buffer]

    def take(self, shape: torch.Size) -> Buffer:
        """A buffer that nobody else has: the field may solve something, in other threads too."""
        found = self.spare.pop(shape, None)
        if found is None:
            with torch.inference_mode(False):
                size = (len(self.first), *shape)
                sums = torch.empty(size, dtype=self.zero.dtype, device="cpu")
            found = sums, sums.unbind(0)
        return found

    def give(self, shape: torch.Size, buffer: Buffer) -> None:
        """What was taken, for the next step."""
        if len(self.spare) >= KEPT:
            self.spare.clear()
        self.spare[shape] = buffer


def is_small(y: Tensor) -> bool:
    """Whether the state is a small one of which plain numbers are asked, and nothing else."""
    return (
        not torch.is_grad_enabled()
        and type(y) is Tensor
        and 0 < y.numel() <= MOST
        and y.is_cpu
        and y.is_floating_point()
        and not (is_transformed() or is_forward() or is_exported())
        and not torch.compiler.is_compiling()
    )


@cache
def columns(tableau: Tableau, estimate: bool, dtype: torch.dtype, axes: int) -> Columns | None:
    """What to multiply slopes of so many axes by; None where sums that grow together need no fewer
    calls than one after the other.
    """
    rows = list(tableau.a[1 : tableau.stages if estimate else tableau.used_stages])
    count, ends = len(rows) + 1, not (estimate and tableau.fsal)
    rows += [tableau.b] if ends else []
    rows += [tableau.error] if estimate and tableau.error is not None else []
    one_by_one = sum(weight != 0.0 for row in rows for weight in row)
    if one_by_one <= count + len(rows):
        return None
    with torch.inference_mode(False):
        numbers = [[*row, *[0.0] * count][:count] for row in rows]
        weights = torch.tensor(numbers, dtype=dtype, device="cpu")
        first, *later = weights.T.reshape(count, len(rows), *[1] * axes).unbind(0)
        zero = torch.zeros((), dtype=dtype, device="cpu")
    return Columns(first, tuple(zip(tableau.c[1:], later, strict=False)), ends, zero, {})
