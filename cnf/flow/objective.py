"""Modules whose forward(x, context) is a loss, for `Flow.fit` and for one's own training loop."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cnf.error import InputError, checked_share
from cnf.flow.batch import Kind, as_batch
from cnf.flow.conditioned import Conditioned
from cnf.flow.continuous import Moved, Solver
from cnf.flow.coupling import Coupling, choose_coupling
from cnf.flow.divergence import Divergence, Hutchinson
from cnf.flow.regularizer import Regularizer
from cnf.flow.transform import Support
from cnf.ode.control import Adaptive
from cnf.ode.integrate import Stats
from cnf.training.captured import Captured
from cnf.training.ranks import current

TRAINING_STEPS = 500  # of a solve to a tolerance of training
LATE_EDGE = 0.02  # how close to the data times are told apart


class Trainable(Protocol):
    """What the objectives need of a flow, which is an nn.Module besides."""

    field: nn.Module
    solver: Solver
    context: int

    @property
    def kind(self) -> Kind: ...
    @property
    def has_own_base(self) -> bool: ...
    def chosen_divergence(self) -> Divergence: ...
    def white(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def conditioned(
        self,
        context: Tensor | None = None,
        guidance: float | None = None,
        *,
        training: bool = False,
    ) -> Conditioned: ...
    def log_prob_of_rows(
        self,
        x: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
    ) -> tuple[Tensor, Stats]: ...
    def carry_to_base(
        self,
        x: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
        times: tuple[float, float] = ...,
    ) -> tuple[Tensor, Moved]: ...
    def carry_to_data(
        self,
        z: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
    ) -> tuple[Tensor, Tensor, Moved]: ...
    def draw_base(self, n: int, seed: int | None = None) -> Tensor: ...


class MaximumLikelihood(nn.Module):
    """The mean negative log-likelihood of a batch under a flow, in nats, 0-d.

    flow: trained in place; tolerance: of adaptive steps in training, or None for the flow's own;
    regularizer: what is added to it; solver: of training, or None for the flow's own.  With
    Hutchinson's estimate the noise is drawn anew for every row and batch.  After a call `nfe` is
    what it cost, and `terms` what the loss was made of.
    Source: Chen et al. 2018, section 4; Grathwohl et al. 2019, section 3.
    """

    def __init__(
        self,
        flow: Trainable,
        *,
        tolerance: float | None = None,
        regularizer: Regularizer | None = None,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.tolerance = tolerance
        self.solver = solver
        self.regularizer = regularizer or Regularizer()
        self.nfe: int | None = None
        self.terms: dict[str, Tensor] = {}

    def forward(self, x: Any, context: Any = None) -> Tensor:
        x, context = _taken(self.flow, x, context)
        conditioned = self.flow.conditioned(context, training=True)
        added = self.regularizer
        divergence = added.around(fresh(self.flow.chosen_divergence()))
        solver = training_solver(self.solver or self.flow.solver, self.tolerance)
        times = (1.0, added.base_time())
        log_prob, moved = self.flow.carry_to_base(x, divergence, solver, conditioned, times)
        self.nfe = moved.stats.calls
        nll, terms = -log_prob.mean(), added.measured(moved.along, -1.0)
        self.terms = {name: value.detach() for name, value in {"nll": nll, **terms}.items()}
        return nll + added.penalty(terms)


class FlowMatching(nn.Module):
    """The mean squared distance of a flow's field to straight paths' velocities, 0-d.

    A batch of white data z₁ meets noise z₀ ~ N(0, I) and times t, evenly spread over [0, 1] with a
    random start; at z_t = (1 − t) z₀ + t z₁ the wanted velocity is E[z₁ − z₀ | z_t].  It is
    estimated from all z₁ of a group of `neighbours` rows, weighted by how likely each leads to z_t:
    with few dimensions this has a far lower variance than z₁ − z₀ alone, which is `neighbours=1`.
    With contexts those of the group count that have the same one.
    coupling: which z₀ meets which z₁.  "independent" is as they come; "ot", or OptimalTransport,
    gives each z₁ of a group the noise that makes the paths of the group shortest.  The wanted
    velocity is then z₁ − z₀ itself, paths are straighter and cross less, and a solve costs less.
    late: share of the times that are drawn close to the data instead, with a density that grows as
    1/(1 − t): errors of the field weigh more in the likelihood there than elsewhere.
    capture: on a GPU, call the field by CUDA graphs: for fields that read and draw no numbers.
    It trains a flow with a standard normal base; raises InputError for any other.  Groups are those
    of the whole batch, where ranks train together.
    Source: Lipman et al. 2023, section 4.1; Liu et al. 2023; weights: Xu et al. 2023, section 3;
    couplings: Pooladian et al. 2023, Tong et al. 2024; times: Song et al. 2021, section 3.
    """

    def __init__(
        self,
        flow: Trainable,
        *,
        neighbours: int = 512,
        coupling: str | Coupling = "independent",
        late: float = 0.0,
        capture: bool = False,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.neighbours = neighbours
        self.late = checked_share("late", late)
        self._captured = Captured() if capture else None
        self.coupling = choose_coupling(coupling)

    def forward(self, x: Any, context: Any = None) -> Tensor:
        if self.flow.has_own_base:
            raise InputError(
                "flow matching is for flows that start at the standard normal, and this one has a "
                "base of its own; train it with MaximumLikelihood"
            )
        x, context = _taken(self.flow, x, context)
        field, rows, told = self.flow.conditioned(context, training=True)
        ranks = current()
        # detached: what is learned of a map, its density teaches
        end = ranks.whole(self.flow.white(x)[0].detach())
        told = None if told is None else ranks.whole(told)
        start = torch.randn_like(end)
        if self.coupling is not None:
            start = start[self.coupling.match(start, end, told)]
        batch = len(end)
        t = (torch.rand((), device=end.device) + torch.arange(batch, device=end.device) / batch) % 1
        t = drawn_late(t, self.late).to(end.dtype)[torch.randperm(batch, device=end.device)]
        at = torch.lerp(start, end, t[:, None])
        own = ranks.share(batch)
        velocity = self._velocity(at, start, end, t, told, own)
        found = self._evaluated(field, t[own], at[own], *rows)
        return (found - velocity).square().sum(-1).mean()

    def _evaluated(self, field: Any, *tensors: Tensor) -> Tensor:
        if self._captured is None or current().world > 1:
            return field(*tensors)
        return self._captured(field, *tensors)

    def _velocity(
        self,
        at: Tensor,
        start: Tensor,
        end: Tensor,
        t: Tensor,
        told: Tensor | None,
        own: slice,
    ) -> Tensor:
        """What is wanted of the rows `own` among those of a whole batch."""
        batch, group = len(end), min(self.neighbours, len(end))
        if group <= 1 or self.coupling is not None:
            return (end - start)[own]
        first, last = own.start // group * group, min(-(-own.stop // group) * group, batch)
        whole = (last - first) // group * group
        given = (at, end, t) if told is None else (at, end, t, told)
        given = tuple(x[first:last] for x in given)  # whole groups
        grouped = (x[:whole].unflatten(0, (-1, group)) for x in given)
        parts = [expected_velocity(*grouped).flatten(0, 1)] if whole else []
        if whole < last - first:
            parts.append(expected_velocity(*(x[whole:] for x in given)))
        return torch.cat(parts)[own.start - first : own.stop - first]


def _taken(flow: Trainable, x: Any, context: Any) -> tuple[Tensor, Tensor | None]:
    """Rows (batch, dim) and contexts (batch, columns) or None, as the flow takes them.

    Raises InputError for a wrong width, values that are not finite, or a context that is missing.
    """
    batch = as_batch(x, flow.kind, context, flow.context)
    rows, given = next(batch.chunks(max(1, len(batch.x))))
    if isinstance(support := getattr(flow, "support", None), Support):
        support.refuse_outside(rows)
    return rows, given


def drawn_late(u: Tensor, late: float) -> Tensor:
    """Times of which the share `late` has a density ∝ 1/(1 − t + LATE_EDGE), the others a uniform
    one, from u that is uniform over [0, 1], of the same shape.
    """
    if not late:
        return u
    edge = math.log1p(1 / LATE_EDGE)
    near = 1 + LATE_EDGE - LATE_EDGE * torch.exp(edge * (1 - u / late))
    return torch.where(u < late, near, (u - late) / (1 - late)).clamp(0, 1)


def expected_velocity(at: Tensor, end: Tensor, t: Tensor, told: Tensor | None = None) -> Tensor:
    """E[z₁ − z₀ | z_t = at] over the candidates `end`, for z₀ ~ N(0, I), of `at`'s shape.

    at, end: (…, rows, dim); t: (…, rows); told: contexts (…, rows, columns), of which those that
    differ make `end` no candidate.
    """
    t = t.unsqueeze(-1)
    noise = (1 - t).clamp_min(torch.finfo(t.dtype).eps)
    # log N(at; t·end, (1 − t)²) up to a constant of the row: one product over dim + 1 columns
    scale = t / noise.square()
    rows = torch.cat([scale * at, -0.5 * t * scale], -1)
    logits = rows @ torch.cat([end, end.square().sum(-1, keepdim=True)], -1).transpose(-1, -2)
    if told is not None:
        same = (told.unsqueeze(-2) == told.unsqueeze(-3)).all(-1)
        logits = logits.masked_fill(~same, -torch.inf)
    mean = torch.softmax(logits, -1) @ end
    return mean - (at - t * mean) / noise


def training_solver(solver: Solver, tolerance: float | None) -> Solver:
    """The solver with the tolerance of training, if there is one and its steps are adaptive."""
    if tolerance is None or not isinstance(solver.control, Adaptive):
        return solver
    # weights that need more steps are lost: let the loop skip the batch, and soon
    most = min(solver.max_steps, TRAINING_STEPS)
    return replace(solver.with_tolerance(tolerance), max_steps=most)


def fresh(divergence: Divergence) -> Divergence:
    """The divergence with noise of its own for every row and solve, as training wants it."""
    return replace(divergence, seed=None) if isinstance(divergence, Hutchinson) else divergence
