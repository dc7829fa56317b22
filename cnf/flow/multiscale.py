"""A stack of ODEs over images at several scales, with a squeeze and a split between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cnf.error import InputError, whole_number
from cnf.flow.continuous import Moved, Solver, move, move_with_logdet
from cnf.flow.divergence import Divergence
from cnf.nets.conv import conv_stack
from cnf.ode.trajectory import Stats

TO_BASE, TO_DATA = (1.0, 0.0), (0.0, 1.0)
LEAST = 4  # pixels a side of the smallest scale, before a squeeze


class Multiscale(nn.Module):
    """An invertible map of flat images (batch, c·h·w) through ODEs at several scales.

    At each scale but the last: `blocks` ODEs, a squeeze of 2 × 2 pixels into channels, `blocks`
    ODEs, and half the channels leave for the base; at the last `blocks` ODEs.
    shape: (channels, height, width); blocks: ODEs before and after each squeeze; widths: hidden
    channels of their fields, see `conv_stack`; scales: by default as many as leave LEAST pixels a
    side, where halves are whole.
    Raises InputError for a side that cannot be halved so often.
    Source: Grathwohl et al. 2019, section 4.2, after Dinh et al. 2017, section 3.6.

    >>> Multiscale((1, 8, 8), blocks=1, widths=(4,)).sizes
    [(1, 8, 8), (4, 4, 4), (2, 4, 4)]
    """

    row_wise = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        blocks: int = 2,
        widths: Sequence[int] = (64, 64, 64),
        scales: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        wanted = _most_scales(self.shape) if scales is None else whole_number("scales", scales, 1)
        self.sizes = _sizes(self.shape, wanted)
        self.fields = nn.ModuleList(
            nn.ModuleList(
                conv_stack(size, widths) for _ in range(whole_number("blocks", blocks, 1))
            )
            for size in self.sizes
        )

    def carry(
        self, x: Tensor, divergence: Divergence | None, times: tuple[float, float], solver: Solver
    ) -> Moved:
        """Rows x carried through every ODE from times[0] to times[1], to the base where they fall.

        With log |det|, the cost and what else the divergence's field gives, of all ODEs together;
        without a divergence, where they arrive alone.
        """
        path = _Path(divergence, times, solver)
        x = self._to_base(x, path) if times[0] > times[1] else self._to_data(x, path)
        return path.arrived(x)

    def to_base(self, x: Tensor, divergence: Divergence, solver: Solver) -> Moved:
        """Where rows x of the data arrive in the base, with log |det| and the cost of all ODEs.

        What leaves at a split comes last, the finest scale at the end.
        """
        return self.carry(x, divergence, TO_BASE, solver)

    def to_data(self, z: Tensor, solver: Solver) -> Tensor:
        """Where rows z of the base arrive among the data, (batch, c·h·w)."""
        return self.carry(z, None, TO_DATA, solver).x

    def _to_base(self, x: Tensor, path: _Path) -> Tensor:
        gone = []
        for i, (fields, size) in enumerate(self._stages()):
            for field in fields:
                x = path.along(field, x)
            if i % 2 == 0 and i + 1 < len(self.sizes):
                x = pixel_unshuffle(x.unflatten(1, size), 2).flatten(1)
            elif i % 2:
                x, left = x.chunk(2, 1)  # of channels, which are the slowest of the flat axis
                gone.insert(0, left)
        return torch.cat([x, *gone], 1)

    def _to_data(self, z: Tensor, path: _Path) -> Tensor:
        stages = list(self._stages())
        sizes = [math.prod(size) // 2 for size in self.sizes[1::2]][::-1]
        x, *gone = z.split([z.shape[1] - sum(sizes), *sizes], 1)
        for i, (fields, _) in reversed(list(enumerate(stages))):
            if i % 2:
                x = torch.cat([x, gone.pop(0)], 1)
            elif i + 1 < len(stages):
                x = pixel_shuffle(x.unflatten(1, self.sizes[i + 1]), 2).flatten(1)
            for field in reversed(list(fields)):
                x = path.along(field, x)
        return x

    def _stages(self) -> Iterator[tuple[nn.ModuleList, tuple[int, ...]]]:
        """Fields of equal size, with that size: an even one ends with a squeeze, an odd one with a
        split, the last with neither.
        """
        for fields, size in zip(self.fields, self.sizes, strict=True):
            assert isinstance(fields, nn.ModuleList)
            yield fields, size


class _Path:
    """What is gathered on the way through all ODEs."""

    def __init__(
        self, divergence: Divergence | None, times: tuple[float, float], solver: Solver
    ) -> None:
        self._divergence, self._times, self._solver = divergence, times, solver
        self._parts: list[Moved] = []

    def along(self, field: nn.Module, x: Tensor) -> Tensor:
        """x carried along one field."""
        if self._divergence is None:
            return move(field, x, self._times, self._solver)
        self._parts.append(move_with_logdet(field, self._divergence, x, self._times, self._solver))
        return self._parts[-1].x

    def arrived(self, x: Tensor) -> Moved:
        """x with what was gathered."""
        if not self._parts:
            return Moved(x, x.new_full((len(x),), math.nan), Stats())
        logdet = torch.stack([part.logdet for part in self._parts]).sum(0)
        gathered = zip(*(part.along for part in self._parts), strict=True)
        along = tuple(torch.stack(terms).sum(0) for terms in gathered)
        return Moved(x, logdet, reduce(_summed, (part.stats for part in self._parts)), along)


def _most_scales(shape: Sequence[int]) -> int:
    """As many as leave LEAST pixels a side at the last, and halves that are whole."""
    side, scales = min(shape[1:]), 1
    while side // 2 >= LEAST and all(length % 2**scales == 0 for length in shape[1:]):
        side, scales = side // 2, scales + 1
    return scales


def _sizes(shape: tuple[int, ...], scales: int) -> list[tuple[int, ...]]:
    """Sizes of images where ODEs are: before and after each squeeze, and at the last scale."""
    channels, height, width = shape
    sizes = [shape]
    for _ in range(scales - 1):
        if height % 2 or width % 2:
            raise InputError(
                f"scales={scales} halve {shape[1]} x {shape[2]} pixels where they are odd; take "
                "fewer scales"
            )
        height, width = height // 2, width // 2
        sizes += [(4 * channels, height, width), (2 * channels, height, width)]
        channels = 2 * channels
    return sizes


def _summed(one: Stats, other: Stats) -> Stats:
    """The cost of two solves; evaluations of backward are not known yet."""
    names = ("nfe", "accepted", "rejected", "calls")
    return Stats(**{name: getattr(one, name) + getattr(other, name) for name in names})
