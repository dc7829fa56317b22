"""torchdiffeq 0.2.5's interface on this core: `import cnf.compat.torchdiffeq as torchdiffeq`.

Names, arguments, option keys, callbacks, warnings and exception types are those of torchdiffeq;
what differs on purpose is in docs/torchdiffeq.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnf.compat.adaptive import AdaptiveSolver, Pieces
from cnf.compat.adjoint import Backward, solve_with_adjoint, with_norm
from cnf.compat.request import Crossing, Layout, Request
from cnf.compat.solver import SOLVERS, read, solve, solve_until
from cnf.error import InputError
from cnf.ode.choice import choose_method
from cnf.ode.control import FixedStep
from cnf.ode.event import Event, Watch
from cnf.ode.integrate import Problem, Stats
from cnf.ode.outcome import corrected
from cnf.ode.state import Structure

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
__version__ = "0.2.5"  # of the interface

State = Any  # a tensor, or a tuple of tensors of any shapes


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    """The solution of dy/dt = func(t, y) with y(t[0]) = y0 at every time of t: (len(t), *y0.shape).

    func: t a 0-d tensor, y a state; y0: a tensor, or a tuple of tensors, for which a tuple comes
    back; t: (times,), floating, strictly monotone in either direction.
    rtol, atol: numbers, tensors for each entry, or a tuple for each part of a tuple; method: a name
    of `SOLVERS`, "dopri5" for None; options: what the method takes.
    event_fn: instead, (event time, solution of shape (2, *y0.shape)), where one of event_fn(t, y)'s
    numbers first turns zero; t[1] says no more than the direction.
    Gradients go through the solver's steps, of any order, and reach y0, t and what func reads.
    Raises ValueError for a method or option that cannot be, TypeError and AssertionError for times
    and states that cannot be, AssertionError where the solution cannot be continued.

    >>> odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))[-1]
    tensor([0.3679])
    """
    _check_event(t, event_fn)
    request = read(func, y0, t, rtol, atol, method, options)
    if event_fn is None:
        return request.layout.split(solve(request))
    moment, states = solve_until(request, Crossing(event_fn, request))
    return moment, request.layout.split(states)


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """The same as `odeint`, differentiated by the adjoint equation in memory independent of the
    number of steps.

    adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the way back; those of the way
    there for None; adjoint_options["norm"]: a function of (t, y, adjoint, *params), or "seminorm",
    which leaves the parameters out; adjoint_params: tensors to differentiate by, func's parameters
    for None.
    Raises ValueError besides where the parameters or the adjoint's options cannot be told.
    Source: Chen et al. 2018, algorithm 1; Kidger et al. 2021 for the seminorm.
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise InputError(
            "func is no nn.Module, so that its parameters are unknown: give them as "
            "`adjoint_params`, or adjoint_params=() if there are none"
        )
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise InputError(
            f"options are those of method={method!r} and cannot serve adjoint_method="
            f"{adjoint_method!r}: give `adjoint_options` too, {{}} for none"
        )
    _check_event(t, event_fn)
    request = read(func, y0, t, rtol, atol, method, options)
    if adjoint_options is None:
        adjoint_options = {key: value for key, value in (options or {}).items() if key != "norm"}
    params = _wanted(func, adjoint_params, adjoint_options)
    backward = Backward(
        _of_augmented(request.rtol, request, params) if adjoint_rtol is None else adjoint_rtol,
        _of_augmented(request.atol, request, params) if adjoint_atol is None else adjoint_atol,
        method if adjoint_method is None else adjoint_method,
        with_norm(adjoint_options, request.norm),
    )
    event = None if event_fn is None else Crossing(event_fn, request)
    moment, states = solve_with_adjoint(request, event, backward, params)
    solution = request.layout.split(states)
    return solution if event is None else (moment, solution)


def odeint_dense(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """The solution between t0 and t1 as a function: t ↦ state of shape (*t.shape, *y0.shape).

    t0, t1: numbers or 0-d tensors, in either order; method: an adaptive one.  The function takes
    numbers or tensors, is differentiable by them, and raises AssertionError outside.

    >>> dense = odeint_dense(lambda t, y: -y, torch.ones(1), 0.0, 2.0)
    >>> dense(1.0)
    tensor([0.3679])
    """
    like = t0 if isinstance(t0, Tensor) else torch.tensor(0.0, dtype=torch.float64)
    ends = (torch.as_tensor(end, dtype=like.dtype, device=like.device) for end in (t0, t1))
    t = torch.stack([end.reshape(()) for end in ends])
    request = read(func, y0, t, rtol, atol, method, options)
    solver = SOLVERS[request.method]
    if not isinstance(solver, AdaptiveSolver):
        raise AssertionError(f"a dense solution needs an adaptive method, got {request.method!r}")
    return _Dense(solver.dense(request), request.layout)


@dataclass(frozen=True)
class _Dense:
    """The solution at any time, as the caller knows the state."""

    pieces: Pieces
    layout: Layout

    def __call__(self, t: Any) -> Any:
        t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        return self.layout.split(self.pieces(t))


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """(event time, solution of shape (2, *y0.shape)): where event_fn(t, y) first turns zero.

    event_fn: returns one number or several, the first to turn zero counts; reverse_time: look
    before t0; odeint_interface, kwargs: what solves, odeint or odeint_adjoint, and its arguments.
    Both results carry gradients by everything that the solution and event_fn depend on, event_fn's
    own parameters included.
    """
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    moment, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    request = read(func, y0, t, 1.0, 1.0, None, None)
    layout = request.layout
    end = layout.join(solution[-1] if layout.shapes is None else [part[-1] for part in solution])
    moment, end = _moved_along(request, Crossing(event_fn, request), moment, end)
    if layout.shapes is None:
        return moment, torch.cat([solution[:-1], end[None]])
    parts = zip(solution, layout.split(end), strict=True)
    return moment, tuple(torch.cat([part[:-1], last[None]]) for part, last in parts)


def _moved_along(
    request: Request, event: Crossing, moment: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The time and the state where the event function is zero to first order, with gradients."""
    watch = Watch((Event(event),), Structure(y), event.clock, False)
    found = moment.item()
    way = Problem(
        request.field, (request.times[0], found), choose_method("euler"), FixedStep(1.0), 1,
        watch=watch,
    )  # fmt: skip
    met = corrected(way, Stats(), 0, found, (y,), ())
    return met.time.to(moment.dtype), met.y[0]


def _check_event(t: Any, event_fn: Any) -> None:
    if event_fn is not None and len(t) != 2:
        raise InputError(f"with event_fn t must hold 2 times, start and direction, got {len(t)}")


def _wanted(
    func: Any, params: Iterable[Tensor] | None, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The tensors to differentiate by."""
    given = tuple(_parameters(func) if params is None else params)
    wanted = tuple(param for param in given if param.requires_grad)
    if len(wanted) < len(given) and callable(options.get("norm")):
        warnings.warn(
            f"{len(given) - len(wanted)} of the adjoint parameters do not require a gradient: they "
            "are left out of the adjoint and of what its norm is given",
            stacklevel=3,
        )
    return wanted


def _parameters(module: nn.Module) -> list[Tensor]:
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    # a replica of nn.DataParallel keeps its parameters as plain attributes
    parts = (vars(part).values() for part in module.modules())
    return [x for values in parts for x in values if isinstance(x, Tensor) and x.requires_grad]


def _of_augmented(tolerance: Any, request: Request, params: tuple[Tensor, ...]) -> Any:
    """A tolerance of the state for (t, y, adjoint, *params)."""
    if not isinstance(tolerance, Tensor):
        return tolerance
    entries, least = tolerance.expand(request.y.shape).reshape(-1), tolerance.min()
    return (least, entries, entries, *[least for _ in params])
