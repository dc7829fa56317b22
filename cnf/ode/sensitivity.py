"""How a loss depends on the state at every time, and on all that the field has done since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.solution import solve


@dataclass(frozen=True)
class AdjointState:
    """The adjoint of a solution at the requested times.

    t: (times,); y, a: the state and ∂L/∂y(t), (times, *y0.shape); a_params: for each of params the
    part of ∂L/∂θ that the field earns from t on, (times, *param.shape); a_t: ∂L/∂t of a start at
    (t, y(t)), (times,).
    """

    t: Tensor
    y: Tensor
    a: Tensor
    a_params: tuple[Tensor, ...]
    a_t: Tensor


def adjoint_state(
    field: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t: Sequence[float] | Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    params: Sequence[Tensor] = (),
    **solver: Any,
) -> AdjointState:
    """a(t) = ∂L/∂y(t) along the solution of dy/dt = field(t, y), y(t[0]) = y0.

    loss: L of the state at t[-1], 0-d; params: tensors that the field reads and that need a
    gradient, whose a_θ(t) is wanted; t: two or more strictly monotone times; solver: settings of
    `solve`: method, rtol, atol, step_size, control.
    da/dt = −a ∂f/∂y, da_θ/dt = −a ∂f/∂θ and da_t/dt = −a ∂f/∂t are solved backward from
    ∂L/∂y(t[-1]), 0 and −a f, with the state beside them.
    Raises InputError for a loss that is no number, and as `solve` does.
    Source: Chen et al. 2018, equations 4 and 8 to 10, and appendix B.

    >>> y0 = torch.ones(1, dtype=torch.float64)
    >>> found = adjoint_state(lambda t, y: -y, y0, [0.0, 1.0], lambda y: y.sum(), rtol=1e-8)
    >>> round(found.a[0].item(), 4), found.a[1].item()  # y(1) = e⁻¹ y(0)
    (0.3679, 1.0)
    """
    for param in params:
        if not param.requires_grad:
            raise InputError("params are tensors that require grad; call requires_grad_() on them")
    with torch.no_grad():
        forward = solve(field, y0, t, **solver)
    end = forward.y[-1].detach().requires_grad_()
    with torch.enable_grad():
        value = loss(end)
    if value.numel() != 1:
        raise InputError(f"loss must return one number, got shape {tuple(value.shape)}; sum it")
    (a_end,) = torch.autograd.grad(value, end)
    back = _Backward(field, tuple(params))
    with torch.no_grad():
        # a may be any size: in units of its own, the tolerance is relative to it
        scale = a_end.square().mean().sqrt().clamp_min(torch.finfo(a_end.dtype).tiny)
        times = torch.as_tensor(t, dtype=torch.float64).flip(0)
        start = (forward.y[-1], a_end / scale)
        solution = solve(back, start, times, quadrature=True, **solver)
        moment = forward.t[-1].to(end.device, end.dtype)  # as the field gets it in a solve
        a_t_end = -(a_end * field(moment, forward.y[-1])).sum()
        a = (solution.y[1] * scale).flip(0)
        a_params, a_t = solution.integral[:-1], solution.integral[-1]
        return AdjointState(
            forward.t,
            forward.y,
            a,
            tuple(
                (part * scale).flip(0).to(param.dtype)
                for part, param in zip(a_params, params, strict=True)
            ),
            ((a_t * scale).flip(0) + a_t_end).to(a.dtype),
        )


@dataclass(frozen=True, eq=False)
class _Backward:
    """(y, a) ↦ ((f, −a ∂f/∂y), (−a ∂f/∂θ, …, −a ∂f/∂t))."""

    field: Callable[[Tensor, Tensor], Tensor]
    params: tuple[Tensor, ...]

    def __call__(self, t: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        y, a = state
        with torch.enable_grad():
            moment, at = t.detach().requires_grad_(), y.detach().requires_grad_()
            value = self.field(moment, at)
            inputs = (at, *self.params, moment)
            pulled: tuple[Tensor | None, ...] = (None,) * len(inputs)
            if value.requires_grad:
                pulled = torch.autograd.grad(value, inputs, a, allow_unused=True)
        found = [
            torch.zeros_like(x) if g is None else -g for x, g in zip(inputs, pulled, strict=True)
        ]
        return (value.detach(), found[0]), tuple(found[1:])
