"""Matched noise is a permutation, the cheapest one, and knows nothing of the context."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from cnf.error import InputError
from cnf.flow.coupling import OptimalTransport, choose_coupling
from cnf.flow.flow import Flow
from cnf.flow.objective import FlowMatching


def cost(start, end):
    return (start - end).square().sum().item()


def test_the_pairs_are_the_cheapest_of_all():
    start, end = torch.randn(6, 2), 3 * torch.randn(6, 2) + 1
    found = OptimalTransport().match(start, end)
    best = min(cost(start[list(order)], end) for order in permutations(range(6)))
    assert cost(start[found], end) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 30])
def test_every_noise_is_used_once(batch):
    found = OptimalTransport(group=8).match(torch.randn(batch, 3), torch.randn(batch, 3))
    assert found.sort().values.tolist() == list(range(batch))


def test_groups_are_matched_by_themselves():
    start, end = torch.randn(20, 2), torch.randn(20, 2)
    found = OptimalTransport(group=10).match(start, end)
    assert found[:10].max() < 10 and found[10:].min() >= 10
    assert torch.equal(found[:10], OptimalTransport().match(start[:10], end[:10]))


def test_in_one_dimension_the_order_is_kept():
    start, end = torch.randn(50, 1), torch.rand(50, 1)
    matched = start[OptimalTransport().match(start, end)]
    assert torch.equal(matched[:, 0].argsort(), end[:, 0].argsort())


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 2)])
def test_rows_are_matched_within_their_context(shape):
    start, end = torch.randn(40, 2), torch.randn(40, 2)
    context = torch.randint(0, 2, shape)
    found = OptimalTransport().match(start, end, context)
    assert torch.equal(context[found], context)
    alike = (context.reshape(40, -1) == context.reshape(40, -1)[0]).all(1).nonzero()[:, 0]
    alone = OptimalTransport().match(start[alike], end[alike])
    assert torch.equal(found[alike], alike[alone])


def test_contexts_that_all_differ_leave_pairs_as_they_are():
    found = OptimalTransport().match(torch.randn(9, 2), torch.randn(9, 2), torch.randn(9, 4))
    assert found.tolist() == list(range(9))


def test_flow_matching_aims_along_the_matched_paths(monkeypatch):
    flow = Flow(2, hidden=(4,))  # a zero field: the loss is the target's mean square
    x, start = 2 * torch.randn(50, 2), torch.randn(50, 2)
    monkeypatch.setattr(torch, "randn_like", lambda end: start)
    loss = FlowMatching(flow, coupling="ot")(x)
    matched = start[OptimalTransport().match(start, x)]
    assert torch.allclose(loss, (x - matched).square().sum(-1).mean())
    assert loss < 0.7 * FlowMatching(flow, neighbours=1)(x)


def test_matched_paths_carry_the_same_marginals():
    """N(0, 1) arrives as N(3, 2²) whichever noise meets which row."""
    flow = Flow(1, hidden=(16, 16), bandwidth=None, whiten=False, seed=0)
    objective = FlowMatching(flow, coupling=OptimalTransport(group=64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        objective(3 + 2 * torch.randn(256, 1)).backward()
        optimizer.step()
    x = flow.sample(4000, seed=0)
    assert x.mean() == pytest.approx(3, abs=0.2) and x.std() == pytest.approx(2, abs=0.2)


def test_a_coupling_of_ones_own_is_taken():
    class Backwards:
        def match(self, start, end, context=None):
            return torch.arange(len(end)).flip(0)

    mine = Backwards()
    assert choose_coupling(mine) is mine
    assert FlowMatching(Flow(2, hidden=(4,)), coupling=mine)(torch.randn(5, 2)).ndim == 0


@pytest.mark.parametrize("wrong", ["", "OT", 3, None, OptimalTransport])
def test_what_is_no_coupling_is_refused(wrong):
    with pytest.raises(InputError, match="coupling"):
        choose_coupling(wrong)


def test_a_group_has_rows():
    with pytest.raises(InputError, match="group must be a whole number, at least 1, got 0"):
        OptimalTransport(group=0)
