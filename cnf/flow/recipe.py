"""How a flow is fitted: a split, trials of the field where it is open, flow matching as a warm
start, then maximum likelihood.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from cnf.data.rows import quoted, reason
from cnf.error import InputError, whole_number
from cnf.flow.coupling import Coupling
from cnf.flow.fitting import Fitting, Origin, Validation, digest, in_parts
from cnf.flow.objective import FlowMatching, MaximumLikelihood
from cnf.flow.pilot import pilot_plan
from cnf.flow.regularizer import Regularizer
from cnf.flow.split import Split, split_rows
from cnf.training.loop import Plan, Progress
from cnf.training.optimizer import SOAP, Adam, Optimizer
from cnf.training.ranks import current
from cnf.training.seed import seeded
from cnf.training.snapshot import Snapshots, opened

SECONDS = 50.0  # the default budget
MATCHING_SHARE = 0.6  # of the seconds that flow matching takes before maximum likelihood
MATCHING_STEPS = 0.95  # of the steps: one of flow matching costs far less
LEARNING_RATE = {"fm": 12e-3, "ml": 2e-3}
# bases take some hundred steps to pay: those of maximum likelihood are fewer, and costly
OPTIMIZER: dict[str, Optimizer] = {"fm": SOAP(), "ml": Adam()}
BATCH = 2048
TOLERANCE = 1e-4  # of adaptive steps in training; gradients are exact for the computed solution


def fit_flow(
    flow: Any,
    x: Any,
    context: Any = None,
    *,
    method: str,
    seconds: float | None,
    steps: int | None,
    seed: int | None,
    lr: float | None,
    batch_size: int | None,
    validation: float | Any,
    sample_weight: Any,
    regularizer: Regularizer | None,
    coupling: str | Coupling,
    callback: Callable[[Progress], None] | None,
    device: str | torch.device | None,
    progress: bool,
    snapshot: str | os.PathLike[str] | Snapshots | None,
) -> None:
    """Fit `flow` in place; the arguments are those of `Flow.fit`."""
    if device is not None:
        move_flow(flow, device)
    budget = checked_budget(seconds, steps, lr)
    batch_size = BATCH if batch_size is None else whole_number("batch_size", batch_size, 1)
    seed = None if seed is None else whole_number("seed", seed, 0)
    settings = {"method": method, **budget._asdict(), "seed": seed,
                "batch_size": batch_size, "coupling": _named(coupling),
                "regularizer": str(regularizer or Regularizer())}  # fmt: skip
    snapshots = opened(snapshot)
    with seeded(current().seed(seed), flow.device):
        origin = Origin(flow, settings, snapshots)
        plans = _plans(flow, method, budget)
        objectives: dict[str, nn.Module] = {
            "fm": FlowMatching(flow, coupling=coupling),
            "ml": MaximumLikelihood(flow, tolerance=TOLERANCE, regularizer=regularizer),
        }
        _refuse_unused(objectives, plans, method)
        if not any(p.requires_grad for p in flow.parameters()):
            raise InputError("the flow has no parameters to fit; make its field a torch.nn.Module")
        split = split_rows(x, flow, validation, context, sample_weight)
        if origin.is_new:
            _set_maps(flow, split)
        current().give(flow)
        score = Validation(flow, split.validation, split.rows)
        weights = None if split.weights is None else digest(split.weights)
        origin.add({"rows": split.rows, "data": score.digest, "weights": weights})
        origin.add({"training data": split.digest, **_settings_of(flow)})
        fitting = Fitting(flow, plans, objectives, split.batches(batch_size, flow), score, origin)
        records = iter(fitting) if snapshots is None else snapshots.follow(fitting, flow.device)
        try:
            follow(records, len(plans), callback, progress)
        finally:
            flow.zero_grad()  # of the field that is now in place


def _set_maps(flow: Any, split: Split) -> None:
    """Set the flow's maps from the data, the first time; under a trained field they stay, since
    others would change what it has learned.
    """
    if flow.is_trained:
        return
    if flow.whitens and not flow.whitening.is_fitted:
        flow.whiten(*in_parts(split.sample(flow), flow))
    elif flow.contexts is not None and not flow.contexts.is_fitted:
        flow.contexts.fit(in_parts(split.sample(flow), flow)[1])


def _settings_of(flow: Any) -> dict[str, Any]:
    """What the flow is, but for what a fit chooses; nothing where that cannot be written down."""
    try:
        config = flow.config
    except InputError:
        return {}
    chosen = ("hidden", "bandwidth")
    return {f"Flow({name}=)": value for name, value in config.items() if name not in chosen}


def _named(coupling: str | Coupling) -> str:
    """A coupling by which it is known again."""
    return coupling if isinstance(coupling, str) else type(coupling).__name__


def move_flow(flow: Any, device: str | torch.device) -> None:
    """Move the flow; raises InputError for a device that is not there."""
    try:
        flow.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"the flow cannot be moved to device {quoted(device)} ({reason(error)}); "
            "use device='cpu'"
        ) from error


def _plans(flow: Any, method: str, budget: Budget) -> list[Plan]:
    if method not in ("auto", "fm", "ml"):
        raise InputError(f"unknown method {method!r}; known are auto, fm, ml")
    seconds, steps, lr = budget.or_default()
    whole = _phase(Plan("fm", steps, seconds), "fm", lr)
    phases = _phases(flow, method)[:steps]
    pilot = pilot_plan(flow, whole) if "fm" in phases else None
    if pilot is not None:
        left = None if steps is None else steps - (pilot.steps or 0)
        whole = replace(whole, steps=left, seconds=(seconds or 0.0) - (pilot.seconds or 0.0))
    plans = [
        replace(_phase(part, phase, lr), patience=8, validations=12)
        for part, phase in zip(shares(whole, len(phases)), phases, strict=True)
    ]
    return plans if pilot is None else [pilot, *plans]


def _phase(plan: Plan, phase: str, lr: float | None) -> Plan:
    """The plan with what a phase steps by, and its own rate where none is given."""
    return replace(plan, phase=phase, lr=lr or LEARNING_RATE[phase], optimizer=OPTIMIZER[phase])


class Budget(NamedTuple):
    """How long to train, in seconds or steps, and how fast; None for what is open."""

    seconds: float | None
    steps: int | None
    lr: float | None

    def or_default(self) -> Budget:
        """The same, of SECONDS where neither seconds nor steps are given."""
        return self if self.steps is not None else self._replace(seconds=self.seconds or SECONDS)


def checked_budget(seconds: float | None, steps: int | None, lr: float | None) -> Budget:
    """The budget in plain numbers, such as a file can hold; raises InputError where it is none."""
    if seconds is not None and steps is not None:
        raise InputError("seconds= and steps= are both budgets: give one of them")
    for name, value in (("seconds", seconds), ("lr", lr)):
        if value is not None and not (isinstance(value, Real) and 0 < value < float("inf")):
            raise InputError(f"{name} must be a number > 0, got {value!r}")
    return Budget(
        None if seconds is None else float(seconds),
        None if steps is None else whole_number("steps", steps, 1),
        None if lr is None else float(lr),
    )


def _refuse_unused(objectives: dict[str, nn.Module], plans: list[Plan], method: str) -> None:
    """Raises InputError for a setting of an objective that no phase trains by."""
    phases = {plan.phase for plan in plans}
    matching, likelihood = objectives["fm"], objectives["ml"]
    if "fm" not in phases and matching.coupling is not None:
        raise InputError(
            f"coupling= is for flow matching, and method={method!r} has none; leave it out"
        )
    if "ml" not in phases and likelihood.regularizer != Regularizer():
        raise InputError(
            f"regularizer= is for maximum likelihood, and method={method!r} has none; leave it out"
        )


def shares(whole: Plan, phases: int) -> list[Plan]:
    """The parts of the plan that one or two phases take."""
    if phases == 1:
        return [whole]
    if whole.steps is None:
        seconds = MATCHING_SHARE * (whole.seconds or 0.0)
        rest = (whole.seconds or 0.0) - seconds
        return [replace(whole, seconds=seconds), replace(whole, seconds=rest)]
    steps = max(1, min(round(whole.steps * MATCHING_STEPS), whole.steps - 1))
    return [replace(whole, steps=steps), replace(whole, steps=whole.steps - steps)]


def _phases(flow: Any, method: str) -> list[str]:
    if method == "ml" or (method == "auto" and flow.has_own_base):
        return ["ml"]
    if flow.has_own_base:
        raise InputError("method='fm' needs the standard normal base; use method='ml'")
    if _takes_batched_times(flow):
        return ["fm"] if method == "fm" else ["fm", "ml"]
    if method == "fm":
        raise InputError(
            "method='fm' needs a field that takes t of shape (batch,), a time for each row; "
            "use method='ml'"
        )
    warnings.warn(
        "the field does not take t of shape (batch,), which flow matching needs, so method="
        "'auto' trains by maximum likelihood alone; give method='ml' to say so",
        stacklevel=5,
    )
    return ["ml"]


def _takes_batched_times(flow: Any) -> bool:
    """Whether the field can be evaluated at a time of its own for every row."""
    if not flow.has_own_field:
        return True
    # rows unlike any width, so that t is not broadcast along the features by accident
    x = torch.zeros(2 * flow.dim + 3, flow.dim, dtype=flow.dtype, device=flow.device)
    t = torch.linspace(0.1, 0.9, len(x), dtype=flow.dtype, device=flow.device)
    try:
        with torch.no_grad():
            given = x.new_zeros(len(x), flow.context) if flow.context else None
            field, rows, _ = flow.conditioned(given, training=True)
            return field(t, x, *rows).shape == x.shape
    except Exception:
        return False


def follow(
    records: Generator[Progress],
    phases: int,
    callback: Callable[[Progress], None] | None,
    progress: bool,
    unit: str = "nats",
) -> None:
    """Train to the end: hand every record to the callback, with a bar on stderr if wanted.

    phases: that count their steps each for itself; unit: of the score on validation rows.
    """
    shown = _with_bar(records, phases, unit) if progress else records
    # closed here: an error's traceback would keep them, and the best weights, waiting
    with closing(records), closing(shown):
        for record in shown:
            if callback is not None:
                callback(record)


def _with_bar(records: Iterable[Progress], phases: int, unit: str) -> Generator[Progress]:
    """The records, with a bar on stderr where that is a terminal."""
    with tqdm(
        total=1000, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False,
        bar_format="{percentage:3.0f}% |{bar}| {desc}",
    ) as bar:  # fmt: skip
        names = {
            "pilot": "choosing the field",
            "fm": "flow matching",
            "ml": "maximum likelihood",
            "kl": "reverse KL",
        }
        validation, seen = None, []
        for record in records:
            seen += [record.phase] if record.phase not in seen else []
            validation = record.validation if record.validation is not None else validation
            share = record.step / max(record.steps, 1)
            bar.n = int(1000 * (min(len(seen), phases) - 1 + share) / phases)
            parts = [names[record.phase], f"loss {record.loss:.3f}"]
            parts += [] if validation is None else [f"validation {validation:.3f} {unit}"]
            parts += [] if record.nfe is None else [f"NFE {record.nfe}"]
            parts += [f"{record.skipped} batches skipped"] if record.skipped else []
            parts += [f"{record.remaining:.0f} s left"]
            bar.set_description_str(" · ".join(parts), refresh=False)
            bar.update(0)
            yield record
