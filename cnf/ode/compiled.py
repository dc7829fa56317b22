"""Steps compiled by torch.compile: all stages, their sums and the error in a few kernels.

What is compiled is the pure step, of tensors to tensors, for one field, one structure and size of
the state, with a graph and without; the loop that chooses the steps is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.control import Control
from cnf.ode.field import Evaluation, Field
from cnf.ode.method import Evaluate, ExplicitRungeKutta, Method, Step, take_step
from cnf.ode.state import Leaves
from cnf.ode.tableau import Tableau

BACKEND = "inductor"
_NUMBERS = count()
_KNOWN: weakref.WeakKeyDictionary[Any, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Compiled:
    """An explicit Runge–Kutta method whose steps are compiled; `plain` is the method itself.

    The first step for a field, a batch size and a dtype takes seconds to a minute.  The field is
    evaluated as it is traced: what it does in Python alone, such as counting, is done once.
    """

    plain: ExplicitRungeKutta

    @property
    def name(self) -> str:
        return self.plain.name

    @property
    def order(self) -> int:
        return self.plain.order

    @property
    def adaptive(self) -> bool:
        return self.plain.adaptive

    def prepare(self, control: Control, evaluate: Evaluate, t: Any, y: Leaves) -> Compiled:
        """Itself; raises InputError for steps that cannot be compiled."""
        if control.per_sample or control.jumps:
            raise InputError(
                "compile=True compiles the step that all rows share: leave out per_sample=True and "
                "jumps=, or compile=True"
            )
        return self

    def back(self, interpolate: bool, rated: bool) -> Method:
        """The method for the adjoint equation, whose field asks autograd and is not compiled."""
        return self.plain

    def twice(self) -> Method:
        """The method where second derivatives are wanted, which compiled code does not have."""
        return self.plain

    def at(self, t: float) -> Method:
        """The method that interpolates a step."""
        return self.plain

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        inner = getattr(field, "inner", None)
        if not isinstance(inner, Field) or inner.substitutes:  # not the field, but made of it
            return self.plain.step(field, t, h, y, first, estimate)
        tableau = self.plain.tableau
        field.count(tableau.stages - 1 if estimate else tableau.used_stages - 1)  # type: ignore
        pure = _pure_step(inner, self.plain, estimate)
        times = [torch.full((), s, dtype=torch.float64, device=inner.device) for s in (t, h)]
        try:
            with inner.precision:
                return pure(*times, y, first, inner.passed)
        except _failures() as error:
            raise InputError(_told(error)) from error


def _pure_step(inner: Field, method: ExplicitRungeKutta, estimate: bool) -> Callable[..., Step]:
    """The compiled step of a field, the same one in every solve."""
    try:
        known = _KNOWN.setdefault(inner.call, {})
    except TypeError:  # a callable that cannot be referred to weakly is compiled in every solve
        known = {}
    key = repr(
        (method, estimate, inner.state.shape, inner.rates and inner.rates.shape, inner.dtype)
    )
    if key not in known:
        _find_weights(method.tableau)
        step = _step_of(inner, method, estimate)
        known[key] = torch.compile(_of_its_own(step), backend=BACKEND, fullgraph=True)
    return known[key]


def _of_its_own(step: Callable[..., Step]) -> Callable[..., Step]:
    """The function with code that no other shares: torch.compile keeps what it has compiled, and
    counts how often, by the code, and gives up after a few.
    """
    code = step.__code__.replace(co_name=f"{step.__name__}_{next(_NUMBERS)}")
    return FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)


def _find_weights(tableau: Tableau) -> None:
    """Have the tableau's derived values at hand: a trace cannot enter the lock of those to come."""
    for name, value in vars(type(tableau)).items():
        if isinstance(value, cached_property):
            getattr(tableau, name)


def _step_of(inner: Field, method: ExplicitRungeKutta, estimate: bool) -> Callable[..., Step]:
    """(t, h, y, first, passed) ↦ the step, t and h 0-d; it holds the field but not the solve."""
    call, state, rates, dtype = weakref.ref(inner.call), inner.state, inner.rates, inner.dtype

    def step(t: Tensor, h: Tensor, y: Leaves, first: Evaluation, passed: Leaves) -> Step:
        field = call()

        def evaluate(moment: Tensor, leaves: Leaves) -> Evaluation:
            value = field(moment.to(dtype), state.build(leaves), *passed)  # type: ignore[misc]
            if rates is None:
                return Evaluation(state.leaves(value), ())
            slope, given = value
            return Evaluation(state.leaves(slope), rates.leaves(given))

        found = take_step(method, evaluate, t, h, y, first, estimate)
        # not _replace: some versions of torch.compile cannot trace it
        return Step(found.y, found.increment, found.last, found.error, found.increment_error)

    return step


def _failures() -> tuple[type[BaseException], ...]:
    """What torch.compile raises where it cannot."""
    from torch._dynamo import exc

    return (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)


def _told(error: BaseException) -> str:
    from torch._dynamo import exc

    if isinstance(error, exc.FailOnRecompileLimitHit):
        return (
            "the step was compiled again and again, until torch.compile gave up: the field is "
            "another at every call (it counts its calls, say), or the batch is; compile=True needs "
            "one that stays, so leave it out or keep the changing number in a tensor"
        )
    reason = " ".join(str(error).split())[:300]
    return (
        f"the step cannot be compiled ({reason}); compile=True needs a field that torch.compile "
        "can trace and, on the CPU, a C++ compiler: leave it out"
    )
