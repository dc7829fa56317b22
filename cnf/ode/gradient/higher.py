"""Derivatives of a derivative: gradients that are differentiable themselves, or say why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.field import alias
from cnf.ode.gradient.problem import vjp
from cnf.ode.state import Leaves


def pulled_back(
    outputs: Sequence[Tensor], inside: Leaves, tensors: Leaves, cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients by `tensors`, differentiable by them and by the cotangents, as often as wanted.

    outputs: with their graph, which ends in the leaves `inside`, copies of the tensors.  On the
    tensors themselves, of which one may be computed from another, a history would be walked twice.
    """
    bars = tuple(map(alias, cotangents))
    found = vjp(outputs, bars, inside, again=True)
    graphs = [g for g in found if g is not None and g.requires_grad]
    if not graphs:
        return found
    linked = iter(_Linked.apply(graphs, (*inside, *bars), *tensors, *cotangents))
    return [next(linked) if g is not None and g.requires_grad else g for g in found]


class _Linked(torch.autograd.Function):
    """The values of graphs on copies, as functions of what was copied."""

    @staticmethod
    def forward(ctx: Any, graphs: Sequence[Tensor], inside: Leaves, *outside: Tensor) -> Leaves:
        ctx.graphs, ctx.inside = graphs, inside
        ctx.save_for_backward(*outside)
        return tuple(graph.detach() for graph in graphs)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return None, None, *pulled_back(ctx.graphs, ctx.inside, ctx.saved_tensors, cotangents)
        return None, None, *vjp(ctx.graphs, cotangents, ctx.inside, keep=True)


def only_once(
    gradients: Sequence[Tensor | None], causes: Sequence[Tensor], reason: str
) -> list[Tensor | None]:
    """The gradients, whose own derivative by `causes` raises InputError with the reason."""
    known = [g for g in gradients if g is not None]
    marked = iter(_Once.apply(reason, len(known), *known, *causes))
    return [None if g is None else next(marked) for g in gradients]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reason: str, count: int, *tensors: Tensor) -> Leaves:
        ctx.reason = reason
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *_: Tensor
    ) -> tuple[Any, ...]:
        raise InputError(ctx.reason)
