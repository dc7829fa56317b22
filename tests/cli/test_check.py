"""`cnf check` and `cnf plot`: what a run is worth, and what evaluations buy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cnf.flow import budget, check

POINTS = np.random.default_rng(0).normal(size=(30, 2))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CELLS", 60)
    monkeypatch.setattr("cnf.cli.check.ROWS", 25)
    monkeypatch.setattr(budget, "REPEATS", 1)


def test_a_run_is_checked_on_its_own_draws(moons: Path, cnf_command) -> None:
    code, out, err = cnf_command("check", moons)
    assert code == 0 and err == ""
    names = [line[:18].strip() for line in out.splitlines()[:-1]]
    assert names == ["integration", "trace", "round trip", "mass", "determinant", "batch", "modes"]
    assert out.splitlines()[-1].startswith("These log-densities can be trusted to ")


def test_a_run_is_checked_on_the_rows_of_a_file(named: Path, cnf_command) -> None:
    np.savetxt("x.csv", POINTS, delimiter=",", header="width,length", comments="")
    outcome = cnf_command("check", named, "x.csv", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0 and found["rows"] == 30 and found["run"] == str(named)
    assert {one["name"] for one in found["findings"]} >= {"mass", "integration"}
    assert isinstance(found["passed"], bool) and found["verdict"].endswith(".")


def test_the_tradeoff_is_a_table_and_a_figure(moons: Path, cnf_command) -> None:
    code, out, _ = cnf_command("plot", moons, "--what", "tradeoff", "-o", "t.png")
    assert code == 0 and Path("t.png").stat().st_size > 5000
    lines = out.splitlines()
    assert lines[0].startswith("method") and lines[-1] == "t.png"
    assert lines[-2].startswith("dopri5 (own)")


def test_the_tradeoff_goes_to_the_run_folder_by_itself(
    moons: Path, cnf_command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.safetensors", "config.json"):
        (run / name).write_bytes((moons / name).read_bytes())
    np.save("x.npy", POINTS)
    outcome = cnf_command("plot", run, "x.npy", "--what", "tradeoff", "--json")
    found = json.loads(outcome.out)
    assert found["rows"] == 30 and found["file"] == str(run / "tradeoff.png")
    assert (run / "tradeoff.png").exists() and found["settings"][0]["method"] == "euler"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "nowhere"), "no run folder"),
        (("check", "RUN", "missing.csv"), "no file missing.csv"),
        (("plot", "RUN", "--what", "tradeoff", "-o", "t.csv"), "is no file for tradeoff"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, words, moons: Path, refusal) -> None:
    assert words in refusal(*(moons if part == "RUN" else part for part in arguments))


def test_columns_of_no_file_are_refused(moons, refusal):
    assert "--columns are those of a FILE, and none is named" in refusal(
        "check", moons, "--columns", "a"
    )
