"""How an image flow is made and trained: a split, flow matching, maximum likelihood."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cnf.data.digits import bits_per_dim
from cnf.error import InputError, IntegrationError, whole_number
from cnf.flow.continuous import Stack
from cnf.flow.image_settings import FIELDS, ImageSettings
from cnf.flow.multiscale import Multiscale
from cnf.flow.objective import FlowMatching, MaximumLikelihood, training_solver
from cnf.flow.pixel import as_pixels, dequantized, fresh_noise
from cnf.flow.recipe import shares
from cnf.flow.regularizer import Regularizer
from cnf.nets.mlp import LabelledMLP
from cnf.nets.unet import UNet
from cnf.training.batches import Shuffled
from cnf.training.loop import Best, Plan, Progress, Training, put

JUDGED_IMAGES = 128  # of those held back, whenever the weights are judged
# Of maximum likelihood and of judgements.  Not a budget: likelihood that is maximized over a few
# fixed steps makes a field that is right where they look, and all of them look at the ends of time.
TOLERANCE = 1e-3
JUDGEMENTS = 12
MLP_WIDTHS = 16  # units of a hidden layer for each of a U-Net's channels
SHARE = 0.05  # of the images that are held back where nobody says how many


def new_field(kind: str, shape: Sequence[int], width: int, classes: int) -> nn.Module:
    """The field of a name: see `ImageSettings`.  Raises InputError for a name that is none."""
    if kind == "unet":
        return UNet(shape, width=width, classes=classes)
    if kind == "mlp":
        hidden = 2 * (MLP_WIDTHS * width,)
        return LabelledMLP(math.prod(shape), hidden, bandwidth=None, classes=classes)
    if kind == "multiscale":
        if classes:
            raise InputError(
                "field='multiscale' is told no classes; leave classes= out, or use field='unet'"
            )
        return Multiscale(shape, widths=3 * (width,))
    known = ", ".join(FIELDS)
    raise InputError(f"unknown field {kind!r}; known are {known}, or give a module f(t, x)")


def labels_column(labels: Any, count: int, classes: int, name: str = "labels") -> Tensor | None:
    """Labels as a column (count, 1) of floats, −1 where none is given; None of a flow without.

    labels: whole numbers −1 … classes − 1, (count,), one for all, or None for none.
    """
    if not classes:
        if labels is not None:
            raise InputError(
                f"the flow takes no {name}; make one that does, ImageFlow(shape, classes=10)"
            )
        return None
    given = torch.as_tensor(-1 if labels is None else labels)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"{name} are of {given.dtype}; give whole numbers 0 … {classes - 1}")
    if given.ndim > 1 or (given.ndim == 1 and len(given) != count):
        raise InputError(
            f"{name} are of shape {tuple(given.shape)} for {count} images; give one for each, or "
            "one for all"
        )
    given = given.long()  # of bytes −1 would be 255
    outside = (given < -1) | (given >= classes)
    if outside.any():
        raise InputError(
            f"{name} hold {given[outside].flatten()[0].item()}, expected whole numbers 0 … "
            f"{classes - 1}, or −1 for none"
        )
    return given.expand(count).reshape(-1, 1).to(torch.get_default_dtype())


class ImageTraining:
    """A training of an `ImageFlow` that can be put down between two records and taken up again.

    images, labels: as for `ImageFlow.fit`; validation: a pair of the same, by which the best
    weights are chosen, or None to hold back `settings.validation` of the images; plans: in the
    place of those of the settings.  Random numbers are torch's own.
    Records count on over all phases; `validation` is in bits/dim, of 128 of the images held back.
    """

    def __init__(
        self,
        flow: Any,
        images: Any,
        labels: Any = None,
        *,
        validation: tuple[Any, Any] | None = None,
        settings: ImageSettings | None = None,
        plans: Sequence[Plan] | None = None,
        regularizer: Regularizer | None = None,
    ) -> None:
        self.flow, self.settings = flow, settings or ImageSettings()
        self.plans = tuple(plans or plans_of(self.settings, flow))
        pixels, column = _rows(flow, images, labels, "images")
        if validation is None:
            held = _held_back(len(pixels), self.settings.validation)
            judged = (pixels[held], None if column is None else column[held])
            rest = torch.ones(len(pixels), dtype=torch.bool).index_fill_(0, held, False)
            pixels, column = pixels[rest], None if column is None else column[rest]
        else:
            judged = _rows(flow, *validation, "validation")
        self._goes_on = flow.is_fitted
        flow.fit_maps(pixels)
        self.regularizer = regularizer or Regularizer(
            kinetic=self.settings.kinetic, jacobian=self.settings.jacobian
        )
        parts = (pixels,) if column is None else (pixels, column)
        self._batches = Shuffled(
            parts,
            self.settings.batch_size,
            change=partial(_dequantized, levels=flow.levels),
            device=flow.device,
        )
        self._score = _Score(flow, *judged)
        self.best = Best()
        self.parameters = [p for p in flow.parameters() if p.requires_grad]
        self._phase, self._steps_before, self._seconds_before = 0, 0, 0.0
        self._skipped_before = 0
        self._training = self._begin()

    @property
    def step(self) -> int:
        return self._steps_before + self._training.step

    @property
    def skipped(self) -> int:
        return self._skipped_before + self._training.skipped

    @property
    def is_done(self) -> bool:
        return self._training.is_done and self._phase == len(self.plans) - 1

    def __iter__(self) -> Generator[Progress]:
        if self.step == 0 and self._goes_on:  # a fit never ends worse than it began
            self.best.offer(self._score(), [p.detach() for p in self.parameters])
        while not self.is_done:
            if self._training.is_done:
                self._go_on()
            for record in self._training:
                yield self._counted(record)

    def _counted(self, record: Progress) -> Progress:
        """The record with what came before it, and what is planned after it."""
        later = self.plans[self._phase + 1 :]
        return replace(
            record,
            step=self._steps_before + record.step,
            steps=self._steps_before + record.steps + sum(plan.steps or 0 for plan in later),
            seconds=self._seconds_before + record.seconds,
            remaining=record.remaining + sum(plan.seconds or 0.0 for plan in later),
            skipped=self._skipped_before + record.skipped,
        )

    def _begin(self) -> Training:
        """The training of the phase that has come."""
        plan = self.plans[self._phase]
        return Training(
            self._objective(plan.phase),
            self._batches,
            plan,
            validate=self._score,
            best=self.best,
        )

    def _objective(self, phase: str) -> nn.Module:
        if phase == "fm":
            return FlowMatching(
                self.flow,
                neighbours=1,
                late=self.settings.late,
                capture=isinstance(self.flow.field, UNet),
            )
        return MaximumLikelihood(
            self.flow,
            regularizer=self.regularizer,
            tolerance=TOLERANCE,
        )

    def _go_on(self) -> None:
        """To the next phase, from the best weights so far."""
        done = self._training
        self._steps_before += done.step
        self._skipped_before += done.skipped
        self._seconds_before += done.seconds
        self.select()
        self._phase += 1
        self._training = self._begin()

    def select(self) -> None:
        """Put the weights with the fewest bits on the images held back into the flow."""
        if self.best.weights:
            put(self.parameters, self.best.weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how it goes on, but for torch's random state; no copies."""
        return {
            "phase": self._phase,
            "steps_before": self._steps_before,
            "skipped_before": self._skipped_before,
            "seconds_before": self._seconds_before,
            "training": self._training.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; raises RuntimeError, LookupError, ValueError or TypeError for a state
        that is not of a training like this one.
        """
        self._phase = self.plans.index(self.plans[state["phase"]])
        self._steps_before = state["steps_before"]
        self._skipped_before = state["skipped_before"]
        self._seconds_before = state["seconds_before"]
        self._training = self._begin()
        self._training.load_state_dict(state["training"])


class _Score:
    """Bits per dimension of some of the images held back, with noise that is always the same."""

    def __init__(self, flow: Any, pixels: Tensor, column: Tensor | None) -> None:
        count = min(len(pixels), JUDGED_IMAGES)
        chosen = torch.linspace(0, len(pixels) - 1, count, dtype=torch.float64).round().long()
        self._flow, self._pixels = flow, pixels[chosen]
        self._column = None if column is None else column[chosen].to(flow.device)

    @torch.no_grad()
    def __call__(self) -> float:
        flow = self._flow
        request = flow.request()
        solver = training_solver(request.solver, TOLERANCE)
        request = request._replace(solver=solver)
        try:
            log_prob = flow.log_prob_of_pixels(self._pixels, self._column, request)
        except IntegrationError:
            return math.inf
        return bits_per_dim(log_prob, flow.dim, flow.levels).mean().item()


def plans_of(settings: ImageSettings, flow: Any, seconds: float | None = None) -> list[Plan]:
    """The plans of a training; seconds: a budget in the place of the settings' steps.

    Raises InputError for flow matching of a flow that it cannot train.
    """
    phases = _phases(settings.method, flow)
    whole = Plan(
        "fm",
        steps=settings.steps if seconds is None else None,
        seconds=seconds,
        memory=settings.memory,
        clip=float(flow.dim),  # losses are sums over pixels, and gradients as much longer
        validations=JUDGEMENTS,
    )
    phases = phases[: whole.steps]
    rates = {"fm": settings.lr, "ml": settings.lr_ml}
    parts = shares(whole, len(phases))
    if settings.steps_ml is not None and len(parts) == 2 and seconds is None:
        split = (settings.steps - settings.steps_ml, settings.steps_ml)
        parts = [replace(whole, steps=steps) for steps in split]
    return [
        replace(part, phase=phase, lr=rates[phase])
        for part, phase in zip(parts, phases, strict=True)
    ]


def _phases(method: str, flow: Any) -> list[str]:
    """Flow matching trains one field to a standard normal base; anything else is trained by
    maximum likelihood alone.
    """
    matches = not (flow.has_own_base or isinstance(flow.field, Stack))
    if method == "fm" and not matches:
        raise InputError(
            "method='fm' needs one field and the standard normal base; use method='ml'"
        )
    return [method] if method != "auto" else ["fm", "ml"] if matches else ["ml"]


def _rows(flow: Any, images: Any, labels: Any, name: str) -> tuple[Tensor, Tensor | None]:
    pixels = as_pixels(images, flow.shape, flow.levels, name).cpu()
    if not len(pixels):
        raise InputError(f"{name} are none; give at least one")
    column = labels_column(labels, len(pixels), flow.classes)
    return pixels, None if column is None else column.to(flow.dtype)


def _held_back(count: int, wanted: int) -> Tensor:
    """The places of as many of the images, drawn by torch's generator."""
    whole_number("validation", wanted, 1)
    if wanted >= count:
        raise InputError(
            f"validation={wanted} leaves none of {count} images to train on; hold fewer back"
        )
    return torch.randperm(count)[:wanted].sort().values


def _dequantized(pixels: Tensor, levels: int) -> Tensor:
    return dequantized(pixels, fresh_noise(pixels), levels)
