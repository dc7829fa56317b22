"""Which noise meets which data row in flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cnf.error import InputError, whole_number


class Coupling(Protocol):
    """How noise and data are paired: noise is permuted, so that data keep their context."""

    def match(self, start: Tensor, end: Tensor, context: Tensor | None = None) -> Tensor:
        """A permutation, (batch,): which row of noise `start` each row of data `end` is given.

        start, end: (batch, dim); context: (batch, …), what a row's density is conditioned on.
        """
        ...


@dataclass(frozen=True)
class OptimalTransport:
    """The pairs of a group whose squared distances have the smallest sum, exactly.

    group: rows matched with each other; the work grows as its cube.  Within a group only rows of
    equal context are matched: a noise that knew of the context would not be the base's, given it.
    Rows whose contexts are all different stay as they are.
    Source: Pooladian et al. 2023, section 3; Tong et al. 2024, section 3.4.

    >>> start, end = torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]])
    >>> OptimalTransport().match(start, end).tolist()
    [1, 0]
    """

    group: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", whole_number("group", self.group, 1))

    def match(self, start: Tensor, end: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Coupling.match`."""
        found = torch.arange(len(end))
        # in double precision and on the CPU, where the assignment is found
        start, end = (x.detach().double().cpu() for x in (start, end))
        for rows in _conditions(context, len(end)):
            for some in rows.split(self.group):
                found[some] = some[_assignment(start[some], end[some])]
        return found


def _assignment(start: Tensor, end: Tensor) -> Tensor:
    """The index of the start that each end is given."""
    # |a − b|² without the squares, which no permutation changes
    cost = -(end @ start.T)
    from scipy.optimize import linear_sum_assignment  # here: slow to load

    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def _conditions(context: Tensor | None, batch: int) -> list[Tensor]:
    """The rows of each condition."""
    if context is None:
        return [torch.arange(batch)]
    _, which = torch.unique(context.detach().cpu().reshape(batch, -1), dim=0, return_inverse=True)
    order = which.argsort(stable=True)
    return list(order.split(torch.bincount(which).tolist()))


def choose_coupling(coupling: str | Coupling) -> Coupling | None:
    """The coupling of a name, or itself; None for "independent", which changes nothing."""
    if isinstance(coupling, str):
        named: dict[str, Coupling | None] = {"independent": None, "ot": OptimalTransport()}
        if coupling not in named:
            raise InputError(f"unknown coupling {coupling!r}; known are {', '.join(named)}")
        return named[coupling]
    if isinstance(coupling, type) or not callable(getattr(coupling, "match", None)):
        raise InputError(
            "coupling must be a name or a coupling such as OptimalTransport(group=256), got "
            f"{coupling!r}"
        )
    return coupling
