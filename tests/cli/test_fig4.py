"""`cnf reproduce fig4` and `fig5`: the picture and its numbers, trained in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from cnf.cli.reproduce import fig4, fig5
from cnf.data.energy import Energy


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(fig4, "QUICK", fig4.Effort(3, 2, 16))
    monkeypatch.setattr(fig4, "DRAWS", 50)
    monkeypatch.setattr(fig4, "SIZES", (2, 3))
    monkeypatch.setattr(fig4, "CELLS", 10)
    monkeypatch.setattr(Energy, "log_integral", lambda energy: 1.0)
    monkeypatch.setattr("cnf.flow.recipe.BATCH", 32)
    monkeypatch.setattr("cnf.flow.split.WHITENING_ROWS", 500)
    monkeypatch.setattr("cnf.flow.split.VALIDATION_ROWS", 50)
    for name, size in (("QUICK_STEPS", 20), ("HELD_OUT", 50), ("DRAWS", 60), ("CELLS", 8)):
        monkeypatch.setattr(fig5, name, size)


@pytest.mark.parametrize(("figure", "numbers"), [("fig4", "kl"), ("fig5", "gaps")])
def test_a_figure_comes_with_its_numbers(figure: str, numbers: str, cnf_command) -> None:
    code, out, _ = cnf_command("reproduce", figure, "--quick", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["figure"] == f"runs/{figure}/{figure}.png" and found["quick"] is True
    assert imread(found["figure"]).size and found[numbers]
    assert json.loads(Path(f"runs/{figure}/{figure}.json").read_text()) == found


def test_figure_4_fits_every_size_to_every_density(cnf_command) -> None:
    outcome = cnf_command("reproduce", "fig4", "--quick", "--quiet", "--out", "there")
    assert outcome.err == ""
    header, *lines, path = outcome.out.splitlines()
    assert header.split() == ["KL(q‖p),", "nats", "NF", "2", "NF", "3", "CNF", "2", "CNF", "3"]
    assert len(lines) == 4 and path == "there/fig4.png"
    kl = json.loads(Path("there/fig4.json").read_text())["kl"]
    assert all(len(values) == 2 for kinds in kl.values() for values in kinds.values())


@pytest.mark.parametrize("figure", ["fig4", "fig5"])
def test_what_is_fitted_is_not_fitted_again(figure: str, cnf_command, refusal) -> None:
    arguments = ("reproduce", figure, "--quick", "--quiet", "--json")
    first = json.loads(cnf_command(*arguments).out)
    kept = sorted(Path(f"runs/{figure}").glob("*.[ns][pa]*"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert json.loads(cnf_command(*arguments).out) == first
    assert len(kept) >= 2 and [path.stat().st_mtime_ns for path in kept] == times
    assert "fitted with other settings" in refusal("reproduce", figure, "--quick", "--seed", 1)


def test_a_fit_that_was_lost_is_made_again_and_comes_out_the_same(cnf_command) -> None:
    arguments = ("reproduce", "fig4", "--quick", "--quiet", "--json")
    first = json.loads(cnf_command(*arguments).out)
    Path("runs/fig4/wave-CNF-3.npz").unlink()
    assert json.loads(cnf_command(*arguments).out) == first


def test_a_damaged_fit_is_named(cnf_command, refusal) -> None:
    assert cnf_command("reproduce", "fig4", "--quick", "--quiet").code == 0
    Path("runs/fig4/ring-NF-2.npz").write_bytes(b"nonsense")
    assert "ring-NF-2.npz is damaged" in refusal("reproduce", "fig4", "--quick", "--quiet")


def test_what_cannot_be_reproduced_is_refused(refusal) -> None:
    assert "invalid choice: 'fig6'" in refusal("reproduce", "fig6")
