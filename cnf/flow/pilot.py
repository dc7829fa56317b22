"""Which field suits the data: candidates are trained for a moment and judged on unseen rows."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cnf.flow.objective import FlowMatching, Trainable
from cnf.training.loop import Batches, Best, Plan, Progress, put, train
from cnf.training.ranks import current

Bandwidth = tuple[float, float] | None
BANDWIDTHS: tuple[Bandwidth, ...] = ((0.5, 6.0), (1.0, 12.0), (0.2, 2.0), None)
WIDTHS = ((128, 128), (64, 64), (256, 256))
SHARE = 0.12  # of the budget
LEAST_SECONDS, LEAST_STEPS = 0.25, 20  # of one candidate: a shorter trial says nothing
DOUBT = 1.0  # standard errors by which a candidate must beat the best before it


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


def choose_field(
    flow: Shapeable, batches: Batches, score: Score, plan: Plan
) -> Generator[Progress]:
    """Give the flow the field under which unseen rows are most likely; records of all trials.

    Bandwidths of the first layer come first, then widths; all have the same share of the plan, and
    one must beat the best before it beyond doubt.  The chosen one keeps what it has learned.
    """
    widths, bandwidths = flow.open_shape
    plan = _share(plan, _count(flow))
    best: _Trial | None = None
    elapsed = 0.0

    def attempt(shape: Shape) -> Generator[Progress]:
        nonlocal best, elapsed
        record = None
        trial = _Trial(flow, shape)
        for record in trial.run(batches, score, plan):
            yield replace(record, seconds=elapsed + record.seconds)
        elapsed += record.seconds if record is not None else 0.0
        if best is None or current().any(trial.beats(best)):
            best = trial

    first = flow.shape
    try:
        for bandwidth in BANDWIDTHS if bandwidths else (first.bandwidth,):
            yield from attempt(first._replace(bandwidth=bandwidth))
        assert best is not None
        bandwidth = best.shape.bandwidth
        for hidden in WIDTHS[1:] if widths else ():
            yield from attempt(Shape(hidden, bandwidth))
    finally:
        if best is not None:
            flow.take_field(best.field, best.shape)


class _Trial:
    """A candidate, its field in the flow's place, and the unseen rows' log-densities under it."""

    def __init__(self, flow: Shapeable, shape: Shape) -> None:
        self.flow, self.shape = flow, shape
        self.field = flow.new_field(shape)
        self.log_prob = torch.tensor([-math.inf])
        flow.take_field(self.field, shape)

    def run(self, batches: Batches, score: Score, plan: Plan) -> Generator[Progress]:
        """Train by flow matching; the records."""
        best = Best()
        yield from train(FlowMatching(self.flow), batches, plan, validate=score, best=best)
        put([p for p in self.field.parameters() if p.requires_grad], best.weights)
        self.log_prob = score.log_prob

    def beats(self, other: _Trial) -> bool:
        """Whether the rows are more likely here, by more than their differences leave in doubt."""
        gain = self.log_prob - other.log_prob
        if not (torch.isfinite(gain).all() and len(gain) > 1):
            return bool(self.log_prob.mean() > other.log_prob.mean())
        return bool(gain.mean() > DOUBT * gain.std() / math.sqrt(len(gain)))


def _count(flow: Shapeable) -> int:
    """How many candidates there are; 1 where nothing is open."""
    widths, bandwidths = flow.open_shape
    return (len(BANDWIDTHS) if bandwidths else 1) + (len(WIDTHS) - 1 if widths else 0)


def _share(plan: Plan, count: int) -> Plan:
    """The plan of one of so many trials; measured at its end alone."""
    if plan.steps is not None:
        return replace(plan, steps=plan.steps // count, validations=1, patience=None)
    return replace(plan, seconds=(plan.seconds or 0.0) / count, validations=1, patience=None)
