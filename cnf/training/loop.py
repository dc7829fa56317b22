"""The training loop: a generator of progress records over any module that returns a loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cnf.error import IntegrationError, TrainingError
from cnf.training.optimizer import Adam, Optimizer
from cnf.training.ranks import connected, current

Batch = Tensor | tuple[Any, ...]  # what the module takes: one argument or several
Batches = Callable[[], Batch]
Validate = Callable[[], float]

PATIENCE_BATCHES = 50  # non-finite losses in a row before giving up
VALIDATION_SHARE = 0.15  # of the time, at the most, where the budget is in seconds
DOUBT = 1.0  # standard errors of a mean difference up to which it may be chance
TIMED_STEPS = 10  # steps that are timed before their number is planned


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step.

    phase: a word for the objective; step of steps (planned); loss: of this batch, NaN where it was
    skipped; lr; seconds: elapsed, remaining: expected; validation: the score of the averaged
    weights, lower is better, where this step measured it; nfe, nfe_backward: evaluations of the
    field and error: the share of the batch that was classified wrongly, where the objective counts
    them; skipped: batches left out so far because their loss or gradient was not finite.
    """

    phase: str
    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    remaining: float
    validation: float | None = None
    nfe: int | None = None
    skipped: int = 0
    nfe_backward: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Plan:
    """How to train: steps, or seconds that are turned into steps by timing the first ones.

    lr: the peak of a cosine with a linear start over `warmup` of the steps; clip: largest gradient
    norm; memory: the averaged weights' horizon as a share of the steps taken; validations: how
    often to measure over the whole; patience: stop after so many without improvement, or None;
    optimizer: what takes the steps; drops: shares of the whole at which lr falls to a tenth, in the
    place of the cosine.
    """

    phase: str
    steps: int | None = None
    seconds: float | None = None
    lr: float = 1e-3
    warmup: float = 0.02
    clip: float = 10.0
    memory: float = 0.08
    validations: int = 10
    patience: int | None = None
    optimizer: Optimizer = Adam()  # noqa: RUF009
    drops: tuple[float, ...] = ()

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step."""
        if self.drops:
            return self.lr * 0.1 ** sum(step >= share * steps for share in self.drops)
        return self.lr * schedule(step, steps, self.warmup)


@dataclass
class Best:
    """The averaged weights to keep so far and their score; starts with none.

    They are those of the lowest score, or later ones where the rows leave in doubt whether their
    score is higher: of two that cannot be told apart the longer trained are the better as a rule.
    age: how many were offered in a row that are not kept; lowest, losses: the lowest score, and the
    rows' losses of which it is the mean, if it is one.
    """

    score: float = math.inf
    weights: list[Tensor] = field(default_factory=list)
    age: int = 0
    lowest: float = math.inf
    losses: Tensor | None = None

    def offer(self, score: float, weights: list[Tensor], losses: Tensor | None = None) -> None:
        """Keep a copy of `weights` if their score is lower, or may be.

        losses: (rows,), of which the score is the mean, of the same rows at every call.
        """
        if score < self.lowest:
            self.lowest, self.losses = score, losses
        elif not self._may_be_as_low(losses):
            self.age += 1
            return
        self.score, self.age = score, 0
        self.weights = [weight.clone() for weight in weights]

    def _may_be_as_low(self, losses: Tensor | None) -> bool:
        """Whether the rows' losses are above those of the lowest score by no more than chance."""
        if losses is None or self.losses is None or len(losses) < 2:
            return False
        excess = losses - self.losses
        return bool(excess.isfinite().all()) and not is_beyond_chance(excess)


def is_beyond_chance(differences: Tensor) -> bool:
    """Whether the mean of differences (rows,), at least two, is above 0 by more than DOUBT of its
    standard errors.
    """
    error = differences.std() / math.sqrt(len(differences))
    return bool(differences.mean() > DOUBT * error)


def train(
    module: nn.Module, batches: Batches, plan: Plan, *, validate: Validate, best: Best
) -> Iterator[Progress]:
    """Train `module`, whose forward(batch) is the loss; a record after every step.

    batches: the next batch at each call, a tensor or a tuple of forward's arguments; validate: the
    score, with the averaged weights in place; best: takes the best averaged weights, in the order
    of module.parameters().
    A batch whose loss or gradient is not finite is skipped and counted; raises TrainingError after
    PATIENCE_BATCHES of them in a row, and where there was no other and best has nothing before it.
    """
    yield from Training(module, batches, plan, validate=validate, best=best)


class Training:
    """A training that can be put down between two records and taken up again: see `train`.

    `state_dict` is all that decides how it goes on, but for torch's random state, which is the
    program's: weights, averaged and best weights, optimizer, step, seconds used, and where batches
    stand if they offer `state_dict` and `load_state_dict` themselves.
    Of ranks that train together each has its own batches, and all go the same way: the gradient is
    their mean, and whatever hangs on a clock or a measurement is decided by all.
    """

    def __init__(
        self, module: nn.Module, batches: Batches, plan: Plan, *, validate: Validate, best: Best
    ) -> None:
        self.module, self.batches, self.plan = module, batches, plan
        self.validate, self.best = validate, best
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.ranks = current()
        self._loss = self.ranks.over(module)
        self.optimizer = plan.optimizer.over(self.parameters, plan.lr)
        self.average = Average(self.parameters, plan.memory)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self._follows = bool(best.weights)  # a training before it, whose weights are worth keeping
        self.is_done = False
        self._error: float | None = None
        self._clock = _Clock(plan)

    @property
    def seconds(self) -> float:
        """That it has taken so far."""
        return self._clock.elapsed()

    def __iter__(self) -> Generator[Progress]:
        steps, _ = self._planned()
        while not self.is_done:
            record = self._advance(steps)
            steps = record.steps
            yield record

    def _planned(self) -> tuple[int, bool]:
        """How many steps are planned by now, and whether to validate."""
        clock = self._clock
        steps, due = self.ranks.agreed(clock.steps(self.step), clock.validation_due(self.step))
        return int(steps), bool(due)

    def _advance(self, steps: int) -> Progress:
        """One step of as many as planned; where training stands after it."""
        plan, clock = self.plan, self._clock
        lr = plan.rate(self.step, steps)
        loss = self._step(self.batches(), lr)
        self.step += 1
        self._count(loss)
        steps, due = self._planned()
        self._check_hope(self.step >= steps and self.skipped == self.step and not self._follows)
        last = self.step >= steps  # decided once: the weights of the last step are always measured
        score = None
        if due or last:
            with self.average.in_place(), clock.validating(self.step):
                (score,) = self.ranks.agreed(self.validate())
            losses = getattr(self.validate, "losses", None)
            self.best.offer(score, self.average.weights, losses)
        tired = plan.patience is not None and self.best.age >= plan.patience
        self.is_done = last or tired
        return Progress(
            phase=plan.phase,
            step=self.step,
            steps=steps,
            loss=loss,
            lr=lr,
            seconds=clock.elapsed(),
            remaining=clock.remaining(self.step),
            validation=score,
            nfe=getattr(self.module, "nfe", None),
            skipped=self.skipped,
            nfe_backward=getattr(self.module, "nfe_backward", None),
            error=self._error,
        )

    def _count(self, loss: float) -> None:
        """Take the weights into the average, or count a batch that was left out."""
        if math.isfinite(loss):
            self.average.update()
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._check_hope(self.skipped_in_a_row >= PATIENCE_BATCHES)

    def _check_hope(self, is_lost: bool) -> None:
        """Raises TrainingError where nothing is to be expected of going on."""
        if is_lost:
            several = self.skipped_in_a_row > 1
            which = f"{self.skipped_in_a_row} batches in a row" if several else "the only batch"
            raise TrainingError(
                f"{which} had a loss or gradient that is not finite (last at step {self.step} of "
                f"phase {self.plan.phase!r}); try a smaller lr, looser tolerances, or data of unit "
                "scale"
            )

    def _step(self, batch: Batch, lr: float) -> float:
        """One optimizer step; the loss, or NaN where it was left out."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = self._forward(batch)
        value = self._measured(loss)
        if loss is None or not math.isfinite(value):
            return math.nan
        try:
            with connected():
                loss.backward()
        except IntegrationError:
            if self.ranks.world > 1:
                raise  # the others wait for this gradient: they cannot leave the batch out
            return math.nan
        norm = nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
        if not math.isfinite(norm.item()):
            return math.nan
        self.optimizer.step()
        return value

    def _forward(self, batch: Batch) -> Tensor | None:
        """The loss, or None where a solve failed."""
        try:
            with torch.enable_grad():
                return self._loss(*batch) if isinstance(batch, tuple) else self._loss(batch)
        except IntegrationError:
            return None

    def _measured(self, loss: Tensor | None) -> float:
        """The loss of the whole batch, not finite where a rank has none; notes its error."""
        value = math.nan if loss is None else loss.item()
        error = getattr(self.module, "error", None)
        value, share = self.ranks.mean(value, error or 0.0)
        self._error = None if error is None else share
        return value

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how it goes on, of tensors and plain values; no copies."""
        state = {name: getattr(self, name) for name in _COUNTS}
        kept = getattr(self.batches, "state_dict", None)
        return state | {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "best": vars(self.best),
            "clock": self._clock.state_dict(),
            "batches": None if kept is None else kept(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; raises RuntimeError, KeyError or ValueError if it is not of a training
        like this one.
        """
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        vars(self.best).update({"lowest": state["best"]["score"], **state["best"]})
        self._clock.load_state_dict(state["clock"])
        if state["batches"] is not None:
            batches: Any = self.batches
            batches.load_state_dict(state["batches"])
        for name in _COUNTS:
            setattr(self, name, state[name])


_COUNTS = ("step", "skipped", "skipped_in_a_row", "is_done")


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at a step: a linear start, then half a cosine."""
    start = max(1.0, warmup * steps)
    return min(1.0, (step + 1) / start) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


class Average:
    """Averaged weights whose memory is a fixed share of the steps taken so far.

    Source: the power-function average of Karras et al. 2024, section 3.1.
    """

    def __init__(self, parameters: list[nn.Parameter], memory: float) -> None:
        self._parameters: list[Tensor] = [*parameters]
        self._power = 1 / memory
        self._count = 0
        self.weights = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self._count += 1
        keep = (1 - 1 / self._count) ** (1 + self._power)
        get_ema_multi_avg_fn(keep)(self.weights, self._parameters, None)  # a call for all of them

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        put(self.weights, state["weights"])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights in the module's place, for as long as the context lasts."""
        with weights_in_place(self._parameters, self.weights):
            yield


@contextmanager
def weights_in_place(parameters: list[Tensor], weights: list[Tensor]) -> Iterator[None]:
    """Other weights in the parameters' place, for as long as the context lasts."""
    kept = [p.detach().clone() for p in parameters]
    put(parameters, weights)
    try:
        yield
    finally:
        put(parameters, kept)


@torch.no_grad()
def put(parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Copy weights into parameters."""
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)


class _Clock:
    """Turns a budget into a number of steps and says when to validate."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._start = time.perf_counter()
        self._last_validation = 0.0  # as a share of the whole
        self._validating = 0.0  # seconds

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def steps(self, step: int) -> int:
        """The planned number of steps; of a budget in seconds, measured afresh at every call."""
        if self._plan.steps is not None:
            return self._plan.steps
        seconds = self._plan.seconds or 0.0
        if step < TIMED_STEPS:
            return TIMED_STEPS if self.elapsed() < seconds else max(step, 1)
        left = max(0.0, seconds - self.elapsed())
        return step + math.floor(left / (self.elapsed() / step))

    def remaining(self, step: int) -> float:
        if self._plan.steps is None:
            return max(0.0, (self._plan.seconds or 0.0) - self.elapsed())
        return (self._plan.steps - step) * self.elapsed() / step

    def validation_due(self, step: int) -> bool:
        """Whether another share of the whole has passed, and validating stays within its share."""
        if self._plan.steps is None and (
            step < TIMED_STEPS or self._validating > VALIDATION_SHARE * self.elapsed()
        ):
            return False
        return self._share(step) - self._last_validation >= 1 / self._plan.validations

    def state_dict(self) -> dict[str, Any]:
        return {
            "elapsed": self.elapsed(),
            "last_validation": self._last_validation,
            "validating": self._validating,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = time.perf_counter() - state["elapsed"]
        self._last_validation = state["last_validation"]
        self._validating = state["validating"]

    @contextmanager
    def validating(self, step: int) -> Iterator[None]:
        """Counts the time that a validation takes."""
        start = self.elapsed()
        yield
        self._validating += self.elapsed() - start
        self._last_validation = self._share(step)

    def _share(self, step: int) -> float:
        """How much of the budget is used up."""
        if self._plan.steps is not None:
            return step / self._plan.steps
        return self.elapsed() / (self._plan.seconds or 1.0)
