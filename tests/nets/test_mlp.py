"""Each field starts at zero, knows its Jacobian, and its closed form is the Jacobian's trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from cnf.nets.activation import ACTIVATIONS
from cnf.nets.mlp import MLP, BilinearMLP

F64 = torch.float64
BATCH = 5
SHAPES = {
    "MLP 1": (MLP, (7,)),
    "MLP 3": (MLP, (7, 5, 6)),
    "MLP 4": (MLP, (3, 4, 5, 4)),
    "bilinear 1": (BilinearMLP, (7,)),
    "bilinear 2": (BilinearMLP, (7, 6)),
    "bilinear 2, narrow": (BilinearMLP, (1, 1)),
}
BANDWIDTHS = {"sines": (0.5, 4.0), "no sines": None}
TIMES = {
    "t of no dimensions": torch.tensor(0.3, dtype=F64),
    "t a row": torch.linspace(0, 1, BATCH, dtype=F64),
}
EACH_TIME = pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)


def perturbed(field: nn.Module) -> nn.Module:
    """The field with all its weights shaken: a zero output layer would prove nothing."""
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return field


def each(**wanted):
    """Parameters for every field: shape × bandwidth × activation × dim."""
    return pytest.mark.parametrize(
        "make",
        [
            pytest.param(
                lambda dim=dim, kind=kind, hidden=hidden, bandwidth=bandwidth, name=name: kind(
                    dim, hidden, bandwidth=bandwidth, activation=name
                ).double(),
                id=f"{shape}-{band}-{name}-{dim}-D",
            )
            for shape, (kind, hidden) in SHAPES.items()
            if issubclass(kind, wanted.get("kind", MLP))
            for band, bandwidth in BANDWIDTHS.items()
            for name in ACTIVATIONS
            for dim in (1, 3)
        ],
    )


def jacobian(field: nn.Module, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """∂f/∂x of every row, (batch, dim, dim), through autograd alone."""
    whole = torch.autograd.functional.jacobian(lambda x: field(t, x), x, create_graph=True)
    return torch.einsum("bibj->bij", whole)


@each()
def test_a_field_starts_at_zero_everywhere(make):
    field = make()
    x = 10 * torch.randn(BATCH, field.dim, dtype=F64)
    for t in TIMES.values():
        assert not field(t, x).any()


@EACH_TIME
@each()
def test_the_tangent_is_the_jacobian(make, t):
    field = perturbed(make())
    x = torch.randn(BATCH, field.dim, dtype=F64)
    tangents = torch.randn(4, BATCH, field.dim, dtype=F64)
    value, pushed = field.tangent(t, x, tangents)
    expected = torch.einsum("bij,kbj->kbi", jacobian(field, t, x), tangents)
    assert torch.allclose(value, field(t, x), rtol=0, atol=1e-12)
    assert torch.allclose(pushed, expected, rtol=0, atol=1e-10)
    assert pushed.abs().max() > 1e-6


@EACH_TIME
@each(kind=BilinearMLP)
def test_the_closed_form_is_the_trace_of_the_jacobian(make, t):
    field = perturbed(make())
    x = torch.randn(BATCH, field.dim, dtype=F64)
    value, divergence = field.with_divergence(t, x, *field.prepare())
    trace = jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1)
    assert torch.allclose(value, field(t, x), rtol=0, atol=1e-12)
    assert torch.allclose(divergence, trace, rtol=0, atol=1e-10)
    assert divergence.abs().max() > 1e-6
    with torch.no_grad():
        silent = field.with_divergence(t, x, *field.prepare())
    assert torch.equal(silent[0], value) and torch.equal(silent[1], divergence)


@EACH_TIME
@each(kind=BilinearMLP)
def test_the_closed_form_has_the_gradients_of_the_trace(make, t):
    field = perturbed(make())
    x = torch.randn(BATCH, field.dim, dtype=F64, requires_grad=True)
    t = t.clone().requires_grad_()
    weights = torch.randn(BATCH, dtype=F64)
    wanted = [*field.parameters(), x, t]
    value, divergence = field.with_divergence(t, x, *field.prepare())
    trace = jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1)
    losses = (
        (divergence * weights).sum() + value.sin().sum(),
        (trace * weights).sum() + field(t, x).sin().sum(),
    )
    found, expected = (
        torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        for loss in losses
    )
    for part, same in zip(found, expected, strict=True):
        assert torch.allclose(part, same, rtol=1e-9, atol=1e-10)
    assert all(part.any() for part in found)


@EACH_TIME
@each(kind=BilinearMLP)
def test_the_closed_form_can_be_differentiated_twice(make, t):
    field = perturbed(make())
    x = torch.randn(BATCH, field.dim, dtype=F64, requires_grad=True)

    def loss(divergence):
        (score,) = torch.autograd.grad(divergence.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(
            score.square().sum(), list(field.parameters()), allow_unused=True
        )

    found = loss(field.with_divergence(t, x, *field.prepare())[1])
    expected = loss(jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1))
    for part, same in zip(found, expected, strict=True):
        part, same = (torch.zeros(()) if g is None else g for g in (part, same))
        assert torch.allclose(part, same, rtol=1e-8, atol=1e-9)


def test_second_derivatives_of_two_steps_in_a_row_count_every_weight_once():
    field = perturbed(BilinearMLP(2, (4, 3)).double())
    x = torch.randn(BATCH, 2, dtype=F64, requires_grad=True)
    t = torch.tensor(0.4, dtype=F64)

    def loss(step):
        first, one = step(x)
        _, two = step(x + 0.3 * first)
        (score,) = torch.autograd.grad((one + two).sum(), x, create_graph=True)
        return torch.autograd.grad(score.square().sum(), list(field.parameters()))

    def plain(x):
        return field(t, x), jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1)

    found = loss(lambda x: field.with_divergence(t, x, *field.prepare()))
    # jacobian() makes a leaf of x: differentiate the trace by tangents instead
    basis = torch.eye(2, dtype=F64)[:, None].expand(-1, BATCH, -1)

    def by_tangents(x):
        value, pushed = field.tangent(t, x, basis)
        return value, torch.einsum("ibi->b", pushed)

    for part, same in zip(found, loss(by_tangents), strict=True):
        assert torch.allclose(part, same, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_and_curves_are_the_derivatives(name):
    activation = ACTIVATIONS[name]
    a = torch.linspace(-30, 30, 241, dtype=F64, requires_grad=True)
    value, slope = activation.slope(a)
    assert torch.allclose(value, activation.value(a), rtol=0, atol=1e-14)
    (expected,) = torch.autograd.grad(activation.value(a).sum(), a)
    assert torch.allclose(slope, expected, rtol=1e-8, atol=1e-12)
    (expected,) = torch.autograd.grad(slope.sum(), a)
    parts = (a.detach(), value.detach(), slope.detach())
    zero, one = torch.zeros(241, dtype=F64), torch.ones(241, dtype=F64)
    assert torch.allclose(activation.pull(*parts, zero.clone(), one), expected, 1e-8, 1e-12)
    assert torch.allclose(activation.pull(*parts, one.clone(), zero), slope, 1e-8, 1e-12)
    with torch.no_grad():  # perhaps in the place of its argument
        for part, same in zip(activation.slope(a.detach().clone()), (value, slope), strict=True):
            assert torch.equal(part, same)
    assert torch.isfinite(torch.stack(activation.slope(torch.tensor([-1e30, 1e30])))).all()


@each()
def test_a_time_for_each_row_is_the_same_as_one_row_after_another(make):
    field = perturbed(make())
    x, t = torch.randn(BATCH, field.dim, dtype=F64), torch.rand(BATCH, dtype=F64)
    together = field(t, x)
    apart = torch.cat([field(moment, row[None]) for moment, row in zip(t, x, strict=True)])
    assert torch.allclose(together, apart, rtol=0, atol=1e-13)
    assert (field(t.flip(0), x) - together).abs().max() > 1e-4  # t is no decoration


@each()
def test_an_empty_batch_goes_through(make):
    field = perturbed(make())
    x = torch.empty(0, field.dim, dtype=F64)
    for t in (torch.tensor(0.5, dtype=F64), torch.empty(0, dtype=F64)):
        assert field(t, x).shape == x.shape
        if isinstance(field, BilinearMLP):
            _, divergence = field.with_divergence(t, x, *field.prepare())
            assert divergence.shape == (0,)


@each()
def test_every_weight_takes_part(make):
    field = perturbed(make())
    x = torch.randn(BATCH, field.dim, dtype=F64)
    field(torch.rand(BATCH, dtype=F64), x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in field.parameters())


@each()
def test_copies_compute_the_same(make):
    field = perturbed(make())
    x, t = torch.randn(BATCH, field.dim, dtype=F64), torch.tensor(0.2, dtype=F64)
    other = make()
    other.load_state_dict(field.state_dict())
    for twin in (copy.deepcopy(field), pickle.loads(pickle.dumps(field)), other):
        assert torch.equal(twin(t, x), field(t, x))


def test_dtype_moves_with_the_module():
    field = perturbed(BilinearMLP(2, (4, 4)))
    x, t = torch.randn(BATCH, 2), torch.tensor(0.25)
    single = field(t, x)
    field.double()
    assert single.dtype == torch.float32
    assert field(t.double(), x.double()).dtype == F64
    assert torch.allclose(single.double(), field(t.double(), x.double()), atol=1e-5)
    assert torch.allclose(single, field.float()(t, x))


def test_a_field_can_be_laid_out_on_another_device():
    field = MLP(2, (4, 4, 4)).to("meta")
    value = field(torch.tensor(0.5, device="meta"), torch.empty(3, 2, device="meta"))
    assert value.device.type == "meta" and value.shape == (3, 2)


def test_one_time_for_all_needs_no_more_than_single_vectors():
    field = perturbed(MLP(3, (4, 4)))
    x = torch.randn(3)
    assert torch.allclose(field(torch.tensor(0.1), x), field(torch.tensor(0.1), x[None])[0])


def test_first_frequencies_span_the_bandwidth():
    field = MLP(3, (50, 4), bandwidth=(0.2, 8.0))
    lengths = field.weights[0].detach().norm(dim=1)
    assert lengths.min() == pytest.approx(0.2, rel=1e-4)
    assert lengths.max() == pytest.approx(8.0, rel=1e-4)
    assert field.activations[0] == "sin"
    assert MLP(3, (5, 4), bandwidth=None, activation="silu").activations == ("silu", "silu")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: MLP(0), "dim ≥ 1"),
        (lambda: MLP(2, ()), "hidden widths ≥ 1"),
        (lambda: MLP(2, (4, 0)), "hidden widths ≥ 1"),
        (lambda: MLP(2, (4,), activation="relu"), "unknown activation 'relu'; known are"),
        (lambda: BilinearMLP(2, (4, 4, 4)), "one or two hidden layers, got 3"),
    ],
)
def test_what_cannot_be_built_is_said(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# given a context ----------------------------------------------------------------------------


def given(shape: str, dim: int = 3, **settings) -> nn.Module:
    kind, hidden = SHAPES[shape]
    return perturbed(kind(dim, hidden, context=2, **settings).double())


EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES)


@EACH_SHAPE
def test_a_field_given_a_context_starts_at_zero_and_then_depends_on_it(shape):
    kind, hidden = SHAPES[shape]
    x, context = torch.randn(BATCH, 3), torch.randn(BATCH, 2)
    field, t = kind(3, hidden, context=2), torch.tensor(0.3)
    assert not field(t, x, field.embed(context)).any()
    field = given(shape).float()
    moved = field(t, x, field.embed(context)) - field(t, x, field.embed(context + 1))
    assert moved.abs().max() > 1e-4


@EACH_TIME
@EACH_SHAPE
def test_the_tangent_given_a_context_is_the_jacobian(shape, t):
    field = given(shape)
    x, embedded = torch.randn(BATCH, 3, dtype=F64), field.embed(torch.randn(BATCH, 2, dtype=F64))
    tangents = torch.randn(4, BATCH, 3, dtype=F64)
    value, pushed = field.tangent(t, x, tangents, embedded)
    whole = torch.autograd.functional.jacobian(lambda x: field(t, x, embedded), x)
    expected = torch.einsum("bij,kbj->kbi", torch.einsum("bibj->bij", whole), tangents)
    assert torch.allclose(value, field(t, x, embedded), rtol=0, atol=1e-12)
    assert torch.allclose(pushed, expected, rtol=0, atol=1e-10)


@EACH_TIME
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if "bilinear" in name])
def test_the_closed_form_given_a_context_has_the_trace_and_its_gradients(shape, name, t):
    field = given(shape, activation=name)
    x = torch.randn(BATCH, 3, dtype=F64, requires_grad=True)
    context = torch.randn(BATCH, 2, dtype=F64, requires_grad=True)
    t, weights = t.clone().requires_grad_(), torch.randn(BATCH, dtype=F64)
    embedded = field.embed(context)
    value, divergence = field.with_divergence(t, x, embedded, *field.prepare())
    basis = torch.eye(3, dtype=F64)[:, None].expand(-1, BATCH, -1)
    plain, pushed = field.tangent(t, x, basis, embedded)
    trace = torch.einsum("ibi->b", pushed)
    assert torch.allclose(value, plain, rtol=0, atol=1e-12)
    assert torch.allclose(divergence, trace, rtol=0, atol=1e-10)
    wanted = [*field.parameters(), x, t, context]
    found, expected = (
        torch.autograd.grad(
            (b * weights).sum() + a.sin().sum(),
            wanted,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for a, b in ((value, divergence), (plain, trace))
    )
    for part, same in zip(found, expected, strict=True):
        assert torch.allclose(part, same, rtol=1e-9, atol=1e-10)
    assert all(part.any() for part in found)


def test_cotangents_given_a_context_are_pulled_back_by_the_formula():
    field, t = given("bilinear 2"), torch.tensor(0.3, dtype=F64)
    x = torch.randn(BATCH, 3, dtype=F64, requires_grad=True)
    embedded = torch.randn(BATCH, sum(field.time.sizes), dtype=F64, requires_grad=True)
    (mixing,) = (part.detach().requires_grad_() for part in field.prepare())
    bars = torch.randn(BATCH, 3, dtype=F64), torch.randn(BATCH, dtype=F64)
    with torch.no_grad():
        x_bar, passed, captured = field.pull_divergence(t, x, embedded, mixing, *bars)
    outputs = field.with_divergence(t, x, embedded, mixing)
    wanted = [x, embedded, mixing, *captured]
    expected = torch.autograd.grad(outputs, wanted, bars, allow_unused=True)
    for part, same in zip((x_bar, *passed, *captured.values()), expected, strict=True):
        if same is None:  # what the mixing was made of, which stands for itself here
            assert part is None
        else:
            assert torch.allclose(part, same, rtol=1e-10, atol=1e-11)


def test_without_a_context_nothing_can_be_embedded():
    with pytest.raises(ValueError, match="depends on no context"):
        MLP(2, (4,)).embed(torch.zeros(3, 1))
