"""A field is any callable, and every tensor that a gradient must reach is found or refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from cnf.error import InputError
from cnf.ode.field import Evaluation, Field, find_captured, name_tensors, precision_of
from cnf.ode.state import Structure

y = torch.randn(3, 2)


def net_and_field_of_kind(kind):
    """(net, field): a field of some kind of callable that reads a net's parameters."""
    net = nn.Linear(2, 2)

    class Plain:
        def __init__(self):
            self.parts = {"nets": [net]}

        def __call__(self, t, y):
            return self.parts["nets"][0](y)

        def method(self, t, y):
            return self(t, y)

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y)

        def method(self, t, y):
            return self.net(y)

    def with_argument(model, t, y, *, scale):
        return model(y) * scale

    def outer(t, y):
        return inner(t, y)

    def inner(t, y):
        return net(y)

    fields = {
        "module": Timed(),
        "bound method of a module": Timed().method,
        "forward of a module": Timed().forward,
        "lambda over a module": lambda t, y: net(y),
        "lambda over a method": (lambda go: lambda t, y: go(t, y))(Timed().method),
        "lambda over a list": (lambda nets: lambda t, y: nets[0](y))([net]),
        "lambda with a default": lambda t, y, model=net: model(y),
        "function over a function": outer,
        "partial of a function": functools.partial(with_argument, net, scale=2.0),
        "partial with a keyword": functools.partial(lambda t, y, model: model(y), model=net),
        "object": Plain(),
        "bound method of an object": Plain().method,
        "wrapped function": functools.wraps(inner)(lambda *args: inner(*args)),
    }
    return (net, fields[kind]) if kind else list(fields)


KINDS = net_and_field_of_kind(None)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_found_in_every_kind_of_callable(kind):
    net, field = net_and_field_of_kind(kind)
    passed, captured = name_tensors(field, (), None)
    assert passed == ()
    assert {id(p) for p in captured} == {id(p) for p in net.parameters()}
    assert len(captured) == 2


def test_a_global_net_is_found_and_a_frozen_parameter_is_not():
    namespace = {"net": nn.Linear(2, 2)}
    exec("def field(t, y):\n    return net(y)", namespace)
    namespace["net"].bias.requires_grad_(False)
    _, captured = name_tensors(namespace["field"], (), None)
    assert [id(p) for p in captured] == [id(namespace["net"].weight)]


def test_a_field_that_refers_to_itself_is_searched_once():
    class Loop:
        def __init__(self):
            self.me, self.net = self, nn.Linear(2, 2)
            self.many = [self] * 100

        def __call__(self, t, y):
            return self.net(y)

    assert len(name_tensors(Loop(), (), None)[1]) == 2


def test_params_are_passed_where_the_signature_asks_for_them():
    w, row = torch.ones(2, requires_grad=True), torch.ones(3)
    assert name_tensors(lambda t, y, w: y * w, (), [w])[0] == (w,)
    assert name_tensors(lambda t, y, row, w: y * w, [row], [w])[0] == (row, w)
    assert name_tensors(lambda t, y, *rest: y, [row], [w])[0] == (row, w)
    assert name_tensors(lambda t, y, *, scale=1.0: y * w, (), [w]) == ((), (w,))
    assert name_tensors(lambda t, y, row: y * w, [row], [w]) == ((row,), (w,))
    assert name_tensors(lambda t, y, w=w: y * w, (), iter([w])) == ((), (w,))


@pytest.mark.parametrize("name", ["rows", "params"])
def test_tensors_are_given_as_a_list_of_tensors(name):
    with pytest.raises(InputError, match=f"{name} must be a list"):
        name_tensors(lambda t, y, w: y, **{"rows": (), "params": None, name: torch.ones(1, 2)})
    with pytest.raises(InputError, match=rf"{name}\[0\] must be a tensor, got float"):
        name_tensors(lambda t, y, w: y, **{"rows": (), "params": None, name: [0.5]})


def field_of(call, passed=(), captured=()):
    device = torch.device("cpu")
    state = Structure(y)
    precision = precision_of(device)
    return Field(call, state, None, y.dtype, device, passed, captured, precision=precision)


def look(call, captured=()):
    """What find_captured finds in a field that names `captured`."""
    field = field_of(call, captured=captured)
    aliases = field.aliases()
    return find_captured(call, lambda: field.bind(aliases)(0.0, (y,)), aliases)[1]


def test_captured_leaves_are_found_by_what_the_first_evaluation_reads():
    deep = {"a": {"b": {"c": {"d": {"e": {"f": torch.ones(2, requires_grad=True)}}}}}}

    def field(t, y):
        return y * deep["a"]["b"]["c"]["d"]["e"]["f"]

    assert name_tensors(field, (), None)[1] == ()
    assert look(field) == (deep["a"]["b"]["c"]["d"]["e"]["f"],)


def test_a_leaf_that_is_returned_as_it_is_is_found():
    w = torch.ones(3, 2, requires_grad=True)
    assert look(lambda t, y: w) == (w,)


def test_what_has_no_gradient_is_not_found():
    w, u = torch.ones(2), torch.ones(2, requires_grad=True)
    assert look(lambda t, y: y * w + u.detach()) == ()


class Holder(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, t, y):
        return y * self.w

    def method(self, t, y):
        return y * self.w


def capturing(kind):
    w = torch.ones(2, requires_grad=True) * 2
    namespace = {"w": w}
    exec("def field(t, y):\n    return y * w", namespace)
    fields = {
        "a closure": lambda t, y: y * w,
        "a global": namespace["field"],
        "a default": lambda t, y, w=w: y * w,
        "a module's attribute": Holder(w),
        "a bound method": Holder(w).method,
        "a partial": functools.partial(lambda t, y, w: y * w, w=w),
        "a list": (lambda all: lambda t, y: y * all[1])([0, w]),
        "a value returned as it is": lambda t, y: (w,)[0].expand(3, 2),
    }
    return (w, fields[kind]) if kind else list(fields)


@pytest.mark.parametrize("kind", capturing(None))
def test_a_captured_computed_tensor_is_refused_by_its_name(kind):
    name = {"a list": r"all\[1\]"}.get(kind, r"(self\.)?w")
    with pytest.raises(InputError, match=f"the field captures {name}, a tensor computed"):
        look(capturing(kind)[1])


@pytest.mark.parametrize("kind", capturing(None))
def test_a_captured_computed_tensor_is_read_once_it_is_named(kind):
    w, field = capturing(kind)
    assert look(field, captured=(w,)) == ()


def test_the_sibling_of_a_named_tensor_must_be_named_too():
    one, two = (torch.ones(4, requires_grad=True) * 2).chunk(2)  # one autograd node for both

    with pytest.raises(InputError, match=r"captures (one|two)"):
        look(lambda t, y: y * one + two, captured=(one,))
    assert look(lambda t, y: y * one + two, captured=(one, two)) == ()


def test_a_history_that_ends_in_a_captured_leaf_is_not_walked_for_it():
    leaf = torch.ones(2, requires_grad=True)
    w = leaf * 2
    assert look(lambda t, y: y * w + leaf, captured=(w,)) == (leaf,)
    assert look(lambda t, y: y * w, captured=(w,)) == ()


READINGS = {
    "an operator": lambda y, w: y @ w,
    "a reflected operator": lambda y, w: 2.0 * w + 0 * y,
    "a method": lambda y, w: w.matmul(y),
    "a property": lambda y, w: w.T,
    "a conjugate transpose": lambda y, w: w.mT * 1,
    "an index": lambda y, w: w[0] * y + w[:, 1:],
    "a list": lambda y, w: torch.stack([w, y]).sum(0),
    "a keyword": lambda y, w: torch.add(y, other=w),
    "a function of torch.nn": lambda y, w: nn.functional.linear(y, w, bias=w[0]),
    "einsum": lambda y, w: torch.einsum("ij,jk->ik", y, w),
    "a loop over rows": lambda y, w: sum(row * y for row in w),
    "unpacking": lambda y, w: torch.stack([*w]) * y,
    "the tensor itself": lambda y, w: w,
    "a view": lambda y, w: w.view(2, 2),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_an_alias_is_read_in_the_place_of_a_captured_tensor_however_it_is_read(read):
    w = torch.randn(2, 2, requires_grad=True) * 1
    at = torch.randn(2, 2)
    field = field_of(lambda t, y: read(y, w), captured=(w,))
    alias = torch.randn(2, 2, requires_grad=True)
    (slope,) = field.bind((alias,))(0.0, (at,)).slope
    assert torch.equal(slope, read(at, alias))
    (gradient,) = torch.autograd.grad(slope.sum(), alias)
    assert gradient.abs().sum() > 0


def test_binding_a_field_to_its_own_tensors_replaces_nothing():
    w = torch.ones(2, requires_grad=True)
    field = field_of(lambda t, y, v: y * w * v, passed=(w * 1,), captured=(w,))
    assert field.bind(field.tensors).substitutes == {}
    aliases = field.aliases()
    assert aliases[0].is_leaf and aliases[0].requires_grad and aliases[1] is w


def test_the_time_is_a_tensor_of_the_states_precision():
    assert field_of(lambda t, y: y).clock(0.25).dtype == y.dtype
    assert field_of(lambda t, y: y).clock(0.25).shape == ()


def test_an_evaluation_holds_the_rates_apart():
    rates = Structure({"a": y[:, 0]}, "the rates")
    field = field_of(lambda t, y: (y, {"a": y[:, 0]}))
    field = Field(field.call, field.state, rates, field.dtype, field.device)
    got = field(0.0, (y,))
    assert isinstance(got, Evaluation)
    assert torch.equal(got.slope[0], y) and torch.equal(got.rates[0], y[:, 0])
