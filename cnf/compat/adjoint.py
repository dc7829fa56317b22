"""The adjoint equation as torchdiffeq poses it, with settings that stay open until backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cnf.compat.request import Callbacks, Crossing, Dynamics, Norm, Request, on_host
from cnf.compat.solver import read, solve, solve_until
from cnf.ode.state import largest, rms

AdjointNorm = Callable[[tuple[Tensor, ...]], Any]


@dataclass(frozen=True)
class Backward:
    """How to solve the adjoint equation; options: with its norm, see `with_norm`."""

    rtol: Any
    atol: Any
    method: str | None
    options: dict[str, Any]


def solve_with_adjoint(
    request: Request, event: Crossing | None, backward: Backward, params: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor]:
    """(event time or None, states), differentiable by the start, the times and `params`.

    The way back is open to change until it is taken: its settings are attributes of the states'
    grad_fn, named as odeint_adjoint's arguments.
    """
    return _Adjoint.apply(request, event, backward, request.t, request.y, *params)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        request: Request,
        event: Crossing | None,
        backward: Backward,
        t: Tensor,
        y: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        if event is None:
            moment, states = None, solve(request)
        else:
            moment, states = solve_until(request, event)
        times = t if moment is None else torch.stack([t[0], moment])
        ctx.adjoint_rtol, ctx.adjoint_atol = backward.rtol, backward.atol
        ctx.adjoint_method, ctx.adjoint_options = backward.method, backward.options
        ctx.field, ctx.is_event = request.field, event is not None
        ctx.save_for_backward(times, states, *params)
        return moment, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, states_bar: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        t, states, *params = ctx.saved_tensors
        back = _Back(ctx, t, states, states_bar, tuple(params))
        wanted = ctx.needs_input_grad[3]
        t_bar = back.times_bar() if wanted else None
        a, params_bar = back.through()
        if t_bar is not None:
            t_bar[0] = -back.along(0, a)
            if ctx.is_event:  # the time of the event was found, not asked for
                t_bar[1:] = 0.0
        return None, None, None, t_bar, a + states_bar[0], *params_bar


class _Back:
    """The way back from the last time to the first."""

    def __init__(
        self, ctx: Any, t: Tensor, states: Tensor, states_bar: Tensor, params: tuple[Tensor, ...]
    ) -> None:
        self._ctx, self._field = ctx, ctx.field
        self._t, self._states, self._bar, self._params = t, states, states_bar, params

    def through(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(a, gradients by the params) at the first time, without the first state's cotangent."""
        a = torch.zeros_like(self._bar[0])
        totals = tuple(torch.zeros_like(param) for param in self._params)
        moments = on_host(self._t)
        for i in range(len(moments) - 1, 0, -1):
            a = a + self._bar[i]
            if moments[i] != moments[i - 1]:  # else an event that was there from the start
                a, totals = self._interval(i, a, totals)
        return a, tuple(map(_like, totals, self._params))

    def times_bar(self) -> Tensor:
        """⟨cotangent, f⟩ at each time: what moving where the solution is looked at changes."""
        rows = [self.along(i, self._bar[i]) for i in range(1, len(self._t))]
        return torch.stack([torch.zeros_like(self._t[0]), *rows])

    def along(self, i: int, bar: Tensor) -> Tensor:
        """⟨bar, f⟩ at the i-th time, 0-d."""
        slope = self._field(self._t[i], (self._states[i],)).slope[0]
        return (bar.conj() * slope).real.sum().to(self._t.dtype)

    def _interval(
        self, i: int, a: Tensor, totals: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The adjoint and the parameters' gradients at the time before the i-th."""
        ctx, zero = self._ctx, torch.zeros_like(a.real).sum()
        request = read(
            _Augmented(self._field, self._params),
            (zero, self._states[i], a, *totals),
            self._t[i - 1 : i + 1].flip(0),
            ctx.adjoint_rtol,
            ctx.adjoint_atol,
            ctx.adjoint_method,
            ctx.adjoint_options,
            partial(Callbacks.of, self._field.call, ending="_adjoint"),
        )
        _, _, a, *grown = request.layout.split(solve(request)[1])
        return _like(a, self._bar), tuple(grown)


def _like(found: Tensor, tensor: Tensor) -> Tensor:
    """A part of the joint state in the precision of the tensor that it belongs to."""
    real = found.is_complex() and not tensor.is_complex()
    return (found.real if real else found).to(tensor.dtype)


class _Augmented:
    """(0, y, a, gradients) ↦ (0, f, −a ∂f/∂y, −a ∂f/∂θ); the first stands where others keep dL/dt,
    which needs no integral: it is ⟨a, f⟩.
    """

    def __init__(self, field: Dynamics, params: tuple[Tensor, ...]) -> None:
        self._field, self._params = field, params

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        zero, y, a, *_ = state
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            slope = self._field(t, (y,)).slope[0]
            found = self._pulled(slope, -a, (y, *self._params))
        return zero, slope.detach(), *found

    def _pulled(self, slope: Tensor, a: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not slope.requires_grad:
            return tuple(torch.zeros_like(x) for x in inputs)
        # what func computed before the solve is walked through at every evaluation
        found = torch.autograd.grad(slope, inputs, a, allow_unused=True, retain_graph=True)
        return tuple(
            torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)
        )


def with_norm(options: dict[str, Any], norm: Norm) -> dict[str, Any]:
    """Adjoint options whose norm is a function of (t, y, a, *params), y and a in one tensor each.

    options: with a norm of the caller's own, which takes a tuple's parts one by one, or "seminorm",
    which leaves the parameters out, or without.
    """
    given = options.get("norm")
    if given is not None and given != "seminorm":
        return {**options, "norm": _of_parts(given, norm)}

    def of_all(state: tuple[Tensor, ...]) -> Tensor:
        t, y, a, *params = state
        counted = [] if given == "seminorm" else [rms(param) for param in params]
        return largest([t.abs(), norm(y), norm(a), *counted])

    return {**options, "norm": of_all}


def _of_parts(given: AdjointNorm, norm: Norm) -> AdjointNorm:
    """The caller's adjoint norm, given a tuple's parts one by one."""
    if norm.layout.shapes is None:
        return given
    split = norm.layout.split

    def of_parts(state: tuple[Tensor, ...]) -> Any:
        t, y, a, *params = state
        return given((t, *split(y), *split(a), *params))

    return of_parts
