"""A fit of several phases, which can be put down between two records and taken up again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cnf.error import InputError, IntegrationError
from cnf.flow.objective import FlowMatching
from cnf.flow.pilot import Pilot, shape_of, stored_shape
from cnf.training.loop import Batches, Best, Plan, Progress, Training, put
from cnf.training.ranks import current
from cnf.training.snapshot import Snapshots

VALIDATION_ROWS = 2048  # looked at while training
PLENTY = 5  # rows to train on for each parameter, with which hardly any is learned by heart
LEAST_STEPS = 1000  # of the solver that a validation may take


class Origin:
    """What a fit began with, now or in the run whose snapshot goes on.

    settings: plain values by name, which must be the same then and now.  Of a fit that goes on the
    flow gets the field that it began with, untrained, and torch the random state, which decides the
    split.  Raises InputError where the settings are others, or the snapshot is of no fit.
    """

    def __init__(self, flow: Any, settings: dict[str, Any], snapshots: Snapshots | None) -> None:
        begun = None if snapshots is None else snapshots.begun
        self.settings: dict[str, Any] = {}
        self.shape, self.open_shape = flow.shape, flow.open_shape
        self.random = torch.get_rng_state()
        self._path = None if begun is None or snapshots is None else snapshots.path
        if begun is not None:
            self._load(begun.state)
        self.add(settings)
        if begun is not None:
            if not flow.has_own_field:
                flow.reopen_field(self.shape, self.open_shape)
            torch.set_rng_state(self.random)

    @property
    def is_new(self) -> bool:
        return self._path is None

    def add(self, settings: dict[str, Any]) -> None:
        """Settings that are known now; refused where the fit that goes on had others.

        What an older version did not write down is taken to be the same.
        """
        if self._path is None:
            self.settings |= settings
            return
        for name, value in settings.items():
            kept = self.settings.get(name, value)
            if kept != value:
                same = f"{name.removesuffix('=)')}={kept!r}, not {value!r}"
                what = "to other data" if name.endswith("data") else f"with {same}"
                raise InputError(
                    f"{self._path} is of a fit {what}; give the same again, or begin a new one"
                )

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "shape": stored_shape(self.shape),
            "open": self.open_shape,
            "random": self.random,
        }

    def _load(self, state: dict[str, Any]) -> None:
        try:
            kept = state["origin"]
            self.settings, self.shape = kept["settings"], shape_of(kept["shape"])
            self.open_shape, self.random = kept["open"], kept["random"]
        except (LookupError, TypeError) as error:
            raise InputError(f"{self._path} is of no fit of a flow; name another file") from error


class Fitting:
    """The phases of a fit, one after another; whatever ends it, the flow is left with its best
    weights.

    plans: of a pilot where the field is open, and of phases, each by the objective of its name;
    score: of the flow on unseen rows; origin: what it began with.  `state_dict` is all that decides
    how it goes on, but for torch's random state.
    """

    def __init__(
        self,
        flow: Any,
        plans: list[Plan],
        objectives: Mapping[str, nn.Module],
        batches: Batches,
        score: Validation,
        origin: Origin,
    ) -> None:
        self.flow, self.plans, self.objectives = flow, plans, objectives
        self.batches, self.score, self.origin = batches, score, origin
        self.best = Best()
        self.phase = self.records = 0
        self.elapsed = self.seconds = 0.0  # of the phases before, and of this one
        self.training: Pilot | Training | None = None

    @property
    def is_done(self) -> bool:
        """Whether no step is left to take."""
        is_last = self.phase == len(self.plans) - 1
        return self.training is not None and is_last and self.training.is_done

    def __iter__(self) -> Generator[Progress]:
        try:
            while self.phase < len(self.plans):
                training = self.training = self.training or self._begun()
                yield from self._records(training)
                self.elapsed += self.seconds
                self.phase, self.seconds, self.training = self.phase + 1, 0.0, None
        finally:
            if self.best.weights:
                put(self._parameters(), self.best.weights)

    def _records(self, training: Pilot | Training) -> Generator[Progress]:
        """The records of a phase, whose times are those of the whole fit."""
        later = sum(plan.seconds or 0.0 for plan in self.plans[self.phase + 1 :])
        with closing(iter(training)) as records:
            for record in records:
                self.seconds, self.records = record.seconds, self.records + 1
                yield replace(
                    record,
                    seconds=self.elapsed + record.seconds,
                    remaining=record.remaining + later,
                )

    def _begun(self) -> Pilot | Training:
        """The phase's training, from the best weights so far."""
        if self._is_pilot:
            return self._made()
        if self.best.weights:
            put(self._parameters(), self.best.weights)
        else:  # a fit never ends worse than it began, beyond chance
            (score,) = current().agreed(self.score())
            weights = [p.detach() for p in self._parameters()]
            self.best.offer(score, weights, self.score.losses)
        self.best.age = 0
        return self._made()

    def _made(self) -> Pilot | Training:
        """The phase's training as it starts with the flow's own weights."""
        plan = self.plans[self.phase]
        if self._is_pilot:
            return Pilot(self.flow, self.batches, self.score, plan)
        objective = self.score.objective = self.objectives[plan.phase]
        return Training(objective, self.batches, plan, validate=self.score, best=self.best)

    @property
    def _is_pilot(self) -> bool:
        return self.plans[self.phase].phase == "pilot"

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.flow.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how it goes on, of tensors and plain values; no copies."""
        return {
            "origin": self.origin.state_dict(),
            "phase": self.phase,
            "records": self.records,
            "elapsed": self.elapsed,
            "seconds": self.seconds,
            "shape": stored_shape(self.flow.shape),
            "score": self.score.state_dict(),
            "training": None if self.training is None else self.training.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with a flow as it was when the fit began.

        Raises RuntimeError, KeyError or ValueError if it is not of a fit like this one.
        """
        for name in ("phase", "records", "elapsed", "seconds"):
            setattr(self, name, state[name])
        shape = shape_of(state["shape"])
        is_other = shape != self.flow.shape and not self.flow.has_own_field
        if is_other and not self._is_pilot:
            self.flow.take_field(self.flow.new_field(shape), shape)
        if state["training"] is not None:
            self.training = self._made()
            self.training.load_state_dict(state["training"])
        self.score.load_state_dict(state["score"])


class Validation:
    """The score of a flow: mean negative log-likelihood of the validation rows, in nats; infinite
    where it fails.

    trained_on: how many other rows the flow is trained on, None where they never end.
    log_prob: of the rows, when they were last scored; objective: is told what scoring cost.
    Of ranks that train together each evaluates its share of the rows.
    """

    def __init__(self, flow: Any, rows: Tensor, trained_on: int | None) -> None:
        # from end to end: they may be sorted
        count = min(len(rows), VALIDATION_ROWS)
        chosen = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()
        self._flow, self._rows = flow, rows[chosen.to(rows.device)]
        self._most, self._trained_on = flow.solver.max_steps, trained_on
        self.log_prob = torch.full((count,), -math.inf)
        self.objective: nn.Module | None = None

    def __call__(self) -> float:
        ranks, total = current(), len(self._rows)
        own = self._evaluated(self._rows[ranks.share(total)])
        self.log_prob = ranks.whole(own, total)
        return -self.log_prob.mean().item()

    @property
    def losses(self) -> Tensor | None:
        """Of the rows, when they were last scored, (rows,), by which chance is told.

        None with too few rows to train on: a score that rises may mean that they are learned by
        heart, and is heeded whatever the doubt.
        """
        parameters = sum(p.numel() for p in self._flow.parameters() if p.requires_grad)
        few = self._trained_on is not None and self._trained_on < PLENTY * parameters
        return None if few else -self.log_prob

    @torch.no_grad()
    def _evaluated(self, rows: Tensor) -> Tensor:
        """Log-densities of the rows, −∞ where the solve fails, in float64 on the CPU."""
        flow, lost = self._flow, torch.full((len(rows),), -math.inf, dtype=torch.float64)
        if not len(rows):
            return lost
        x, *context = in_parts(rows.to(flow.device, flow.dtype), flow)
        solver = replace(flow.solver, max_steps=self._most)
        try:
            conditioned = flow.conditioned(*context)
            divergence = flow.chosen_divergence()
            log_prob, stats = flow.log_prob_of_rows(x, divergence, solver, conditioned)
        except IntegrationError:
            return lost
        # weights that need so many more steps than the first ones are lost, and not worth the time
        wanted = max(LEAST_STEPS, 20 * stats.attempts)
        self._most = min(flow.solver.max_steps, wanted)
        if isinstance(self.objective, FlowMatching):
            self.objective.nfe = stats.calls
        return log_prob.double().cpu()

    @property
    def digest(self) -> str:
        """Of the rows, by which they are known again."""
        return digest(self._rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "most": self._most,
            "log_prob": self.log_prob,
            "nfe": getattr(self.objective, "nfe", None),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._most, self.log_prob = state["most"], state["log_prob"]
        if isinstance(self.objective, FlowMatching):
            self.objective.nfe = state["nfe"]


def digest(tensor: Tensor) -> str:
    """Of a tensor's numbers, by which they are known again."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def in_parts(rows: Tensor, flow: Any) -> tuple[Tensor, ...]:
    """(x,), or (x, contexts) of a conditional flow, of rows that go on with their contexts."""
    return (rows,) if not flow.context else (rows[:, : flow.dim], rows[:, flow.dim :])
