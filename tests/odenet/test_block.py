"""An ODE as a layer: its settings, what it costs, and the residual network that it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.error import InputError
from cnf.ode.tableau import TABLEAUS
from cnf.odenet.block import ODEBlock, blocks_of

F64 = torch.float64
GRADIENTS = ("backprop", "checkpoint", "adjoint", "reversible")
EXPLICIT = [name for name, tableau in TABLEAUS.items() if not tableau.implicit]


class Field(nn.Module):
    """tanh(W y + t b)."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, dim, dtype=F64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(y, self.layer.weight, t * self.layer.bias))


def some(batch: int = 4, dim: int = 3) -> Tensor:
    return torch.randn(batch, dim, dtype=F64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


# what it computes ---------------------------------------------------------------------------------


def test_it_is_the_solution_at_the_end() -> None:
    block = ODEBlock(decay, (0.0, 2.0), rtol=1e-9)
    y = some()
    assert torch.allclose(block(y), y * math.exp(-2), rtol=1e-6, atol=1e-7)
    back = ODEBlock(decay, (2.0, 0.0), rtol=1e-9)
    assert torch.allclose(back(block(y)), y, rtol=1e-6)


def test_states_keep_their_structure() -> None:
    def turn(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"p": -y["q"], "q": y["p"]}

    start = {"p": some(), "q": some()}
    end = ODEBlock(turn, (0.0, math.pi), rtol=1e-9)(start)
    assert end.keys() == start.keys()
    assert torch.allclose(end["p"], -start["p"], atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_gradient_reaches_input_and_parameters(gradient: str) -> None:
    block = ODEBlock(Field(), method="rk4", step_size=0.125, gradient=gradient)
    y = some().requires_grad_()
    block(y).square().sum().backward()
    found = [y.grad, *(p.grad for p in block.parameters())]
    block.gradient = "backprop"
    y.grad = None
    block.zero_grad()
    block(y).square().sum().backward()
    exact = [y.grad, *(p.grad for p in block.parameters())]
    tolerance = 1e-4 if gradient in ("adjoint", "reversible") else 1e-10
    for one, other in zip(found, exact, strict=True):
        assert one is not None and other is not None
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def residual_net(field: Field, y: Tensor, layers: int) -> Tensor:
    """z_{k+1} = z_k + f(k, z_k) with the same weights in every layer."""
    for k in range(layers):
        y = y + field(torch.tensor(float(k), dtype=F64), y)
    return y


ANEW = cnf.Reversible(every=1)  # whose second state never lags behind the first


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint", ANEW])
@pytest.mark.parametrize("layers", [1, 6])
def test_euler_of_step_one_is_a_residual_net_of_shared_weights(gradient, layers: int) -> None:
    field = Field()
    block = ODEBlock(field, (0.0, layers), method="euler", step_size=1.0, gradient=gradient)
    y = some()
    assert torch.allclose(block(y), residual_net(field, y, layers), rtol=1e-13, atol=1e-13)
    assert block.stats is not None
    spent = 2 * layers if gradient is ANEW else layers
    looks = gradient == "backprop"  # at the field, first
    assert spent + looks <= block.stats.nfe <= spent + looks + (layers if gradient is ANEW else 0)


def test_a_reversible_step_of_euler_is_a_residual_layer() -> None:
    field, y = Field(), some()
    block = ODEBlock(field, method="euler", step_size=1.0, gradient="reversible")
    assert torch.allclose(block(y), residual_net(field, y, 1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", ANEW])
def test_its_gradients_are_the_residual_nets(gradient) -> None:
    field, y = Field(), some().requires_grad_()
    leaves = (y, *field.parameters())
    block = ODEBlock(field, (0.0, 6.0), method="euler", step_size=1.0, gradient=gradient)
    ours = torch.autograd.grad(block(y).square().sum(), leaves)
    theirs = torch.autograd.grad(residual_net(field, y, 6).square().sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_the_continuous_adjoint_sees_the_other_end_of_each_step() -> None:
    """a_k = a_{k+1} (1 + ∂f/∂z) is the residual net's; the adjoint's has ∂f/∂z at z_{k+1}."""
    field, y = Field(), some().requires_grad_()
    block = ODEBlock(field, method="euler", step_size=1.0, gradient="adjoint")
    end = block(y)
    weights = torch.randn_like(end)
    (ours,) = torch.autograd.grad(end, y, weights)
    at_end = end.detach().requires_grad_()
    (slope,) = torch.autograd.grad(field(torch.tensor(1.0, dtype=F64), at_end), at_end, weights)
    assert torch.allclose(ours, weights + slope, rtol=1e-12)
    (theirs,) = torch.autograd.grad(residual_net(field, y, 1), y, weights)
    assert not torch.allclose(ours, theirs, rtol=1e-3)


# settings -----------------------------------------------------------------------------------------


def test_the_last_way_to_say_how_long_steps_are_holds() -> None:
    block = ODEBlock(decay)
    assert (block.rtol, block.atol, block.step_size, block.nfe) == (1e-3, 1e-3, None, None)
    block.step_size = 0.25
    assert (block.rtol, block.step_size) == (None, 0.25)
    block(some())
    assert block.stats is not None and block.stats.accepted == 4
    block.rtol = 1e-6
    assert (block.rtol, block.atol, block.step_size) == (1e-6, 1e-6, None)
    block.atol = 1e-9
    assert (block.rtol, block.atol) == (1e-6, 1e-9)
    block.nfe = 12
    assert (block.nfe, block.step_size, block.rtol) == (12, 0.5, None)
    block.control = cnf.Adaptive(1e-4, 1e-5)
    assert (block.rtol, block.atol, block.nfe) == (1e-4, 1e-5, None)


def test_a_tighter_tolerance_after_training_is_one_assignment() -> None:
    block, y = ODEBlock(Field()), some()
    loose = block(y)
    assert block.stats is not None
    spent = block.stats.nfe
    block.rtol = 1e-9
    assert not torch.equal(block(y), loose)
    assert block.stats.nfe > 2 * spent


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_a_budget_is_spent_and_never_exceeded(method: str, gradient: str) -> None:
    block, y = ODEBlock(Field(), method=method, gradient=gradient), some()
    for budget in (26, 40):
        block.nfe = budget
        block(y)
        assert block.stats is not None
        spent = block.stats.nfe
        assert budget - spent < spent / block.stats.accepted <= budget
        assert spent <= budget


def test_a_budget_follows_the_method() -> None:
    block = ODEBlock(decay, (0.0, 2.0), method="euler", nfe=8)
    assert block.step_size == 0.25
    block.method = "rk4"
    assert block.step_size == 1.0


def test_a_budget_that_pays_for_no_step_names_a_method_that_it_pays_for() -> None:
    block = ODEBlock(decay, nfe=4)
    with pytest.raises(InputError, match=r"dopri5 takes 6 evaluations.*nfe=4.*method='rk4'"):
        block(some())
    block.method = "rk4"
    assert block(some()).shape == (4, 3)


def test_a_method_without_a_price_takes_no_budget() -> None:
    with pytest.raises(InputError, match="trapezoid has no fixed number of evaluations"):
        ODEBlock(decay, method="trapezoid", nfe=20)(some())


def test_other_settings_hold_for_a_while() -> None:
    block = ODEBlock(decay, method="rk4", nfe=8)
    with block.using(method="dopri5", rtol=1e-5, gradient="adjoint"):
        assert (block.method, block.rtol, block.gradient) == ("dopri5", 1e-5, "adjoint")
    assert (block.method, block.nfe, block.gradient) == ("rk4", 8, "checkpoint")
    with pytest.raises(InputError, match="'tolerance' is no setting"), block.using(tolerance=1):
        pass
    assert block.method == "rk4"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "rk5"}, "unknown method 'rk5'"),
        ({"gradient": "forward"}, "unknown gradient 'forward'"),
        ({"rtol": -1.0}, "rtol must be a number"),
        ({"step_size": 0.0}, "step_size must be a number > 0"),
        ({"nfe": 0}, "nfe must be a whole number"),
        ({"nfe": 8, "step_size": 0.5}, "step_size= and nfe= both say"),
        ({"rtol": 1e-3, "control": cnf.FixedStep(0.1)}, "rtol= and control= both say"),
        ({"control": 0.1}, "control must be FixedStep or Adaptive"),
        ({"max_steps": 0}, "max_steps must be a whole number"),
        ({"t": (0.0, 0.5, 1.0)}, "t must be a start and an end, got 3 times"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ODEBlock(decay, **settings)


def test_a_wrong_assignment_changes_nothing() -> None:
    block = ODEBlock(decay, method="rk4", nfe=8)
    for name, value in (("method", "rk5"), ("nfe", 0), ("rtol", -1.0), ("gradient", "no")):
        with pytest.raises(InputError):
            setattr(block, name, value)
    assert (block.method, block.nfe, block.gradient) == ("rk4", 8, "checkpoint")


def test_a_method_without_an_error_estimate_asks_for_steps_at_the_call() -> None:
    block = ODEBlock(decay)
    block.method = "euler"
    with pytest.raises(InputError, match="give step_size="):
        block(some())
    block.step_size = 0.5
    assert block(some()).shape == (4, 3)


# what it costs ------------------------------------------------------------------------------------


def test_statistics_grow_when_backward_runs() -> None:
    block = ODEBlock(Field(), method="rk4", step_size=0.25)
    assert block.stats is None
    end = block(some().requires_grad_())
    assert block.stats is not None
    assert (block.stats.nfe, block.stats.nfe_backward) == (16, 0)
    end.sum().backward()
    assert block.stats.nfe_backward == 16


# a module -----------------------------------------------------------------------------------------


def test_it_is_a_module_that_holds_parameters_alone() -> None:
    block = ODEBlock(Field())
    block(some())
    assert block.state_dict().keys() == {"field.layer.weight", "field.layer.bias"}
    again = copy.deepcopy(block)
    y = some()
    assert torch.equal(again(y), block(y))
    assert blocks_of(nn.Sequential(nn.Identity(), block)) == [block]
    assert "nfe=4" in repr(ODEBlock(decay, nfe=4)) and "dopri5" in repr(block)


def test_an_end_time_can_be_trained() -> None:
    t = nn.Parameter(torch.tensor([0.0, 1.0], dtype=F64))
    block = ODEBlock(decay, t, rtol=1e-8)
    assert list(block.parameters()) == [t]
    y = torch.ones(1, 1, dtype=F64)
    block(y).sum().backward()
    assert t.grad is not None and t.grad[1].item() == pytest.approx(-math.exp(-1), rel=1e-5)


# energy -------------------------------------------------------------------------------------------


def test_the_energy_is_the_integral_along_the_way() -> None:
    y = some()
    for t, lowest, highest in (((0.0, 1.0), 0.0, 1.0), ((1.0, 0.0), -1.0, 0.0)):
        end, energy = ODEBlock(decay, t, rtol=1e-9).with_energy(y)
        # ∫ ½ mean y² of y e^{-s}, s from the start
        weight = (math.exp(-2 * lowest) - math.exp(-2 * highest)) / 2
        assert torch.allclose(energy, 0.5 * y.square().mean(1) * weight, rtol=1e-5)
        assert end.shape == y.shape and energy.shape == (4,) and energy.dtype == y.dtype


def test_the_energy_does_not_steer_the_steps_and_reaches_parameters() -> None:
    block, y = ODEBlock(Field(), rtol=1e-5), some()
    end = block(y)
    assert block.stats is not None
    steps = block.stats.accepted
    same, energy = block.with_energy(y)
    assert torch.equal(same, end) and block.stats.accepted == steps
    energy.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


def test_the_energy_needs_rows() -> None:
    with pytest.raises(InputError, match="y0 must be a tensor"):
        ODEBlock(decay).with_energy(torch.ones(3))


def test_the_whole_solution_is_there_to_ask() -> None:
    block = ODEBlock(decay, rtol=1e-8)
    y = some()
    solution = block.solve(y, dense=True)
    assert torch.allclose(solution(0.5), y * math.exp(-0.5), atol=1e-6)
    assert block.solve(y, t=(0.0, 0.5, 1.0)).y.shape == (3, 4, 3)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch before 2.7")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_net_with_fixed_steps_is_exported_for_any_batch():
    torch.manual_seed(0)
    block = ODEBlock(cnf.nets.BilinearMLP(2, (8, 8)), method="rk4", step_size=0.25)
    net = nn.Sequential(nn.Linear(3, 2), block)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (torch.randn(4, 3),), dynamic_shapes=dynamic)
    x = torch.randn(7, 3)
    assert torch.allclose(program.module()(x), net(x), atol=1e-6)
    adaptive = ODEBlock(block.field, method="dopri5")
    with pytest.raises(InputError, match=r"traces one path.*block\.nfe = 8"):
        torch.export.export(adaptive, (torch.randn(4, 2),))
