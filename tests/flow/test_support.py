"""Bounded data: the map of a support inverts, knows its determinant and keeps to its ends."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Beta, Exponential

from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.flow.transform import Standardize, Support

F64 = torch.float64
INF = math.inf
TIGHT = dict(rtol=1e-8, atol=1e-8, logdet_atol=1e-7)
ENDS = {
    "everything": ((-INF, -INF, -INF), (INF, INF, INF)),
    "a box": ((0.0, -1.0, 5.0), (1.0, 3.0, 5.5)),
    "positive": (0.0, INF),
    "negative": (-INF, 0.0),
    "some of each": ((-2.0, 1.0, -INF), (3.0, INF, -1.0)),
    "None for no end": ((0.0, None, None), (None, 1.0, None)),
}
EACH_SUPPORT = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)


def points(support: Support, n: int = 30) -> torch.Tensor:
    return support.invert(2 * torch.randn(n, 3, dtype=F64))


@EACH_SUPPORT
def test_the_map_inverts(ends):
    support = Support(3, *ends)
    y = 3 * torch.randn(50, 3, dtype=F64)
    x = support.invert(y)
    assert support.contains(x).all()
    assert torch.allclose(support(x)[0], y, atol=1e-8)


@EACH_SUPPORT
def test_the_determinant_is_that_of_the_jacobian(ends):
    support = Support(3, *ends)
    x = points(support, 4)
    whole = torch.autograd.functional.jacobian(lambda x: support(x)[0], x)
    known = torch.linalg.slogdet(torch.einsum("bibj->bij", whole))[1]
    assert torch.allclose(support(x)[1], known, atol=1e-9)


@EACH_SUPPORT
def test_gradients_are_finite_both_ways(ends):
    support = Support(3, *ends)
    x = points(support).requires_grad_()
    y, logdet = support(x)
    (found,) = torch.autograd.grad(y.sum() + logdet.sum(), x)
    assert torch.isfinite(found).all()
    y = (40 * torch.randn(30, 3, dtype=F64)).requires_grad_()
    (found,) = torch.autograd.grad(support.invert(y).sum(), y)
    assert torch.isfinite(found).all()


@EACH_SUPPORT
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_rounding_reaches_the_ends(ends, dtype):
    support = Support(3, *ends)
    y = torch.tensor([[-200.0] * 3, [-30.0] * 3, [30.0] * 3, [60.0] * 3], dtype=dtype)
    x = support.invert(y)
    assert x.dtype == dtype and support.contains(x).all()


def test_rows_outside_have_no_density_and_no_nan():
    support = Support(2, 0.0, (1.0, INF))
    x = torch.tensor([[0.5, 1.0], [0.0, 1.0], [1.0, 1.0], [0.5, -1.0], [2.0, 2.0]])
    y, logdet = support(x.requires_grad_())
    assert torch.isfinite(y).all() and torch.isfinite(logdet[0]) and (logdet[1:] == -INF).all()
    assert torch.isfinite(torch.autograd.grad(y.sum() + logdet[0], x)[0]).all()


@pytest.mark.parametrize(
    "support, said",
    [
        ((1.0, 0.0), "low < high in every column, got 1 and 0 in column 0"),
        ((0.0, (1.0, 0.0)), "in column 1"),
        ((INF, INF), "low < high"),
        (((0.0, 0.0, 0.0), 1.0), "each a number or one for each of 2 columns"),
        ((math.nan, 1.0), "each a number"),
        ("negative", "'positive', \\(low, high\\) or None"),
        (3.0, "'positive', \\(low, high\\) or None"),
        (("a", "b"), "each a number"),
    ],
)
def test_a_support_that_is_none_is_refused(support, said):
    with pytest.raises(InputError, match=said):
        Flow(2, support=support)


# a flow over bounded data -------------------------------------------------------------------


def shaken(flow: Flow, size: float = 0.2) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return flow


def test_the_density_on_a_box_integrates_to_one():
    flow = shaken(Flow(1, hidden=(8, 8), support=(2.0, 5.0), **TIGHT)).double()
    edges = torch.linspace(2, 5, 4001, dtype=F64)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = flow.log_prob(middle[:, None]).exp().sum() * (edges[1] - edges[0])
    assert mass.item() == pytest.approx(1, abs=1e-4)
    assert (flow.log_prob(torch.tensor([[1.9], [5.1], [2.0], [5.0]])) == -INF).all()


def test_samples_keep_to_the_support_and_have_their_density():
    flow = shaken(Flow(2, hidden=(8, 8), support=((0.0, -INF), (1.0, 4.0)), **TIGHT)).double()
    x, log_prob = flow.sample(500, return_log_prob=True, seed=0)
    assert (x[:, 0] > 0).all() and (x[:, 0] < 1).all() and (x[:, 1] < 4).all()
    assert torch.allclose(flow.log_prob(x), log_prob, atol=1e-3)
    assert torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-4)


@pytest.mark.parametrize(
    "law, support",
    [(Exponential(torch.tensor([0.5])), "positive"), (Beta(*torch.tensor([[2.0], [5.0]])), (0, 1))],
    ids=["exponential", "beta"],
)
def test_bounded_laws_are_learned(law, support):
    torch.manual_seed(0)
    x = law.sample((4000,))
    flow = Flow(1, hidden=(16, 16), support=support, seed=0)
    flow.fit(x, steps=250, batch_size=512, progress=False, seed=0)
    test = law.sample((2000,))
    gap = law.log_prob(test).squeeze(-1) - flow.log_prob(test)
    assert abs(gap.mean().item()) < 0.03
    assert (flow.sample(1000, seed=0) > 0).all()


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_data_outside_the_support_are_refused_with_their_place(value):
    x = torch.rand(40, 2) + 0.1
    x[7, 1] = value
    flow = Flow(2, hidden=(4, 4), support="positive")
    said = rf"x has {value:g} in row 7, column 1, which is not inside the support \(0, inf\)"
    for use in (flow.fit, flow.whiten, flow.encode):
        with pytest.raises(InputError, match=said):
            use(x)


@pytest.mark.parametrize(
    "support", ["positive", (0, 1), ((None, 2.0), (3.0, np.inf)), None], ids=str
)
def test_a_support_comes_back_from_the_disk(support, tmp_path):
    flow = shaken(Flow(2, hidden=(4, 4), support=support))
    flow.save(tmp_path / "flow")
    loaded = Flow.load(tmp_path / "flow")
    json.dumps(flow.config, allow_nan=False)
    x = flow.sample(5, seed=0)
    assert loaded.config == flow.config and loaded.support.low == flow.support.low
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))


def test_ends_are_exact_whatever_the_precision_of_the_flow():
    flow = Flow(1, hidden=(4,), support=(0.1, None)).double()
    just_above = torch.tensor([[0.1], [np.nextafter(0.1, 1)]], dtype=F64)
    assert flow.support.low == (0.1,)
    assert torch.isfinite(flow.log_prob(just_above)).tolist() == [False, True]


def test_standardize_is_the_mean_and_the_spread():
    map_ = Standardize(2)
    c = torch.randn(300, 2) * torch.tensor([3.0, 0.01]) + 7
    assert torch.equal(map_(c), c)
    map_.fit(c)
    assert map_(c).mean(0).abs().max() < 1e-3
    assert torch.allclose(map_(c).std(0, correction=0), torch.ones(2), atol=1e-3)


def test_a_row_outside_is_named_wherever_it_is_among_many(monkeypatch):
    monkeypatch.setattr("cnf.flow.flow.CHUNK", 10)
    x = torch.full((25, 2), 0.5)
    x[17, 1] = 2.0
    with pytest.raises(InputError, match="x has 2 in row 17, column 1"):
        Flow(2, hidden=(4, 4), support=(0, 1)).encode(x)


@pytest.mark.parametrize("support", ["positive", (-math.inf, 3.0), ([0, -math.inf], [1, math.inf])])
def test_torch_maps_the_whole_space_onto_it(support):
    law = Flow(2, hidden=(4, 4), support=support).dist()
    bijection = torch.distributions.biject_to(law.support)
    x = bijection(torch.randn(50, 2))
    assert torch.isfinite(x).all() and law.support.check(x).all()
    assert torch.isfinite(law.log_prob(x)).all()
    assert not law.support.check(torch.tensor([4.0, 4.0])) or support == "positive"
