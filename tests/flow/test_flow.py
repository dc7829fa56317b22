"""A flow is a density: its log-densities are exact, integrate to one and belong to its samples."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, StudentT, Uniform

import cnf
from cnf.data.density import toy
from cnf.error import InputError, IntegrationError
from cnf.flow.flow import Flow

F64 = torch.float64
TIGHT = dict(rtol=1e-9, atol=1e-9, logdet_atol=1e-8)
GRADIENTS = ["backprop", "checkpoint", "adjoint"]
MATRIX = torch.tensor([[0.4, -0.9], [0.5, -0.2]], dtype=F64)


class Linear(nn.Module):
    """f(t, x) = A x, of which everything is known."""

    def __init__(self, matrix: torch.Tensor = MATRIX) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, t, x):
        return x @ self.matrix.T


class KnownLinear(Linear):
    """The same, which knows its divergence too."""

    def prepare(self):
        return (self.matrix.trace(),)

    def with_divergence(self, t, x, trace):
        return self(t, x), trace.expand(len(x))


class Timed(nn.Module):
    """A small net of x and t; t of no dimensions alone, or a row."""

    def __init__(self, dim: int = 2, rows: bool = True) -> None:
        super().__init__()
        self.rows = rows
        self.inner, self.outer = nn.Linear(dim + 1, 8), nn.Linear(8, dim)

    def forward(self, t, x):
        if self.rows:
            t = t.expand(len(x)).unsqueeze(-1)
            return self.outer(torch.tanh(self.inner(torch.cat([x, t], -1))))
        return self.outer(
            torch.tanh(self.inner.weight[:, -1] * t + x @ self.inner.weight[:, :-1].T)
        )


def shaken(flow: Flow, size: float = 0.25) -> Flow:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.add_(size * noise.to(parameter.dtype))
    return flow


def small(dim: int = 2, size: float = 0.25, **settings) -> Flow:
    """A flow that is no identity."""
    return shaken(Flow(dim, **{"hidden": (8, 7), "seed": 0, **settings}), size)


def exact(dim: int = 2, **settings) -> Flow:
    return small(dim, **{**TIGHT, **settings}).double()


def whitened(flow: Flow) -> Flow:
    data = torch.randn(200, flow.dim, dtype=F64)
    return flow.whiten(data * torch.linspace(0.3, 3, flow.dim, dtype=F64) + data[:, :1] + 4)


def student(dim: int = 2) -> Independent:
    return Independent(StudentT(torch.full((dim,), 5.0)), 1)


FLOWS = {
    "one layer": lambda: small(hidden=(16,)),
    "two layers": lambda: small(hidden=(16, 16)),
    "three layers": lambda: small(hidden=(16, 16, 16)),
    "whitened": lambda: whitened(small()),
    "in one dimension": lambda: whitened(small(1)),
    "in 64 dimensions": lambda: small(64, size=0.05),
    "fixed steps": lambda: small(step_size=0.05, method="rk4"),
    "tsit5": lambda: small(method="tsit5"),
    "tangents": lambda: small(divergence=cnf.Tangents()),
    "own field": lambda: small(field=Timed()),
    "own field, times without rows": lambda: small(field=Timed(rows=False)),
    "own base": lambda: whitened(small(base=student())),
    "own base without rsample": lambda: small(base=Integers()),
    "double": lambda: whitened(exact()),
    "adjoint": lambda: small(gradient="adjoint"),
    "backprop": lambda: small(gradient="backprop"),
}
EACH_FLOW = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
EACH_GRADIENT = pytest.mark.parametrize("gradient", GRADIENTS)


class Integers(torch.distributions.Distribution):
    """A normal that can only be drawn from without gradients."""

    has_rsample = False
    arg_constraints: ClassVar[dict] = {}

    def __init__(self) -> None:
        super().__init__(event_shape=torch.Size([2]))

    def sample(self, sample_shape=()):
        return torch.randn(*sample_shape, 2)

    def log_prob(self, value):
        return Normal(0.0, 1.0).log_prob(value).sum(-1)


# the density --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 64])
@pytest.mark.parametrize("hidden", [(16,), (16, 16), (16, 16, 16)])
def test_an_untrained_flow_is_the_standard_normal(dim, hidden):
    flow, x = Flow(dim, hidden=hidden), torch.randn(10, dim)
    law = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    assert torch.allclose(flow.log_prob(x), law.log_prob(x), atol=1e-4)
    assert torch.equal(flow.encode(x), x) and torch.equal(flow.decode(x), x)


def test_an_untrained_flow_is_its_base():
    flow, x = Flow(2, base=student()), torch.randn(10, 2)
    assert torch.allclose(flow.log_prob(x), student().log_prob(x))


def test_an_untrained_whitened_flow_is_the_datas_normal():
    data = torch.randn(5000, 2, dtype=F64) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]).double() + 3
    flow = Flow(2, hidden=(4,)).double().whiten(data)
    law = MultivariateNormal(data.mean(0), torch.cov(data.T))
    assert torch.allclose(flow.log_prob(data), law.log_prob(data), atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    "field, divergence",
    [
        (Linear, "auto"),
        (Linear, cnf.Tangents()),
        (KnownLinear, "auto"),
        (KnownLinear, cnf.ClosedForm()),
        (KnownLinear, cnf.Tangents()),
    ],
)
@EACH_GRADIENT
def test_a_linear_field_has_the_gaussians_density(field, divergence, gradient):
    flow = Flow(2, field=field(), divergence=divergence, gradient=gradient, **TIGHT).double()
    x = torch.randn(7, 2, dtype=F64)
    back = torch.linalg.matrix_exp(-MATRIX)
    expected = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()).log_prob(
        x @ back.T
    )
    assert torch.allclose(flow.log_prob(x), expected - MATRIX.trace(), rtol=0, atol=1e-7)
    assert torch.allclose(flow.encode(x), x @ back.T, atol=1e-8)
    assert torch.allclose(flow.decode(x), x @ torch.linalg.matrix_exp(MATRIX).T, atol=1e-8)
    draws, log_prob = flow.sample(50, return_log_prob=True, seed=0)
    assert torch.allclose(log_prob, flow.log_prob(draws), atol=1e-7)


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_hutchinson_is_the_gaussians_density_in_the_mean(law):
    x = torch.randn(1, 2, dtype=F64)
    flow = Flow(2, field=Linear(), divergence=cnf.Hutchinson(1, law, None), **TIGHT).double()
    found = flow.log_prob(x.expand(4000, -1)).detach()
    flow.divergence = "tangents"
    error = found.std() / 4000**0.5
    assert abs(found.mean() - flow.log_prob(x)[0]) < 4 * error and error > 1e-3


def test_hutchinson_is_exact_where_the_jacobian_is_diagonal():
    matrix = torch.diag(torch.tensor([0.3, -0.7], dtype=F64))
    flow = Flow(2, field=Linear(matrix), divergence="hutchinson", **TIGHT).double()
    x = torch.randn(7, 2, dtype=F64)
    expected = flow.log_prob(x)
    flow.divergence = "tangents"
    assert torch.allclose(expected, flow.log_prob(x), atol=1e-9)


@pytest.mark.parametrize("hidden", [(8,), (8, 7)])
def test_the_closed_form_and_tangents_agree(hidden):
    flow, x = whitened(exact(3, hidden=hidden)), torch.randn(20, 3, dtype=F64)
    closed, info = flow.log_prob(x, return_info=True)
    assert info.divergence == "ClosedForm" and info.nfe > 6
    flow.divergence = cnf.Tangents()
    by_tangents, info = flow.log_prob(x, return_info=True)
    assert info.divergence == "Tangents"
    assert torch.allclose(closed, by_tangents, atol=1e-7)


def test_info_says_what_auto_chose():
    x = torch.zeros(1, 2)
    for flow, name in (
        (small(), "ClosedForm"),
        (small(hidden=(4, 4, 4)), "Tangents"),
        (small(field=Timed()), "Tangents"),
        (small(field=lambda t, x: -x), "Tangents"),
        (small(divergence="hutchinson"), "Hutchinson"),
    ):
        assert flow.log_prob(x, return_info=True)[1].divergence == name


@pytest.mark.parametrize(
    "base", [None, Independent(Normal(torch.zeros(2), 0.7), 1)], ids=["normal base", "own base"]
)
def test_the_density_integrates_to_one(base):
    torch.manual_seed(1)
    flow = Flow(2, hidden=(24, 24), base=base, seed=0)
    flow.fit(toy("moons").sample((1500,)), steps=150, seed=0, progress=False, batch_size=256)
    low, high, count = -9.0, 9.0, 301
    axis = torch.linspace(low, high, count)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = flow.log_prob(grid).double().exp()
    mass = density.sum() * ((high - low) / (count - 1)) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)
    assert flow.log_prob(grid[:1]).exp() < density.max()


@EACH_FLOW
def test_decode_undoes_encode(make):
    flow = make()
    x = flow.sample(20, seed=3)
    z = flow.encode(x)
    assert z.shape == x.shape
    assert torch.allclose(flow.decode(z), x, atol=2e-3, rtol=2e-3)
    double = flow.dtype == F64
    assert not double or torch.allclose(flow.decode(z), x, atol=1e-7)


@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name) for name, make in FLOWS.items() if "64" not in name]
)
def test_log_prob_is_the_base_density_at_the_encoded_point_and_the_jacobian(make):
    flow = make()
    x = flow.sample(3, seed=4)
    whole = torch.autograd.functional.jacobian(flow.encode, x)
    logdet = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))[1]
    base = flow.base or MultivariateNormal(torch.zeros(flow.dim), torch.eye(flow.dim))
    expected = base.log_prob(flow.encode(x).float()) + logdet
    atol = 2e-2 if flow.dtype == torch.float32 else 1e-5
    assert torch.allclose(flow.log_prob(x).double(), expected.double(), atol=atol)


# gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [cnf.ClosedForm(), cnf.Tangents(), cnf.Hutchinson(2)])
@pytest.mark.parametrize("whiten", [True, False])
def test_every_gradient_method_finds_the_same_gradient(divergence, whiten):
    x = torch.randn(10, 3, dtype=F64)
    found = {}
    for gradient in GRADIENTS:
        flow = exact(3, gradient=gradient, divergence=divergence)
        if whiten:
            torch.manual_seed(1)
            whitened(flow)
        point = x.clone().requires_grad_()
        flow.log_prob(point).mean().backward()
        found[gradient] = [point.grad, *(p.grad for p in flow.parameters())]
    for gradient in ("checkpoint", "adjoint"):
        atol = 1e-9 if gradient == "checkpoint" else 1e-5
        for part, expected in zip(found[gradient], found["backprop"], strict=True):
            assert torch.allclose(part, expected, atol=atol, rtol=1e-4)
            assert expected.any()


@EACH_GRADIENT
def test_the_gradient_is_that_of_finite_differences(gradient):
    flow, x = exact(gradient=gradient), torch.randn(6, 2, dtype=F64)
    flow.log_prob(x).mean().backward()
    step = 1e-5
    for parameter in flow.parameters():
        place = parameter.grad.abs().argmax()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[place] += sign * step
                values.append(flow.log_prob(x).mean().item())
                parameter.view(-1)[place] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


@EACH_GRADIENT
def test_a_closure_as_a_field_passes_its_nets_gradients(gradient):
    net = Timed().double()
    flow = Flow(2, field=lambda t, x: net(t, x) - x, gradient=gradient, **TIGHT).double()
    assert not list(flow.parameters())
    flow.log_prob(torch.randn(5, 2, dtype=F64)).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_two_losses_of_one_flow_add_their_gradients():
    flow, x = exact(), torch.randn(6, 2, dtype=F64)
    flow.log_prob(x[:3]).sum().backward()
    flow.log_prob(x[3:]).sum().backward()
    added = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    flow.log_prob(x).sum().backward()
    for part, parameter in zip(added, flow.parameters(), strict=True):
        assert torch.allclose(part, parameter.grad, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_flow_in_either_mode(mode):
    flow = getattr(small(), mode)()
    flow.log_prob(torch.randn(3, 2)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())


def test_the_score_is_the_gradient_by_x():
    x = torch.randn(7, 2, dtype=F64, requires_grad=True)
    flow = Flow(2, field=Linear(), **TIGHT).double()
    (score,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    back = torch.linalg.matrix_exp(-MATRIX)
    assert torch.allclose(score, -(x.detach() @ back.T) @ back, atol=1e-7)


@pytest.mark.parametrize("divergence", [cnf.ClosedForm(), cnf.Tangents()])
def test_second_derivatives_come_through_backprop(divergence):
    steps = dict(method="rk4", step_size=0.1)
    flow = exact(gradient="backprop", divergence=divergence, hidden=(5, 4), **steps)
    x = torch.randn(3, 2, dtype=F64, requires_grad=True)

    def score_norm() -> torch.Tensor:
        (score,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
        return score.square().sum()

    found = torch.autograd.grad(score_norm(), list(flow.parameters()))
    step = 1e-4
    for parameter, gradient in zip(flow.parameters(), found, strict=True):
        place = gradient.abs().argmax()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[place] += sign * step
            values.append(score_norm().item())
            with torch.no_grad():
                parameter.view(-1)[place] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert gradient.view(-1)[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


@EACH_GRADIENT
def test_draws_carry_gradients_and_samples_do_not(gradient):
    flow = whitened(exact(gradient=gradient))
    draws, log_prob = flow.rsample(6, return_log_prob=True, seed=0)
    assert draws.requires_grad and log_prob.requires_grad
    (draws.square().sum() + log_prob.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())
    for part in flow.sample(6, return_log_prob=True, seed=0):
        assert not part.requires_grad
    assert torch.allclose(flow.sample(6, seed=0), draws.detach(), atol=1e-7)


def test_draws_gradient_is_that_of_finite_differences():
    flow = exact()
    flow.rsample(6, seed=0).square().sum().backward()
    parameter = flow.field.out
    place = parameter.grad.abs().argmax()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[place] += sign * 1e-5
            values.append(flow.sample(6, seed=0).square().sum().item())
            parameter.view(-1)[place] -= sign * 1e-5
    slope = (values[0] - values[1]) / 2e-5
    assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-4)


def test_a_base_with_parameters_gets_their_gradients_from_draws():
    scale = torch.full((2,), 0.5, requires_grad=True)
    flow = small(base=Independent(Normal(torch.zeros(2), scale), 1))
    draws, log_prob = flow.rsample(5, return_log_prob=True)
    (draws.sum() + log_prob.sum()).backward()
    assert scale.grad.any()


# sampling -----------------------------------------------------------------------------------


@EACH_FLOW
def test_log_densities_of_samples_agree_with_log_prob(make):
    flow = make()
    x, log_prob = flow.sample(30, return_log_prob=True, seed=0)
    assert x.shape == (30, flow.dim) and log_prob.shape == (30,)
    assert x.dtype == flow.dtype == log_prob.dtype
    atol = 1e-6 if flow.dtype == F64 else 2e-2
    assert torch.allclose(log_prob, flow.log_prob(x), atol=atol)
    assert torch.allclose(x, flow.sample(30, seed=0), atol=1e-6 if flow.dtype == F64 else 5e-3)


@EACH_FLOW
def test_a_seed_fixes_the_samples_and_leaves_the_generator_alone(make):
    flow = make()
    state = torch.get_rng_state()
    one, other = flow.sample(5, seed=11), flow.sample(5, seed=11)
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, flow.sample(5, seed=12))
    assert torch.equal(torch.get_rng_state(), state)


@EACH_FLOW
def test_without_a_seed_samples_come_from_torchs_generator(make):
    flow = make()
    torch.manual_seed(3)
    one, other = flow.sample(5), flow.sample(5)
    torch.manual_seed(3)
    assert torch.equal(flow.sample(5), one) and not torch.equal(one, other)


@EACH_FLOW
def test_no_samples_are_an_empty_tensor(make):
    flow = make()
    assert flow.sample(0).shape == flow.rsample(0).shape == (0, flow.dim)
    x, log_prob = flow.sample(0, return_log_prob=True)
    assert x.shape == (0, flow.dim) and log_prob.shape == (0,)


def test_samples_follow_the_density():
    flow = Flow(2, field=Linear(), **TIGHT).double()
    draws = flow.sample(20_000, seed=0)
    forth = torch.linalg.matrix_exp(MATRIX)
    assert draws.mean(0).abs().max() < 0.05
    assert torch.allclose(torch.cov(draws.T), forth @ forth.T, atol=0.06)


def test_samples_of_many_chunks_are_those_of_one(monkeypatch):
    flow = exact()
    whole = flow.sample(50, return_log_prob=True, seed=0)
    monkeypatch.setattr("cnf.flow.flow.CHUNK", 7)
    for part, same in zip(flow.sample(50, return_log_prob=True, seed=0), whole, strict=True):
        assert torch.allclose(part, same, atol=1e-7)


@pytest.mark.parametrize("n", [-1, 2.0, "3", None, True, (3,), [3]])
def test_a_number_of_draws_that_is_none_is_refused(n):
    for draw in (small().sample, small().rsample):
        with pytest.raises(InputError, match="n must be a whole number"):
            draw(n)


@pytest.mark.parametrize("seed", [-1, 0.5, "a", 2**70])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(InputError, match="seed must be"):
        small().sample(2, seed=seed)
    with pytest.raises(InputError, match="seed must be"):
        Flow(2, seed=seed)


def test_numpys_integers_are_numbers():
    flow = Flow(np.int64(2), hidden=np.array([4, 4]), seed=np.int64(0))
    assert flow.sample(np.int32(3), seed=np.int64(1)).shape == (3, 2)
    assert flow.log_prob(np.zeros((5, 2)), chunk=np.int64(2)).shape == (5,)


# shapes and inputs --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray], ids=["tensor", "array"])
def test_leading_shapes_stay(lead, dim, kind):
    flow = small(dim, size=0.05)
    x = torch.randn(*lead, dim)
    given = x if kind is torch.as_tensor else x.numpy()
    log_prob = flow.log_prob(given)
    assert log_prob.shape == lead
    assert flow.encode(given).shape == flow.decode(given).shape == (*lead, dim)
    if math.prod(lead):
        flat = flow.log_prob(x.reshape(-1, dim)).reshape(lead)
        assert torch.allclose(log_prob, flat, atol=1e-5)


def test_a_density_over_numbers_takes_a_plain_list_of_them():
    flow = small(1)
    x = torch.randn(6)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x[:, None]))
    assert torch.equal(flow.log_prob(x.tolist()), flow.log_prob(x[:, None]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_in_half_precision_is_refused(dtype):
    with pytest.raises(InputError, match=f"{dtype}, too coarse for log-densities; use flow.float"):
        Flow(2, seed=0).to(dtype).log_prob(torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64, torch.int64])
def test_any_real_dtype_is_taken_and_the_flows_given_back(dtype):
    x = torch.tensor([[1, -2], [0, 3]], dtype=dtype)
    for flow in (small(), exact()):
        log_prob = flow.log_prob(x)
        assert log_prob.dtype == flow.dtype == flow.encode(x).dtype
        assert torch.equal(log_prob, flow.log_prob(x.to(flow.dtype)))


@pytest.mark.parametrize("chunk", [1, 3, 10, 1000])
def test_every_container_means_the_same(chunk, tmp_path):
    flow, x = small(), np.random.default_rng(0).normal(size=(10, 2))
    np.save(tmp_path / "x.npy", x)
    expected = flow.log_prob(torch.tensor(x))
    others = [
        x,
        np.asfortranarray(x),
        x[::-1][::-1],
        x.astype(">f8"),
        x.tolist(),
        pd.DataFrame(x, columns=["a", "b"]),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        np.load(tmp_path / "x.npy", mmap_mode="c"),
    ]
    for given in others:
        found = flow.log_prob(given, chunk=chunk)
        assert torch.allclose(found, expected, atol=1e-5 if chunk >= 10 else 2e-2)
        assert torch.allclose(flow.encode(given), flow.encode(torch.tensor(x)), atol=1e-5)
    frame = pd.DataFrame(x)
    assert flow.log_prob(frame.iloc[3]).shape == ()
    assert flow.log_prob(frame[:0]).shape == (0,)


def test_the_input_is_never_changed():
    flow = whitened(small())
    x, array = torch.randn(5, 2), np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    kept, held = x.clone(), array.copy()
    flow.log_prob(x), flow.encode(x), flow.decode(x), flow.log_prob(array)
    assert torch.equal(x, kept) and (array == held).all()


def test_a_view_with_strides_is_taken():
    flow, x = small(), torch.randn(10, 4)
    assert torch.equal(flow.log_prob(x[::2, ::2]), flow.log_prob(x[::2, ::2].contiguous()))
    same = flow.log_prob(torch.zeros(1, 2).expand(5, -1))
    assert torch.allclose(same, same[0])


@pytest.mark.parametrize(
    "x, said",
    [
        (torch.zeros(3, 4), r"x has shape \(3, 4\), expected \(n, 2\)"),
        (torch.zeros(2, 5), r"expected \(n, 2\); transpose it with x.T"),
        (np.zeros((2, 7)), "transpose it with x.T"),
        (torch.zeros(3), r"x has shape \(3,\)"),
        (torch.tensor(1.0), r"x has shape \(\)"),
        (torch.zeros(2, 3, 4), r"x has shape \(2, 3, 4\)"),
        (torch.zeros(0, 3), r"of shape \(0, 3\)"),
        (torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), "NaN or infinite values in 1 row .*row 1"),
        (torch.tensor([[0.0, math.inf]]), "NaN or infinite"),
        (np.array([[0.0, -np.inf]]), "NaN or infinite"),
        (torch.tensor([[0.0, 1e35]]), "too large"),
        (pd.DataFrame({"a": [1.0, None], "b": [0.0, 1.0]}), "column 'a'"),
        (pd.DataFrame({"a": ["x", "y"], "b": [0.0, 1.0]}), "column 'a'"),
        (np.array([["a", "b"]]), "text"),
        (torch.zeros(2, 2, dtype=torch.complex64), "complex"),
        ([[1.0, 2.0], [3.0]], "unequal length"),
        ("moons", "text"),
        (None, "Python objects"),
        (torch.eye(2).to_sparse(), "no plain tensor"),
    ],
)
def test_input_that_cannot_be_used_is_refused_in_a_sentence(x, said):
    flow = small()
    for use in (flow.log_prob, flow.encode, flow):
        with pytest.raises(InputError, match=said) as caught:
            use(x)
        assert str(caught.value).isprintable()


def test_decode_calls_its_input_z():
    with pytest.raises(InputError, match=r"z has shape \(2, 3\), expected \(n, 2\); .* z.T"):
        small().decode(torch.zeros(2, 3))


def test_a_bad_row_of_a_memory_map_is_named_with_its_block(tmp_path):
    x = np.zeros((100, 2))
    x[57, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match=r"x\[40:60\] has .*row 17, .*column '1'"):
        small().log_prob(np.load(tmp_path / "x.npy", mmap_mode="r"), chunk=20)


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "all", None, True])
def test_a_chunk_without_rows_is_refused(chunk):
    with pytest.raises(InputError, match="chunk must be a whole number, at least 1"):
        small().log_prob(torch.zeros(3, 2), chunk=chunk)


# the batch is not a unit --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 20, 21])
def test_chunks_do_not_change_the_result(chunk):
    flow, x = whitened(exact()), 4 + torch.randn(20, 2, dtype=F64)
    assert torch.allclose(flow.log_prob(x, chunk=chunk), flow.log_prob(x), atol=1e-6)
    single, x = small(), torch.randn(20, 2)
    assert torch.allclose(single.log_prob(x, chunk=chunk), single.log_prob(x), atol=2e-2)


def test_chunks_carry_gradients():
    flow, x = exact(), torch.randn(9, 2, dtype=F64)
    found = []
    for chunk in (2, 100):
        flow.zero_grad()
        flow.log_prob(x, chunk=chunk).mean().backward()
        found.append([p.grad for p in flow.parameters()])
    for part, same in zip(*found, strict=True):
        assert torch.allclose(part, same, atol=1e-6)


@pytest.mark.parametrize("divergence", [cnf.ClosedForm(), cnf.Tangents(), cnf.Hutchinson(2)])
def test_a_row_alone_is_the_row_among_others(divergence):
    flow = exact(divergence=divergence)
    x = torch.randn(12, 2, dtype=F64) * torch.linspace(0.1, 8, 12, dtype=F64)[:, None]
    together, mapped = flow.log_prob(x), flow.encode(x)
    for i in (0, 5, 11):
        assert torch.allclose(flow.log_prob(x[i]), together[i], atol=1e-6)
        assert torch.allclose(flow.encode(x[i]), mapped[i], atol=1e-6)
    order = torch.randperm(12)
    assert torch.allclose(flow.log_prob(x[order]), together[order], atol=1e-9)


@EACH_FLOW
def test_modes_do_not_change_the_result(make):
    flow = make()
    x = flow.sample(6, seed=0)
    expected = flow.train().log_prob(x).detach()
    results = [flow.eval().log_prob(x).detach()]
    with torch.no_grad():
        results += [flow.log_prob(x), flow.train().log_prob(x)]
    with torch.inference_mode():
        results.append(flow.log_prob(x))
    results += [flow(x).detach(), flow.log_prob(x.clone().requires_grad_()).detach()]
    assert all(torch.allclose(result, expected, rtol=1e-6, atol=1e-6) for result in results)
    assert torch.isfinite(expected).all()


def test_hutchinson_with_a_seed_gives_the_same_again():
    flow, x = small(divergence=cnf.Hutchinson(seed=3)), torch.randn(5, 2)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x))
    state = torch.get_rng_state()
    flow.log_prob(x)
    assert torch.equal(torch.get_rng_state(), state)
    flow.divergence = cnf.Hutchinson(seed=None)
    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))


def test_far_points_have_a_small_density_and_no_error():
    flow = small()
    for size in (1e2, 1e6, 1e12):
        log_prob = flow.log_prob(torch.full((2, 2), size))
        assert not log_prob.isnan().any() and (log_prob < -1000).all()


def test_a_field_that_blows_up_says_so():
    flow = Flow(2, field=lambda t, x: 50 * x**3)
    with pytest.raises(IntegrationError, match="the solution may blow up there"):
        flow.decode(torch.ones(3, 2))


# a module -----------------------------------------------------------------------------------


@EACH_FLOW
def test_copies_are_independent_and_equal(make):
    flow = make()
    x = flow.sample(4, seed=0)
    expected = flow.log_prob(x)
    twin = copy.deepcopy(flow)
    assert torch.equal(twin.log_prob(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(flow.log_prob(x), expected)


@EACH_FLOW
def test_pickles_compute_the_same(make):
    flow = make()
    x = flow.sample(4, seed=0)
    again = pickle.loads(pickle.dumps(flow))
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert again.solver == flow.solver and again.divergence == flow.divergence


@EACH_FLOW
def test_a_state_dict_is_the_whole_state(make):
    flow, other = make(), make()
    with torch.no_grad():
        for tensor in (*other.parameters(), other.whitening.mean, other.whitening.factor):
            tensor.add_(1)
    other.load_state_dict(flow.state_dict())
    x = flow.sample(4, seed=0)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_copies_after_backward_are_possible():
    flow, x = small(), torch.randn(3, 2)
    expected = flow.log_prob(x)
    expected.sum().backward()
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin.log_prob(x), expected)


def test_a_module_lists_its_parts():
    flow = small()
    names = {name for name, _ in flow.named_parameters()}
    assert names and all(name.startswith("field.") for name in names)
    assert "whitening.mean" in flow.state_dict()
    assert "whitening" in repr(flow) and len(list(flow.modules())) > 3
    assert not any(p.requires_grad for p in flow.requires_grad_(False).parameters())


def test_a_flow_within_a_module_is_part_of_it():
    outer = nn.ModuleDict({"flow": small()}).double()
    assert outer["flow"].dtype == F64
    assert outer["flow"].log_prob(torch.zeros(1, 2)).dtype == F64


def test_double_and_back_changes_the_dtype_alone():
    flow, x = whitened(small(**TIGHT)), torch.randn(5, 2) + 4
    double = copy.deepcopy(flow).double()
    assert double.log_prob(x).dtype == F64
    # float32 cannot reach these tolerances: the double flow is the reference
    flow.solver = small().solver
    assert torch.allclose(flow.log_prob(x).double(), double.log_prob(x), atol=2e-3)
    assert double.float().log_prob(x).dtype == torch.float32


def test_weights_can_be_changed_between_calls():
    flow, x = small(), torch.randn(5, 2)
    before = flow.log_prob(x).detach()
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    assert flow.log_prob(x).mean() > before.mean()


def test_functional_calls_take_other_weights():
    flow, other, x = small(), small(size=0.1), torch.randn(5, 2)
    found = torch.func.functional_call(flow, dict(other.named_parameters()), (x,))
    assert torch.allclose(found, other.log_prob(x), atol=1e-5)


def test_the_same_seed_makes_the_same_flow_and_disturbs_nothing():
    state = torch.get_rng_state()
    one, other = Flow(2, seed=5), Flow(2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.field.weights[0], Flow(2, seed=6).field.weights[0])
    torch.manual_seed(1)
    one = Flow(2)
    assert not torch.equal(one.field.weights[0], Flow(2).field.weights[0])


# construction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(dim=0), "dim must be a whole number, at least 1, got 0"),
        (dict(dim=-2), "dim must be"),
        (dict(dim=2.0), "dim must be"),
        (dict(dim="2"), "dim must be"),
        (dict(dim=True), "dim must be"),
        (dict(dim=None), "dim must be"),
        (dict(dim=(2,)), "dim must be"),
        (dict(hidden=()), r"hidden must hold one width or more, such as \(128, 128\), got \(\)"),
        (dict(hidden=64), "hidden must hold one width or more"),
        (dict(hidden=(8, 0)), "each width in hidden must be a whole number, at least 1, got 0"),
        (dict(hidden=(8, 2.5)), "each width in hidden"),
        (dict(divergence="exact"), "unknown divergence 'exact'; known are auto, closed_form"),
        (dict(divergence=cnf.Hutchinson), "divergence must be a name or a divergence such as"),
        (dict(method="rk5"), "unknown method 'rk5'; known are"),
        (dict(method="rk4"), "give step_size="),
        (dict(gradient="none"), "unknown gradient 'none'; known are"),
        (dict(step_size=0), "step_size must be a number > 0"),
        (dict(step_size=-0.1), "step_size must be"),
        (dict(rtol=-1), "rtol must be a number ≥ 0"),
        (dict(atol="x"), "atol must be a number ≥ 0"),
        (dict(rtol=0, atol=0), "rtol and atol are both 0"),
        (dict(logdet_atol=0), "quadrature_atol must be a number > 0"),
        (dict(field="net"), "field must be a function"),
        (dict(base="normal"), "base must be a torch distribution"),
        (dict(base=Normal(0.0, 1.0)), "event_shape"),
        (dict(base=Normal(torch.zeros(2), 1.0)), "wrap it in torch.distributions.Independent"),
        (dict(base=Independent(Normal(torch.zeros(3), 1.0), 1)), "vectors of 2"),
        (dict(base=Independent(Normal(torch.zeros(4, 2), 1.0), 1)), r"batch_shape \(\)"),
    ],
)
def test_settings_that_make_no_flow_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Flow(**{"dim": 2, **settings})


def test_a_field_of_another_width_is_refused_when_used():
    with pytest.raises((InputError, RuntimeError)):
        Flow(2, field=Timed(3)).log_prob(torch.zeros(4, 2))
    with pytest.raises(InputError, match="the field returned dy/dt of shape"):
        Flow(2, field=lambda t, x: x[:, :1]).encode(torch.zeros(4, 2))


@pytest.mark.parametrize(
    "base",
    [
        student(),
        MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
        Independent(Normal(torch.zeros(2), torch.tensor([0.5, 2.0])), 1),
        Independent(StudentT(torch.full((2,), 5.0, dtype=F64)), 1),
    ],
    ids=str,
)
def test_any_base_over_vectors_serves(base):
    flow = whitened(small(base=base))
    x, log_prob = flow.sample(10, return_log_prob=True, seed=0)
    assert x.dtype == log_prob.dtype == torch.float32
    assert torch.allclose(log_prob, flow.log_prob(x), atol=5e-3)
    assert flow.config["own_base"] is not None
    double = flow.double()
    assert double.log_prob(x).dtype == F64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_beyond_a_bounded_base_the_log_density_is_minus_infinity(dtype):
    one = torch.ones(2, dtype=dtype)
    square = Independent(Uniform(-one, one), 1)
    flow = Flow(2, base=square, hidden=(4,), whiten=False)
    x = torch.tensor([[0.5, -0.5], [3.0, 0.0], [0.0, 0.0]], requires_grad=True)
    log_prob = flow.log_prob(x)
    assert log_prob[1] == -math.inf
    assert torch.allclose(
        log_prob[[0, 2]], torch.full_like(log_prob[:2], math.log(0.25)), atol=1e-5
    )
    (gradient,) = torch.autograd.grad(log_prob[[0, 2]].sum(), x)
    assert torch.isfinite(gradient).all()
    assert flow.log_prob(x[1:2]).item() == -math.inf


def test_a_bounded_base_draws_within_its_bounds():
    flow = Flow(2, base=Independent(Uniform(-torch.ones(2), torch.ones(2)), 1), hidden=(4,))
    x, log_prob = flow.sample(100, return_log_prob=True)
    assert x.abs().max() <= 1
    assert torch.allclose(log_prob, torch.full_like(log_prob, -2 * math.log(2)))


@pytest.mark.parametrize(
    "hidden, name", [((4,), "Bilinear"), ((4, 4), "Bilinear"), ((4,) * 3, "MLP")]
)
def test_the_default_field_has_a_closed_form_where_there_is_one(hidden, name):
    assert type(Flow(2, hidden=hidden).field).__name__.startswith(name)


def test_every_combination_of_method_gradient_and_divergence_goes_through():
    x = torch.randn(3, 2)
    methods = [dict(method="dopri5"), dict(method="tsit5"), dict(method="euler", step_size=0.2)]
    divergences = ["auto", "tangents", "hutchinson"]
    for method, gradient, name in itertools.product(methods, GRADIENTS, divergences):
        flow = small(**method, gradient=gradient, divergence=name, hidden=(4, 4))
        flow.log_prob(x).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in flow.parameters())


def test_fixed_steps_cost_what_they_should():
    _, info = small(step_size=0.1, method="rk4").log_prob(torch.zeros(4, 2), return_info=True)
    assert info.nfe == 40


def test_a_flow_of_another_default_dtype_is_of_that_dtype():
    torch.set_default_dtype(F64)
    try:
        flow = Flow(2, hidden=(4, 4))
        assert flow.dtype == F64 and flow.log_prob(torch.zeros(1, 2)).dtype == F64
        assert flow.sample(2).dtype == F64
    finally:
        torch.set_default_dtype(torch.float32)


# whiten -------------------------------------------------------------------------------------


def test_whiten_sets_the_map_and_returns_the_flow():
    flow = Flow(2, hidden=(4,))
    x = np.random.default_rng(0).normal(size=(300, 2)) * [1e3, 1e-3] + 5
    assert flow.whiten(x) is flow and flow.whitening.is_fitted
    z = flow.encode(x)
    assert z.mean(0).abs().max() < 1e-3 and torch.allclose(z.std(0), torch.ones(2), atol=0.05)
    flow.whiten(x + 1)  # once more, on other data
    assert torch.allclose(flow.whitening.mean, torch.as_tensor(x.mean(0) + 1).float(), rtol=1e-5)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.full((5, 2), math.nan), torch.ones(9, 2)])
def test_whiten_refuses_what_it_cannot_use(x):
    with pytest.raises(InputError):
        Flow(2, hidden=(4,)).whiten(x)


def test_whiten_keeps_the_precision_of_the_flow():
    x = 1e9 + torch.randn(100, 1, dtype=F64)  # all the same in float32
    flow = Flow(1, hidden=(4,)).double().whiten(x)
    assert flow.encode(x).std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("divergence", ["auto", "tangents", "hutchinson"])
def test_a_row_alone_is_worth_what_it_is_in_any_batch(divergence):
    flow = small(size=0.6, divergence=divergence).double()
    x = 2 * torch.randn(40, 2, dtype=F64)
    together, order = flow.log_prob(x), torch.randperm(40)
    assert torch.allclose(flow.log_prob(x[order]), together[order], rtol=0, atol=1e-9)
    assert torch.allclose(flow.log_prob(x, chunk=7), together, rtol=0, atol=1e-9)
    alone = torch.cat([flow.log_prob(row[None]) for row in x])
    assert torch.allclose(alone, together, rtol=0, atol=1e-9)
    assert torch.allclose(flow.encode(x[:3]), flow.encode(x)[:3], rtol=0, atol=1e-9)


def test_a_field_that_is_no_row_wise_one_keeps_the_steps_that_rows_share():
    def field(t, x):
        return torch.cos(t) * x  # for t of shape (batch,) this fails, or means something else

    flow, x = Flow(2, field=field, **TIGHT), torch.randn(6, 2)
    expected = torch.exp(-torch.sin(torch.tensor(1.0))) * x
    assert torch.allclose(flow.encode(x), expected, atol=1e-5)
