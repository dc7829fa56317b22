"""Multilayer perceptrons as vector fields, conditioned on time and context by shifts and gates.

Layer i computes h_i = g_i ∘ φ_i(W_i h_{i−1} + u_i); the output W h + u has no gate, so that the
matrix of the closed-form trace depends on neither.  The shifts u and gates g are linear in Fourier
features of t; what a context adds to them is a small net's output, computed once for each solve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cnf.nets.activation import ACTIVATIONS
from cnf.nets.bilinear import Layers, pull, value_and_trace

CONTEXT_WIDTH = 64  # of the hidden layers that a context goes through


class MLP(nn.Module):
    """A field f(t, x) of any depth; t: 0-d or (batch,); x: (batch, dim) → (batch, dim).

    context: columns of what it depends on besides, 0 for nothing: it is then f(t, x, embed(c)).
    hidden: widths, one or more; bandwidth: (low, high), angular frequencies that the first layer's
    sines reach per unit of x, spread evenly on a log scale, or None for a first activation like the
    others; activation: "tanh", "silu" or "softplus"; frequencies: of the Fourier features of t.
    The output layer starts at zero: the flow starts as the identity.
    """

    row_wise = True

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128),
        *,
        bandwidth: tuple[float, float] | None = (0.5, 6.0),
        activation: str = "tanh",
        frequencies: int = 4,
        context: int = 0,
    ) -> None:
        super().__init__()
        if dim < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"expected dim ≥ 1 and hidden widths ≥ 1, got {dim} and {hidden}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}"
            )
        self._layer_activations = (activation,) * len(hidden)
        # stored beside the weights, which mean something else with the other first activation
        self.register_buffer("sines", torch.tensor(bandwidth is not None))
        self.sines: Tensor
        self.activations = self._named_activations()
        widths = [dim, *hidden]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(rows, columns)) for columns, rows in pairwise(widths)
        )
        self.out = nn.Parameter(torch.zeros(dim, widths[-1]))
        self.time = _TimeLayer(hidden, dim, frequencies)
        self.given = _ContextNet(context, sum(self.time.sizes)) if context else None
        self._initialize(bandwidth)

    @property
    def dim(self) -> int:
        return self.out.shape[0]

    def _named_activations(self) -> tuple[str, ...]:
        """Of each hidden layer; on the host, since every call asks for them."""
        return ("sin", *self._layer_activations[1:]) if self.sines else self._layer_activations

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        """Weights and the first activation that they are for; weights stored without are taken to
        be for the one that is here.
        """
        state_dict.setdefault(prefix + "sines", self.sines)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.activations = self._named_activations()

    @torch.no_grad()
    def _initialize(self, bandwidth: tuple[float, float] | None) -> None:
        for weight in self.weights:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if bandwidth is not None:
            first = self.weights[0]
            low, high = (math.log(value) for value in bandwidth)
            scales = torch.linspace(low, high, first.shape[0]).exp()
            first.copy_(nn.functional.normalize(torch.randn_like(first), dim=1) * scales[:, None])
            nn.init.uniform_(self.time.shift_bias(0), -math.pi, math.pi)

    def embed(self, context: Tensor) -> Tensor:
        """What contexts (batch, columns) add to all shifts and gates, (batch, …): what the field
        takes in their place, once for each solve.
        """
        if self.given is None:
            raise ValueError("the field depends on no context; make it with context=")
        return self.given(context)

    def forward(self, t: Tensor, x: Tensor, given: Tensor | None = None) -> Tensor:
        shifts, gates, drift = self.time(t, given)
        for weight, shift, gate, name in zip(
            self.weights, shifts, gates, self.activations, strict=True
        ):
            x = ACTIVATIONS[name].value(_affine(x, weight, shift)) * gate
        return _affine(x, self.out, drift)

    def tangent(
        self, t: Tensor, x: Tensor, tangents: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(f, J·tangents): tangents of shape (k, batch, dim) carried layer by layer beside x.

        Returns shapes (batch, dim) and (k, batch, dim).
        """
        shifts, gates, drift = self.time(t, given)
        for weight, shift, gate, name in zip(
            self.weights, shifts, gates, self.activations, strict=True
        ):
            x, slope = ACTIVATIONS[name].slope(_affine(x, weight, shift))
            x, tangents = x * gate, (tangents @ weight.T) * (slope * gate)
        return _affine(x, self.out, drift), tangents @ self.out.T


class BilinearMLP(MLP):
    """An MLP of one or two hidden layers, whose divergence has a closed form.

    With s_i = g_i ∘ φ_i'(a_i): one hidden layer, tr ∂f/∂x = s₁ · diag(W₁ W₂); two,
    tr ∂f/∂x = s₂ᵀ M s₁ with M = W₂ ∘ (W₁ W₃)ᵀ.  The cost does not depend on dim.
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (128, 128), **settings: object) -> None:
        if len(hidden) not in (1, 2):
            raise ValueError(f"the closed form needs one or two hidden layers, got {len(hidden)}")
        super().__init__(dim, hidden, **settings)  # type: ignore[arg-type]

    def prepare(self) -> tuple[Tensor, ...]:
        """(M,) of the closed form, computed once for each solve; (h₁,) or (h₂, h₁)."""
        inner = self.weights[0] @ self.out
        return (self.weights[1] * inner.T if len(self.weights) == 2 else inner.diagonal(),)

    def with_divergence(self, t: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(f, tr ∂f/∂x) of shapes (batch, dim) and (batch,).

        tensors: what `embed` returned, where there is a context, then what `prepare` returned.
        """
        *given, mixing = tensors
        if len(self.weights) == 2:
            return value_and_trace(x, *self._layers(t, mixing, *given))
        (shift,), (gate,), drift = self.time(t, *given)
        h, slope = ACTIVATIONS[self.activations[0]].slope(_affine(x, self.weights[0], shift))
        return _affine(h * gate, self.out, drift), slope * gate @ mixing

    def pull_divergence(
        self, t: Tensor, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[Tensor, Tensor | None]] | None:
        """What `with_divergence` pulls cotangents back to: those of x, of what `prepare` returned,
        and of the parameters.  By its own formula, without a graph; None where it has none.

        tensors: those of `with_divergence`, then the cotangents of f and of the trace.
        """
        *given, mixing, value_bar, trace_bar = tensors
        if len(self.weights) != 2 or t.ndim != 0:
            return None
        x_bar, bars = pull(x, *self._layers(t, mixing, *given), value_bar, trace_bar)
        first, second = self.weights
        at_time = bars.at_time.sum(0) if given else bars.at_time
        # the net of contexts was asked ahead of the solve and takes no part in it
        apart = () if self.given is None else self.given.parameters()
        return (
            x_bar,
            (bars.at_time, bars.m) if given else (bars.m,),
            {
                first: bars.w1,
                second: bars.w2,
                self.out: bars.w3,
                self.time.weight: torch.outer(at_time, self.time.features(t)),
                self.time.bias: at_time,
                **dict.fromkeys(apart),
            },
        )

    def _layers(
        self, t: Tensor, mixing: Tensor, given: Tensor | None = None
    ) -> tuple[Layers, tuple[str, str]]:
        """The tensors of the closed form at one time, or at those of the rows, and the names of its
        activations.
        """
        first, second = self.weights
        at_time = self.time.vector(t) if given is None else self.time.vector(t) + given
        layers = Layers(first, second, self.out, mixing, at_time)
        return layers, (self.activations[0], self.activations[1])


class LabelledMLP(BilinearMLP):
    """A BilinearMLP that may be told one of `classes` labels: whole numbers, −1 for none."""

    def __init__(
        self, dim: int, hidden: Sequence[int], *, classes: int = 0, **settings: object
    ) -> None:
        super().__init__(dim, hidden, context=classes, **settings)
        self.classes = classes

    def embed(self, context: Tensor) -> Tensor:
        """What labels (batch, 1) add to all shifts and gates; as `MLP.embed` of their indicators,
        all 0 where there is none.
        """
        known = torch.arange(self.classes, device=context.device)
        return super().embed((context == known).to(self.out.dtype))


class _TimeLayer(nn.Module):
    """Shifts and gates of every hidden layer and the output's shift, linear in features of t."""

    def __init__(self, hidden: Sequence[int], dim: int, frequencies: int) -> None:
        super().__init__()
        self.sizes = [*hidden, *hidden, dim]
        self.hidden_layers = len(hidden)
        # features t − ½, cos πkt and sin πkt: cosines of frequency · t + phase, but the first
        waves = math.pi * torch.arange(1, frequencies + 1, dtype=torch.get_default_dtype())
        zeros = torch.zeros_like(waves)
        frequency = torch.cat([torch.ones(1), waves, waves])
        phase = torch.cat([torch.full((1,), -0.5), zeros, zeros - math.pi / 2])
        self.register_buffer("frequency", frequency, persistent=False)
        self.register_buffer("phase", phase, persistent=False)
        self.register_buffer("is_linear", torch.arange(len(phase)) == 0, persistent=False)
        self.frequency: Tensor
        self.phase: Tensor
        self.is_linear: Tensor
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes), 2 * frequencies + 1))
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        with torch.no_grad():
            gates = self.bias[sum(hidden) : 2 * sum(hidden)]
            gates.fill_(1.0)  # open gates

    def shift_bias(self, layer: int) -> Tensor:
        """The constant part of a hidden layer's shift."""
        return self.bias.split(self.sizes)[layer]

    def forward(
        self, t: Tensor, given: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
        if given is None and t.ndim:  # each by itself: the gradient of one whole is a large copy
            features = self.features(t)
            own = zip(self.weight.split(self.sizes), self.bias.split(self.sizes), strict=True)
            parts = [nn.functional.linear(features, weight, bias) for weight, bias in own]
        else:
            vector = self.vector(t) if given is None else self.vector(t) + given
            parts = vector.split(self.sizes, -1)
        layers = self.hidden_layers
        return parts[:layers], parts[layers:-1], parts[-1]

    def vector(self, t: Tensor) -> Tensor:
        """All shifts, all gates and the output's shift one after the other, (*t.shape, …)."""
        return nn.functional.linear(self.features(t), self.weight, self.bias)

    def features(self, t: Tensor) -> Tensor:
        """Fourier features of t, and t itself about the middle, (*t.shape, …)."""
        angle = torch.addcmul(self.phase, t.unsqueeze(-1), self.frequency)
        return torch.where(self.is_linear, angle, angle.cos())


class _ContextNet(nn.Module):
    """What a context adds to shifts and gates: a net of two hidden layers that starts at zero."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, CONTEXT_WIDTH)
        self.middle = nn.Linear(CONTEXT_WIDTH, CONTEXT_WIDTH)
        self.outer = nn.Linear(CONTEXT_WIDTH, outputs)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, context: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.inner(context))
        return self.outer(nn.functional.silu(self.middle(hidden)))


def _affine(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """x Wᵀ + shift; shift of shape (rows,) or (batch, rows)."""
    if shift.ndim == 1:
        return nn.functional.linear(x, weight, shift)
    return torch.addmm(shift, x, weight.T)
