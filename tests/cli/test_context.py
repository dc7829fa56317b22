"""Conditional runs: columns of context from a file, samples given values, densities of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from cnf.cli import main, picture
from cnf.cli.source import read_source
from cnf.data.table import read_table
from cnf.flow.flow import Flow

TINY = ("--steps", "3", "--hidden", "8,8", "--batch-size", "32", "--quiet")
ROWS = np.random.default_rng(0).normal(size=(80, 4)) * [1, 2, 3, 0.5] + [0, 1, 0, 5]
HEADER = "height,width,age,dose"


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of height and width given dose and age."""
    folder = tmp_path_factory.mktemp("conditional")
    np.savetxt(folder / "t.csv", ROWS, delimiter=",", header=HEADER, comments="")
    run = folder / "run"
    code = main(["fit", str(folder / "t.csv"), "--context", "dose,age", "--out", str(run), *TINY])
    assert code == 0
    return run


def table(name: str = "t.csv", header: str = HEADER) -> str:
    np.savetxt(name, ROWS, delimiter=",", header=header, comments="")
    return name


def drawn_lines(name: str) -> list[str]:
    """What an .svg draws, without its date and random names."""
    return [line for line in Path(name).read_text().splitlines() if line.lstrip().startswith("L ")]


def test_all_other_columns_are_data(conditional: Path) -> None:
    flow = Flow.load(conditional / "model.safetensors")
    data = json.loads((conditional / "config.json").read_text())["data"]
    assert (flow.dim, flow.context) == (2, 2)
    assert data["columns"] == ["height", "width"] and data["context"] == ["dose", "age"]
    assert (conditional / "density.png").exists()
    figures = json.loads((conditional / "metrics.json").read_text())
    assert figures["mass"] is None and np.isfinite(figures["nll"])


def test_columns_of_data_can_be_chosen_too(cnf_command) -> None:
    outcome = cnf_command("fit", table(), "--columns", "0", "--context", "3", "--out", "r", *TINY)
    assert outcome.code == 0
    flow = Flow.load("r/model.safetensors")
    assert (flow.dim, flow.context) == (1, 1)


def test_samples_are_given_values(conditional: Path, cnf_command) -> None:
    outcome = cnf_command("sample", conditional, "-n", 7, "--context", "5,-1", "--seed", 1,
                          "-o", "s.csv")  # fmt: skip
    assert outcome.code == 0
    found = read_table("s.csv")
    flow = Flow.load(conditional / "model.safetensors")
    assert found.columns == ("height", "width")
    assert np.allclose(found.values, flow.sample(7, [5.0, -1.0], seed=1).numpy(), atol=1e-4)


def test_contexts_of_rows_are_found_by_name(conditional: Path, cnf_command) -> None:
    np.savetxt("x.csv", ROWS[:, ::-1], delimiter=",", header="dose,age,width,height", comments="")
    assert cnf_command("logprob", conditional, "x.csv", "-o", "l.npy").code == 0
    flow = Flow.load(conditional / "model.safetensors")
    known = flow.log_prob(ROWS[:, :2], ROWS[:, [3, 2]]).detach().numpy()
    assert np.allclose(np.load("l.npy")[:, 0], known, atol=1e-3)


def test_a_conditional_run_is_checked_on_a_file(
    conditional: Path, cnf_command, monkeypatch
) -> None:
    monkeypatch.setattr("cnf.flow.check.CELLS", 60)
    outcome = cnf_command("check", conditional, table(), "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["rows"] == 80


def test_a_conditional_run_is_checked_on_draws_given_a_context(
    conditional: Path, cnf_command, monkeypatch
) -> None:
    monkeypatch.setattr("cnf.flow.check.CELLS", 60)
    assert cnf_command("check", conditional, "--context", "5,-1").code == 0


@pytest.mark.parametrize("what", ["density", "trajectories", "field", "tradeoff"])
def test_one_contexts_density_is_drawn(what: str, conditional: Path, cnf_command) -> None:
    arguments = ("plot", conditional, "--what", what, "--context", "5,-1", "-o", "p.png")
    outcome = cnf_command(*arguments)
    assert (outcome.code, outcome.err) == (0, "") and imread("p.png").size


def test_an_animation_is_given_a_context(conditional: Path, cnf_command) -> None:
    arguments = ("--what", "animation", "--context", "5,-1", "-o", "a.gif")
    assert cnf_command("plot", conditional, *arguments).code == 0
    with Image.open("a.gif") as picture:
        assert picture.n_frames == 3


def test_a_context_changes_the_picture(conditional: Path, cnf_command) -> None:
    for name, context in (("a.svg", "5,-1"), ("b.svg", "5,-1"), ("c.svg", "4,2")):
        arguments = ("--what", "trajectories", f"--context={context}", "-o", name)
        assert cnf_command("plot", conditional, *arguments).code == 0
    first, again, other = (drawn_lines(name) for name in ("a.svg", "b.svg", "c.svg"))
    assert first == again != other


def test_data_beside_a_density_have_the_nearest_contexts(conditional: Path, monkeypatch) -> None:
    monkeypatch.setattr(picture, "LEAST_NEAREST", 3)
    source = read_source(
        str(conditional.parent / "t.csv"), seed=0, columns=None, context=("dose", "age")
    )
    rows, contexts = source.parts(picture._shown_rows(source))
    near = picture._rows_near(source, torch.tensor(contexts[7]))
    assert len(near) == 3 and rows[7] in near


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "moons", "--context", "a"), "are for files"),
        (
            ("fit", "t.csv", "--context", "dose", "--columns", "dose,age"),
            "data and context at once",
        ),
        (("fit", "t.csv", "--context", "dose,age,height,width"), "no column besides --context"),
        (("fit", "t.csv", "--context", "weight"), "no column 'weight'"),
        (("sample", "RUN", "-n", "3", "-o", "s.npy"), "2 columns of context, got 0 values"),
        (("sample", "RUN", "-n", "3", "--context", "1", "-o", "s.npy"), "got 1 values"),
        (("sample", "RUN", "-n", "3", "--context", "1,x", "-o", "s.npy"), "no list of numbers"),
        (("sample", "MOONS", "-n", "3", "--context", "1", "-o", "s.npy"), "is not needed here"),
        (("check", "RUN"), "draws need a context; give --context"),
        (("check", "RUN", "t.csv", "--context", "5,-1"), "the rows of t.csv have their own"),
        (("check", "MOONS", "--context", "1"), "is not needed here"),
        (
            ("plot", "RUN", "--what", "field"),
            "one for each context; give values of 'dose', 'age': --context X,Y",
        ),
        (("plot", "RUN", "--what", "trajectories"), "--what trajectories draws one density"),
        (("plot", "RUN", "--what", "animation"), "--what animation draws one density"),
        (("plot", "RUN", "--what", "field", "--context", "1"), "got 1 values"),
        (("plot", "RUN", "--what", "pairs", "--context", "5,-1"), "draws no single one"),
        (("plot", "MOONS", "--what", "field", "--context", "1"), "is not needed here"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(
    arguments, words, conditional: Path, moons: Path, refusal
) -> None:
    table()
    places = {"RUN": conditional, "MOONS": moons}
    assert words in refusal(*(places.get(part, part) for part in arguments))


def test_samples_keep_to_a_budget(moons: Path, cnf_command) -> None:
    assert cnf_command("sample", moons, "-n", 5, "--nfe", 8, "--seed", 0, "-o", "s.npy").code == 0
    known = Flow.load(moons / "model.safetensors").sample(5, seed=0, nfe=8)
    assert np.allclose(np.load("s.npy"), known.numpy(), atol=1e-5)


def test_the_commands_to_go_on_with_name_the_context(cnf_command) -> None:
    outcome = cnf_command("fit", table(), "--columns", "0", "--context", "3", "--out", "r", *TINY)
    assert "cnf check r --context dose\n" in outcome.out
    assert "cnf sample r -n 1000 --context dose -o samples.npy" in outcome.out
