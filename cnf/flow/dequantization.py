"""Learned noise between whole numbers: a map of every cell of the unit cube onto itself.

Uniform noise makes a density flat within a cell, and a flow has to have corners there.  A learned
law q(u | pixels) may follow the flow instead: the bound on the log-probability of the pixels,
E_q[log p(pixels + u) − log q(u | pixels)], comes closer.  With u made of uniform noise v by a map
that knows the pixels, −log q is log |du/dv|: one more invertible map before the ODE.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

COUPLINGS = 2
WIDTH = 32  # channels of a coupling's hidden layer
REACH = 1.0  # the logarithm of the most that a coupling stretches by
EDGE = 1e-9  # how far noise stays from the ends of its cell


class VariationalDequantization(nn.Module):
    """x ↦ (k + u)/levels for rows x = (k + v)/levels of the unit cube, (batch, dim), k whole.

    u is v's logit moved by couplings: of the pixels of a chessboard, white and black in turn, half
    are shifted and stretched as a small net says that sees all pixels k and the other half's noise.
    It starts as the identity: v is uniform, and so is u.
    Source: Ho et al. 2019, section 3.1; couplings: Dinh et al. 2017.
    """

    def __init__(self, shape: Sequence[int], levels: int) -> None:
        super().__init__()
        self.shape, self.levels = (shape[0], shape[1], shape[2]), levels
        self.nets = nn.ModuleList(_net(self.shape[0]) for _ in range(COUPLINGS))
        rows, columns = (torch.arange(side) for side in self.shape[1:])
        chessboard = ((rows[:, None] + columns) % 2).expand(self.shape)
        self.register_buffer("chessboard", chessboard.bool(), persistent=False)
        self.chessboard: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x with learned noise, log |det| of that map, (batch,))."""
        level, noise = self._cells(x)
        a = torch.logit(noise)
        logdet = -_slope(a)
        for i, net in enumerate(self.nets):
            log_scale, shift = self._said(net, level, a, i)
            a, logdet = a * log_scale.exp() + shift, logdet + log_scale
        return self._joined(level, a), (logdet + _slope(a)).flatten(1).sum(1)

    def invert(self, x: Tensor) -> Tensor:
        """The rows of `forward` again."""
        level, noise = self._cells(x)
        a = torch.logit(noise)
        for i, net in reversed(list(enumerate(self.nets))):
            log_scale, shift = self._said(net, level, a, i)
            a = (a - shift) * (-log_scale).exp()
        return self._joined(level, a)

    def _said(self, net: nn.Module, level: Tensor, a: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(log scale, shift) of a coupling, 0 where pixels stay as they are."""
        moves = self.chessboard if i % 2 else ~self.chessboard
        seen = torch.where(moves, 0.0, torch.sigmoid(a) - 0.5)
        board = moves[:1].expand(len(a), -1, -1, -1)
        kind = next(net.parameters()).dtype
        inputs = torch.cat([2 * level / (self.levels - 1) - 1, seen, board.to(a.dtype)], 1)
        log_scale, shift = net(inputs.to(kind)).to(a.dtype).chunk(2, 1)
        log_scale = REACH * torch.tanh(log_scale / REACH)
        return torch.where(moves, log_scale, 0.0), torch.where(moves, shift, 0.0)

    def _cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(levels, noise within them) as images."""
        scaled = (x * self.levels).unflatten(1, self.shape)
        level = scaled.floor().clamp(0, self.levels - 1)
        return level, (scaled - level).clamp(EDGE, 1 - EDGE)

    def _joined(self, level: Tensor, a: Tensor) -> Tensor:
        noise = torch.sigmoid(a).clamp(EDGE, 1 - EDGE)
        return ((level + noise) / self.levels).flatten(1)


def _net(channels: int) -> nn.Sequential:
    last = nn.Conv2d(WIDTH, 2 * channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(
        nn.Conv2d(2 * channels + 1, WIDTH, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.SiLU(),
        last,
    )


def _slope(a: Tensor) -> Tensor:
    """log σ'(a)."""
    return logsigmoid(a) + logsigmoid(-a)
