"""The Jacobian of a field, and states as vectors that it multiplies.

It is taken by reverse mode: one evaluation with a graph, and one pass backward for all entries of
dy/dt at once.  So the field is called once, as it is called for its gradient, and what backward can
follow it can follow; forward mode, which is shorter where it works, is silently wrong for a field
that detaches its state, such as the gradient of an energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.state import Leaves

_LARGEST = 2**25  # numbers in a Jacobian: 256 MiB in double precision, of which LU needs as much
_AT_ONCE = 2**22  # numbers in the cotangents of one pass backward


@dataclass(frozen=True)
class Layout:
    """Leaves like `like` as real vectors, (blocks, size): one for each row, or one for all.

    blocks: 1, or the number of rows.  A complex number is two real ones; vectors are of the leaves'
    widest precision, single at least, since there is no LU in half.
    """

    like: Leaves
    blocks: int

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (x.real.dtype for x in self.like), torch.float32)

    @property
    def size(self) -> int:
        """Numbers in one vector."""
        return sum(self._width(leaf) for leaf in self.like)

    def vector(self, leaves: Leaves) -> Tensor:
        """(blocks, size), with the leaves' graph."""
        parts = [
            _real(leaf).reshape(self.blocks, self._width(like)).to(self.dtype)
            for leaf, like in zip(leaves, self.like, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def leaves(self, vector: Tensor) -> Leaves:
        """The leaves of a vector, with its graph."""
        parts = vector.split([self._width(leaf) for leaf in self.like], 1)
        return tuple(map(_shaped, parts, self.like))

    def _width(self, leaf: Tensor) -> int:
        entries = leaf.numel() if self.blocks == 1 else prod(leaf.shape[1:])
        return entries * (2 if leaf.is_complex() else 1)


def jacobian_of(field: Any, t: Any, y: Leaves) -> Tensor:
    """∂(dy/dt)_i / ∂y_j at (t, y), (blocks, size, size), by its own `jacobian` if it has one.

    field: (t, y) → a value with a `slope`.
    """
    own = getattr(field, "jacobian", None)
    return own(t, y) if own is not None else jacobian(lambda at: field(t, at).slope, y, 1)


def jacobian(slope: Callable[[Leaves], Leaves], y: Leaves, blocks: int) -> Tensor:
    """∂ slope_i / ∂y_j of each block, (blocks, size, size), real; see Layout.

    slope: leaves → leaves of the same shapes, called once; what autograd does not follow is taken
    for a constant.  With a graph where gradients are enabled, to y too if y has one.
    Raises InputError for a Jacobian that is too large to be kept.
    """
    layout, again = Layout(y, blocks), torch.is_grad_enabled()
    _check_size(layout)
    with torch.inference_mode(False), torch.enable_grad():
        at = layout.vector(y)
        at = at if again and at.requires_grad else at.detach().clone().requires_grad_()
        value = layout.vector(slope(layout.leaves(at)))
        if not (value.requires_grad and value.numel()):
            return at.detach().new_zeros(blocks, layout.size, layout.size)
        return _pulled(value, at, again).transpose(0, 1)


def _pulled(value: Tensor, at: Tensor, again: bool) -> Tensor:
    """∂ value_i / ∂ at, (size, blocks, size): entry i of all blocks is pulled back at once."""
    size = value.shape[1]
    units = torch.eye(size, dtype=value.dtype, device=value.device)[:, None].expand(size, *at.shape)
    settings: dict[str, bool] = dict(retain_graph=True, create_graph=again, allow_unused=True)

    def pull(bars: Tensor, batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(value, at, bars, is_grads_batched=batched, **settings)
        return torch.zeros_like(bars) if found is None else found

    chunk = max(_AT_ONCE // max(at.numel(), 1), 1)
    try:
        return torch.cat([pull(bars, True) for bars in units.split(chunk)])
    except RuntimeError:  # some operation's backward cannot be mapped over cotangents
        return torch.stack([pull(bar, False) for bar in units])


def _check_size(layout: Layout) -> None:
    size = layout.size
    if layout.blocks * size * size <= _LARGEST:
        return
    count = f"{size}² numbers" if layout.blocks == 1 else f"{layout.blocks} times {size}² numbers"
    raise InputError(
        f"an implicit method needs the field's Jacobian, here {count}, more than {_LARGEST}; where "
        "no row of the batch depends on another say so, field.row_wise = True, or solve fewer rows "
        "at once; else take an explicit method"
    )


def _real(leaf: Tensor) -> Tensor:
    return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    if not like.is_complex():
        return part.reshape(like.shape).to(like.dtype)
    pairs = part.reshape(*like.shape, 2).to(like.real.dtype)
    return torch.view_as_complex(pairs.contiguous())
