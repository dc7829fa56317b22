"""One ODE as an invertible map: the log-determinant is that of the map, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnf.error import InputError
from cnf.flow.continuous import Solver, move, move_with_logdet
from cnf.flow.divergence import ClosedForm, Tangents
from cnf.nets.mlp import BilinearMLP
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.tableau import TABLEAUS

F64 = torch.float64
TIGHT = Solver(control=Adaptive(1e-10, 1e-10, quadrature_atol=1e-9))
SPANS = {"to the data": (0.0, 1.0), "to the base": (1.0, 0.0)}
EACH_SPAN = pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)


@pytest.fixture
def field():
    net = BilinearMLP(3, (8, 6))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    return net.double()


@EACH_SPAN
@pytest.mark.parametrize("divergence", [ClosedForm(), Tangents()], ids=type)
def test_logdet_is_that_of_the_maps_jacobian(field, span, divergence):
    x = torch.randn(2, 3, dtype=F64)
    moved = move_with_logdet(field, divergence, x, span, TIGHT)
    whole = torch.autograd.functional.jacobian(lambda x: move(field, x, span, TIGHT), x)
    expected = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))[1]
    assert torch.allclose(moved.logdet, expected, atol=1e-7)
    assert torch.allclose(moved.x, move(field, x, span, TIGHT), atol=1e-9)
    assert moved.stats.nfe > 6
    assert moved.logdet.shape == (2,) and moved.logdet.dtype == F64


def test_there_and_back_is_the_identity_and_the_logdets_cancel(field):
    x = torch.randn(4, 3, dtype=F64)
    there = move_with_logdet(field, ClosedForm(), x, (0.0, 1.0), TIGHT)
    back = move_with_logdet(field, ClosedForm(), there.x, (1.0, 0.0), TIGHT)
    assert torch.allclose(back.x, x, atol=1e-8)
    assert torch.allclose(back.logdet, -there.logdet, atol=1e-8)
    assert there.logdet.abs().max() > 1e-3


def test_a_linear_field_moves_by_the_matrix_exponential():
    matrix = torch.tensor([[0.3, -0.8], [0.5, 0.1]], dtype=F64)
    net = nn.Linear(2, 2, bias=False).double()
    net.weight.data.copy_(matrix)
    x = torch.randn(5, 2, dtype=F64)
    moved = move_with_logdet(lambda t, x: net(x), Tangents(), x, (0.0, 1.0), TIGHT)
    assert torch.allclose(moved.x, x @ torch.linalg.matrix_exp(matrix).T, atol=1e-8)
    assert torch.allclose(moved.logdet, matrix.trace().expand(5), atol=1e-9)


def test_in_single_precision_logdet_stays_in_double(field):
    moved = move_with_logdet(field.float(), ClosedForm(), torch.randn(4, 3), (0.0, 1.0), Solver())
    assert moved.x.dtype == torch.float32 and moved.logdet.dtype == F64


@pytest.mark.parametrize("method", TABLEAUS)
def test_every_method_serves_with_fixed_steps(field, method):
    x = torch.randn(4, 3, dtype=F64)
    solver = Solver(method=method, control=FixedStep(1 / 64))
    exact = move_with_logdet(field, ClosedForm(), x, (0.0, 1.0), TIGHT)
    moved = move_with_logdet(field, ClosedForm(), x, (0.0, 1.0), solver)
    atol = {1: 0.1, 2: 1e-2, 3: 5e-4}.get(TABLEAUS[method].order, 1e-4)
    assert torch.allclose(moved.x, exact.x, atol=atol)
    assert torch.allclose(moved.logdet, exact.logdet, atol=atol)


def test_with_tolerance_changes_every_tolerance_and_nothing_else():
    solver = Solver("tsit5", Adaptive(1e-5, 1e-6, quadrature_atol=1e-4, safety=0.8), Adjoint(), 7)
    loose = solver.with_tolerance(1e-2)
    control = loose.control
    assert isinstance(control, Adaptive)
    assert (control.rtol, control.atol, control.quadrature_atol) == (1e-2, 1e-2, 1e-1)
    assert control.safety == 0.8
    assert (loose.method, loose.gradient, loose.max_steps) == ("tsit5", Adjoint(), 7)
    assert solver.control == Adaptive(1e-5, 1e-6, quadrature_atol=1e-4, safety=0.8)


def test_with_tolerance_leaves_out_what_was_left_out():
    control = Solver(control=Adaptive(1e-5, 1e-5)).with_tolerance(1e-2).control
    assert isinstance(control, Adaptive) and control.quadrature_atol is None


def test_fixed_steps_have_no_tolerance_to_change():
    solver = Solver(control=FixedStep(0.1))
    assert solver.with_tolerance(1e-2) == solver


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(method="dopri6"), "unknown method 'dopri6'; known are"),
        (dict(method="rk4"), "cannot choose its steps: give step_size="),
        (dict(gradient="magic"), "unknown gradient 'magic'; known are"),
        (dict(control=0.1), "control must be FixedStep or Adaptive"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(settings, said):
    with pytest.raises(InputError, match=said):
        Solver(**settings)
