"""An ODE between invertible maps and a base: what every flow does to rows, vectors or images.

Time runs from t = 0, the base, to t = 1, the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnf.flow.accuracy import Request
from cnf.flow.base import base_log_prob, drawn
from cnf.flow.conditioned import Conditioned, embedded, guided, undisturbed
from cnf.flow.continuous import Moved, Solver, move, move_with_logdet
from cnf.flow.divergence import Divergence, choose_divergence
from cnf.ode.integrate import Stats
from cnf.training.seed import seeded

TO_BASE, TO_DATA = (1.0, 0.0), (0.0, 1.0)


class Carrier(nn.Module):
    """What a flow is made of its maps: `white` to where the ODE ends and `unwhite` back, both over
    rows, and `told` and `told_nothing`, which say what the field is told of contexts.
    """

    dim: int
    field: Any
    has_own_field: bool
    base: Any
    solver: Solver
    divergence: str | Divergence

    # the maps ---------------------------------------------------------------------------------

    def white(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, (batch, dim), where the ODE ends; log |det| of that map, (batch,)."""
        raise NotImplementedError

    def unwhite(self, z: Tensor) -> Tensor:
        """x, (batch, dim), of what `white` made of it."""
        raise NotImplementedError

    def told(self, context: Tensor | None, training: bool) -> Tensor | None:
        """What the field is told of contexts (batch, k), withheld at random in training; None of
        none.
        """
        raise NotImplementedError

    def told_nothing(self, told: Tensor) -> Tensor:
        """What the field is told where all contexts are withheld, of `told`'s shape."""
        raise NotImplementedError

    def encoded(
        self, x: Tensor, context: Tensor | None, request: Request, with_logdet: bool
    ) -> tuple[Tensor, Tensor]:
        """The base's points of rows x, and log |det dz/dx|, but of the maps alone unless asked."""
        field, rows, _ = self.conditioned(context, request.guidance)
        z, logdet = self.white(x)
        solver = request.solver.for_rows(field, z, rows)
        if not with_logdet:
            return move(field, z, TO_BASE, solver, rows), logdet
        moved = move_with_logdet(field, request.divergence, z, TO_BASE, solver, rows)
        return moved.x, (moved.logdet + logdet).to(x.dtype)

    def decoded(
        self, z: Tensor, context: Tensor | None, request: Request, with_log_prob: bool
    ) -> tuple[Tensor, Tensor]:
        """The data's points of rows z, and their log-densities if asked for, else nothing."""
        field, rows, _ = self.conditioned(context, request.guidance)
        solver = request.solver.for_rows(field, z, rows)
        if not with_log_prob:
            x = self.unwhite(move(field, z, TO_DATA, solver, rows))
            return x, x.new_empty(0)
        return self.carry_to_data(z, request.divergence, solver, Conditioned(field, rows))[:2]

    def log_prob_of_rows(
        self,
        x: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
    ) -> tuple[Tensor, Stats]:
        """Log-density of rows (batch, dim) by a divergence and a solver, unchecked; the cost.

        conditioned: what `conditioned` returned for the rows' contexts.
        """
        log_prob, moved = self.carry_to_base(x, divergence, solver, conditioned)
        return log_prob, moved.stats

    def carry_to_base(
        self,
        x: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
        times: tuple[float, float] = TO_BASE,
    ) -> tuple[Tensor, Moved]:
        """The same with the whole solve that gave it.

        times: other ends of the path: the density of the points on the way, where the first is
        below 1; where the base stands for once, see `Regularizer`.
        """
        field, rows = (conditioned or self.conditioned())[:2]
        z, logdet = self.white(x)
        moved = move_with_logdet(field, divergence, z, times, solver, rows)
        log_prob = base_log_prob(self.base, moved.x) + moved.logdet + logdet
        return log_prob.to(x.dtype), moved

    def carry_to_data(
        self,
        z: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
    ) -> tuple[Tensor, Tensor, Moved]:
        """(x, log-density) of what the base's rows z (batch, dim) are carried to; the solve."""
        field, rows = (conditioned or self.conditioned())[:2]
        moved = move_with_logdet(field, divergence, z, TO_DATA, solver, rows)
        x = self.unwhite(moved.x)
        log_prob = base_log_prob(self.base, z) - moved.logdet + self.white(x)[1]
        return x, log_prob.to(z.dtype), moved

    def draw_base(self, n: int, seed: int | None = None) -> Tensor:
        """n draws of the base, (n, dim), differentiable where the base's are."""
        with seeded(seed, self.device):
            return drawn(self.base, n, self.dim, self.dtype, self.device)

    # the field --------------------------------------------------------------------------------

    def conditioned(
        self,
        context: Tensor | None = None,
        guidance: float | None = None,
        *,
        training: bool = False,
    ) -> Conditioned:
        """The field to integrate for rows of these contexts, (batch, context), and what it takes of
        every row; training: contexts are withheld at random, and the field is in its own mode.
        """
        field = self.field
        if self.has_own_field and not training:
            field = undisturbed(field)
        told = self.told(context, training)
        if told is None:
            return Conditioned(field)
        given = embedded(field, told)
        if guidance is None or guidance == 1:
            return Conditioned(field, (given,), told)
        none = embedded(field, self.told_nothing(told))
        return Conditioned(guided(field, guidance), (given, none), told)

    def chosen_divergence(self) -> Divergence:
        """The divergence in use: what "auto" stands for with this field."""
        return choose_divergence(self.divergence, self.field)

    @property
    def has_own_base(self) -> bool:
        return self.base is not None

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError
