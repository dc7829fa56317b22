"""Exact divergences equal the trace of the Jacobian; Hutchinson's has it for a mean, and a variance
that is known.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from cnf.error import InputError
from cnf.flow.divergence import ClosedForm, Hutchinson, Tangents, choose_divergence, push
from cnf.nets.mlp import MLP, BilinearMLP

F64 = torch.float64
DIM, BATCH = 3, 4
NOW = torch.tensor(0.3, dtype=F64)


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module.double()


class Plain(nn.Module):
    """A module that offers nothing but its value."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim + 1, 8), nn.Linear(8, dim)

    def forward(self, t, x):
        t = t.expand(len(x)) if t.ndim == 0 else t
        return self.outer(torch.tanh(self.inner(torch.cat([x, t.unsqueeze(-1)], -1))))


class Known(Plain):
    """A field whose owner worked out the divergence of x ↦ x³ + t."""

    def forward(self, t, x):
        return x**3 + t

    def prepare(self):
        return (torch.tensor(3.0, dtype=F64),)

    def with_divergence(self, t, x, three):
        return self(t, x), (three * x**2).sum(-1)


def closure():
    net = shaken(Plain())
    return lambda t, x: net(t, x) * torch.cos(t) + x.flip(-1) * x


FIELDS = {
    "closed form, 1 layer": lambda: shaken(BilinearMLP(DIM, (6,))),
    "closed form, 2 layers": lambda: shaken(BilinearMLP(DIM, (6, 5))),
    "tangents, 3 layers": lambda: shaken(MLP(DIM, (6, 5, 4))),
    "a user's closed form": lambda: Known(),
    "a plain module": lambda: shaken(Plain()),
    "a closure": closure,
}
EXACT = {
    "ClosedForm": ClosedForm(),
    "Tangents": Tangents(),
    "one tangent at a time": Tangents(chunk=1),
    "two tangents at a time": Tangents(chunk=2),
}
PAIRS = [
    pytest.param(make, divergence, id=f"{name} of {field}")
    for field, make in FIELDS.items()
    for name, divergence in EXACT.items()
    if "angent" in name or "closed form" in field
]
EACH_FIELD = pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
EACH_LAW = pytest.mark.parametrize("law", ["rademacher", "gaussian"])


def jacobian(field, t, x):
    """∂f/∂x of every row, (batch, dim, dim), by reverse mode."""
    whole = torch.autograd.functional.jacobian(lambda x: field(t, x), x, create_graph=True)
    return torch.einsum("bibj->bij", whole)


def trace(field, t, x):
    return jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1)


def evaluate(divergence, field, x, t=NOW):
    attached = divergence.attach(field, x)
    return attached.field(t, x, *attached.rows, *attached.params)


@pytest.mark.parametrize("make, divergence", PAIRS)
def test_an_exact_divergence_is_the_trace_of_the_jacobian(make, divergence):
    field, x = make(), torch.randn(BATCH, DIM, dtype=F64)
    value, found = evaluate(divergence, field, x)
    assert torch.allclose(value, field(NOW, x), rtol=0, atol=1e-12)
    assert torch.allclose(found, trace(field, NOW, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make, divergence", PAIRS)
def test_an_exact_divergence_has_the_gradients_of_the_trace(make, divergence):
    field = make()
    x = torch.randn(BATCH, DIM, dtype=F64, requires_grad=True)
    wanted = [x, *(p for p in getattr(field, "parameters", list)())]
    value, found = evaluate(divergence, field, x)
    expected = (trace(field, NOW, x) ** 2).sum() + field(NOW, x).sin().sum()
    parts = [
        torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)
        for loss in ((found**2).sum() + value.sin().sum(), expected)
    ]
    for part, same in zip(*parts, strict=True):
        assert torch.allclose(part, same, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 17])
def test_exact_divergences_hold_in_any_dimension(dim):
    field, x = shaken(BilinearMLP(dim, (6, 5))), torch.randn(BATCH, dim, dtype=F64)
    expected = trace(field, NOW, x)
    for divergence in EXACT.values():
        assert torch.allclose(evaluate(divergence, field, x)[1], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("divergence", [*EXACT.values(), Hutchinson()], ids=str)
def test_rows_do_not_mix(divergence):
    field = shaken(BilinearMLP(DIM, (6, 5)))
    x = torch.randn(6, DIM, dtype=F64)
    together = evaluate(divergence, field, x)[1]
    apart = torch.cat([evaluate(divergence, field, row[None])[1] for row in x])
    assert torch.allclose(together, apart, rtol=0, atol=1e-12)
    assert torch.allclose(evaluate(divergence, field, x.flip(0))[1], together.flip(0), atol=1e-12)


@pytest.mark.parametrize("divergence", [*EXACT.values(), Hutchinson(2)], ids=str)
@pytest.mark.parametrize("make", [FIELDS["closed form, 2 layers"], lambda: Known()])
def test_a_batch_without_rows_has_none(divergence, make):
    value, found = evaluate(divergence, make(), torch.empty(0, DIM, dtype=F64))
    assert value.shape == (0, DIM) and found.shape == (0,)


def test_a_plain_module_takes_an_empty_batch_too():
    for divergence in (Tangents(), Hutchinson(2)):
        assert evaluate(divergence, shaken(Plain()), torch.empty(0, DIM, dtype=F64))[1].shape == (
            0,
        )


@EACH_FIELD
def test_pushed_tangents_are_jacobian_times_tangent(make):
    field, x = make(), torch.randn(BATCH, DIM, dtype=F64)
    tangents = torch.randn(5, BATCH, DIM, dtype=F64)
    value, pushed = push(field, NOW, x, tangents)
    expected = torch.einsum("bij,kbj->kbi", jacobian(field, NOW, x), tangents)
    assert torch.allclose(value, field(NOW, x), rtol=0, atol=1e-12)
    assert torch.allclose(pushed, expected, rtol=0, atol=1e-10)


def test_a_field_with_dropout_has_one_mask_for_value_and_tangents():
    field = shaken(Plain())
    dropout = nn.Dropout(0.5)
    x = torch.ones(BATCH, DIM, dtype=F64)
    value, pushed = push(lambda t, x: dropout(x), NOW, x, torch.ones(3, BATCH, DIM, dtype=F64))
    assert torch.equal(pushed, value.expand(3, -1, -1))  # f is linear in x: J·1 = f
    assert field(NOW, x).shape == x.shape


# Hutchinson ---------------------------------------------------------------------------------


def estimates(law, probes=1, count=40_000):
    """Estimates of one row's trace, (count,), its trace, and the Jacobian's symmetric part."""
    field, x = shaken(Plain()), torch.randn(1, DIM, dtype=F64)
    divergence = Hutchinson(probes, law, seed=None)
    found = evaluate(divergence, field, x.expand(count, -1))[1].detach()
    matrix = jacobian(field, NOW, x)[0].detach()
    return found, matrix.trace(), (matrix + matrix.T) / 2


@EACH_LAW
@pytest.mark.parametrize("probes", [1, 3])
def test_the_mean_of_the_estimates_is_the_trace(law, probes):
    found, expected, _ = estimates(law, probes)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - expected) < 4 * error
    assert error > 0


@EACH_LAW
@pytest.mark.parametrize("probes", [1, 3])
def test_the_variance_of_the_estimates_is_that_of_the_formula(law, probes):
    found, _, symmetric = estimates(law, probes)
    squares = symmetric.square().sum()
    if law == "rademacher":
        squares = squares - symmetric.diagonal().square().sum()
    expected = 2 * squares / probes
    deviations = (found - found.mean()).square()
    error = deviations.std() / len(found) ** 0.5
    assert abs(found.var() - expected) < 4 * error


@pytest.mark.parametrize("probes", [1, 2, 3])
@pytest.mark.parametrize("law", ["hadamard", "orthogonal"])
def test_the_variance_of_orthogonal_probes_is_that_of_the_formula(law, probes):
    found, trace, symmetric = estimates(law, probes)
    assert abs(found.mean() - trace) < 4 * found.std() / len(found) ** 0.5 + 1e-12
    squares = symmetric.square().sum()
    if law == "hadamard":
        one, most = 2 * (squares - symmetric.diagonal().square().sum()), 4
    else:
        one, most = 2 * DIM / (DIM + 2) * (squares - trace**2 / DIM), DIM
    expected = one / probes * (most - probes) / (most - 1)
    deviations = (found - found.mean()).square()
    error = deviations.std() / len(found) ** 0.5
    assert abs(found.var() - expected) < 4 * error + 1e-20


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("law", ["hadamard", "orthogonal"])
def test_as_many_orthogonal_probes_as_there_are_give_the_trace(law, dim, seed):
    field, x = shaken(Plain(dim)), torch.randn(BATCH, dim, dtype=F64)
    most = dim if law == "orthogonal" else 1 << (dim - 1).bit_length()
    divergence = Hutchinson(most, law, seed)
    noise = divergence.draw(x)
    assert torch.allclose(noise.mT @ noise / most, torch.eye(dim, dtype=F64), atol=1e-12)
    found = evaluate(divergence, field, x)[1]
    assert torch.allclose(found, trace(field, NOW, x), rtol=0, atol=1e-10)
    with pytest.raises(InputError, match=f"probes={most + 1} is too many, since .* {most}"):
        Hutchinson(most + 1, law).attach(field, x)


@pytest.mark.parametrize("law", ["hadamard", "orthogonal"])
def test_fewer_orthogonal_probes_are_orthogonal_and_of_unit_variance(law):
    noise = Hutchinson(3, law, seed=None).draw(torch.zeros(5, 8, dtype=F64))
    expected = 8 * torch.eye(3, dtype=F64).expand(5, 3, 3)
    assert torch.allclose(noise @ noise.mT, expected, atol=1e-12)
    assert len(torch.unique(noise.flatten(1), dim=0)) == 5


def test_the_norm_beside_the_trace_is_that_of_the_jacobian():
    field, x = shaken(Plain()), torch.randn(BATCH, DIM, dtype=F64)
    expected = jacobian(field, NOW, x).square().sum((1, 2))
    exact = (Tangents(), Tangents(chunk=2), Hutchinson(4, "hadamard"), Hutchinson(3, "orthogonal"))
    for divergence in exact:
        attached = divergence.attach_with_norm(field, x)
        value, (found, norm) = attached.field(NOW, x, *attached.rows)
        assert torch.allclose(value, field(NOW, x)) and torch.allclose(norm, expected)
        assert torch.allclose(found, trace(field, NOW, x))


# memory -------------------------------------------------------------------------------------


class Widths(Plain):
    """It notes how many rows of tangents it is given at once."""

    def __init__(self, dim):
        super().__init__(dim)
        self.seen = []

    def tangent(self, t, x, tangents):
        self.seen.append(tangents.shape[0] * tangents.shape[1])
        slope = 1 - torch.tanh(x) ** 2
        return torch.tanh(x), tangents * slope


def test_no_more_tangents_than_the_chunk_are_carried_at_once():
    field, x = Widths(10), torch.randn(BATCH, 10, dtype=F64)
    evaluate(Tangents(chunk=4), field, x)
    assert field.seen == [16, 16, 8]


def test_by_default_a_large_batch_is_carried_in_parts(monkeypatch):
    monkeypatch.setattr("cnf.flow.divergence.TANGENTS", 30)
    field, x = Widths(10), torch.randn(BATCH, 10, dtype=F64)
    _, found = evaluate(Tangents(), field, x)
    assert field.seen == [28, 12]
    assert torch.allclose(found, (1 - torch.tanh(x) ** 2).sum(-1))


def test_in_backward_chunks_are_evaluated_again_and_not_kept():
    field = Widths(10)
    x = torch.randn(BATCH, 10, dtype=F64, requires_grad=True)
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, found = evaluate(Tangents(chunk=2), field, x)
    assert kept < 10 * BATCH * 10  # the tangents alone are this many, and more than one is kept
    assert len(field.seen) == 5
    found.sum().backward()
    assert len(field.seen) == 10
    assert torch.allclose(x.grad, -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2))


def test_a_chunk_is_a_number_of_tangents():
    with pytest.raises(InputError, match="chunk must be a whole number, at least 1, got 0"):
        Tangents(chunk=0)


def test_rademacher_is_exact_for_a_diagonal_jacobian():
    x = torch.randn(BATCH, DIM, dtype=F64)
    found = evaluate(Hutchinson(), lambda t, x: x**3, x)[1]
    assert torch.allclose(found, (3 * x**2).sum(-1))


@EACH_LAW
def test_a_seed_draws_one_noise_for_all_rows_and_solves(law):
    divergence = Hutchinson(2, law, seed=3)
    x = torch.randn(BATCH, DIM, dtype=F64)
    state = torch.get_rng_state()
    noise = divergence.draw(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.shape == (BATCH, 2, DIM) and noise.dtype == F64
    assert torch.equal(noise, noise[:1].expand_as(noise))
    assert torch.equal(divergence.draw(x[:2] + 1), noise[:2])
    torch.manual_seed(99)
    assert torch.equal(divergence.draw(x), noise)
    assert not torch.equal(Hutchinson(2, law, seed=4).draw(x), noise)


@EACH_LAW
def test_without_a_seed_every_row_and_solve_has_its_own_noise(law):
    divergence = Hutchinson(1, law, seed=None)
    x = torch.randn(50, 20, dtype=F64)
    noise, again = divergence.draw(x), divergence.draw(x)
    assert len(torch.unique(noise[:, 0], dim=0)) == 50
    assert not torch.equal(noise, again)
    torch.manual_seed(5)
    one = divergence.draw(x)
    torch.manual_seed(5)
    assert torch.equal(divergence.draw(x), one)


def test_the_noise_is_drawn_once_for_a_solve():
    field, x = shaken(Plain()), torch.randn(BATCH, DIM, dtype=F64)
    attached = Hutchinson(seed=None).attach(field, x)
    one = attached.field(NOW, x, *attached.rows)[1]
    assert torch.equal(attached.field(NOW, x, *attached.rows)[1], one)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_noise_takes_the_states_dtype(dtype):
    x = torch.zeros(2, DIM, dtype=dtype)
    assert Hutchinson().draw(x).dtype == dtype
    assert set(Hutchinson(8).draw(x).unique().tolist()) == {-1.0, 1.0}


# choosing -----------------------------------------------------------------------------------


@EACH_FIELD
def test_auto_is_the_closed_form_where_the_field_has_one(make):
    field = make()
    chosen = choose_divergence("auto", field)
    assert chosen == (ClosedForm() if hasattr(field, "with_divergence") else Tangents())


@pytest.mark.parametrize(
    "name, kind", [("closed_form", ClosedForm), ("tangents", Tangents), ("hutchinson", Hutchinson)]
)
def test_names_stand_for_divergences(name, kind):
    assert choose_divergence(name, closure()) == kind()


def test_a_divergence_of_ones_own_is_taken_as_it_is():
    class Mine:
        def attach(self, field, x): ...

    mine = Mine()
    assert choose_divergence(mine, closure()) is mine


@pytest.mark.parametrize("make", [FIELDS["a plain module"], closure, lambda: MLP(3, (4, 4, 4))])
def test_a_closed_form_that_is_not_there_is_refused(make):
    field = make()
    with pytest.raises(
        InputError, match="offers no closed form of its divergence: give it prepare"
    ):
        ClosedForm().attach(field, torch.zeros(1, DIM, dtype=F64))


def test_the_refusal_names_the_field():
    with pytest.raises(InputError, match="the field Plain offers"):
        ClosedForm().attach(Plain(), torch.zeros(1, DIM))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(probes=0), "probes must be a whole number, at least 1, got 0"),
        (dict(probes=-2), "probes must be"),
        (dict(probes=1.5), "probes must be"),
        (dict(probes="2"), "probes must be"),
        (
            dict(law="cauchy"),
            "law must be one of rademacher, gaussian, hadamard, orthogonal, got 'cauchy'",
        ),
        (dict(seed=0.5), "seed must be"),
        (dict(seed="now"), "seed must be"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Hutchinson(**settings)


@pytest.mark.parametrize("wrong", ["exact", "", 3, None, Hutchinson, object()])
def test_what_is_no_divergence_is_refused(wrong):
    with pytest.raises(InputError, match="divergence"):
        choose_divergence(wrong, Plain())


def test_settings_are_values():
    assert Hutchinson(2) == Hutchinson(probes=2) != Hutchinson(3)
    assert hash(Tangents()) == hash(Tangents())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hutchinson().probes = 5


@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_the_closed_form_pulls_cotangents_as_autograd_does(hidden):
    torch.manual_seed(1)
    field = BilinearMLP(3, hidden, activation="softplus").double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
    x, value_bar, trace_bar = (torch.randn(*shape, dtype=F64) for shape in ((4, 3), (4, 3), (4,)))
    t, x = torch.tensor(0.3, dtype=F64), x.requires_grad_()
    mixing = tuple(m.detach().requires_grad_() for m in field.prepare())
    found = field.pull_divergence(t, x, *mixing, value_bar, trace_bar)
    if len(hidden) == 1:
        assert found is None
        return
    x_bar, mixing_bars, bars = found
    parameters = list(field.parameters())
    expected = torch.autograd.grad(
        field.with_divergence(t, x, *mixing), (x, *mixing, *parameters), (value_bar, trace_bar)
    )
    ours = (x_bar, *mixing_bars, *(bars[parameter] for parameter in parameters))
    for part, same in zip(ours, expected, strict=True):
        assert torch.allclose(part, same, rtol=1e-10, atol=1e-12)
