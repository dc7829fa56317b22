"""`cnf sample`: tables of draws, and runs and outputs that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cnf.data.table import read_table


def test_samples_are_written_as_a_table(moons: Path, cnf_command) -> None:
    for name in ("s.npy", "s.csv"):
        code, out, err = cnf_command("sample", moons, "-n", 7, "-o", name)
        assert (code, err) == (0, "") and f"7 samples of 2 columns in {name}" in out
        assert read_table(name).values.shape == (7, 2)
    assert read_table("s.csv").columns == ("x1", "x2")


def test_a_table_s_columns_keep_their_names(named: Path, cnf_command) -> None:
    assert cnf_command("sample", named, "-n", 3, "-o", "s.csv").code == 0
    assert read_table("s.csv").columns == ("length", "width")


def test_a_seed_draws_the_same_again(moons: Path, cnf_command) -> None:
    for name, seed in (("a.npy", 1), ("b.npy", 1), ("c.npy", 2)):
        assert cnf_command("sample", moons, "-n", 5, "--seed", seed, "-o", name).code == 0
    a, b, c = (np.load(name) for name in ("a.npy", "b.npy", "c.npy"))
    assert np.array_equal(a, b) and not np.allclose(a, c)


def test_json_says_what_was_written(moons: Path, cnf_command) -> None:
    outcome = cnf_command("sample", moons, "-n", 5, "-o", "a.csv", "--json")
    assert json.loads(outcome.out) == {"file": "a.csv", "rows": 5, "columns": ["x1", "x2"]}


def test_a_file_is_overwritten_only_on_request(moons: Path, refusal, cnf_command) -> None:
    Path("s.csv").write_text("mine")
    arguments = ("sample", moons, "-n", 5, "-o", "s.csv")
    assert "s.csv exists" in refusal(*arguments)
    assert cnf_command(*arguments, "--overwrite").code == 0
    assert len(read_table("s.csv").values) == 5


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("s.txt", "suffix .csv or .npy"),
        ("s", "suffix .csv or .npy"),
        ("missing/s.csv", "there is no folder missing"),
        ("there.csv", "there.csv exists"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(output, words, moons, refusal) -> None:
    Path("there.csv").mkdir()
    assert words in refusal("sample", moons, "-n", 5, "-o", output)


def test_what_is_no_run_is_refused(refusal) -> None:
    Path("file").write_text("x")
    Path("folder").mkdir()
    for run, words in (("none", "no run folder none"), ("file", "is a file"),
                       ("folder", "holds no config.json")):  # fmt: skip
        assert words in refusal("sample", run, "-n", 5, "-o", "s.csv")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "empty", "truncated", "noise", "folder"])
def test_a_damaged_run_is_refused(name: str, damage: str, moons: Path, refusal) -> None:
    shutil.copytree(moons, "run")
    file = Path("run") / name
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "removed":
        kept = {"empty": b"", "truncated": content[: len(content) // 2], "noise": bytes(range(256))}
        file.write_bytes(kept[damage])
    sentence = refusal("sample", "run", "-n", 5, "-o", "s.csv")
    assert name in sentence


@pytest.mark.parametrize(
    "config",
    ["[]", "1", "{}", '{"data": 1}', '{"data": {"columns": 2}}', '{"data": {"columns": [1, 2]}}',
     '{"data": {"columns": "ab"}}', '{"data": {"columns": ["a"]}}', "[" * 100_000],
)  # fmt: skip
def test_a_config_of_something_else_is_refused(config: str, moons: Path, refusal) -> None:
    shutil.copytree(moons, "run")
    Path("run/config.json").write_text(config)
    assert "config.json" in refusal("sample", "run", "-n", 5, "-o", "s.csv")


def test_every_cut_of_a_model_is_refused(moons: Path, refusal) -> None:
    shutil.copytree(moons, "run")
    content = Path("run/model.safetensors").read_bytes()
    for length in np.linspace(0, len(content) - 1, 12).astype(int):
        Path("run/model.safetensors").write_bytes(content[:length])
        assert "damaged" in refusal("sample", "run", "-n", 5, "-o", "s.csv")
