"""The value and the trace of a net with two hidden layers, in one pass and with one backward.

f = A₃ φ₂(A₂ φ₁(A₁ x + b₁) + b₂) + b₃ and tr ∂f/∂x = s₂ᵀ M s₁ with s_i = φ_i'(a_i), where
M = A₂ ∘ (A₁ A₃)ᵀ.  Written out by hand because the kernels are elementwise and bound by memory:
autograd's chain over the same formula takes about three times as many passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf.nets.activation import ACTIVATIONS


class Layers(NamedTuple):
    """The matrices and shifts of the formula; M of shape (h₂, h₁)."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    a3: Tensor
    b3: Tensor
    m: Tensor


Names = tuple[str, str]  # of φ₁ and φ₂


def value_and_trace(x: Tensor, layers: Layers, names: Names) -> tuple[Tensor, Tensor]:
    """(f, tr ∂f/∂x) of shapes (batch, dim) and (batch,), differentiable to any order."""
    if torch.is_grad_enabled():
        return _ValueAndTrace.apply(names, x, *layers)
    value, trace, _ = _forward(x, layers, names)
    return value, trace


def _forward(x: Tensor, layers: Layers, names: Names) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    a1 = torch.addmm(layers.b1, x, layers.a1.T)
    h1, s1 = ACTIVATIONS[names[0]].slope(a1)
    a2 = torch.addmm(layers.b2, h1, layers.a2.T)
    h2, s2 = ACTIVATIONS[names[1]].slope(a2)
    mixed = s1 @ layers.m.T
    value = torch.addmm(layers.b3, h2, layers.a3.T)
    return value, (s2 * mixed).sum(-1), (a1, h1, s1, a2, h2, s2, mixed)


class _ValueAndTrace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: Names, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        value, trace, hidden = _forward(x, Layers(*tensors), names)
        ctx.names = names
        ctx.save_for_backward(x, *tensors, *hidden)
        return value, trace

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, value_bar: Tensor, trace_bar: Tensor
    ) -> tuple[Any, ...]:
        inputs, hidden = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        if torch.is_grad_enabled():  # a second derivative is wanted: leave it to autograd
            # aliases: x's own history leads to the same weights and must not be walked from here
            inputs = [x.view_as(x) for x in inputs]
            value, trace, _ = _forward(inputs[0], Layers(*inputs[1:]), ctx.names)
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(
                torch.autograd.grad(
                    (value, trace),
                    wanted,
                    (value_bar, trace_bar),
                    create_graph=True,
                    allow_unused=True,
                )
            )
            return None, *(next(found) if x.requires_grad else None for x in inputs)
        return None, *_backward(inputs[0], Layers(*inputs[1:]), hidden, ctx, value_bar, trace_bar)


def _backward(
    x: Tensor,
    layers: Layers,
    hidden: tuple[Tensor, ...],
    ctx: Any,
    value_bar: Tensor,
    trace_bar: Tensor,
) -> tuple[Tensor | None, ...]:
    """Cotangents of x and of every layer."""
    a1, h1, s1, a2, h2, s2, mixed = hidden
    first, second = (ACTIVATIONS[name] for name in ctx.names)
    trace_bar = trace_bar.unsqueeze(-1)
    a3_bar, b3_bar = value_bar.T @ h2, value_bar.sum(0)

    # cotangent of a₂, through f and through s₂ in the trace
    a2_in = second.curve(a2, h2, s2).mul_(mixed).mul_(trace_bar)
    a2_in.addcmul_(value_bar @ layers.a3, s2)
    mixed_bar = s2 * trace_bar
    m_bar, s1_bar = mixed_bar.T @ s1, mixed_bar @ layers.m
    a2_bar, b2_bar = a2_in.T @ h1, a2_in.sum(0)

    a1_in = first.curve(a1, h1, s1).mul_(s1_bar)
    a1_in.addcmul_(a2_in @ layers.a2, s1)
    a1_bar, b1_bar = a1_in.T @ x, a1_in.sum(0)
    x_bar = a1_in @ layers.a1 if ctx.needs_input_grad[1] else None
    return x_bar, a1_bar, b1_bar, a2_bar, b2_bar, a3_bar, b3_bar, m_bar
