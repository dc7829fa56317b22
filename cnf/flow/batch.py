"""What a flow is asked about: rows of any leading shape, their contexts, and blocks of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.data.rows import as_rows
from cnf.error import InputError


@dataclass(frozen=True)
class Kind:
    """What rows are made to be: `dim` columns of a dtype on a device.

    Raises InputError for a dtype too coarse for densities, which a flow's weights may be in.
    """

    dim: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"the flow is in {self.dtype}, too coarse for log-densities; use flow.float()"
            )

    def rows(self, x: Any, name: str) -> Tensor:
        """x as rows (batch, dim), checked."""
        return as_rows(x, self.dim, name=name, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Batch:
    """Rows, (batch, dim) or a memory map of that shape; contexts (batch, k) or None; the shape of
    what is said of each row.
    """

    x: Any
    context: Tensor | None
    shape: torch.Size
    kind: Kind
    name: str = "x"

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Consecutive rows and contexts, `size` at a time; one block if there are none."""
        for start in range(0, max(len(self.x), 1), size):
            x = self.x[start : start + size]
            if not isinstance(x, Tensor):
                x = self.kind.rows(x, f"{self.name}[{start}:{start + len(x)}]")
            yield x, None if self.context is None else self.context[start : start + size]


def as_batch(x: Any, kind: Kind, context: Any, columns: int, name: str = "x") -> Batch:
    """x of shape (…, dim) with contexts (…, columns), which are broadcast along x's leading shape.

    columns: of a context, 0 for a flow that takes none.
    Raises InputError for a wrong width or values that are not finite.
    """
    rows, shape = _leading(x, kind, name)
    return Batch(rows, as_context(context, shape, kind, columns), shape, kind, name)


def as_context(context: Any, shape: torch.Size, kind: Kind, columns: int) -> Tensor | None:
    """Contexts as rows, one for each of what has that shape, or None where there are no columns."""
    given = shaped_context(context, kind, columns)
    if given is None:
        return None
    try:
        spread = given.expand(*shape, columns)
    except RuntimeError:
        raise InputError(
            f"context has shape {tuple(given.shape)}, which does not go with rows of shape "
            f"{tuple(shape)}; give one context for each row, or one for all"
        ) from None
    return spread.reshape(-1, columns)


def shaped_context(context: Any, kind: Kind, columns: int) -> Tensor | None:
    """A context as a tensor (…, columns), checked; None where there are no columns.

    Raises InputError where there should be one and is none, or the other way round.
    """
    if columns == 0:
        if context is not None:
            raise InputError("the flow takes no context; make one that does, Flow(dim, context=k)")
        return None
    if context is None:
        raise InputError(
            f"the flow is conditional and got no context; give one of {columns} columns"
        )
    if isinstance(context, float | int):
        context = [context]
    kind = Kind(columns, kind.dtype, kind.device)
    rows, lead = _leading(context, kind, "context", whole=True)
    return rows.reshape(*lead, columns)


def _leading(x: Any, kind: Kind, name: str, whole: bool = False) -> tuple[Any, torch.Size]:
    """x as checked rows (batch, dim), and its leading shape; whole: read a memory map now."""
    if isinstance(x, np.memmap) and x.ndim == 2 and x.shape[1] == kind.dim and not whole:
        return x, torch.Size([len(x)])  # read chunk by chunk, and checked there
    if isinstance(x, list | tuple):
        with suppress(ValueError, TypeError, RuntimeError):  # ragged: as_rows says what of it
            x = np.asarray(x)
    shape = tuple(getattr(x, "shape", ()))
    if shape[-1:] != (kind.dim,):
        rows = kind.rows(x, name)
        return rows, torch.Size([len(rows)])
    if len(shape) != 2:
        x = (x if isinstance(x, Tensor) else np.asarray(x)).reshape(-1, kind.dim)
    if 0 in shape:
        empty = x if isinstance(x, Tensor) else torch.empty(0, kind.dim)
        return empty.to(kind.device, kind.dtype), torch.Size(shape[:-1])
    return kind.rows(x, name), torch.Size(shape[:-1])
