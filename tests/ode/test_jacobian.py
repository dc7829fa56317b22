"""A Jacobian is that of the field, of every row or of all, however the state is made."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import jacobian as by_torch

from cnf.error import InputError
from cnf.ode.field import Field
from cnf.ode.jacobian import Layout, jacobian
from cnf.ode.state import Structure

F64 = torch.float64
X = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
STATES = {
    "a tensor": X,
    "one number": torch.tensor(0.7, dtype=F64),
    "no row": X[:0],
    "complex numbers": torch.complex(X, X.flip(0)),
    "a tuple": (X, X[:, 0]),
    "a dict of two precisions": {"x": X, "v": (X[0].float(),)},
}


def curved(y):
    """Every entry of every leaf turns on every other."""
    leaves = Structure(y).leaves(y)
    total = sum((leaf.abs() ** 2).sum() for leaf in leaves)
    return Structure(y).build([torch.sin(leaf) * total.to(leaf.real.dtype) for leaf in leaves])


def field_of(call, y, row_wise=False):
    leaf = Structure(y).leaves(y)[0]
    return Field(call, Structure(y), None, leaf.real.dtype, leaf.device, row_wise=row_wise)


@pytest.mark.parametrize("y", STATES.values(), ids=STATES)
def test_it_is_the_derivative_of_all_by_all(y):
    state, layout = Structure(y), Layout(Structure(y).leaves(y), 1)
    with torch.no_grad():
        found = field_of(lambda t, y: curved(y), y).jacobian(0.0, state.leaves(y))
    assert found.shape == (1, layout.size, layout.size) and not found.requires_grad
    if not layout.size:
        return

    def flat(vector):
        return layout.vector(state.leaves(curved(state.build(layout.leaves(vector)))))[0]

    wanted = by_torch(lambda v: flat(v[None]), layout.vector(state.leaves(y))[0])
    assert torch.allclose(found[0], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("y", STATES.values(), ids=STATES)
def test_a_vector_and_its_leaves_are_the_same_numbers(y):
    leaves = Structure(y).leaves(y)
    again = Layout(leaves, 1).leaves(Layout(leaves, 1).vector(leaves))
    for one, other in zip(leaves, again, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_rows_that_do_not_depend_on_each_other_have_a_block_each():
    def alone(t, y):
        x, v = y
        return torch.sin(x) * v[:, None] + t, (x**2).sum(1) * v

    y = (X, X[:, 0].cos())
    whole = field_of(alone, y).jacobian(0.3, y)[0]
    blocks = field_of(alone, y, row_wise=True).jacobian(0.3, y)
    assert blocks.shape == (3, 3, 3)
    for row in range(3):
        places = [2 * row, 2 * row + 1, 6 + row]  # of its x and v among the entries of all
        assert torch.allclose(blocks[row], whole[places][:, places])


class Unmapped(torch.autograd.Function):
    """The sine, with a backward that cannot be mapped over cotangents."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, bar):
        assert float(bar.abs().sum()) >= 0.0  # reads a number
        return bar * ctx.saved_tensors[0].cos()


class BySign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, bar):
        return torch.from_numpy(bar.numpy() * 2)


def energy_slope(y):
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        return torch.autograd.grad((y**4).sum(), y, create_graph=True)[0]


FIELDS = {
    "a backward that reads a number": (Unmapped.apply, torch.cos),
    "a backward by NumPy": (BySign.apply, lambda x: torch.full_like(x, 2.0)),
    "the gradient of an energy": (energy_slope, lambda x: 12 * x**2),
    "a field of time alone": (lambda x: torch.ones_like(x), torch.zeros_like),
    "a branch on the state": (lambda x: x**2 if x.sum() > -1e9 else x, lambda x: 2 * x),
}


@pytest.mark.parametrize(("slope", "diagonal"), FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_backward_can_follow_it_can(slope, diagonal, quiet):
    x, calls = torch.tensor([0.3, -1.2], dtype=F64), []

    def counted(leaves):
        calls.append(leaves)
        return (slope(leaves[0]),)

    with quiet():
        found = jacobian(counted, (x,), 1)
    assert torch.allclose(found[0], torch.diag(diagonal(x))) and len(calls) == 1


def test_it_has_a_graph_where_the_state_has_one():
    x = torch.tensor([0.3, -1.2], dtype=F64, requires_grad=True)
    found = jacobian(lambda leaves: (leaves[0] ** 3,), (x,), 1)
    (second,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(second, 6 * x)


def test_a_complex_number_is_a_pair_of_real_ones():
    y = torch.tensor([1.0 + 2.0j], dtype=torch.complex128)
    found = jacobian(lambda leaves: (leaves[0].conj() * 2 + 1j * leaves[0],), (y,), 1)
    assert found[0].tolist() == [[2.0, -1.0], [1.0, -2.0]]


def test_half_precision_is_linearized_in_single():
    x = torch.ones(2, dtype=torch.bfloat16)
    assert jacobian(lambda leaves: (leaves[0] * 2,), (x,), 1).dtype == torch.float32


def test_one_that_is_too_large_is_refused_before_it_is_made():
    with pytest.raises(InputError, match=r"6000² numbers, .* field\.row_wise = True"):
        jacobian(lambda leaves: leaves, (torch.ones(3000, 2),), 1)
    with pytest.raises(InputError, match="1000 times 300² numbers"):
        jacobian(lambda leaves: leaves, (torch.ones(1000, 300),), 1000)
