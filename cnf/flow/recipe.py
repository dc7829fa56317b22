"""How a flow is fitted: a split, flow matching as a warm start, then maximum likelihood."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cnf.data.rows import as_rows
from cnf.error import InputError, IntegrationError
from cnf.flow.objective import FlowMatching, MaximumLikelihood, Trainable
from cnf.training.loop import Best, Plan, Progress, put, train

SECONDS = 50.0  # the default budget
MATCHING_SHARE = 0.7  # of the seconds that flow matching takes before maximum likelihood
MATCHING_STEPS = 0.9  # of the steps: one of flow matching costs far less
LEARNING_RATE = {"fm": 3e-3, "ml": 1e-3}
BATCH = 1024
TOLERANCE = 1e-3  # of adaptive steps in training; gradients are exact for the computed solution
VALIDATION_ROWS = 4096  # looked at while training
WHITENING_ROWS = 200_000
LAZY_BYTES = 2**28  # memory maps above this size stay on disk
LEAST_ROWS = 10


class Fittable(Trainable, Protocol):
    """What fitting needs of a flow, which is an nn.Module besides."""

    dim: int
    whitens: bool
    has_own_field: bool

    @property
    def has_own_base(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Split:
    """Rows to train on, (rows, dim), in memory or mapped; and rows to validate on."""

    training: Tensor | np.ndarray
    validation: Tensor

    def batches(self, size: int, flow: Fittable) -> Callable[[], Tensor]:
        """A function that draws the next batch: all rows in a new order, again and again."""
        return _Shuffled(self.training, min(size, len(self.training)), flow)


def fit_flow(
    flow: Any,
    x: Any,
    *,
    method: str,
    seconds: float | None,
    steps: int | None,
    seed: int | None,
    lr: float | None,
    batch_size: int | None,
    validation: float | Any,
    callback: Callable[[Progress], None] | None,
    device: str | torch.device | None,
    progress: bool,
) -> None:
    """Fit `flow` in place; the arguments are those of `Flow.fit`."""
    if device is not None:
        flow.to(device)
    plans = _plans(flow, method, seconds, steps, lr)
    with torch.random.fork_rng() if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        split = split_rows(x, flow, validation)
        if flow.whitens and not flow.whitening.is_fitted:
            flow.whitening.fit(_sample_of(split.training))
        batches = split.batches(batch_size or BATCH, flow)
        records = _run(flow, plans, batches, split.validation)
        for record in _bar(records, plans) if progress else records:
            if callback is not None:
                callback(record)


def _run(
    flow: Any, plans: list[Plan], batches: Callable[[], Tensor], validation: Tensor
) -> Iterator[Progress]:
    """The records of all phases; whatever ends them, the flow is left with its best weights."""
    parameters = [p for p in flow.parameters() if p.requires_grad]
    best = Best()
    score = _Score(flow, validation)
    best.offer(score(), [p.detach() for p in parameters])  # a fit never ends worse than it began
    elapsed = 0.0
    try:
        for plan in plans:
            objective: nn.Module = (
                FlowMatching(flow)
                if plan.phase == "fm"
                else MaximumLikelihood(flow, tolerance=TOLERANCE)
            )
            if best.weights:
                put(parameters, best.weights)
            score.objective = objective
            best.age = 0
            record = None
            for record in train(objective, batches, plan, validate=score, best=best):
                yield replace(record, seconds=elapsed + record.seconds)
            elapsed += record.seconds if record is not None else 0.0
    finally:
        if best.weights:
            put(parameters, best.weights)


def _plans(
    flow: Any, method: str, seconds: float | None, steps: int | None, lr: float | None
) -> list[Plan]:
    if method not in ("auto", "fm", "ml"):
        raise InputError(f"unknown method {method!r}; known are auto, fm, ml")
    if seconds is not None and steps is not None:
        raise InputError("seconds= and steps= are both budgets: give one of them")
    for name, value in (("seconds", seconds), ("steps", steps), ("lr", lr)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} must be a number > 0, got {value!r}")
    phases = _phases(flow, method)
    if steps is not None and steps < len(phases):
        phases = phases[: int(steps)]
    plans = []
    for i, phase in enumerate(phases):
        rate = lr or LEARNING_RATE[phase]
        plan = Plan(phase, lr=rate, patience=8, validations=20)
        share = (MATCHING_SHARE, 1 - MATCHING_SHARE)[i] if len(phases) == 2 else 1.0
        if steps is None:
            plans.append(replace(plan, seconds=(seconds or SECONDS) * share))
        else:
            first = max(1, min(round(steps * MATCHING_STEPS), int(steps) - 1))
            count = int(steps) if len(phases) == 1 else (first, int(steps) - first)[i]
            plans.append(replace(plan, steps=count))
    return plans


def _phases(flow: Any, method: str) -> list[str]:
    if method != "auto":
        if method == "fm" and flow.has_own_base:
            raise InputError("method='fm' needs the standard normal base; use method='ml'")
        return [method]
    return ["ml"] if flow.has_own_base or not _takes_batched_times(flow) else ["fm", "ml"]


def _takes_batched_times(flow: Any) -> bool:
    """Whether the field can be evaluated at a time of its own for every row."""
    if not flow.has_own_field:
        return True
    x = torch.zeros(3, flow.dim, dtype=flow.dtype, device=flow.device)
    try:
        with torch.no_grad():
            good = flow.field(x.new_tensor([0.1, 0.5, 0.9]), x).shape == x.shape
    except Exception:
        good = False
    if not good:
        warnings.warn(
            "the field does not take t of shape (batch,), which flow matching needs, so method="
            "'auto' trains by maximum likelihood alone; give method='ml' to say so",
            stacklevel=5,
        )
    return good


def split_rows(x: Any, flow: Fittable, validation: float | Any) -> Split:
    """Training and validation rows, on the CPU, drawn with torch's generator."""
    lazy = isinstance(x, np.memmap) and x.ndim == 2 and x.nbytes > LAZY_BYTES
    rows = x if lazy else as_rows(x, flow.dim, dtype=flow.dtype).detach().cpu()
    if lazy and x.shape[1] != flow.dim:
        raise InputError(f"x must have {flow.dim} columns, got {x.shape[1]}")
    if len(rows) < LEAST_ROWS:
        raise InputError(f"x has {len(rows)} rows; a density needs at least {LEAST_ROWS}")
    if not isinstance(validation, float | int):
        return Split(rows, as_rows(validation, flow.dim, name="validation", dtype=flow.dtype))
    if not 0 < validation < 1:
        raise InputError(f"validation must be a share between 0 and 1 or rows, got {validation!r}")
    order = torch.randperm(len(rows))
    count = max(2, round(validation * len(rows)))
    chosen, rest = order[:count], order[count:]
    if not lazy:
        return Split(rows[rest], rows[chosen])
    chosen = np.sort(chosen[:VALIDATION_ROWS].numpy())
    # a mapped table is not copied: its few validation rows stay among the training rows
    return Split(rows, torch.as_tensor(np.asarray(rows[chosen]), dtype=flow.dtype))


class _Shuffled:
    def __init__(self, rows: Tensor | np.ndarray, size: int, flow: Fittable) -> None:
        self._rows, self._size, self._flow = rows, size, flow
        self._order = torch.empty(0, dtype=torch.long)

    def __call__(self) -> Tensor:
        if len(self._order) < self._size:
            self._order = torch.cat([self._order, torch.randperm(len(self._rows))])
        chosen, self._order = self._order[: self._size], self._order[self._size :]
        if isinstance(self._rows, Tensor):
            return self._rows[chosen].to(self._flow.device)
        block = np.asarray(self._rows[np.sort(chosen.numpy())])
        return torch.as_tensor(block, dtype=self._flow.dtype).to(self._flow.device)


def _sample_of(rows: Tensor | np.ndarray) -> Tensor:
    if len(rows) <= WHITENING_ROWS:
        return torch.as_tensor(rows)
    if isinstance(rows, Tensor):
        return rows[:WHITENING_ROWS]  # the rows are in random order
    chosen = np.sort(np.random.default_rng(0).choice(len(rows), WHITENING_ROWS, replace=False))
    return torch.as_tensor(np.asarray(rows[chosen]))


class _Score:
    """Mean negative log-likelihood of the validation rows, in nats; infinite where it fails."""

    def __init__(self, flow: Any, rows: Tensor) -> None:
        self._flow, self._rows = flow, rows[:VALIDATION_ROWS]
        self.objective: nn.Module | None = None

    @torch.no_grad()
    def __call__(self) -> float:
        flow = self._flow
        rows = self._rows.to(flow.device, flow.dtype)
        try:
            log_prob, stats = flow.log_prob_of_rows(rows, flow.chosen_divergence(), flow.solver)
        except IntegrationError:
            return float("inf")
        if isinstance(self.objective, FlowMatching):
            self.objective.nfe = stats.nfe
        return -log_prob.double().mean().item()


def _bar(records: Iterator[Progress], plans: list[Plan]) -> Iterator[Progress]:
    """The records, with a bar on stderr where that is a terminal."""
    with tqdm(
        total=1000, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {postfix}",
    ) as bar:  # fmt: skip
        names = {"fm": "flow matching", "ml": "maximum likelihood"}
        validation = None
        for record in records:
            validation = record.validation if record.validation is not None else validation
            share = record.step / max(record.steps, 1)
            done = [plan.phase for plan in plans].index(record.phase)
            bar.n = int(1000 * (done + share) / len(plans))
            bar.set_description_str(names[record.phase], refresh=False)
            shown = "" if validation is None else f" · validation {validation:.3f} nats"
            cost = "" if record.nfe is None else f" · NFE {record.nfe}"
            bar.set_postfix_str(
                f"loss {record.loss:.3f}{shown}{cost} · {record.remaining:.0f} s left",
                refresh=False,
            )
            bar.update(0)
            yield record
