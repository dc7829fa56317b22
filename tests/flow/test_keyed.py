"""Noise of a row's own depends on the row and the seed, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from cnf.flow.keyed import KeyedHutchinson, keys_of, signs, uniform

ROWS = torch.randint(0, 256, (5, 12), dtype=torch.uint8)


def test_a_rows_noise_stays_with_it_wherever_it_is():
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(uniform(keys_of(ROWS[order]), 12, 7), uniform(keys_of(ROWS), 12, 7)[order])
    assert torch.equal(signs(keys_of(ROWS[order]), 3, 12, 7), signs(keys_of(ROWS), 3, 12, 7)[order])


def test_rows_and_seeds_that_differ_have_noise_that_differs():
    keys = keys_of(ROWS)
    noise = torch.cat([uniform(keys, 12, 0), uniform(keys, 12, 1)])
    assert len(noise.unique(dim=0)) == 10


def test_uniform_noise_fills_the_open_unit_interval():
    noise = uniform(range(2000), 10, 0)
    assert 0 < noise.min() < 1e-3 and 1 - 1e-3 < noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.002


def test_probes_are_signs_without_a_mean():
    probes = signs(range(500), 4, 10, 0)
    assert probes.shape == (500, 4, 10) and set(probes.unique().tolist()) == {-1.0, 1.0}
    assert abs(probes.mean()) < 0.03


def test_its_estimate_of_a_trace_is_unbiased_and_goes_with_the_rows():
    matrix = torch.randn(12, 12)
    x = torch.zeros(4000, 12)
    divergence = KeyedHutchinson(2, keys=tuple(range(4000)))

    def trace(divergence, x):
        attached = divergence.attach(lambda t, x: x @ matrix.T, x)
        return attached.field(torch.tensor(0.0), x, *attached.rows)[1]

    estimates = trace(divergence, x)
    assert abs(estimates.mean() - matrix.trace()) < 4 * estimates.std() / 4000**0.5
    rows = torch.tensor([7, 3])
    assert torch.allclose(trace(divergence.of_rows(rows), x[rows]), estimates[rows])


def test_no_rows_have_no_noise():
    none = keys_of(ROWS[:0])
    assert uniform(none, 12, 0).shape == (0, 12) and signs(none, 2, 12, 0).shape == (0, 2, 12)


@pytest.mark.parametrize("law", ["gaussian", "hadamard", "orthogonal"])
def test_every_law_gives_a_row_its_own_noise(law):
    keys = keys_of(ROWS)
    order = [3, 0, 4, 1, 2]
    x = torch.zeros(5, 12)
    noise = KeyedHutchinson(4, law, 7, keys).draw(x)
    again = KeyedHutchinson(4, law, 7, tuple(keys[i] for i in order)).draw(x)
    assert noise.shape == (5, 4, 12) and len(noise.unique(dim=0)) == 5
    assert torch.equal(again, noise[order])
    assert not torch.equal(KeyedHutchinson(4, law, 8, keys).draw(x), noise)
    assert KeyedHutchinson(4, law, 7, ()).draw(x[:0]).shape == (0, 4, 12)


def test_as_many_orthogonal_probes_as_dimensions_are_exact():
    matrix, x = torch.randn(12, 12), torch.zeros(5, 12)
    divergence = KeyedHutchinson(12, "orthogonal", 0, keys_of(ROWS))
    attached = divergence.attach(lambda t, x: x @ matrix.T, x)
    _, trace = attached.field(torch.tensor(0.0), x, *attached.rows)
    assert torch.allclose(trace, matrix.trace().expand(5), atol=1e-4)
