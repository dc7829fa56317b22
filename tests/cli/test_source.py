"""Where rows come from: splits that depend on the seed alone and share no row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cnf.cli import source
from cnf.cli.source import read_source
from cnf.error import InputError


def saved(path: Path, rows: int, columns: int = 2) -> str:
    np.save(path, np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32))
    return str(path)


def parts(found: source.Source) -> list[np.ndarray]:
    return [np.asarray(part) for part in (found.train, found.validation, found.held_out[0])]


@pytest.mark.parametrize("name", source.TOY_NAMES)
def test_toy_points_are_fresh_in_every_part(name: str) -> None:
    found = read_source(name, seed=0, rows=50)
    everything = np.concatenate(parts(found))
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert found.law is not None and len(found.train) == 50


def test_the_seed_decides() -> None:
    first, same, other = (read_source("moons", seed=seed, rows=20) for seed in (3, 3, 4))
    assert all(map(np.array_equal, parts(first), parts(same)))
    assert not any(map(np.array_equal, parts(first), parts(other)))


def test_training_points_are_those_of_the_seed() -> None:
    torch.manual_seed(3)
    expected = source.toy("moons").sample((20,))
    assert torch.equal(torch.as_tensor(read_source("moons", seed=3, rows=20).train), expected)


def test_images_are_copied_with_fresh_noise() -> None:
    found = read_source("digits", seed=0)
    assert found.held_out.shape == (source.HELD_OUT_DRAWS, 270, 64)
    first, second = (17 * found.held_out[:2]).floor(), found.held_out[:2]
    assert torch.equal(first[0], first[1]) and not torch.equal(second[0], second[1])
    assert (found.levels, found.shape) == (17, (8, 8))


@pytest.mark.parametrize("rows", [14, 15, 100, 1000])
def test_a_file_is_split_without_loss(rows: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "t.npy", rows)
    found = parts(read_source(path, seed=1))
    assert [len(part) for part in found[1:]] == [round(0.15 * rows)] * 2
    whole = np.concatenate(found)
    assert np.array_equal(np.sort(whole, axis=0), np.sort(np.load(path), axis=0))


def test_thirteen_rows_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 13 rows, too few"):
        read_source(saved(tmp_path / "t.npy", 13), seed=0)


def test_a_large_table_holds_out_no_more_than_it_needs(tmp_path: Path) -> None:
    found = read_source(saved(tmp_path / "t.npy", 100_000, 1), seed=0)
    assert [len(part) for part in parts(found)] == [80_000, 10_000, 10_000]


def test_a_mapped_file_stays_on_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(source, "LAZY_BYTES", 100)
    path = saved(tmp_path / "t.npy", 100)
    found = read_source(path, seed=0)
    assert isinstance(found.train, np.memmap)
    assert np.array_equal(np.concatenate(parts(found)), np.load(path))
    assert "its last 15 rows are held out" in found.warnings[0]
    with pytest.raises(InputError, match="too large to --dequantize"):
        read_source(path, seed=0, dequantized=True)


def test_noise_is_as_wide_as_the_grid_and_moves_no_other_column(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = np.stack([rng.integers(0, 5, 200) / 4, rng.normal(size=200)], 1)
    np.save(tmp_path / "t.npy", table)
    found = read_source(str(tmp_path / "t.npy"), seed=0, dequantized=True)
    assert found.details["dequantized"] == {"0": 0.25} and found.warnings == ()
    noisy = np.concatenate(parts(found))
    order = np.argsort(noisy[:, 1])
    plain = table[np.argsort(table[:, 1])]
    assert np.array_equal(noisy[order, 1], plain[:, 1].astype(np.float32))
    assert np.array_equal(np.floor(4 * noisy[order, 0]) / 4, plain[:, 0])


def test_what_repeats_without_a_grid_is_left_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    column = np.where(rng.random(5000) < 0.5, 0, rng.random(5000))
    np.save(tmp_path / "t.npy", column)
    found = read_source(str(tmp_path / "t.npy"), seed=0, dequantized=True)
    assert found.details["dequantized"] == {}
    assert "lies on no grid" in found.warnings[0]


def test_noise_where_nothing_repeats_is_noted(tmp_path: Path) -> None:
    found = read_source(saved(tmp_path / "t.npy", 50), seed=0, dequantized=True)
    assert found.warnings == ("no column repeats its values, so --dequantize changes nothing",)


def test_values_that_float32_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", 1.7e9 + np.random.default_rng(0).random(50))
    with pytest.raises(InputError, match="the same value in every row"):
        read_source(str(tmp_path / "t.npy"), seed=0)
