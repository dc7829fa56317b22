"""Which field suits the data: candidates are trained for a moment and judged on unseen rows."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cnf.flow.objective import FlowMatching, Trainable
from cnf.training.loop import (
    Batches,
    Best,
    Plan,
    Progress,
    Training,
    is_beyond_chance,
    put,
)
from cnf.training.ranks import current

Bandwidth = tuple[float, float] | None
BANDWIDTHS: tuple[Bandwidth, ...] = ((0.5, 6.0), (1.0, 12.0), (0.2, 2.0), None)
WIDTHS = ((128, 128), (64, 64), (256, 256))
SHARE = 0.12  # of the budget
LEAST_SECONDS, LEAST_STEPS = 0.25, 20  # of one candidate: a shorter trial says nothing


class Shape(NamedTuple):
    """What is open of the default field: widths of its hidden layers, bandwidth of the first."""

    hidden: tuple[int, ...]
    bandwidth: Bandwidth


class Shapeable(Trainable, Protocol):
    """What choosing needs of a flow, which is an nn.Module besides."""

    @property
    def shape(self) -> Shape: ...
    @property
    def open_shape(self) -> tuple[bool, bool]: ...
    def take_field(self, field: nn.Module, shape: Shape) -> None: ...
    def new_field(self, shape: Shape) -> nn.Module: ...


class Score(Protocol):
    """The mean negative log-density of unseen rows, whose log-densities it keeps, (rows,)."""

    log_prob: Tensor

    def __call__(self) -> float: ...


def pilot_plan(flow: Shapeable, plan: Plan) -> Plan | None:
    """The plan of all trials together; None where nothing is open or the budget is too small.

    plan: of the whole budget, in seconds or steps.
    """
    count = _count(flow)
    if count < 2:
        return None
    if plan.steps is not None:
        steps = int(SHARE * plan.steps) // count * count
        return replace(plan, phase="pilot", steps=steps) if steps >= count * LEAST_STEPS else None
    seconds = SHARE * (plan.seconds or 0.0)
    return (
        replace(plan, phase="pilot", seconds=seconds) if seconds > count * LEAST_SECONDS else None
    )


class Pilot:
    """The trials, one after another; the flow is left with the field under which unseen rows are
    most likely.

    Bandwidths of the first layer come first, then widths; all have the same share of the plan, and
    one must beat the best before it beyond doubt.  The chosen one keeps what it has learned.
    As a `Training` it can be put down between two records and taken up again.
    """

    def __init__(self, flow: Shapeable, batches: Batches, score: Score, plan: Plan) -> None:
        self.flow, self.batches, self.score = flow, batches, score
        widths, bandwidths = flow.open_shape
        self._first = flow.shape
        self._bandwidths = BANDWIDTHS if bandwidths else (flow.shape.bandwidth,)
        self._widths = WIDTHS[1:] if widths else ()
        self.count = _count(flow)
        self.plan = _share(plan, self.count)
        self.judged, self.elapsed = 0, 0.0
        self.best: _Trial | None = None
        self.trial: _Trial | None = None

    @property
    def is_done(self) -> bool:
        """Whether all are trained; the last is judged when the records end."""
        is_last = self.judged == self.count - 1
        return self.trial is not None and is_last and self.trial.training.is_done

    def __iter__(self) -> Generator[Progress]:
        try:
            while self.judged < self.count:
                trial = self.trial = self.trial or self._trial(self._shape())
                for record in trial.training:
                    trial.seconds = record.seconds
                    others = (self.count - self.judged - 1) * (record.seconds + record.remaining)
                    yield replace(
                        record,
                        seconds=self.elapsed + record.seconds,
                        remaining=record.remaining + others,
                    )
                self._judge(trial)
        finally:
            if self.best is not None:
                self.flow.take_field(self.best.field, self.best.shape)

    def _shape(self) -> Shape:
        """Of the next candidate."""
        if self.judged < len(self._bandwidths):
            return self._first._replace(bandwidth=self._bandwidths[self.judged])
        assert self.best is not None
        hidden = self._widths[self.judged - len(self._bandwidths)]
        return Shape(hidden, self.best.shape.bandwidth)

    def _trial(self, shape: Shape) -> _Trial:
        return _Trial(self.flow, shape, self.batches, self.score, self.plan)

    def _judge(self, trial: _Trial) -> None:
        """Take the best weights of a trial that has ended, and see whether it is the best."""
        trial.finish(self.score.log_prob)
        if self.best is None or current().any(trial.beats(self.best)):
            self.best = trial
        self.elapsed += trial.seconds
        self.judged, self.trial = self.judged + 1, None

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how it goes on, of tensors and plain values."""
        best, trial = self.best, self.trial
        return {
            "judged": self.judged,
            "elapsed": self.elapsed,
            "best": None if best is None else best.result(),
            "trial": None if trial is None else trial.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with a flow and a plan as they were."""
        self.judged, self.elapsed = state["judged"], state["elapsed"]
        if (best := state["best"]) is not None:
            self.best = self._trial(shape_of(best["shape"]))
            self.best.field.load_state_dict(best["field"])
            self.best.log_prob = best["log_prob"]
        if (trial := state["trial"]) is not None:
            self.trial = self._trial(shape_of(trial["shape"]))
            self.trial.load_state_dict(trial)


class _Trial:
    """A candidate, its field in the flow's place, and the unseen rows' log-densities under it."""

    def __init__(
        self, flow: Shapeable, shape: Shape, batches: Batches, score: Score, plan: Plan
    ) -> None:
        self.shape = shape
        self.field = flow.new_field(shape)
        self.log_prob = torch.tensor([-math.inf])
        self.seconds = 0.0
        flow.take_field(self.field, shape)
        self.training = Training(FlowMatching(flow), batches, plan, validate=score, best=Best())

    def finish(self, log_prob: Tensor) -> None:
        """Take the best weights, and the log-densities of unseen rows under them."""
        if self.training.best.weights:  # none where no density could be computed
            put([p for p in self.field.parameters() if p.requires_grad], self.training.best.weights)
        self.log_prob = log_prob

    def beats(self, other: _Trial) -> bool:
        """Whether the rows are more likely here, by more than their differences leave in doubt."""
        gain = self.log_prob - other.log_prob
        if not (torch.isfinite(gain).all() and len(gain) > 1):
            return bool(self.log_prob.mean() > other.log_prob.mean())
        return is_beyond_chance(gain)

    def result(self) -> dict[str, Any]:
        """What remains of a trial that was judged."""
        return {
            "shape": stored_shape(self.shape),
            "field": self.field.state_dict(),
            "log_prob": self.log_prob,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "shape": stored_shape(self.shape),
            "seconds": self.seconds,
            "training": self.training.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]
        self.training.load_state_dict(state["training"])


def stored_shape(shape: Shape) -> dict[str, Any]:
    """A shape as plain values."""
    return shape._asdict()


def shape_of(stored: dict[str, Any]) -> Shape:
    """The inverse of `stored_shape`."""
    return Shape(**stored)


def _count(flow: Shapeable) -> int:
    """How many candidates there are; 1 where nothing is open."""
    widths, bandwidths = flow.open_shape
    return (len(BANDWIDTHS) if bandwidths else 1) + (len(WIDTHS) - 1 if widths else 0)


def _share(plan: Plan, count: int) -> Plan:
    """The plan of one of so many trials; measured at its end alone."""
    if plan.steps is not None:
        return replace(plan, steps=plan.steps // count, validations=1, patience=None)
    return replace(plan, seconds=(plan.seconds or 0.0) / count, validations=1, patience=None)
