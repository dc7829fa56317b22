"""A state comes apart into leaves and back; combinations never change what they read."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.error import InputError
from cnf.ode.state import (
    Structure,
    bad_rows,
    combine,
    is_finite,
    largest,
    precise_dtype,
    rms,
    weighted_sum,
)

one, two, three = (torch.full((2,), float(i)) for i in (1, 2, 3))

STATES = {
    "tensor": one,
    "tuple": (one, two),
    "list": [one, two],
    "dict": {"x": one, "v": two},
    "nested": {"x": (one, {"deep": two}), "v": three},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_is_rebuilt_from_its_leaves(state):
    structure = Structure(state)
    leaves = structure.leaves(state)
    rebuilt = structure.build(leaves)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert [id(leaf) for leaf in structure.leaves(rebuilt)] == [id(leaf) for leaf in leaves]
    if isinstance(state, dict):
        assert rebuilt.keys() == state.keys()


def test_a_dict_in_another_order_is_the_same_state():
    leaves = Structure({"x": one, "v": two}).leaves({"v": two, "x": one})
    assert leaves[0] is one and leaves[1] is two


@pytest.mark.parametrize("example", [(), {}, 1.0, None, [1.0], {"x": "y"}, (one, None)])
def test_what_holds_no_tensor_is_refused(example):
    with pytest.raises(InputError, match="must be a tensor"):
        Structure(example)


@pytest.mark.parametrize(
    ("example", "state", "says"),
    [
        (one, (one,), "hold a tensor"),
        (one, 1.0, "hold a tensor"),
        ((one, two), (one,), "tuple of 2 parts"),
        ((one, two), one, "tensor of shape"),
        ((one, two), {"x": one, "v": two}, "the keys"),
        ({"x": one}, {"y": one}, "keys \\['x'\\]"),
        ({"x": one}, None, "NoneType"),
    ],
)
def test_a_state_built_otherwise_is_refused(example, state, says):
    with pytest.raises(InputError, match=says):
        Structure(example).leaves(state, "dy/dt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_a_combination_is_y_plus_h_times_the_weighted_slopes(dtype):
    y, *ks = torch.randn(4, 3, 2, dtype=dtype)
    copies = [x.clone() for x in (y, *ks)]
    got = combine(y, ks, [(0, 0.5), (2, -2.0)], 0.1)
    assert torch.allclose(got, y + 0.1 * (0.5 * ks[0] - 2.0 * ks[2]))
    assert torch.allclose(weighted_sum(ks, [(0, 0.5), (2, -2.0)], 0.1), got - y)
    assert all(torch.equal(x, copy) for x, copy in zip((y, *ks), copies, strict=True))


def test_a_combination_of_one_slope_with_itself_leaves_it_as_it_was():
    y = torch.ones(1).expand(3)  # stride 0: written to in place, all entries would change
    combine(y, [y, y, y], [(0, 1.0), (1, 1.0), (2, 1.0)], 1.0)
    weighted_sum([y, y, y], [(0, 1.0), (1, 1.0), (2, 1.0)], 1.0)
    assert y.tolist() == [1.0, 1.0, 1.0]


def test_a_combination_without_weights_is_y_or_zero():
    assert combine(one, [two], [], 1.0) is one
    assert weighted_sum([two], [], 1.0).tolist() == [0.0, 0.0]


def test_a_combination_carries_gradients():
    y, *ks = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda *x: combine(x[0], x[1:], [(0, 0.3), (1, -0.7)], 0.1), (y, *ks)
    )
    assert torch.autograd.gradcheck(
        lambda *x: weighted_sum(x, [(0, 0.3), (1, -0.7)], 0.1), tuple(ks)
    )


def test_the_root_mean_square_counts_entries_and_not_rows():
    assert rms(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item() == pytest.approx(2.5)
    assert rms(torch.tensor([3 + 4j])).item() == pytest.approx(5.0)
    assert rms(torch.tensor(-2.0)).item() == 2.0
    assert rms(torch.empty(0, 3)).item() == 0.0


def test_the_largest_of_some_is_nan_where_one_is():
    values = [torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(2.0, dtype=torch.float64)]
    assert math.isnan(largest(values).item())
    assert largest(values[::2]).item() == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, complex(0, math.nan)])
def test_one_bad_entry_makes_the_leaves_non_finite(bad):
    leaf = torch.tensor([1.0, bad])
    assert not is_finite((one, leaf)) and is_finite((one, two)) and is_finite(())
    assert is_finite((torch.empty(0, 2),))


def test_the_rows_that_went_bad_are_named():
    leaf = torch.zeros(9, 2, 2)
    leaf[[1, 8], 0, 1] = math.nan
    assert bad_rows((leaf, torch.zeros(9))) == [1, 8]
    assert bad_rows((torch.full((9,), math.inf),), most=2) == [0, 1]
    assert bad_rows((torch.tensor(math.nan),)) == []  # no batch
    assert bad_rows((leaf, torch.zeros(4))) == []  # no common batch


def test_integrals_are_kept_in_double_precision():
    assert precise_dtype(torch.ones(1)) == torch.float64
    assert precise_dtype(torch.ones(1, dtype=torch.complex64)) == torch.complex128
