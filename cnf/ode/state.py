"""A state is a tensor, or a tuple, list or dict of states; inside the core, a tuple of leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.tangent import is_transformed

Leaves = tuple[Tensor, ...]
Weights = Sequence[tuple[int, float]]  # (index of a slope, its weight)


class Structure:
    """How a user's state is made of tensors: `leaves` takes one apart, `build` makes another.

    Raises InputError for a state without a tensor or with anything else in it.
    """

    def __init__(self, example: Any, name: str = "y0") -> None:
        self._shape = _shape_of(example, name)

    @property
    def shape(self) -> Any:
        """None for a tensor, or a tuple or dict of such."""
        return self._shape

    def leaves(self, state: Any, name: str = "the state") -> Leaves:
        """The tensors of `state`, in order; raises InputError where it is built differently."""
        if self._shape is None and isinstance(state, Tensor):  # the usual case, once a stage
            return (state,)
        return tuple(_leaves(self._shape, state, name))

    def build(self, leaves: Sequence[Tensor]) -> Any:
        """A state of this structure from its leaves."""
        return leaves[0] if self._shape is None else _build(self._shape, iter(leaves))


def combine(y: Tensor, slopes: Sequence[Tensor], weights: Weights, h: float) -> Tensor:
    """y + h Σ weight · slopes[index], of y's shape and dtype; never changes y.

    The sum grows in place: no kernel saves it for backward, so one form serves with a graph and
    without.  Not under torch.func, which may transform the slope and not the sum.
    """
    if not weights:
        return y
    index, weight = weights[0]
    grow = Tensor.add if is_transformed() else Tensor.add_
    total = torch.add(y, slopes[index], alpha=h * weight)
    for index, weight in weights[1:]:
        total = grow(total, slopes[index], alpha=h * weight)
    return total


def weighted_sum(slopes: Sequence[Tensor], weights: Weights, h: float) -> Tensor:
    """h Σ weight · slopes[index], of the slopes' shape and dtype."""
    if not weights:
        return torch.zeros_like(slopes[0])
    index, weight = weights[0]
    grow = Tensor.add if is_transformed() else Tensor.add_
    total = slopes[index] * (h * weight)
    for index, weight in weights[1:]:
        total = grow(total, slopes[index], alpha=h * weight)
    return total


def across(numbers: Tensor, leaf: Tensor) -> Tensor:
    """Real numbers, shaped to multiply a leaf whose first axes they are."""
    numbers = numbers.to(leaf.device, leaf.real.dtype)
    return numbers.reshape((*numbers.shape, *[1] * (leaf.ndim - numbers.ndim)))


def rms(x: Tensor) -> Tensor:
    """Root mean square of all entries, a 0-d real tensor; 0 for an empty one."""
    return torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5


def row_rms(x: Tensor) -> Tensor:
    """Root mean square of each row's entries, real, of shape (rows,)."""
    flat = as_matrix(x)
    return torch.linalg.vector_norm(flat, dim=1) / max(flat.shape[1], 1) ** 0.5


def as_matrix(x: Tensor) -> Tensor:
    """x, (rows, …), as (rows, entries)."""
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


def largest(values: Sequence[Tensor]) -> Tensor:
    """The largest of some tensors of one shape, entry by entry; NaN where one of them is."""
    return values[0] if len(values) == 1 else torch.stack([v.double() for v in values]).amax(0)


def is_finite(leaves: Leaves) -> bool:
    """Whether every entry is finite: one device-to-host read."""
    sizes = [torch.linalg.vector_norm(leaf, math.inf) for leaf in leaves if leaf.numel()]
    return not sizes or math.isfinite(largest(sizes).item())


def precise_dtype(leaf: Tensor) -> torch.dtype:
    """float64, or complex128 for complex leaves; the leaf's own where a device has neither."""
    if leaf.device.type == "mps":
        return leaf.dtype
    return torch.complex128 if leaf.dtype.is_complex else torch.float64


def bad_rows(leaves: Leaves, most: int = 5) -> list[int]:
    """The first few rows that hold a non-finite entry; empty where leaves share no batch."""
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in leaves}
    if len(sizes) != 1 or -1 in sizes:
        return []
    finite = torch.stack(
        [
            torch.isfinite(leaf).flatten(1).all(1) if leaf.ndim > 1 else torch.isfinite(leaf)
            for leaf in leaves
        ]
    ).all(0)
    return torch.nonzero(~finite).flatten()[:most].tolist()


def _shape_of(example: Any, name: str) -> Any:
    if isinstance(example, Tensor):
        return None
    if isinstance(example, tuple | list) and example:
        return tuple(_shape_of(part, name) for part in example)
    if isinstance(example, dict) and example:
        return {key: _shape_of(part, name) for key, part in example.items()}
    raise InputError(
        f"{name} must be a tensor, or a tuple or dict of tensors, got {type(example).__name__}"
    )


def _leaves(shape: Any, state: Any, name: str) -> Iterator[Tensor]:
    if shape is None:
        if not isinstance(state, Tensor):
            raise InputError(f"{name} must hold a tensor here, got {type(state).__name__}")
        yield state
    elif isinstance(shape, tuple):
        if not isinstance(state, tuple | list) or len(state) != len(shape):
            raise InputError(
                f"{name} must be a tuple of {len(shape)} parts like y0, got {_describe(state)}"
            )
        for part_shape, part in zip(shape, state, strict=True):
            yield from _leaves(part_shape, part, name)
    else:
        if not isinstance(state, dict) or state.keys() != shape.keys():
            raise InputError(
                f"{name} must be a dict with the keys {list(shape)} like y0, got {_describe(state)}"
            )
        for key, part_shape in shape.items():
            yield from _leaves(part_shape, state[key], name)


def _describe(state: Any) -> str:
    if isinstance(state, Tensor):
        return f"a tensor of shape {tuple(state.shape)}"
    if isinstance(state, tuple | list):
        return f"{len(state)} parts"
    if isinstance(state, dict):
        return f"the keys {list(state)}"
    return type(state).__name__


def _build(shape: Any, leaves: Iterator[Tensor]) -> Any:
    if shape is None:
        return next(leaves)
    if isinstance(shape, tuple):
        return tuple(_build(part, leaves) for part in shape)
    return {key: _build(part, leaves) for key, part in shape.items()}
