"""Batches of rows in memory, whose place in the data can be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.training.ranks import current, row_noise


class Shuffled:
    """Batches of aligned tensors: all rows in a new order, again and again.

    parts: tensors of as many rows; size: of a batch; change: what is done to a batch's first part,
    such as `shifted`; device: where batches go; weights: (rows,), above 0, how often each row comes
    up, None for all alike.  Random numbers are torch's own.
    Of ranks that train together each gets its share of the batch.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        size: int,
        *,
        change: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
        weights: Tensor | None = None,
    ) -> None:
        self._parts, self._change, self._device = parts, change, device
        self._weights, self._ranks = weights, current()
        self._size = self._ranks.batch_size(min(size, len(parts[0])))
        self._order = torch.empty(0, dtype=torch.long)

    def __call__(self) -> tuple[Tensor, ...]:
        if len(self._order) < self._size:
            self._order = torch.cat([self._order, self._new_order()])
        chosen, self._order = self._order[: self._size], self._order[self._size :]
        own = chosen[self._ranks.share(self._size)]
        first, *rest = (part[own].to(self._device) for part in self._parts)
        return (first if self._change is None else self._change(first), *rest)

    def _new_order(self) -> Tensor:
        order = torch.randperm(len(self._parts[0]))
        if self._weights is None:
            return order
        return resampled(self._weights, len(order), torch.rand(()).item())[order]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order.clone()}  # a view would be stored with all that it views

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order = state["order"]


def resampled(weights: Tensor, count: int, offset: float = 0.5) -> Tensor:
    """Indices of `count` rows, in order: each as often as its share of the weights, but for one.

    weights: (rows,), not negative, not all 0; offset: from 0 to below 1; where it is uniform each
    row's number is right on average.
    Source: systematic resampling, Carpenter, Clifford & Fearnhead 1999.

    >>> resampled(torch.tensor([1.0, 0.0, 3.0]), 4).tolist()
    [0, 2, 2, 2]
    """
    edges = weights.double().cumsum(0)
    places = (torch.arange(count, dtype=torch.float64) + offset) * (edges[-1] / count)
    return torch.searchsorted(edges, places, right=True).clamp_(max=_last(weights))


def _last(weights: Tensor) -> int:
    """The last row of a weight above 0: rounding may place a draw beyond all edges."""
    return int(weights.nonzero()[-1])


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` pixels in both directions, filled up with zeros.

    images: (batch, channels, height, width).  Random numbers are torch's own.
    """
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (most,) * 4)

    def moves(rows: int) -> Tensor:
        return torch.randint(2 * most + 1, (2, rows, 1), device="cpu").transpose(0, 1)

    down, right = row_noise(batch, moves).transpose(0, 1).to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    row = torch.arange(batch, device=images.device).reshape(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).reshape(-1, 1, 1)
    return padded[row, channel, rows[:, None, :, None], columns[:, None, None, :]]
