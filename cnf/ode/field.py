"""The user's field behind one signature, and every tensor that a gradient must reach.

Inside the core a field is called with the time as a host number and the state as leaves, and it
reads named tensors: those passed to it (`rows`, `params`) and those that it captures. Captured
leaves (a module's parameters, a tensor in a closure) are found; a captured tensor that is itself
computed must be named, since backward evaluates the field on aliases of the named tensors: else its
history would be walked a second time inside the solve.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnf.error import InputError
from cnf.ode.state import Leaves, Structure

UserField = Callable[..., Any]


class Evaluation(NamedTuple):
    """dy/dt, and the rates of what is integrated along the path (empty without a quadrature)."""

    slope: Leaves
    rates: Leaves


@dataclass(frozen=True)
class Field:
    """A user's field f(t, y, *rows, *params) as (host time, leaves) → Evaluation.

    passed: the rows and params it is called with; captured: what it reads by itself;
    substitutes: aliases by the id of the captured tensor whose place they take.
    """

    call: UserField
    state: Structure
    rates: Structure | None
    dtype: torch.dtype
    device: torch.device
    passed: Leaves = ()
    captured: Leaves = ()
    substitutes: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> Leaves:
        """Every named tensor, in the order that `bind` takes them."""
        return self.passed + self.captured

    def __call__(self, t: float, y: Leaves) -> Evaluation:
        value = self.value(t, y)
        if self.rates is None:
            return Evaluation(self.state.leaves(value, "dy/dt"), ())
        slope, rates = value
        return Evaluation(self.state.leaves(slope, "dy/dt"), self.rates.leaves(rates, "the rates"))

    def value(self, t: float, y: Leaves) -> Any:
        """What the user's field returns, as it is."""
        time = torch.full((), t, dtype=self.dtype, device=self.device)
        if not self.substitutes:
            return self.call(time, self.state.build(y), *self.passed)
        with _Substitute(self.substitutes):
            return self.call(time, self.state.build(y), *self.passed)

    def bind(self, tensors: Sequence[Tensor]) -> Field:
        """The same field, reading `tensors` in the place of its own."""
        passed = tuple(tensors[: len(self.passed)])
        taken = zip(self.captured, tensors[len(self.passed) :], strict=True)
        substitutes = {id(old): new for old, new in taken if old is not new}
        return replace(self, passed=passed, substitutes=substitutes)

    def aliases(self) -> Leaves:
        """Tensors to bind and differentiate by: computed ones cut from their history.

        Captured leaves stand for themselves, since the engine stops there anyway.
        """
        captured = (leaf if leaf.is_leaf else _alias(leaf) for leaf in self.captured)
        return (*map(_alias, self.passed), *captured)


def _alias(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def name_tensors(
    call: UserField, rows: Sequence[Tensor], params: Sequence[Tensor] | None
) -> tuple[Leaves, Leaves]:
    """(passed, captured): what the field is called with, and what it reads by itself.

    params are passed where the field's signature asks for them, f(t, y, *rows, *params);
    else the field is taken to capture them.
    """
    given = tuple(params) if params is not None else ()
    for i, tensor in enumerate((*rows, *given)):
        if not isinstance(tensor, Tensor):
            where = f"rows[{i}]" if i < len(rows) else f"params[{i - len(rows)}]"
            raise InputError(f"{where} must be a tensor, got {type(tensor).__name__}")
    found = tuple(_unique(p for p in _parameters(call) if p.requires_grad))
    if given and _asks_for(call, 2 + len(rows) + len(given)):
        return (*rows, *given), found
    known = {id(p) for p in found}
    return tuple(rows), found + tuple(p for p in given if id(p) not in known and p.requires_grad)


def find_captured(
    call: UserField, evaluate: Callable[[], Evaluation], named: Sequence[Tensor]
) -> tuple[Evaluation, Leaves]:
    """One evaluation with a graph, and the leaves that it reads beyond the `named` tensors.

    Raises InputError where it reads a computed tensor that nobody named.
    """
    with torch.enable_grad():
        start = torch.zeros((), requires_grad=True).view(()).grad_fn
        evaluation = evaluate()
    born = _sequence_number(start)
    known = {id(tensor) for tensor in named}
    ends = {tensor.grad_fn for tensor in named if tensor.grad_fn is not None}
    roots = [leaf.grad_fn for leaf in (*evaluation.slope, *evaluation.rates)]
    found: list[Tensor] = []
    for node in _nodes(roots, ends):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            if id(leaf) not in known and leaf.requires_grad:
                known.add(id(leaf))
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
        kwargs = {key: self._swap(value) for key, value in (kwargs or {}).items()}
        return func(*(self._swap(value) for value in args), **kwargs)

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._substitutes.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self._swap(part) for part in value)
        return value


def _asks_for(call: UserField, count: int) -> bool:
    """Whether the field's signature takes `count` positional arguments that it cannot do without."""
    target = call.forward if isinstance(call, nn.Module) else call
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return count == sum(p.kind in positional and p.default is p.empty for p in parameters)


def _parameters(call: Any, depth: int = 3) -> Iterator[Tensor]:
    """Parameters of the modules that a callable is, is bound to, wraps or closes over."""
    if depth == 0:
        return
    if isinstance(call, partial):
        for part in (call.func, *call.args, *call.keywords.values()):
            yield from _parameters(part, depth - 1)
    elif callable(getattr(call, "parameters", None)):
        yield from call.parameters()
    elif inspect.ismethod(call):
        yield from _parameters(call.__self__, depth - 1)
    elif inspect.isfunction(call):
        for cell in call.__closure__ or ():
            try:
                contents = cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
            if isinstance(contents, nn.Module) or inspect.isroutine(contents):
                yield from _parameters(contents, depth - 1)


def _name_of(call: Any, node: Any) -> str:
    """The name under which a callable captures the tensor that `node` computed."""
    places: dict[str, Any] = dict(getattr(call, "__dict__", {}))
    if inspect.isfunction(call):
        variables = inspect.getclosurevars(call)
        places |= {**variables.globals, **variables.nonlocals}
    for name, value in places.items():
        if isinstance(value, Tensor) and value.grad_fn is node:
            return name
    return f"<{node.name()}>"


def _unique(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _nodes(roots: Sequence[Any], ends: set[Any]) -> Iterator[Any]:
    """Autograd nodes under `roots`, each once, not walking past `ends`."""
    waiting = [node for node in roots if node is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node in ends:
            continue
        seen.add(node)
        yield node
        waiting.extend(child for child, _ in node.next_functions if child is not None)


def _sequence_number(node: Any) -> int:
    """When an autograd node was made; nodes of leaves are the youngest of all."""
    return node._sequence_nr()
