"""What cannot be is refused with torchdiffeq's exceptions, in a sentence."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.compat.torchdiffeq import odeint, odeint_adjoint

INTERFACES = pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
ONE = torch.ones(2)
T = torch.tensor([0.0, 1.0])


def decay(t, y):
    return -y


def ask(interface, func=decay, y0=ONE, t=T, **settings):
    if interface is odeint_adjoint:
        settings.setdefault("adjoint_params", ())
    return interface(func, y0, t, **settings)


def grid_of(*moments):
    return {"grid_constructor": lambda func, y0, t: torch.tensor(moments)}


REFUSED = {
    "a method that is none": ({"method": "rk5"}, ValueError, "rk5.*dopri8, dopri5, tsit5"),
    "two grids": (
        {"method": "rk4", "options": {"step_size": 0.1, **grid_of(0.0, 1.0)}},
        ValueError,
        "mutually exclusive",
    ),
    "an unknown interpolation": (
        {"method": "rk4", "options": {"interp": "spline"}},
        ValueError,
        "linear.*cubic.*spline",
    ),
    "a step size of zero": (
        {"method": "rk4", "options": {"step_size": 0}},
        ValueError,
        "step_size",
    ),
    "a grid that ends elsewhere": (
        {"method": "rk4", "options": grid_of(0.0, 0.9)},
        AssertionError,
        "at 0 and 1, got 0 and 0.9",
    ),
    "a grid that turns back": (
        {"method": "rk4", "options": grid_of(0.0, 0.5, 0.4, 1.0)},
        AssertionError,
        "in the order of t",
    ),
    "a grid of one time": ({"method": "rk4", "options": grid_of(1.0)}, AssertionError, "two times"),
    "no tolerance at all": ({"rtol": 0.0, "atol": 0.0}, ValueError, "rtol and atol are both 0"),
    "a tolerance that asks for a gradient": (
        {"rtol": torch.tensor(1e-3, requires_grad=True)},
        AssertionError,
        "rtol cannot require grad",
    ),
    "tolerances of another number than parts": (
        {"y0": (ONE, ONE), "atol": (1e-3,)},
        AssertionError,
        "atol has 1 entries and y0 has 2 parts",
    ),
    "times of whole numbers": ({"t": torch.tensor([0, 1])}, TypeError, "floating point.*int64"),
    "times that are no tensor": ({"t": [0.0, 1.0]}, AssertionError, "torch.Tensor, got list"),
    "times of two dimensions": ({"t": torch.rand(2, 2)}, AssertionError, "one dimensional"),
    "times that turn back": (
        {"t": torch.tensor([0.0, 1.0, 0.5])},
        AssertionError,
        "strictly increasing or decreasing",
    ),
    "times that stand": (
        {"t": torch.tensor([0.0, 0.0])},
        AssertionError,
        "strictly increasing or decreasing",
    ),
    "a time that is NaN": ({"t": torch.tensor([0.0, math.nan])}, AssertionError, "finite"),
    "a time without end": ({"t": torch.tensor([0.0, math.inf])}, AssertionError, "finite"),
    "no time": ({"t": torch.zeros(0)}, AssertionError, "one finite time or more"),
    "a list of states": ({"y0": [ONE, ONE]}, AssertionError, "tuple of tensors, got list of 2"),
    "a state that is a number": ({"y0": 1.0}, AssertionError, "tensor or a tuple.*got float"),
    "a state of whole numbers": ({"y0": torch.ones(2).int()}, ValueError, "floating or complex"),
    "a field of another shape": (
        {"func": lambda t, y: torch.ones(3)},
        ValueError,
        r"dy/dt of shape \(3,\).*shape \(2,\)",
    ),
    "a field that returns nothing": ({"func": lambda t, y: None}, ValueError, "returned NoneType"),
    "a field that returns nothing for a tuple": (
        {"y0": (ONE, ONE), "func": lambda t, y: None},
        ValueError,
        "returned NoneType where dy/dt is expected",
    ),
    "parts of another size": (
        {"y0": (ONE, ONE), "func": lambda t, y: (y[0], y[1][:1])},
        ValueError,
        r"\(3,\).*\(4,\)",
    ),
}


@INTERFACES
@pytest.mark.parametrize(("settings", "kind", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(interface, settings, kind, says):
    with pytest.raises(kind, match=says):
        ask(interface, **settings)


@INTERFACES
def test_what_the_field_raises_is_passed_on(interface):
    def broken(t, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ask(interface, broken)


def test_times_elsewhere_are_moved_to_the_state_with_a_warning():
    with pytest.warns(UserWarning, match="t is on cpu and y0 on meta"), pytest.raises(RuntimeError):
        ask(odeint, y0=torch.ones(2, device="meta"))  # whose errors cannot be read


def test_the_caller_is_where_a_warning_points():
    with pytest.warns(UserWarning, match="Unexpected arguments") as caught:
        odeint(decay, ONE, T, options={"stepsize": 0.1})
    assert caught[0].filename == __file__
