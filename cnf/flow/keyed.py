"""Noise of every row's own, from a seed and a key of the row: neither place nor neighbours matter.

Where all rows shared one draw, the mean over many rows would be no surer than that of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnf.flow.divergence import Hutchinson

UNIFORM, PROBES = 0, 1  # what noise is for: streams that share no number
OPEN = 2.0**-33  # how far uniform noise stays from both ends


def keys_of(rows: Tensor) -> tuple[int, ...]:
    """A number for every row of whole numbers that depends on the row alone."""
    values = rows.cpu().contiguous().numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values)
    return tuple(int.from_bytes(digest) for digest in digests)


def uniform(keys: Sequence[int], dim: int, seed: int) -> Tensor:
    """Noise uniform on (0, 1), (rows, dim), in float64."""
    rows = [_generator(key, seed, UNIFORM).random(dim) for key in keys]
    noise = np.stack(rows) if rows else np.zeros((0, dim))
    return torch.from_numpy(noise).clamp_(OPEN, 1 - OPEN)


def signs(keys: Sequence[int], probes: int, dim: int, seed: int) -> Tensor:
    """Probes of ±1, (rows, probes, dim)."""
    rows = [
        _generator(key, seed, PROBES).integers(0, 2, (probes, dim), dtype=np.int8) for key in keys
    ]
    stacked = np.stack(rows) if rows else np.zeros((0, probes, dim), dtype=np.int8)
    return torch.from_numpy(stacked) * 2.0 - 1.0


@dataclass(frozen=True)
class KeyedHutchinson(Hutchinson):
    """Hutchinson's estimate by probes of each row's key; keys: one for each row."""

    keys: tuple[int, ...] = ()

    def draw(self, x: Tensor) -> Tensor:
        seed, dim = self.seed or 0, x.shape[1]
        if self.law == "rademacher":
            return signs(self.keys, self.probes, dim, seed).to(x)
        streams = (int(_generator(key, seed, PROBES).integers(2**63)) for key in self.keys)
        generators = (torch.Generator().manual_seed(stream) for stream in streams)
        noise = [self._noise((1, self.probes, dim), generator) for generator in generators]
        return torch.cat([x.new_empty(0, self.probes, dim), *(one.to(x) for one in noise)])

    def of_rows(self, rows: Tensor) -> KeyedHutchinson:
        """The estimate for some of the rows, by their places."""
        chosen = tuple(self.keys[i] for i in rows.tolist())
        return KeyedHutchinson(self.probes, self.law, self.seed, chosen)


def _generator(*stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(stream))
