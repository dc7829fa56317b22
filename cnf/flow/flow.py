"""A continuous normalizing flow: a density with an ODE between it and a simple base.

Time runs from t = 0, the base, to t = 1, the data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.distributions import Distribution

from cnf.data.rows import as_rows
from cnf.error import InputError, whole_number
from cnf.flow.accuracy import (
    Info,
    Request,
    evaluated,
    in_double,
    joined,
    valued,
    within_error,
)
from cnf.flow.base import LearnedBase
from cnf.flow.batch import as_batch, as_context, shaped_context
from cnf.flow.budget import BUDGETS, METHODS, Tradeoff, tradeoff, with_budget
from cnf.flow.check import Check, examined
from cnf.flow.coupling import Coupling
from cnf.flow.distribution import FlowDistribution, FlowTransform
from cnf.flow.recipe import fit_flow
from cnf.flow.regularizer import Regularizer
from cnf.flow.setting import checked_guidance
from cnf.flow.storage import damaged, fill, read, write
from cnf.flow.transform import refuse_constant
from cnf.flow.transport import OwnField, Transport
from cnf.flow.variational import fit_flow_to_density
from cnf.ode.tableau import Tableau
from cnf.training.loop import Progress
from cnf.training.snapshot import Snapshots

CHUNK = 16_384  # rows solved together where no gradient ties them


class How(TypedDict, total=False):
    """How a flow's ODE is to be solved: a budget of evaluations, and the field's guidance."""

    nfe: int | None
    method: str | Tableau | None
    guidance: float | None


class Flow(Transport):
    """A density over vectors of `dim` features; as a module, forward(x) is log_prob(x).

    context: columns of what the density is conditional on, 0 for nothing; context_dropout: the
    share of rows whose context is withheld in training, so that sampling can be guided.
    hidden: widths of the default field, (128, 128) until the first fit, which tries others if none
    are given; bandwidth: (low, high), the angular frequencies of its first layer's sines per
    standard deviation, None for no sines, "auto" likewise for (0.5, 6) until the first fit;
    field: one's own f(t, x) → dx/dt instead, x (batch, dim), t 0-d or (batch,); where there is a
    context f(t, x, c), with c (batch, context) standardized, and with context_dropout one column
    more, 1 where the context is given and 0, as all of c, where it is withheld.
    base: a torch distribution over vectors, or a DiagonalGaussian, StudentT or GaussianMixture,
    which are learned; by default the standard normal; support: where the data can be, "positive" or
    (low, high), numbers or one for each column, None or inf for no end; divergence: "auto" (the
    closed form where the field has one, else exact tangents), or a ClosedForm, Tangents or
    Hutchinson; whiten: whether `fit` puts the data's affine whitening inside the flow; marginals:
    "auto" lets it put a monotone map of every column before the whitening where rows held out say
    so (skewed columns, columns with edges), None does not; method, step_size, rtol, atol, gradient:
    as for `solve`; logdet_atol: the tolerance of log-densities in nats per step; seed: of the
    initial weights.  An untrained flow is the identity: its density is the base's.
    Source: Chen et al. 2018, section 4; Grathwohl et al. 2019.

    >>> flow = Flow(2, seed=0)
    >>> flow.log_prob(torch.zeros(1, 2)).tolist()  # −log 2π
    [-1.8378770351409912]
    >>> flow.sample(3, seed=0).shape
    torch.Size([3, 2])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    # densities --------------------------------------------------------------------------------

    @overload
    def log_prob(
        self,
        x: Any,
        context: Any = ...,
        *,
        return_info: Literal[False] = False,
        error: float | None = ...,
        chunk: int = ...,
        **how: Unpack[How],
    ) -> Tensor: ...
    @overload
    def log_prob(
        self,
        x: Any,
        context: Any = ...,
        *,
        return_info: Literal[True],
        error: float | None = ...,
        chunk: int = ...,
        **how: Unpack[How],
    ) -> tuple[Tensor, Info]: ...
    def log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        return_info: bool = False,
        error: float | None = None,
        chunk: int = CHUNK,
        **how: Unpack[How],
    ) -> Tensor | tuple[Tensor, Info]:
        """Log-density in nats, of shape (…) for x of shape (…, dim); differentiable.

        x: tensor, array or data frame; context: of shape (…, context), one for each row or one for
        all; return_info: return (log_prob, Info), with what each value is worth, for about four
        times the work; error: nats that each may be off, by which tolerance and probes are chosen;
        nfe: a budget of evaluations instead of the tolerance, by `method`, else by rk4, below 16 by
        midpoint; guidance: of the field that is guided so, see `sample`; chunk: rows solved
        together.
        A row's value depends on no other row, nor on train() or eval(); points outside the support
        have −∞.  Raises InputError for a wrong width or values that are not finite.
        """
        batch = as_batch(x, self.kind, context, self.context)
        request = self._request(**how).within(error)
        chunks = batch.chunks(whole_number("chunk", chunk, 1))
        if not return_info and request.error is None:
            parts = [evaluated(self, *rows, request)[0] for rows in chunks]
            return torch.cat(parts).reshape(batch.shape)
        value, twin = valued if request.error is None else within_error, in_double(self)
        measured = [value(self, twin, *rows, request) for rows in chunks]
        log_prob, info = joined(measured, batch.shape, request.divergence)
        return (log_prob, info) if return_info else log_prob

    @overload
    def encode(
        self,
        x: Any,
        context: Any = ...,
        *,
        return_logdet: Literal[False] = False,
        **how: Unpack[How],
    ) -> Tensor: ...
    @overload
    def encode(
        self, x: Any, context: Any = ..., *, return_logdet: Literal[True], **how: Unpack[How]
    ) -> tuple[Tensor, Tensor]: ...
    def encode(
        self, x: Any, context: Any = None, *, return_logdet: bool = False, **how: Unpack[How]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The base's points, (…, dim), that the flow carries to x (…, dim).

        With return_logdet=True (points, log |det dz/dx| of shape (…)).  The other arguments are
        those of `log_prob`.  Raises InputError for points outside the support.
        """
        batch = as_batch(x, self.kind, context, self.context)
        request = self._request(**how)
        parts: list[tuple[Tensor, Tensor]] = []
        for i, (rows, given) in enumerate(batch.chunks(CHUNK)):
            self.support.refuse_outside(rows, first=i * CHUNK)
            parts.append(self.encoded(rows, given, request, return_logdet))
        z = torch.cat([z for z, _ in parts]).reshape(*batch.shape, self.dim)
        if not return_logdet:
            return z
        return z, torch.cat([logdet for _, logdet in parts]).reshape(batch.shape)

    def check(self, x: Any, context: Any = None) -> Check:
        """What the flow's log-densities are worth, measured on rows x (rows, dim): printed it is a
        table and a verdict in a sentence.
        """
        batch = as_batch(x, self.kind, context, self.context)
        if len(batch.x) < 2:
            raise InputError(f"x has {len(batch.x)} rows; give at least 2 to check the flow on")
        return examined(self, *next(batch.chunks(len(batch.x))))

    def tradeoff(
        self,
        x: Any,
        context: Any = None,
        *,
        methods: Sequence[str] = METHODS,
        nfe: Sequence[int] = BUDGETS,
    ) -> Tradeoff:
        """Error and time of log_prob and of sampling against the number of evaluations, for several
        methods, on rows x (rows, dim); printed it is a table.
        """
        batch = as_batch(x, self.kind, context, self.context)
        if len(batch.x) < 2:
            raise InputError(f"x has {len(batch.x)} rows; give at least 2 to compare settings on")
        return tradeoff(self, *next(batch.chunks(len(batch.x))), methods, nfe)

    # samples ----------------------------------------------------------------------------------

    @overload
    def sample(
        self,
        n: int,
        context: Any = ...,
        *,
        return_log_prob: Literal[False] = False,
        seed: int | None = ...,
        **how: Unpack[How],
    ) -> Tensor: ...
    @overload
    def sample(
        self,
        n: int,
        context: Any = ...,
        *,
        return_log_prob: Literal[True],
        seed: int | None = ...,
        **how: Unpack[How],
    ) -> tuple[Tensor, Tensor]: ...
    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Any = None,
        *,
        return_log_prob: bool = False,
        seed: int | None = None,
        **how: Unpack[How],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """n draws of shape (n, dim), without gradients; with their log-densities if asked for.

        context: one for all draws, (context,), or one for each, (n, context); seed: the same draws
        every time, None draws from torch's generator; nfe, method: a budget of evaluations, as for
        `log_prob`; guidance: how far the field follows the context, 1 as it was learned, more to
        exaggerate it, for a flow with context_dropout; the log-densities are then those of the
        guided field.
        """
        if return_log_prob:
            return self.rsample(n, context, return_log_prob=True, seed=seed, **how)
        return self.rsample(n, context, seed=seed, **how)

    @overload
    def rsample(
        self,
        n: int,
        context: Any = ...,
        *,
        return_log_prob: Literal[False] = False,
        seed: int | None = ...,
        **how: Unpack[How],
    ) -> Tensor: ...
    @overload
    def rsample(
        self,
        n: int,
        context: Any = ...,
        *,
        return_log_prob: Literal[True],
        seed: int | None = ...,
        **how: Unpack[How],
    ) -> tuple[Tensor, Tensor]: ...
    def rsample(
        self,
        n: int,
        context: Any = None,
        *,
        return_log_prob: bool = False,
        seed: int | None = None,
        **how: Unpack[How],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """n draws of shape (n, dim), differentiable by the flow's parameters; see `sample`.

        With return_log_prob=True (draws, log-densities (n,)) from one solve.
        """
        n = whole_number("n", n, 0)
        given = as_context(context, torch.Size([n]), self.kind, self.context)
        request = self._request(**how)
        z = self.draw_base(n, seed)
        contexts = [None] * len(z.split(CHUNK)) if given is None else given.split(CHUNK)
        pairs = zip(z.split(CHUNK), contexts, strict=True)
        parts = [self.decoded(*rows, request, return_log_prob) for rows in pairs]
        x = torch.cat([part for part, _ in parts])
        return (x, torch.cat([log_prob for _, log_prob in parts])) if return_log_prob else x

    def decode(self, z: Any, context: Any = None, **how: Unpack[How]) -> Tensor:
        """The points x, (…, dim), to which the flow carries the base's z (…, dim)."""
        batch = as_batch(z, self.kind, context, self.context, "z")
        request = self._request(**how)
        parts = [self.decoded(*rows, request, False)[0] for rows in batch.chunks(CHUNK)]
        return torch.cat(parts).reshape(*batch.shape, self.dim)

    def dist(
        self,
        context: Any = None,
        *,
        guidance: float | None = None,
        validate_args: bool | None = None,
    ) -> FlowDistribution:
        """The flow as a torch distribution over vectors; its batch shape is the context's, less the
        columns.  Where Pyro has been imported `pyro.sample` takes it too.
        """
        checked_guidance(guidance, self.context, self.context_dropout)
        given = shaped_context(context, self.kind, self.context)
        law = FlowDistribution
        if "pyro" in sys.modules:
            from cnf.flow.pyro import PyroFlowDistribution as law
        return law(self, given, guidance=guidance, validate_args=validate_args)

    @property
    def transform(self) -> FlowTransform:
        """The map from the base's points to the data's as a torch transform; that of a conditional
        flow is `dist(context).transform`.
        """
        shaped_context(None, self.kind, self.context)  # refused where there should be one
        return FlowTransform(self)

    # fitting ----------------------------------------------------------------------------------

    def fit(
        self,
        x: Any,
        context: Any = None,
        *,
        method: str = "auto",
        seconds: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        validation: float | Any = 0.1,
        sample_weight: Any = None,
        regularizer: Regularizer | None = None,
        coupling: str | Coupling = "independent",
        callback: Callable[[Progress], None] | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        snapshot: str | os.PathLike[str] | Snapshots | None = None,
    ) -> Self:
        """This flow, fitted to rows x of shape (rows, dim); a second fit goes on from here.

        x may be a torch distribution, from which every batch is then drawn anew; context: (rows,
        context), where the flow takes one.
        method: "fm" (flow matching), "ml" (maximum likelihood), or "auto": the first as a warm
        start, then the second.  What is open of the default field is chosen first, by short trials
        that are judged on the validation rows.  seconds or steps: the budget, by default 50
        seconds; lr: the largest learning rate, by default 0.012 of flow matching (by SOAP) and
        0.002 of maximum likelihood (by Adam); validation: a share of the rows, or rows of their own
        (with a context a pair of both), on which the best weights are chosen; sample_weight:
        (rows,), from 0 up, how much each row counts, such as how often it was seen; regularizer:
        what maximum likelihood adds to its loss; coupling: of noise and data in flow matching;
        callback: is given a Progress record after every step; progress: a bar on stderr.
        snapshot: a file that keeps where the fit stands, written every minute, on Ctrl-C and
        SIGTERM, and at the end; where it exists already, the fit goes on from there, or returns at
        once if it had ended.
        Raises InputError for data that cannot be fitted, and for a snapshot of another fit;
        IntegrationError or TrainingError where training cannot go on.
        """
        fit_flow(
            self,
            x,
            context,
            method=method,
            seconds=seconds,
            steps=steps,
            seed=seed,
            lr=lr,
            batch_size=batch_size,
            validation=validation,
            sample_weight=sample_weight,
            regularizer=regularizer,
            coupling=coupling,
            callback=callback,
            device=device,
            progress=progress,
            snapshot=snapshot,
        )
        return self

    def fit_to_density(
        self,
        log_density: Callable[..., Tensor],
        context: Any = None,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        lr: float | None = None,
        batch_size: int = 512,
        regularizer: Regularizer | None = None,
        callback: Callable[[Progress], None] | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> Self:
        """This flow, fitted to a density that is known up to a constant, by reverse KL.

        log_density: x (n, dim) → (n,), nats, differentiable by x and row by row; of a conditional
        flow (x, context) → (n,); context: rows (m, k), of which each step draws one for each of its
        draws, so that one flow serves them all; batch_size: draws of a step; the rest as for `fit`.
        The best weights are chosen on draws that stay the same.
        Minus the loss bounds the log of the density's integral from below; what lies far from all
        draws is not seen: a mode that no draw reaches is missed.
        Raises InputError for a log-density that cannot be used.
        Source: Rezende & Mohamed 2015, section 2.
        """
        fit_flow_to_density(
            self,
            log_density,
            context,
            seconds=seconds,
            steps=steps,
            seed=seed,
            lr=lr,
            batch_size=batch_size,
            regularizer=regularizer,
            callback=callback,
            device=device,
            progress=progress,
        )
        return self

    def whiten(self, x: Any, context: Any = None) -> Self:
        """This flow with its maps set from data (rows, dim): the columns' own, if any are called
        for, then an affine one of full covariance, shrunk; contexts are standardized.
        """
        rows = as_rows(x, self.dim, dtype=self.dtype, device=self.device)
        self.support.refuse_outside(rows)
        refuse_constant(rows)
        given = shaped_context(context, self.kind, self.context)
        if self.contexts is not None and given is not None:
            self.contexts.fit(given.reshape(-1, self.context))
        inner = self.support(rows)[0]
        if self.maps_marginals:
            self.marginals.fit(inner)
        self.whitening.fit(self.marginals(inner)[0])
        return self

    # files and settings ------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings to one .safetensors file, atomically."""
        write(path, self, self.config)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        field: OwnField | None = None,
        base: Distribution | LearnedBase | None = None,
    ) -> Self:
        """The flow in a file that `save` wrote; no code of the file is run.

        field, base: one's own, where the saved flow had them.  Raises InputError for a file that
        is missing, damaged or of another kind.
        """
        settings, tensors = read(path)
        if "image" in settings:
            raise InputError(f"{path} holds an image flow; read it by cnf.ImageFlow.load")
        for name, own in (("field", field), ("base", base)):
            if (stored := settings.pop(f"own_{name}", None)) and own is None:
                raise InputError(
                    f"{path} was saved with a {name} of its own, {stored}; hand it in "
                    f"again: Flow.load(path, {name}=…)"
                )
        learned = settings.pop("base", None)
        base = learned if base is None else base
        try:
            flow = cls(**settings, field=field, base=base)
            flow.to(tensors["whitening.mean"].dtype)
            flow.marginals.take_shapes(tensors, "marginals.")
        except InputError:
            raise  # a base= that does not fit, say
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(path) from error
        fill(flow, tensors, path)
        return flow

    def _request(
        self,
        *,
        nfe: int | None = None,
        method: str | Tableau | None = None,
        guidance: float | None = None,
    ) -> Request:
        """The solver and the field that were asked for, checked."""
        weight = checked_guidance(guidance, self.context, self.context_dropout)
        solver = with_budget(self.solver, nfe, method)
        return Request(self.chosen_divergence(), solver, weight, budget=nfe)
