"""A continuous normalizing flow over images: bits per dimension, samples, what is hidden.

Pixels become points of the unit cube by noise between whole numbers, then points of the whole
space by a map of every pixel; from there an ODE leads to the base.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, Self, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.distributions import Distribution

from cnf.error import InputError, checked_share, whole_number
from cnf.flow.accuracy import (
    Info,
    Request,
    checked_error,
    evaluated,
    in_double,
    joined,
    valued,
    within_error,
)
from cnf.flow.base import LEARNED, LearnedBase, checked_base
from cnf.flow.batch import Kind
from cnf.flow.bits import Bits, measured_bits
from cnf.flow.budget import with_budget
from cnf.flow.carrier import Carrier
from cnf.flow.conditioned import Conditioned, Mixed
from cnf.flow.continuous import Solver, Stack
from cnf.flow.dequantization import VariationalDequantization
from cnf.flow.divergence import Divergence, Hutchinson, KnowsDivergence
from cnf.flow.image_recipe import ImageTraining, labels_column, new_field, plans_of
from cnf.flow.image_settings import DEQUANTIZATIONS, PRECISIONS, image_settings
from cnf.flow.inpainting import inpainted
from cnf.flow.keyed import KeyedHutchinson, keys_of, uniform
from cnf.flow.pixel import Equalize, Logit, as_pixels, dequantized, quantized
from cnf.flow.recipe import checked_budget, follow, move_flow
from cnf.flow.regularizer import Regularizer
from cnf.flow.setting import checked_guidance
from cnf.flow.storage import damaged, fill, pack, read, unpack, write
from cnf.flow.transport import OwnField
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.gradient.problem import Gradient
from cnf.ode.method import Method
from cnf.ode.tableau import Tableau
from cnf.training.loop import Progress
from cnf.training.ranks import row_noise
from cnf.training.seed import seeded

CHUNK = 256  # images solved together
SECONDS = 600.0  # the default budget of a fit
LOGDET_ATOL = 5e-6  # nats a step, for each pixel: well below a thousandth of a bit in all


class How(TypedDict, total=False):
    """How a flow's ODE is to be solved: a budget of evaluations, and the field's guidance."""

    nfe: int | None
    method: str | Tableau | None
    guidance: float | None


class ImageFlow(Carrier):
    """A density over images of whole-number pixels; as a module, forward(images) is log_prob.

    shape: (channels, height, width); classes: of labels that images may have, 0 for none: the flow
    is then conditional, and also learns to do without, as label_dropout of the labels are withheld
    in training.
    field: "unet", whose channels at half the resolution are `width`; "mlp", two hidden layers of
    16·width, with the exact trace; "multiscale", FFJORD's stack of ODEs with three layers of
    `width` channels each, without classes; or one's own f(t, x) → dx/dt over rows x (batch, dim),
    t 0-d or (batch,); where there are classes f(t, x, labels), of shape (batch, 1), −1 where
    withheld.
    dequantization: "uniform" noise between whole numbers, or "variational": noise whose law is
    learned by maximum likelihood; levels: of grey, pixels are 0 … levels − 1; alpha: of the logit
    that leads from the unit cube to the whole space; equalize: whether `fit` puts in its place the
    map that makes the grey levels of all training images normal.
    base, divergence, method, step_size, rtol, atol, gradient: as for `Flow`; divergence "auto" is
    the closed form where the field has one, else Hutchinson's estimate; logdet_atol: by default
    5e-6 nats a step for each pixel; precision: "mixed" evaluates the field in bfloat16 in training,
    where autocast allows it, and only there; seed: of the initial weights.
    An untrained flow is the identity.
    Source: Grathwohl et al. 2019, section 4.2; dequantization: Theis et al. 2016, section 3.1.

    >>> flow = ImageFlow((1, 8, 8), width=8, levels=17, seed=0)
    >>> flow.sample(3, seed=0).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        *,
        classes: int = 0,
        field: str | OwnField = "unet",
        width: int = 32,
        label_dropout: float = 0.1,
        dequantization: str = "uniform",
        alpha: float = 1e-6,
        levels: int = 256,
        equalize: bool = True,
        base: Distribution | LearnedBase | None = None,
        divergence: str | Divergence = "auto",
        method: str | Tableau | Method = "dopri5",
        step_size: float | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        logdet_atol: float | None = None,
        gradient: str | Gradient = "checkpoint",
        precision: str = "single",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _refuse_unknown("dequantization", dequantization, DEQUANTIZATIONS)
        _refuse_unknown("precision", precision, PRECISIONS)
        self.shape = _checked_shape(shape)
        self.dim = math.prod(self.shape)
        self.classes = whole_number("classes", classes, 0)
        self.label_dropout = checked_share("label_dropout", label_dropout)
        self.levels = whole_number("levels", levels, 2)
        self.equalizes = equalize
        self.divergence = divergence
        self._logdet_atol = logdet_atol
        quadrature_atol = LOGDET_ATOL * self.dim if logdet_atol is None else logdet_atol
        adaptive = Adaptive(rtol, atol, quadrature_atol=quadrature_atol)
        control = adaptive if step_size is None else FixedStep(step_size)
        self.solver = Solver(method, control, gradient)
        self.base = checked_base(base, self.dim)
        self.logit = Logit(alpha)
        self.equalized = Equalize(self.levels)
        self.width = whole_number("width", width, 1)
        self.field_name = field if isinstance(field, str) else None
        self.has_own_field = not isinstance(field, str)
        if isinstance(field, str):
            with seeded(seed, torch.get_default_device()):
                field = new_field(field, self.shape, self.width, self.classes)
        elif not callable(field):
            raise InputError(f"field must be a name, a function f(t, x) or a module, got {field!r}")
        self.field = field
        self.precision = precision
        if precision == "mixed" and isinstance(field, KnowsDivergence | Stack):
            raise InputError(
                "precision='mixed' is for one field without a closed form of its trace, such as "
                "field='unet'; use precision='single'"
            )
        learned = dequantization == "variational"
        with seeded(seed, torch.get_default_device()):
            self.learned_noise = (
                VariationalDequantization(self.shape, self.levels) if learned else None
            )
        self.chosen_divergence()  # a name that does not exist is refused here

    def forward(self, images: Any, labels: Any = None) -> Tensor:
        return self.log_prob(images, labels)

    # densities --------------------------------------------------------------------------------

    @overload
    def log_prob(
        self,
        images: Any,
        labels: Any = ...,
        *,
        return_info: Literal[False] = False,
        seed: int = ...,
        probes: int = ...,
        probe_seed: int | None = ...,
        error: float | None = ...,
        chunk: int = ...,
        **how: Unpack[How],
    ) -> Tensor: ...
    @overload
    def log_prob(
        self,
        images: Any,
        labels: Any = ...,
        *,
        return_info: Literal[True],
        seed: int = ...,
        probes: int = ...,
        probe_seed: int | None = ...,
        error: float | None = ...,
        chunk: int = ...,
        **how: Unpack[How],
    ) -> tuple[Tensor, Info]: ...
    def log_prob(
        self,
        images: Any,
        labels: Any = None,
        *,
        return_info: bool = False,
        seed: int = 0,
        probes: int = 1,
        probe_seed: int | None = None,
        error: float | None = None,
        chunk: int = CHUNK,
        **how: Unpack[How],
    ) -> Tensor | tuple[Tensor, Info]:
        """Log-density in nats of the dequantized images, points of the unit cube, (n,).

        images: (n, *shape), or (n, h, w) for one channel: whole numbers 0 … levels − 1 in an
        integer dtype, or floats 0 … 1 in steps of 1/(levels − 1).  labels: whole numbers (n,), one
        for all, or None: −1 and None stand for no label, as in the images of training whose label
        was withheld.
        seed: of the noise between whole numbers, probe_seed: of the trace's, by default the same;
        every image has noise of its own, which depends on its pixels and on nothing else; probes:
        of the trace's estimate.  return_info, error, nfe, method, guidance: as for
        `Flow.log_prob`; chunk: images solved together.
        Its mean over the noise, less dim·log(levels), is at most the log-probability of the pixels.
        Raises InputError for images or labels that cannot be meant.
        """
        pixels, column = self._given(images, labels)
        noise = seed if probe_seed is None else probe_seed
        request = self.request(probes=probes, probe_seed=noise, **how).within(error)
        size = whole_number("chunk", chunk, 1)
        if not return_info and request.error is None:
            return self.log_prob_of_pixels(pixels, column, request, seed, size)
        value, twin = valued if request.error is None else within_error, in_double(self)
        measured = [
            value(self, twin, x, given, part)
            for x, given, part in self._chunks(pixels, column, request, seed, size)
        ]
        log_prob, info = joined(measured, torch.Size([len(pixels)]), request.divergence)
        return (log_prob, info) if return_info else log_prob

    def log_prob_of_pixels(
        self,
        pixels: Tensor,
        column: Tensor | None,
        request: Request,
        seed: int = 0,
        chunk: int = CHUNK,
    ) -> Tensor:
        """Log-densities of rows of whole numbers (n, dim), given labels (n, 1), unchecked."""
        chunks = self._chunks(pixels, column, request, seed, chunk)
        parts = [evaluated(self, x, given, part)[0] for x, given, part in chunks]
        return torch.cat(parts) if parts else pixels.new_empty(0, dtype=self.dtype)

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Any,
        labels: Any = None,
        *,
        draws: int = 1,
        importance: int | None = None,
        seed: int = 0,
        probes: int = 1,
        error: float | None = None,
        chunk: int = CHUNK,
        **how: Unpack[How],
    ) -> Bits:
        """Bits per dimension of images, an upper bound, with its standard error; float(bits) works.

        draws: of the noise between whole numbers; importance: as many draws, weighted by how likely
        they are, which is a tighter bound: it is then the value.  error: bits per dimension that
        each image's figure may be off by, which chooses tolerance and probes; the rest as for
        `log_prob`.  Sources: Theis et al. 2016, section 3.1; Burda et al. 2016.
        """
        pixels, column = self._given(images, labels)
        draws = whole_number("draws", draws, 1)
        if importance is not None:
            draws = whole_number("importance", importance, 2)
        nats = None if (wanted := checked_error(error)) is None else wanted * self._nats_a_bit
        given = None if column is None else column.squeeze(1).long()
        shaped = pixels.reshape(-1, *self.shape)
        stride = 1_000_003  # seeds of draws lie far from those a user counts up

        def bounds(i: int, j: int) -> Tensor:
            log_prob = self.log_prob(
                shaped,
                given,
                seed=seed + i * stride,
                probe_seed=seed + j * stride,
                probes=probes,
                error=nats,
                chunk=chunk,
                **how,
            )
            return log_prob - self.dim * math.log(self.levels)

        bits = measured_bits(bounds, self.dim, draws, exact=self.trace_is_exact)
        if importance is None:
            return bits
        return replace(bits, value=bits.weighted, standard_error=bits.weighted_error)

    @property
    def _nats_a_bit(self) -> float:
        """Nats of an image that a bit per dimension is."""
        return self.dim * math.log(2)

    # images -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        classes: Any = None,
        *,
        seed: int | None = None,
        chunk: int = CHUNK,
        **how: Unpack[How],
    ) -> Tensor:
        """n images of whole numbers, uint8 (int32 above 256 levels), (n, *shape).

        classes: a label for all, or n of them, or None for images of any; guidance: how far the
        field follows the labels, 1 as it was learned, more to exaggerate them; seed, nfe, method:
        as for `Flow.sample`.
        """
        n = whole_number("n", n, 0)
        column = self._column(classes, n, "classes")
        return self._decoded(self.draw_base(n, seed), column, self.request(**how), chunk)

    @torch.no_grad()
    def encode(
        self, images: Any, labels: Any = None, *, seed: int = 0, **how: Unpack[How]
    ) -> Tensor:
        """The base's points, (n, *shape), that the flow carries to the images, dequantized by the
        noise of `log_prob`.
        """
        pixels, column = self._given(images, labels)
        chunks = self._chunks(pixels, column, self.request(**how), seed, CHUNK)
        parts = [self.encoded(x, given, part, False)[0] for x, given, part in chunks]
        return torch.cat(parts).reshape(-1, *self.shape) if parts else self._no_points()

    @torch.no_grad()
    def decode(self, z: Any, labels: Any = None, **how: Unpack[How]) -> Tensor:
        """The images of whole numbers to which the flow carries the base's z (n, *shape)."""
        points = torch.as_tensor(z).to(self.device, self.dtype)
        if tuple(points.shape[1:]) not in (self.shape, (self.dim,)):
            raise InputError(
                f"z must be of shape (n, {', '.join(map(str, self.shape))}), got "
                f"{tuple(points.shape)}"
            )
        column = self._column(labels, len(points))
        return self._decoded(points.flatten(1), column, self.request(**how), CHUNK)

    @torch.no_grad()
    def interpolate(
        self,
        a: Any,
        b: Any,
        steps: int = 8,
        *,
        labels: Any = None,
        seed: int = 0,
        **how: Unpack[How],
    ) -> Tensor:
        """Images on the way from a to b, both (n, *shape): (steps, n, *shape), a first, b last.

        The ways are great circles between the base's points, whose length changes evenly: points on
        a straight line would be shorter than any that the flow has seen.  labels: as for
        `log_prob`, of both ends and of all between.
        """
        steps = whole_number("steps", steps, 2)
        start, end = (self.encode(x, labels, seed=seed, **how).flatten(1) for x in (a, b))
        if start.shape != end.shape:
            raise InputError(f"a has {len(start)} images and b {len(end)}; give as many of both")
        shares = torch.linspace(0, 1, steps, device=self.device, dtype=self.dtype)
        points = torch.stack([_between(start, end, share) for share in shares])
        column = self._column(labels, len(start))
        every = None if column is None else column.repeat(steps, 1)
        images = self._decoded(points.flatten(0, 1), every, self.request(**how), CHUNK)
        return images.unflatten(0, (steps, -1))

    @torch.no_grad()
    def inpaint(
        self,
        images: Any,
        mask: Any,
        labels: Any = None,
        *,
        seed: int | None = None,
        steps: int = 64,
        guidance: float | None = None,
        chunk: int = CHUNK,
    ) -> Tensor:
        """The images, (n, *shape), with draws in the place of what is hidden.

        mask: truths (n, *shape), or of a shape that is broadcast to it, true where pixels are
        known; the others count for nothing, and may hold anything that a pixel can be.  Drawn by an
        ODE that is guided to the known pixels, in `steps` steps of Euler's: approximately from the
        law of the hidden pixels given the others, see `cnf.flow.inpainting`.  It wants a flow of
        flow matching, and the normal base.  The other arguments are those of `sample`.
        """
        if self.base is not None:
            raise InputError("inpainting needs the standard normal base; leave base= out")
        pixels, column = self._given(images, labels)
        known = _checked_mask(mask, (len(pixels), *self.shape)).to(self.device).flatten(1)
        pixels = torch.where(known, pixels.to(self.device), 0)
        noise = self.draw_base(len(pixels), seed)
        request, steps = self.request(guidance=guidance), whole_number("steps", steps, 2)
        ends = [
            inpainted(
                self.conditioned(given, guidance), self.white(x)[0], known[rows], noise[rows], steps
            )
            for rows, (x, given, _) in zip(
                torch.arange(len(pixels)).split(chunk),
                self._chunks(pixels, column, request, seed or 0, chunk),
                strict=True,
            )
        ]
        filled = quantized(self.unwhite(torch.cat(ends)), self.levels) if ends else pixels
        return torch.where(known, pixels, filled).reshape(-1, *self.shape)

    def _decoded(self, z: Tensor, column: Tensor | None, request: Request, chunk: int) -> Tensor:
        if not len(z):
            return quantized(z, self.levels).reshape(-1, *self.shape)
        contexts = [None] * len(z.split(chunk)) if column is None else column.split(chunk)
        pairs = zip(z.split(chunk), contexts, strict=True)
        x = torch.cat([self.decoded(*rows, request, False)[0] for rows in pairs])
        return quantized(x, self.levels).reshape(-1, *self.shape)

    # the maps ---------------------------------------------------------------------------------

    def white(self, x: Tensor) -> tuple[Tensor, Tensor]:
        within = x.new_zeros(len(x))
        if self.learned_noise is not None:
            x, within = self.learned_noise(x)
        y, logdet = self._map(x)
        return y.to(self.dtype), logdet + within

    def unwhite(self, z: Tensor) -> Tensor:
        x = self._map.invert(z if z.device.type == "mps" else z.double())
        return x if self.learned_noise is None else self.learned_noise.invert(x)

    @property
    def _map(self) -> Logit | Equalize:
        return self.equalized if self.equalized.is_fitted else self.logit

    @property
    def is_fitted(self) -> bool:
        """Whether a fit has set what is done to pixels before the ODE."""
        return bool(self.equalized.is_fitted) or bool(self.logit.is_fitted)

    def fit_maps(self, pixels: Tensor) -> None:
        """Set what is done to pixels before the ODE from rows of whole numbers, the first time."""
        if self.is_fitted:
            return
        if self.equalizes:
            self.equalized.fit(pixels)
        else:
            some = pixels[: 2**26 // self.dim]
            self.logit.fit(dequantized(some, torch.rand(some.shape).double(), self.levels))

    def conditioned(
        self,
        context: Tensor | None = None,
        guidance: float | None = None,
        *,
        training: bool = False,
    ) -> Conditioned:
        found = super().conditioned(context, guidance, training=training)
        mixed = training and self.precision == "mixed"
        return found._replace(field=Mixed(found.field)) if mixed else found

    def told(self, context: Tensor | None, training: bool) -> Tensor | None:
        """Labels (batch, 1), −1 where they are withheld."""
        if context is None or not self.classes:
            return None
        context = context.to(self.dtype)  # pixels before their maps are wider
        if not (training and self.label_dropout):
            return context

        def draw(rows: int) -> Tensor:
            return torch.rand(rows, 1, dtype=context.dtype, device=context.device)

        kept = row_noise(len(context), draw) >= self.label_dropout
        return torch.where(kept, context, -1.0)

    def told_nothing(self, told: Tensor) -> Tensor:
        return torch.full_like(told, -1.0)

    def chosen_divergence(self) -> Divergence:
        """The divergence in use; "auto" is the closed form where the field has one, else
        Hutchinson's estimate.
        """
        knows = isinstance(self.field, KnowsDivergence)
        if self.divergence == "auto" and not knows:
            return Hutchinson()
        return super().chosen_divergence()

    @property
    def trace_is_exact(self) -> bool:
        """Whether log-densities have no noise but that of dequantization."""
        return not isinstance(self.chosen_divergence(), Hutchinson)

    # fitting ----------------------------------------------------------------------------------

    def fit(
        self,
        images: Any,
        labels: Any = None,
        *,
        method: str = "auto",
        seconds: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        validation: float | Any = 0.05,
        regularizer: Regularizer | None = None,
        callback: Callable[[Progress], None] | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> Self:
        """This flow, fitted to images (n, *shape); a second fit goes on from here.

        labels: (n,), where the flow has classes.  method: "fm" (flow matching), "ml" (maximum
        likelihood), or "auto", the first and then the second.  seconds or steps: the budget, by
        default 600 seconds; validation: a share of the images, or images of their own (with labels
        a pair of both), by whose bits per dimension the best weights are chosen; regularizer: what
        maximum likelihood adds to its loss, by default RNODE's two terms.  The rest as for
        `Flow.fit`.
        """
        if device is not None:
            move_flow(self, device)
        if seconds is None and steps is None:
            seconds = SECONDS
        seconds, steps, lr = checked_budget(seconds, steps, lr).or_default()
        given = {"method": method, "steps": steps, "lr": lr, "lr_ml": lr, "batch_size": batch_size}
        settings = image_settings({k: v for k, v in given.items() if v is not None})
        with seeded(seed, self.device):
            held = self._validation(validation, labels)
            pair = held if isinstance(held, tuple) else None
            if not isinstance(held, tuple):
                settings = replace(settings, validation=max(1, round(held * len(images))))
            training = ImageTraining(
                self,
                images,
                labels,
                validation=pair,
                settings=settings,
                plans=plans_of(settings, self, seconds),
                regularizer=regularizer,
            )
            try:
                follow(iter(training), 1, callback, progress, unit="bits/dim")
            finally:
                training.select()
                self.zero_grad()
        return self

    def _validation(self, validation: Any, labels: Any) -> float | tuple[Any, Any]:
        """A share of the images, or a pair of images and labels."""
        if isinstance(validation, Real):
            if not 0 < float(validation) < 1:
                raise InputError(
                    f"validation must be a share between 0 and 1 or images, got {validation!r}"
                )
            return float(validation)
        if labels is None:
            return validation, None
        try:
            images, given = validation
        except (TypeError, ValueError):
            raise InputError(
                "validation of images with labels must be a share or a pair (images, labels)"
            ) from None
        return images, given

    # files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings to one .safetensors file, atomically."""
        write(path, self, {"image": self.config})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        field: OwnField | None = None,
        base: Distribution | LearnedBase | None = None,
    ) -> Self:
        """The flow in a file that `save` wrote; no code of the file is run.

        field, base: one's own, where the saved flow had them.  Raises InputError for a file that is
        missing, damaged or of another kind.
        """
        stored, tensors = read(path)
        settings = stored.get("image")
        if not isinstance(settings, dict):
            raise InputError(f"{path} holds no image flow; is it one of cnf.Flow.load?")
        settings = dict(settings)
        for name, own in (("field", field), ("base", base)):
            if (kind := settings.pop(f"own_{name}", None)) and own is None:
                raise InputError(
                    f"{path} was saved with a {name} of its own, {kind}; hand it in again: "
                    f"ImageFlow.load(path, {name}=…)"
                )
        settings = {name: unpack(value) for name, value in settings.items()}
        learned = settings.pop("base", None)
        try:
            named = settings.pop("field")
            flow = cls(
                **settings,
                field=named if field is None else field,
                base=learned if base is None else base,
            )
            flow.to(tensors["logit.shift"].dtype)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(path) from error
        fill(flow, tensors, path)
        return flow

    @property
    def config(self) -> dict[str, Any]:
        """The settings that make this flow again, as JSON values."""
        control = self.solver.control
        adaptive = control if isinstance(control, Adaptive) else Adaptive(1e-4, 1e-4)
        learned = type(self.base) in LEARNED.values()
        return {
            "shape": list(self.shape),
            "classes": self.classes,
            "field": self.field_name,
            "width": self.width,
            "label_dropout": self.label_dropout,
            "dequantization": "uniform" if self.learned_noise is None else "variational",
            "precision": self.precision,
            "alpha": self.logit.alpha,
            "levels": self.levels,
            "equalize": self.equalizes,
            "base": pack("base", self.base) if learned else None,
            "divergence": pack("divergence", self.divergence),
            "method": pack("method", self.solver.method),
            "step_size": control.step_size if isinstance(control, FixedStep) else None,
            "rtol": adaptive.rtol,
            "atol": adaptive.atol,
            "logdet_atol": self._logdet_atol,
            "gradient": pack("gradient", self.solver.gradient),
            "own_field": type(self.field).__qualname__ if self.has_own_field else None,
            "own_base": type(self.base).__qualname__ if self.base and not learned else None,
        }

    # what was asked for -----------------------------------------------------------------------

    def request(
        self,
        *,
        probes: int = 1,
        probe_seed: int = 0,
        nfe: int | None = None,
        method: str | Tableau | None = None,
        guidance: float | None = None,
    ) -> Request:
        """The solver, the field and the trace's noise that were asked for, checked."""
        weight = checked_guidance(guidance, self.classes, self.label_dropout)
        divergence = self.chosen_divergence()
        if isinstance(divergence, Hutchinson):
            count = max(whole_number("probes", probes, 1), divergence.probes)
            divergence = replace(divergence, probes=count, seed=whole_number("seed", probe_seed, 0))
        return Request(divergence, with_budget(self.solver, nfe, method), weight, budget=nfe)

    def _given(self, images: Any, labels: Any) -> tuple[Tensor, Tensor | None]:
        """Rows of whole numbers (n, dim), and labels (n, 1) or None."""
        pixels = as_pixels(images, self.shape, self.levels)
        return pixels, self._column(labels, len(pixels))

    def _column(self, labels: Any, count: int, name: str = "labels") -> Tensor | None:
        column = labels_column(labels, count, self.classes, name)
        return None if column is None else column.to(self.device, self.dtype)

    def _chunks(
        self, pixels: Tensor, column: Tensor | None, request: Request, seed: int, size: int
    ) -> Iterator[tuple[Tensor, Tensor | None, Request]]:
        """Blocks of dequantized rows, their labels, and the request with the trace's noise of each
        row.
        """
        for start in range(0, len(pixels), size):
            rows = pixels[start : start + size]
            keys = keys_of(rows)
            noise = uniform(keys, self.dim, seed).to(self.device)
            x = dequantized(rows.to(self.device), noise, self.levels)
            given = None if column is None else column[start : start + size]
            divergence = request.divergence
            if isinstance(divergence, Hutchinson):
                probes, law, noise = divergence.probes, divergence.law, divergence.seed
                divergence = KeyedHutchinson(probes, law, noise, keys)
            yield x, given, request._replace(divergence=divergence)

    def _no_points(self) -> Tensor:
        return torch.empty(0, *self.shape, dtype=self.dtype, device=self.device)

    @property
    def context(self) -> int:
        """Columns of what the field is told of every row: the label, where there are classes."""
        return 1 if self.classes else 0

    @property
    def kind(self) -> Kind:
        """What dequantized rows are made to be before the maps take them."""
        wide = self.dtype if self.device.type == "mps" else torch.float64
        return Kind(self.dim, wide, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.logit.shift.dtype

    @property
    def device(self) -> torch.device:
        return self.logit.shift.device


def _between(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Points (n, dim) at a share of the way along great circles, of lengths between the ends'."""
    lengths = start.norm(dim=1, keepdim=True), end.norm(dim=1, keepdim=True)
    one, other = start / lengths[0], end / lengths[1]
    angle = (one * other).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    turned = (((1 - share) * angle).sin() * one + (share * angle).sin() * other) / angle.sin()
    return torch.lerp(*lengths, share) * turned


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """Truths of that shape."""
    given = torch.as_tensor(mask)
    if given.dtype != torch.bool:
        raise InputError(
            f"mask is of {given.dtype}; give truths, true where pixels are known, such as mask > 0"
        )
    try:
        return given.expand(shape)
    except RuntimeError:
        raise InputError(
            f"mask is of shape {tuple(given.shape)}, which does not go with images {shape}"
        ) from None


def _refuse_unknown(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"unknown {name} {value!r}; known are {', '.join(known)}")


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    try:
        channels, height, width = (whole_number("a side of shape", side, 1) for side in shape)
    except (TypeError, ValueError):
        raise InputError(
            f"shape must be (channels, height, width), such as (1, 28, 28), got {shape!r}"
        ) from None
    return channels, height, width
