"""The value and the trace of a net with two hidden layers, in one pass and with one backward.

f = W₃ h₂ + b₃, h_i = g_i ∘ φ_i(a_i), a₁ = W₁ x + b₁, a₂ = W₂ h₁ + b₂, and tr ∂f/∂x = s₂ᵀ M s₁ with
s_i = g_i ∘ φ_i'(a_i) and M = W₂ ∘ (W₁ W₃)ᵀ.  Where shifts b and gates g are those of one time,
shared by all rows, the gates are put into the matrices, which are smaller than the batch; where
every row has its own, given a context, they are put into the hidden units.
Written out by hand because the kernels are elementwise and bound by memory, and small: autograd's
chain over the same formula takes about three times as many passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf.nets.activation import ACTIVATIONS


class Layers(NamedTuple):
    """The tensors of the formula: W₁ (h₁, dim), W₂ (h₂, h₁), W₃ (dim, h₂), M (h₂, h₁).

    at_time: b₁, b₂, g₁, g₂ and b₃ one after the other, in one vector, or in one for each row.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor
    m: Tensor
    at_time: Tensor

    def parts_of_time(self) -> tuple[Tensor, ...]:
        """(b₁, b₂, g₁, g₂, b₃)"""
        first, second = self.w1.shape[0], self.w3.shape[1]
        sizes = [first, second, first, second, self.w3.shape[0]]
        return torch.split_with_sizes(self.at_time, sizes, -1)

    @property
    def of_rows(self) -> bool:
        """Whether every row has shifts and gates of its own."""
        return self.at_time.ndim == 2


Names = tuple[str, str]  # of φ₁ and φ₂


def value_and_trace(x: Tensor, layers: Layers, names: Names) -> tuple[Tensor, Tensor]:
    """(f, tr ∂f/∂x) of shapes (batch, dim) and (batch,), differentiable to any order."""
    if torch.is_grad_enabled():
        return _ValueAndTrace.apply(names, x, *layers)
    value, trace, _ = _forward(x, layers, names)
    return value, trace


def pull(
    x: Tensor, layers: Layers, names: Names, value_bar: Tensor, trace_bar: Tensor
) -> tuple[Tensor, Layers]:
    """Cotangents of x and of every layer, without a graph and without the value itself."""
    hidden = _hidden(x, layers, names)
    x_bar, *bars = _backward(x, layers, hidden, names, value_bar, trace_bar)
    return x_bar, Layers(*bars)


def _forward(x: Tensor, layers: Layers, names: Names) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    hidden = _hidden(x, layers, names)
    (*_, h2, s2, mixed), (*_, g2, b3) = hidden, layers.parts_of_time()
    if layers.of_rows:
        return torch.addmm(b3, h2 * g2, layers.w3.T), (s2 * g2 * mixed).sum(-1), hidden
    value = torch.addmm(b3, h2, (layers.w3 * g2).T)
    return value, (s2 * mixed).sum(-1), hidden


def _hidden(x: Tensor, layers: Layers, names: Names) -> tuple[Tensor, ...]:
    """(a₁, h₁, s₁, a₂, h₂, s₂, M s₁), the gates left out of h and s; M s₁ has those of the rows'
    own first layer, or both that are shared.
    """
    b1, b2, g1, g2, _ = layers.parts_of_time()
    a1 = torch.addmm(b1, x, layers.w1.T)
    h1, s1 = ACTIVATIONS[names[0]].slope(a1)  # often in the place of a₁: large, and done with
    if layers.of_rows:
        a2 = torch.addmm(b2, h1 * g1, layers.w2.T)
        h2, s2 = ACTIVATIONS[names[1]].slope(a2)
        return a1, h1, s1, a2, h2, s2, (s1 * g1) @ layers.m.T
    a2 = torch.addmm(b2, h1, (layers.w2 * g1).T)
    h2, s2 = ACTIVATIONS[names[1]].slope(a2)
    mixed = s1 @ (layers.m * g1 * g2.unsqueeze(-1)).T
    return a1, h1, s1, a2, h2, s2, mixed


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
        inputs, hidden = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
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
        layers = Layers(*inputs[1:])
        return None, *_backward(inputs[0], layers, hidden, ctx.names, value_bar, trace_bar)


def _backward(
    x: Tensor,
    layers: Layers,
    hidden: tuple[Tensor, ...],
    names: Names,
    value_bar: Tensor,
    trace_bar: Tensor,
) -> tuple[Tensor, ...]:
    """Cotangents of x and of every layer.

    Those of the matrices are found with the gates in them first: a gate's own is the sum over its
    row or column of the matrices that it scales.
    """
    if layers.of_rows:
        return _backward_of_rows(x, layers, hidden, names, value_bar, trace_bar)
    a1, h1, s1, a2, h2, s2, mixed = hidden
    _, _, g1, g2, _ = layers.parts_of_time()
    first, second = (ACTIVATIONS[name] for name in names)
    trace_bar, outer = trace_bar.unsqueeze(-1), g2.unsqueeze(-1)
    w3_in = value_bar.T @ h2

    # cotangent of a₂, through f and through φ₂' in the trace
    a2_in = second.pull(a2, h2, s2, value_bar @ (layers.w3 * g2), mixed * trace_bar)
    mixed_bar = s2 * trace_bar
    m_half = layers.m * g1
    m_in, w2_in = mixed_bar.T @ s1, a2_in.T @ h1

    a1_in = first.pull(a1, h1, s1, a2_in @ (layers.w2 * g1), mixed_bar @ (m_half * outer))
    x_bar, w1_bar = a1_in @ layers.w1, a1_in.T @ x

    m_outer = m_in * outer
    g1_bar = torch.addcmul(w2_in * layers.w2, m_outer, layers.m).sum(0)
    g2_bar = (w3_in * layers.w3).sum(0).add_((m_in * m_half).sum(1))
    time_bar = torch.cat([a1_in.sum(0), a2_in.sum(0), g1_bar, g2_bar, value_bar.sum(0)])
    return x_bar, w1_bar, w2_in.mul_(g1), w3_in.mul_(g2), m_outer.mul_(g1), time_bar


def _backward_of_rows(
    x: Tensor,
    layers: Layers,
    hidden: tuple[Tensor, ...],
    names: Names,
    value_bar: Tensor,
    trace_bar: Tensor,
) -> tuple[Tensor, ...]:
    """The same where every row has shifts and gates of its own."""
    a1, h1, s1, a2, h2, s2, mixed = hidden
    _, _, g1, g2, _ = layers.parts_of_time()
    first, second = (ACTIVATIONS[name] for name in names)
    trace_bar = trace_bar.unsqueeze(-1)

    h2_in, mixed_in = value_bar @ layers.w3, mixed * trace_bar
    g2_bar = torch.addcmul(h2_in * h2, mixed_in, s2)
    a2_in = second.pull(a2, h2, s2, h2_in * g2, mixed_in * g2)
    mixed_bar = (s2 * g2).mul_(trace_bar)

    h1_in, s1_in = a2_in @ layers.w2, mixed_bar @ layers.m
    g1_bar = torch.addcmul(h1_in * h1, s1_in, s1)
    a1_in = first.pull(a1, h1, s1, h1_in * g1, s1_in * g1)

    w2_bar, m_bar = a2_in.T @ (h1 * g1), mixed_bar.T @ (s1 * g1)
    time_bar = torch.cat([a1_in, a2_in, g1_bar, g2_bar, value_bar], -1)
    return (
        a1_in @ layers.w1, a1_in.T @ x, w2_bar, value_bar.T @ (h2 * g2), m_bar, time_bar,
    )  # fmt: skip
