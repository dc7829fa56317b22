"""The user's field behind one signature, and every tensor that a gradient must reach.

Inside the core a field is called with the time as a host number and the state as leaves, and it
reads named tensors: those passed to it (`rows`, `params`) and those that it captures. Captured
leaves (a module's parameters, a tensor in a closure) are found, by looking at what the field names
and at what its first evaluation reads; a captured tensor that is itself computed must be named,
since backward evaluates the field on aliases of the named tensors: else its history would be walked
a second time inside the solve.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from cnf.error import InputError
from cnf.ode.jacobian import jacobian
from cnf.ode.state import Leaves, Structure

UserField = Callable[..., Any]
Named = tuple[str, Tensor]
_LARGEST_CONTAINER = 1000  # a longer one holds data, and is not searched for parameters


class Evaluation(NamedTuple):
    """dy/dt, and the rates of what is integrated along the path (empty without a quadrature)."""

    slope: Leaves
    rates: Leaves = ()


class Pulls(Protocol):
    """The attribute `pull` of a field that knows its own vector-Jacobian product."""

    def __call__(
        self, t: Tensor, y: Any, *tensors: Any
    ) -> tuple[Any, Sequence[Tensor | None], Mapping[Tensor, Tensor | None]] | None:
        """(cotangents of y, of what it is called with, of what it captures by the tensor itself:
        None for what takes no part).

        tensors: what the field is called with, then the cotangent of dy/dt, and of the rates if it
        has any.  Without a graph; None where the formula does not apply.
        """
        ...


@dataclass(frozen=True)
class Field:
    """A user's field f(t, y, *rows, *params) as (host time, leaves) → Evaluation.

    passed: the rows and params it is called with, the first `aligned` of them with the batch;
    captured: what it reads by itself; row_wise: whether rows can be left out;
    substitutes: aliases by the id of the captured tensor whose place they take; precision: the
    autocast state of the solve, for evaluations in backward.
    """

    call: UserField
    state: Structure
    rates: Structure | None
    dtype: torch.dtype
    device: torch.device
    passed: Leaves = ()
    captured: Leaves = ()
    aligned: int = 0
    row_wise: bool = False
    substitutes: dict[int, Tensor] = field(default_factory=dict)
    precision: Precision | nullcontext[None] = field(default_factory=nullcontext)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the state is one tensor and nothing is integrated beside it."""
        return self.state.shape is None and self.rates is None

    @property
    def tensors(self) -> Leaves:
        """Every named tensor, in the order that `bind` takes them."""
        return self.passed + self.captured

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        if self.is_plain and not self.substitutes:  # the usual case, in as few calls as can be
            slope = self.call(self.clock(t), y[0], *self.passed)
            return Evaluation((slope,) if isinstance(slope, Tensor) else self.state.leaves(slope))
        value = self.value(self.clock(t), y)
        if self.rates is None:
            return Evaluation(self.state.leaves(value, "dy/dt"))
        slope, rates = value
        return Evaluation(self.state.leaves(slope, "dy/dt"), self.rates.leaves(rates, "the rates"))

    def jacobian(self, t: Any, y: Leaves) -> Tensor:
        """∂(dy/dt)_i / ∂y_j, real, (blocks, size, size): a block for each row of a row-wise field,
        else one for all; see `jacobian`.
        """
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in y}
        rows = sizes.pop() if self.row_wise and len(sizes) == 1 else None
        with self.precision:
            return jacobian(lambda leaves: self(t, leaves).slope, y, 1 if rows is None else rows)

    def take(self, rows: Tensor) -> Field:
        """The same field for some rows of the batch."""
        aligned = tuple(tensor.index_select(0, rows) for tensor in self.passed[: self.aligned])
        return replace(self, passed=(*aligned, *self.passed[self.aligned :]))

    def clock(self, t: Any) -> Tensor:
        """The time as the user's field gets it, 0-d; (rows,) where every row has its own."""
        if isinstance(t, Tensor):
            return t.to(self.device, self.dtype)
        return torch.scalar_tensor(t, dtype=self.dtype, device=self.device)

    def value(self, time: Tensor, y: Leaves) -> Any:
        """What the user's field returns, as it is."""
        if not self.substitutes:
            return self.call(time, self.state.build(y), *self.passed)
        with _Substitute(self.substitutes) as mode:
            value = self.call(time, self.state.build(y), *self.passed)
        return mode.swap(value)  # a captured tensor may be returned as it is

    @property
    def has_formula(self) -> bool:
        """Whether the user's field offers a vector-Jacobian product of its own."""
        return getattr(self.call, "pull", None) is not None

    def pull(
        self, t: Any, y: Leaves, slope_bar: Sequence[Tensor], rates_bar: Sequence[Tensor]
    ) -> tuple[Leaves, list[Tensor | None]] | None:
        """Cotangents of y and of the named tensors by the field's own formula, see `Pulls`.

        None where it has none, or none for all that is asked for.
        """
        formula: Pulls | None = getattr(self.call, "pull", None)
        if formula is None or self.substitutes or self._is_autocast():
            return None
        bars = (self.state.build(slope_bar), *self._built_rates(rates_bar))
        found = formula(self.clock(t), self.state.build(y), *self.passed, *bars)
        if found is None:
            return None
        y_bar, passed_bars, captured_bars = found
        if any(x.requires_grad and x not in captured_bars for x in self.captured):
            return None
        bars_of_captured = (captured_bars.get(x) for x in self.captured)
        pairs = zip(self.tensors, (*passed_bars, *bars_of_captured), strict=True)
        return self.state.leaves(y_bar), [bar if x.requires_grad else None for x, bar in pairs]

    def _is_autocast(self) -> bool:
        """Whether evaluations were, or would now be, in another precision than their arguments'."""
        enabled = isinstance(self.precision, Precision) and self.precision.enabled
        return enabled or torch.is_autocast_enabled(self.device.type)

    def _built_rates(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        return () if self.rates is None else (self.rates.build(leaves),)

    def bind(self, tensors: Sequence[Tensor]) -> Field:
        """The same field, reading `tensors` in the place of its own."""
        if all(map(operator.is_, tensors, self.tensors)):
            return self
        passed = tuple(tensors[: len(self.passed)])
        taken = zip(self.captured, tensors[len(self.passed) :], strict=True)
        substitutes = {id(old): new for old, new in taken if old is not new}
        return replace(self, passed=passed, substitutes=substitutes)

    def aliases(self) -> Leaves:
        """Tensors to bind and differentiate by: computed ones cut from their history.

        Captured leaves stand for themselves, since the engine stops there anyway, unless the user
        hooked them: hooks wait for the whole gradient, not for each step's part of it.
        """
        captured = (
            leaf if leaf.is_leaf and not leaf._backward_hooks else alias(leaf)
            for leaf in self.captured
        )
        return (*map(alias, self.passed), *captured)


def alias(tensor: Tensor) -> Tensor:
    """The same numbers, cut from their history; a gradient is asked for where it was."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def is_row_wise(call: UserField) -> bool:
    """Whether a field says, by `row_wise = True`, that no row's value depends on another row."""
    return getattr(call, "row_wise", False) is True


class Precision:
    """An autocast state to enter again later, inside itself too, which torch's context is not for.

    Without its cache of casts: a cast weight made before the solve would pass for a tensor that the
    field captures.
    """

    def __init__(self, kind: str) -> None:
        self.enabled = torch.is_autocast_enabled(kind)
        self._kind, self._dtype = kind, torch.get_autocast_dtype(kind)
        self._free: list[torch.autocast] = []
        self._entered: list[torch.autocast] = []

    def __enter__(self) -> None:
        context = self._free.pop() if self._free else self._new()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *raised: Any) -> None:
        context = self._entered.pop()
        context.__exit__(*raised)
        self._free.append(context)

    def _new(self) -> torch.autocast:
        return torch.autocast(
            self._kind, dtype=self._dtype, enabled=self.enabled, cache_enabled=False
        )


def precision_of(device: torch.device) -> Precision | nullcontext[None]:
    """The autocast state of now; where no gradients are enabled there is no later."""
    return Precision(device.type) if torch.is_grad_enabled() else nullcontext()


def name_tensors(
    call: UserField, rows: Sequence[Tensor], params: Sequence[Tensor] | None
) -> tuple[Leaves, Leaves]:
    """(passed, captured): what the field is called with, and what it reads by itself.

    params are passed where the field's signature asks for them, f(t, y, *rows, *params);
    else the field is taken to capture them.  What it captures is looked for only where gradients
    are enabled.
    """
    for name, tensors in (("rows", rows), ("params", params)):
        if isinstance(tensors, Tensor):
            raise InputError(f"{name} must be a list of tensors, got one tensor: {name}=[tensor]")
    given = tuple(params) if params is not None else ()
    for i, tensor in enumerate((*rows, *given)):
        if not isinstance(tensor, Tensor):
            where = f"rows[{i}]" if i < len(rows) else f"params[{i - len(rows)}]"
            raise InputError(f"{where} must be a tensor, got {type(tensor).__name__}")
    read = _reads(call, set()) if torch.is_grad_enabled() else ()
    found = tuple(_unique(x for _, x in read if x.is_leaf and x.requires_grad))
    if given and _asks_for(call, 2 + len(rows) + len(given)):
        return (*rows, *given), found
    known = {id(p) for p in found}
    return tuple(rows), found + tuple(p for p in given if id(p) not in known and p.requires_grad)


def find_captured(
    call: UserField, evaluate: Callable[[], Evaluation], known: Sequence[Tensor]
) -> tuple[Evaluation, Leaves]:
    """One evaluation with a graph, and the leaves that it reads beyond the `known` tensors.

    Raises InputError where it reads a computed tensor that nobody named.
    """
    with torch.enable_grad():
        start = torch.zeros((), requires_grad=True).view(()).grad_fn
        evaluation = evaluate()
    born = _sequence_number(start)
    ids = {id(tensor) for tensor in known}
    leaves = (*evaluation.slope, *evaluation.rates)
    found: list[Tensor] = []
    for node in _nodes([get_gradient_edge(leaf).node for leaf in leaves if leaf.requires_grad]):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            if id(leaf) not in ids:
                found.append(leaf)
        elif _sequence_number(node) < born:
            name = _name_of(call, node)
            raise InputError(
                f"the field captures {name}, a tensor computed before the solve, and nobody named "
                f"it: its gradient would be lost; give params=[{name}] and take it as an argument, "
                "f(t, y, *params), or use gradient='backprop'"
            )
    return evaluation, tuple(found)


class _Substitute(TorchFunctionMode):
    """Inside this context torch's functions see the aliases in the place of captured tensors."""

    def __init__(self, substitutes: dict[int, Tensor]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(self.swap, args), **self.swap(kwargs or {}))

    def swap(self, value: Any) -> Any:
        """`value` with the aliases in the place of captured tensors."""
        if isinstance(value, Tensor):
            return self._substitutes.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(map(self.swap, value))
        if type(value) is dict:
            return {key: self.swap(part) for key, part in value.items()}
        return value


def _asks_for(call: UserField, count: int) -> bool:
    """Whether the field's signature asks for `count` positional arguments, no less."""
    target = call.forward if isinstance(call, nn.Module) else call
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return count == sum(p.kind in positional and p.default is p.empty for p in parameters)


def _reads(thing: Any, seen: set[int], name: str = "self", depth: int = 5) -> Iterator[Named]:
    """(name, tensor) for each tensor that a callable may read beside its arguments.

    It looks into the modules, containers and objects that the callable is, is bound to, wraps or
    names; what lies deeper is found only where the first evaluation reads it.
    """
    if isinstance(thing, Tensor):
        yield name, thing
    elif depth > 0 and id(thing) not in seen:
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            yield from thing.named_parameters()
        for key, part in _parts(thing, name):
            yield from _reads(part, seen, key, depth - 1)


def _parts(thing: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, value) for what a function names, a wrapper wraps, a container or an object holds."""
    if isinstance(thing, partial):
        yield "func", thing.func
        yield from ((f"args[{i}]", part) for i, part in enumerate(thing.args))
        yield from thing.keywords.items()
    elif inspect.ismethod(thing):
        yield from (("function", thing.__func__), ("self", thing.__self__))
    elif inspect.isfunction(thing):
        yield from _variables(thing)
    elif isinstance(thing, tuple | list | dict):
        if len(thing) <= _LARGEST_CONTAINER:
            keyed = thing.items() if isinstance(thing, dict) else enumerate(thing)
            yield from ((f"{name}[{key!r}]", part) for key, part in keyed)
    elif not isinstance(thing, type | ModuleType):
        hidden = isinstance(thing, nn.Module)  # its own tables, which named_parameters() read
        for key, part in getattr(thing, "__dict__", {}).items():
            if not (hidden and key.startswith("_")):
                yield f"{name}.{key}", part


def _variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of the globals, the enclosing functions' variables and the defaults it uses."""
    code = function.__code__
    for name in code.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a name that is not bound yet
            yield name, cell.cell_contents
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(reversed(positional), reversed(function.__defaults__ or ()), strict=False)
    yield from (function.__kwdefaults__ or {}).items()


def _name_of(call: Any, node: Any) -> str:
    """The name under which a callable captures the tensor that `node` computed."""
    for name, tensor in _reads(call, set()):
        if tensor.grad_fn is node:
            return name
    return f"<{node.name()}>"


def _unique(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _nodes(roots: Sequence[Any]) -> Iterator[Any]:
    """Autograd nodes under `roots`, each once."""
    waiting = list(roots)
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(child for child, _ in node.next_functions if child is not None)


def _sequence_number(node: Any) -> int:
    """When an autograd node was made; nodes of leaves are the youngest of all."""
    return node._sequence_nr()
