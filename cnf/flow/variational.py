"""How a flow is fitted to a density that can be evaluated, up to a constant, and not sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cnf.error import InputError, IntegrationError, whole_number
from cnf.flow.batch import as_context, shaped_context
from cnf.flow.objective import Trainable, fresh, training_solver
from cnf.flow.recipe import TOLERANCE, checked_budget, follow, move_flow
from cnf.flow.regularizer import Regularizer
from cnf.training.loop import Best, Plan, Progress, put, train
from cnf.training.seed import seeded

LogDensity = Callable[..., Tensor]  # of x (n, dim), and of contexts (n, k) if there are any
LEARNING_RATE = 5e-3
VALIDATION_DRAWS = 2048  # of the base, the same every time


class ReverseKL(nn.Module):
    """The mean of log q(x) − log p̃(x) over n draws of a flow q, in nats, 0-d.

    It is KL(q‖p) − log Z for the density p = p̃ / Z, so that minus the loss bounds log Z from below:
    training it fits a flow to a density that is known up to a constant and cannot be sampled.
    log_density: x (n, dim) → log p̃(x) (n,), differentiable; of a conditional flow (x, context) →
    log p̃(x | context), a context (n, k) for each row, and the loss is the mean over contexts.
    tolerance, regularizer: as for `MaximumLikelihood`.
    forward(n) draws n; forward(z) carries draws z (n, dim) of the base; forward(…, context) for a
    conditional flow.
    Raises InputError for a log-density of another shape, or through which no gradient goes.
    Source: Rezende & Mohamed 2015, section 2; Chen et al. 2018, section 4.1; with contexts:
    Kingma & Welling 2014, section 2.
    """

    def __init__(
        self,
        flow: Trainable,
        log_density: LogDensity,
        *,
        tolerance: float | None = None,
        regularizer: Regularizer | None = None,
    ) -> None:
        super().__init__()
        if not callable(log_density):
            raise InputError(
                "log_density must be a function of x (n, dim) that returns (n,), such as a "
                f"distribution's log_prob, got {log_density!r}"
            )
        if regularizer is not None and regularizer.steer:
            raise InputError(
                "steer= moves the base's end of the path; it is for data: leave it out"
            )
        if getattr(flow, "context_dropout", 0.0):
            raise InputError(
                "the flow withholds contexts (context_dropout=), and reverse KL knows no density "
                "to learn without one; make a flow that does not"
            )
        self.flow = flow
        self.log_density = partial(log_density)  # a module among it is no part of this one
        self.tolerance = tolerance
        self.regularizer = regularizer or Regularizer()
        self.nfe: int | None = None
        self.terms: dict[str, Tensor] = {}

    def forward(self, draws: int | Tensor, context: Any = None) -> Tensor:
        z = draws if isinstance(draws, Tensor) else self.flow.draw_base(draws)
        context = as_context(context, z.shape[:1], self.flow.kind, self.flow.context)
        added = self.regularizer
        divergence = added.around(fresh(self.flow.chosen_divergence()))
        solver = training_solver(self.flow.solver, self.tolerance)
        field = self.flow.conditioned(context, training=True)
        x, log_prob, moved = self.flow.carry_to_data(z, divergence, solver, field)
        self.nfe = moved.stats.calls
        kl = (log_prob - self._target(x, context)).mean()
        terms = added.measured(moved.along, 1.0)
        self.terms = {name: value.detach() for name, value in {"kl": kl, **terms}.items()}
        return kl + added.penalty(terms)

    def _target(self, x: Tensor, context: Tensor | None) -> Tensor:
        found = self.log_density(x) if context is None else self.log_density(x, context)
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"log_density must return one value a row, ({len(x)},), got {shape}; sum over "
                "the features"
            )
        if x.requires_grad and not found.requires_grad:
            raise InputError(
                "no gradient goes through log_density: compute it by torch's functions of x, "
                "without detach() or no_grad()"
            )
        return found


def fit_flow_to_density(
    flow: Any,
    log_density: LogDensity,
    context: Any,
    *,
    seconds: float | None,
    steps: int | None,
    seed: int | None,
    lr: float | None,
    batch_size: int,
    regularizer: Regularizer | None,
    callback: Callable[[Progress], None] | None,
    device: str | torch.device | None,
    progress: bool,
) -> None:
    """Fit `flow` in place; the arguments are those of `Flow.fit_to_density`."""
    if device is not None:
        move_flow(flow, device)
    seconds, steps, lr = checked_budget(seconds, steps, lr).or_default()
    batch_size = whole_number("batch_size", batch_size, 1)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the flow has no parameters to fit; make its field a torch.nn.Module")
    if isinstance(flow.base, nn.Module) and not flow.base.has_rsample:
        raise InputError(
            f"the base {type(flow.base).__name__} is learned and cannot be sampled with gradients, "
            "which reverse KL needs; take DiagonalGaussian or StudentT"
        )
    objective = ReverseKL(flow, log_density, tolerance=TOLERANCE, regularizer=regularizer)
    contexts = _contexts(flow, context)
    plan = Plan("kl", steps, seconds, lr=lr or LEARNING_RATE, validations=20)
    best = Best()
    with seeded(seed, flow.device):
        score = _Score(flow, log_density, contexts)
        best.offer(score(), [p.detach() for p in parameters])
        records: Any = train(
            objective,
            lambda: _batch(flow.draw_base(batch_size), contexts),
            plan,
            validate=score,
            best=best,
        )
        try:
            follow(records, 1, callback, progress)
        finally:
            if best.weights:
                put(parameters, best.weights)
            flow.whitening.is_fitted.fill_(True)  # the field has learned where it is
            flow.zero_grad()


def _contexts(flow: Any, context: Any) -> Tensor | None:
    """The contexts to draw from, (rows, k); the flow's map of them is set, if it was not before."""
    given = shaped_context(context, flow.kind, flow.context)
    if given is None:
        return None
    rows = given.reshape(-1, flow.context)
    if not len(rows):
        raise InputError("context has no rows to draw from; give some of those it will be asked of")
    if flow.contexts is not None and not flow.contexts.is_fitted:
        flow.contexts.fit(rows)
    return rows


def _batch(z: Tensor, contexts: Tensor | None) -> Any:
    """Draws of the base, with a context drawn for each where there are any."""
    if contexts is None:
        return z
    return z, contexts[torch.randint(len(contexts), (len(z),), device=z.device)]


class _Score:
    """The reverse KL over draws of the base, and contexts, that stay the same; infinite where it
    fails.
    """

    def __init__(self, flow: Any, log_density: LogDensity, contexts: Tensor | None) -> None:
        self._objective = ReverseKL(flow, log_density)
        batch = _batch(flow.draw_base(VALIDATION_DRAWS, 0).detach(), contexts)
        self._batch = batch if isinstance(batch, tuple) else (batch,)

    @torch.no_grad()
    def __call__(self) -> float:
        try:
            found = self._objective(*self._batch).item()
        except IntegrationError:
            return math.inf
        return found if math.isfinite(found) else math.inf
