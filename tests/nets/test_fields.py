"""The contract of every field: its value, tangents, closed form and gradients agree with
torch's own derivatives in double precision, at one time and at a time of each row's own; it is
copied, stored, and starts a flow where it says.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cnf import nets
from cnf.flow.continuous import Solver, move_with_logdet
from cnf.flow.divergence import ClosedForm, Hutchinson, Tangents, push
from cnf.flow.flow import Flow
from cnf.flow.objective import FlowMatching, MaximumLikelihood
from cnf.flow.regularizer import Regularized, Regularizer
from cnf.nets.conditioning import CONDITIONINGS
from cnf.ode.control import Adaptive
from cnf.ode.solution import solve

F64 = torch.float64
BATCH = 4
NOW = torch.tensor(0.3, dtype=F64)
push(lambda t, x: x, NOW, torch.zeros(1, 1), torch.ones(1, 1, 1))  # load forward mode, once
OWN = torch.linspace(0.1, 0.9, BATCH, dtype=F64)  # times of the rows


class Plain(nn.Module):
    """A module that offers nothing but its value."""

    def __init__(self, dim):
        super().__init__()
        self.inner, self.outer = nn.Linear(dim + 1, 8), nn.Linear(8, dim)

    def forward(self, t, x):
        return self.outer(torch.sin(self.inner(torch.cat([x, t.expand(len(x))[:, None]], -1))))


def images(dim):
    """A net of convolutions and norms over images of one pixel row, from and to flat rows."""
    return nets.Chain(
        nn.Unflatten(1, (1, 1, dim)),
        nn.Conv2d(1, 4, 3, padding=2),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nets.Residual(nn.Conv2d(4, 4, (1, 3), padding="same", padding_mode="circular"), nn.Tanh()),
        nn.Sequential(nn.GroupNorm(4, 4, affine=False), nn.Softplus(beta=2.0)),
        nn.Conv2d(4, 1, 3, bias=False),
        nn.Flatten(),
    )


def normed(dim):
    return nets.Chain(
        nn.Linear(dim, 6, bias=False), nn.LayerNorm(6), nn.Sigmoid(), nets.ConcatLinear(6, 5),
        nn.Identity(), nn.LayerNorm(5, elementwise_affine=False), nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(10, dim),
    )  # fmt: skip


FIELDS = {
    "MLP": lambda dim: nets.MLP(dim, (7, 5, 6)),
    "bilinear, 1 layer": lambda dim: nets.BilinearMLP(dim, (7,)),
    "bilinear, 2 layers": lambda dim: nets.BilinearMLP(dim, (7, 6)),
    "residual": lambda dim: nets.ResidualMLP(dim, 6, 2),
    "residual, fourier": lambda dim: nets.ResidualMLP(dim, 6, 1, conditioning="fourier"),
    **{
        f"timed, {name}": lambda dim, name=name: nets.TimedMLP(dim, (6, 5), conditioning=name)
        for name in CONDITIONINGS
    },
    "timed, silu": lambda dim: nets.TimedMLP(dim, (6, 5), activation="silu"),
    "timed, softplus": lambda dim: nets.TimedMLP(dim, (6,), activation="softplus"),
    "planar": lambda dim: nets.PlanarField(dim, 5, hidden=4),
    "potential, 1 layer": lambda dim: nets.PotentialField(dim, 6, 1),
    "potential, 2 layers": lambda dim: nets.PotentialField(dim, 6, 2),
    "potential, 4 layers": lambda dim: nets.PotentialField(dim, 6, 4, rank=2),
    "convolutions and group norms": images,
    "layer norms": normed,
    "U-Net": lambda dim: nets.UNet((1, 1, dim), width=8),
    "a learned end time of a closed form": lambda dim: nets.learned_end_time(
        nets.BilinearMLP(dim, (5, 4)), 1.3
    ),
    "a learned end time of tangents": lambda dim: nets.learned_end_time(normed(dim), 1.3),
    "plain": Plain,
}
START_AT_ZERO = [
    name
    for name in FIELDS
    if name.split(",")[0] in ("MLP", "bilinear", "residual", "timed", "planar")
]
EACH_FIELD = pytest.mark.parametrize("name", FIELDS)
LARGE = [name for name in FIELDS if name == "U-Net"]  # up to a minute
EACH_FIELD_AT_LENGTH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in FIELDS]
)
EACH_TIME = pytest.mark.parametrize("t", [NOW, OWN], ids=["one time", "a time of each row's own"])


def made(name, dim=3):
    torch.manual_seed(len(name))
    field = FIELDS[name](dim).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return field


def jacobian(field, t, x):
    """∂f/∂x of every row by forward mode, (batch, dim, dim)."""

    def of_row(t, x):
        return torch.func.jacfwd(lambda x: field(t[None], x[None])[0])(x)

    rows = [of_row(*pair) for pair in zip(t.expand(len(x)), x, strict=True)]
    return torch.stack(rows)


def evaluate(divergence, field, t, x):
    attached = divergence.attach(field, x)
    return attached.field(t, x, *attached.rows, *attached.params)


def divergences(field, dim):
    known = [ClosedForm()] if hasattr(field, "with_divergence") else []
    order = 1 << (dim - 1).bit_length()
    return [
        *known, Tangents(), Tangents(chunk=2), Tangents(chunk=dim),
        Hutchinson(order, "hadamard"), Hutchinson(dim, "orthogonal", None),
    ]  # fmt: skip


@EACH_FIELD
@EACH_TIME
@pytest.mark.parametrize("dim", [1, 3])
def test_every_exact_divergence_is_the_trace_of_the_jacobian(name, t, dim):
    field, x = made(name, dim), torch.randn(BATCH, dim, dtype=F64)
    expected = jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1)
    for divergence in divergences(field, dim):
        value, found = evaluate(divergence, field, t, x)
        assert torch.allclose(value, field(t, x), rtol=0, atol=1e-12), divergence
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10), divergence


@EACH_FIELD
@EACH_TIME
def test_tangents_are_pushed_by_the_jacobian(name, t):
    field, x = made(name), torch.randn(BATCH, 3, dtype=F64)
    tangents = torch.randn(5, BATCH, 3, dtype=F64)
    before = x.clone(), tangents.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            value, pushed = push(field, t, x, tangents)
        expected = torch.einsum("bij,kbj->kbi", jacobian(field, t, x), tangents)
        assert torch.allclose(value, field(t, x), rtol=0, atol=1e-12)
        assert torch.allclose(pushed, expected, rtol=0, atol=1e-10)
        assert torch.equal(x, before[0]) and torch.equal(tangents, before[1])


@EACH_FIELD
def test_a_divergence_has_the_gradients_of_the_trace(name):
    field = made(name)
    x = torch.randn(BATCH, 3, dtype=F64, requires_grad=True)
    wanted = [x, *field.parameters()]

    def gradients(value, trace):
        loss = (trace**2).sum() + value.sin().sum()
        return torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)

    whole = torch.autograd.functional.jacobian(lambda x: field(NOW, x), x, create_graph=True)
    expected = gradients(field(NOW, x), torch.einsum("bibi->b", whole))
    for divergence in divergences(field, 3):
        for part, same in zip(
            gradients(*evaluate(divergence, field, NOW, x)), expected, strict=True
        ):
            assert torch.allclose(part, same, rtol=1e-7, atol=1e-8), divergence


@EACH_FIELD
def test_rows_do_not_mix_and_each_takes_its_own_time(name):
    field, x = made(name), torch.randn(BATCH, 3, dtype=F64)
    together = field(OWN, x)
    for i in range(BATCH):
        assert torch.allclose(field(OWN[i], x[i : i + 1])[0], together[i], rtol=0, atol=1e-12)
    assert field(NOW, x[:0]).shape == (0, 3)


@EACH_FIELD_AT_LENGTH
def test_a_flow_of_it_is_invertible_and_has_its_jacobians_determinant(name):
    flow = Flow(2, field=made(name, 2), rtol=1e-8, atol=1e-8, logdet_atol=1e-8).double()
    z = torch.randn(2, 2, dtype=F64)
    x, log_prob = flow.decode(z), None
    log_prob = flow.log_prob(x)
    assert torch.allclose(flow.encode(x), z, atol=1e-6)
    whole = torch.autograd.functional.jacobian(flow.decode, z)
    logdet = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))[1]
    normal = -0.5 * z.square().sum(-1) - math.log(2 * math.pi)
    assert torch.allclose(log_prob, normal - logdet, atol=1e-5)


@EACH_FIELD_AT_LENGTH
def test_a_row_alone_shuffled_and_in_a_batch_of_a_thousand_has_one_density(name):
    flow, x = Flow(2, field=made(name, 2)).double(), torch.randn(1000, 2, dtype=F64)
    order = torch.randperm(1000)
    with torch.no_grad():
        together = flow.log_prob(x)
        assert torch.allclose(flow.log_prob(x[order]), together[order], rtol=0, atol=1e-6)
        for i in (0, 499, 999):
            assert torch.allclose(flow.log_prob(x[i]), together[i], rtol=0, atol=1e-6)


@EACH_FIELD_AT_LENGTH
def test_kinetic_energy_and_jacobians_norm_are_their_integrals_by_direct_quadrature(name):
    field, x = made(name, 2), torch.randn(3, 2, dtype=F64)
    points = 1201 if name == "U-Net" else 601  # its embedding of the time turns faster
    both = Regularizer(kinetic=1.0, jacobian=1.0)
    tight = Solver(control=Adaptive(1e-9, 1e-9, quadrature_atol=1e-8))
    moved = move_with_logdet(field, Regularized(Tangents(), both), x, (1.0, 0.0), tight)
    t = torch.linspace(1, 0, points, dtype=F64)
    at = solve(field, x, t, rtol=1e-9, atol=1e-9).y.flatten(0, 1).detach().requires_grad_()
    velocity = field(t.repeat_interleave(len(x)), at)
    slopes = [torch.autograd.grad(v.sum(), at, retain_graph=True)[0] for v in velocity.unbind(1)]
    rates = (0.5 * velocity.square().sum(1), sum(s.square().sum(1) for s in slopes))
    simpson = torch.ones(points, dtype=F64) / (3 * (points - 1))
    simpson[1:-1:2] *= 4
    simpson[2:-1:2] *= 2
    for found, rate in zip(both.measured(moved.along, -1.0).values(), rates, strict=True):
        expected = (simpson @ rate.detach().reshape(points, -1)).mean()
        assert torch.allclose(found, expected, rtol=1e-4)


@EACH_FIELD
def test_it_is_stored_and_copied_with_a_flow(name, tmp_path):
    flow, x = Flow(3, field=made(name)).double(), torch.randn(5, 3, dtype=F64)
    flow.save(tmp_path / "flow.safetensors")
    again = Flow.load(tmp_path / "flow.safetensors", field=FIELDS[name](3))
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))


@EACH_FIELD
@pytest.mark.parametrize("kind", [MaximumLikelihood, FlowMatching])
def test_both_objectives_reach_every_weight(name, kind):
    flow = Flow(3, field=made(name).float(), rtol=1e-3, atol=1e-3, logdet_atol=1e-2)
    kind(flow)(torch.randn(20, 3)).backward()
    for key, parameter in flow.field.named_parameters():
        # the constant part of a potential's slope in time moves no point
        part = parameter.grad[:3] if key == "linear" else parameter.grad
        assert part is not None and part.any(), key


@pytest.mark.parametrize("name", START_AT_ZERO)
def test_a_flow_of_it_starts_as_the_identity(name):
    field, x = FIELDS[name](2), torch.randn(6, 2)
    assert not field(torch.tensor(0.4), x).any()
    flow = Flow(2, field=field, rtol=1e-3, atol=1e-3)
    before = [p.detach().clone() for p in field.parameters()]
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(4):  # and yet it learns
        optimizer.zero_grad()
        FlowMatching(flow)(2 + torch.randn(64, 2)).backward()
        optimizer.step()
    for (key, now), then in zip(field.named_parameters(), before, strict=True):
        assert not torch.equal(now, then), key


# one by one ---------------------------------------------------------------------------------


@EACH_TIME
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_potential_field_is_minus_the_gradient_of_its_potential(t, depth):
    field = nets.PotentialField(3, 6, depth).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_(std=0.6)
    x = torch.randn(BATCH, 3, dtype=F64, requires_grad=True)
    t = t.clone().requires_grad_()
    phi = field.potential(t, x)
    by_t, by_x = torch.autograd.grad(phi.sum(), (t, x))
    assert torch.allclose(field(t, x), -by_x, rtol=0, atol=1e-12)
    found = field.residual(t, x)
    expected = by_t - 0.5 * by_x.square().sum(-1)
    if t.ndim == 0:  # the slopes of all rows in one number
        found, expected = found.sum(), by_t - 0.5 * by_x.square().sum()
    assert torch.allclose(found, expected, rtol=0, atol=1e-11)


def test_a_potential_field_is_finite_far_out():
    field = made("potential, 2 layers")
    value, trace = field.with_divergence(NOW, 1e4 * torch.randn(BATCH, 3, dtype=F64))
    assert torch.isfinite(value).all() and torch.isfinite(trace).all()


def test_the_hjb_residual_is_zero_where_points_move_straight():
    """Φ = −|x|² / (2 (1 + t)) moves every point at constant speed: f = x / (1 + t)."""

    class Spreading(nn.Module):
        def forward(self, t, x):
            return x / (1 + t).unsqueeze(-1)

    x = torch.randn(5, 2, dtype=F64, requires_grad=True)
    t = torch.full((5,), 0.4, dtype=F64, requires_grad=True)
    phi = -x.square().sum(-1) / (2 * (1 + t))
    by_t, by_x = torch.autograd.grad(phi.sum(), (t, x))
    assert torch.allclose(-by_x, Spreading()(t, x))
    assert torch.allclose(by_t - 0.5 * by_x.square().sum(-1), torch.zeros(5, dtype=F64), atol=1e-12)


def test_the_hjb_term_straightens_paths():
    """Trained with the term, points end nearly where their first velocity would take them."""
    bends = []
    for weight in (0.0, 5.0):
        torch.manual_seed(1)
        flow = Flow(2, field=nets.PotentialField(2, 16), rtol=1e-3, atol=1e-3, whiten=False)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        loss = MaximumLikelihood(flow, regularizer=Regularizer(hjb=weight))
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        data = torch.randn(128, 2) * torch.tensor([2.0, 0.5]) + 1
        for _ in range(40):
            optimizer.zero_grad()
            loss(data).backward()
            optimizer.step()
        with torch.no_grad():
            z = torch.randn(200, 2)
            straight = z + flow.field(torch.tensor(0.0), z)
            bends.append((flow.decode(z) - straight).norm(dim=1).mean())
    assert bends[1] < 0.5 * bends[0]


def test_a_planar_unit_moves_points_along_its_direction():
    field = made("planar")
    u, w, b = field.units(NOW)
    x = torch.randn(BATCH, 3, dtype=F64)
    expected = sum(torch.tanh(x @ w[m] + b[m])[:, None] * u[m] for m in range(field.width))
    assert torch.allclose(field(NOW, x), expected)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_conditioning_depends_on_time(conditioning):
    field = made(f"timed, {conditioning}")
    x = torch.randn(BATCH, 3, dtype=F64)
    assert not torch.allclose(field(NOW, x), field(NOW + 0.5, x), atol=1e-3)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: nets.Chain(nn.Linear(2, 2), nn.ReLU()), "layer 1 is ReLU, through which no tang"),
        (lambda: nets.TimedMLP(2, conditioning="film"), "unknown conditioning 'film'; known are"),
        (lambda: nets.TimedMLP(2, activation="relu"), "unknown activation 'relu'; known are tanh"),
        (lambda: nets.TimedMLP(2, ()), "hidden widths ≥ 1"),
        (lambda: nets.ResidualMLP(2, 8, 0), "blocks ≥ 1, got 2, 8 and 0"),
        (lambda: nets.PlanarField(0), "expected dim, width and hidden ≥ 1"),
        (lambda: nets.PotentialField(2, depth=0), "depth and rank ≥ 1, got 2, 32, 0 and 2"),
        (lambda: nets.ConcatLinear(0, 3), "expected widths ≥ 1, got 0 and 3"),
        (lambda: nets.NoSuchField, "no attribute 'NoSuchField'"),
    ],
)
def test_what_cannot_be_built_is_said(make, said):
    with pytest.raises((ValueError, AttributeError), match=said):
        make()


def test_every_exported_name_is_there():
    for name in nets._EXPORTS:
        assert getattr(nets, name) is not None and name in dir(nets)
