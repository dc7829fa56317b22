"""`cnf logprob`: values of the flow, columns found by name, and tables that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cnf.data.table import read_table
from cnf.flow.flow import Flow

TABLE = np.array([[0.1, 5.0, 0.3], [0.4, 6.0, -0.7], [-1.2, 7.0, 2.0]])
PICKED = TABLE[:, [0, 2]]


def written(name: str, values: np.ndarray, header: str = "") -> str:
    if name.endswith(".npy"):
        np.save(name, values)
    else:
        np.savetxt(name, values, delimiter=",", header=header, comments="")
    return name


def expected(run: Path, values: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return Flow.load(run / "model.safetensors").log_prob(values).numpy()


@pytest.mark.parametrize("name", ["x.csv", "x.npy"])
@pytest.mark.parametrize("output", ["l.csv", "l.npy"])
def test_every_row_gets_the_flow_s_value(name, output, moons, cnf_command) -> None:
    points = np.random.default_rng(0).normal(size=(20, 2))
    code, out, _ = cnf_command("logprob", moons, written(name, points), "-o", output)
    values = read_table(output).values[:, 0]
    assert code == 0 and np.allclose(values, expected(moons, points), atol=1e-4)
    assert f"mean log p(x) {values.mean():.2f}"[:18] in out and "20 rows" in out


def test_a_csv_has_a_header(moons: Path, cnf_command) -> None:
    assert cnf_command("logprob", moons, written("x.csv", PICKED), "-o", "l.csv").code == 0
    assert read_table("l.csv").columns == ("log_prob",)


def test_json_holds_the_mean_and_its_error(moons: Path, cnf_command) -> None:
    outcome = cnf_command("logprob", moons, written("x.npy", PICKED), "-o", "l.npy", "--json")
    figures, values = json.loads(outcome.out), np.load("l.npy").astype(float)
    assert figures["mean"] == pytest.approx(values.mean())
    assert figures["mean_error"] == pytest.approx(values.std(ddof=1) / 3**0.5)
    assert figures["rows"] == 3 and figures["nfe"] > 0 and figures["divergence"] == "ClosedForm"


def test_one_row_has_no_error(moons: Path, cnf_command) -> None:
    code, out, _ = cnf_command("logprob", moons, written("x.csv", PICKED[:1]), "-o", "l.csv",
                               "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["mean_error"] is None


@pytest.mark.parametrize(
    ("header", "order"),
    [("length,width", [0, 2]), ("width,length", [2, 0]), ("width,height,length", [2, 1, 0])],
)
def test_columns_are_found_by_name(header, order, named, cnf_command) -> None:
    written("x.csv", TABLE[:, order], header)
    assert cnf_command("logprob", named, "x.csv", "-o", "l.npy").code == 0
    assert np.allclose(np.load("l.npy")[:, 0], expected(named, PICKED), atol=1e-4)


@pytest.mark.parametrize("name", ["x.csv", "x.npy"])
def test_columns_without_names_are_taken_in_order(name, named, cnf_command) -> None:
    assert cnf_command("logprob", named, written(name, PICKED), "-o", "l.npy").code == 0
    assert np.allclose(np.load("l.npy")[:, 0], expected(named, PICKED), atol=1e-4)


def test_columns_can_be_chosen(named: Path, cnf_command) -> None:
    written("x.csv", TABLE, "a,b,c")
    assert cnf_command("logprob", named, "x.csv", "--columns", "a,c", "-o", "l.npy").code == 0
    assert np.allclose(np.load("l.npy")[:, 0], expected(named, PICKED), atol=1e-4)


@pytest.mark.parametrize(
    ("header", "width", "arguments", "words"),
    [
        ("", 3, "", "has 3 columns, but"),
        ("", 1, "", "has 1 column, but"),
        ("a,b", 2, "", "no column 'length'"),
        ("length,b", 2, "", "no column 'width'"),
        ("a,b,c", 3, "--columns a", "trained on 2 ('length', 'width')"),
        ("a,b,c", 3, "--columns a,z", "no column 'z'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    header, width, arguments, words, named, refusal
) -> None:
    written("x.csv", TABLE[:, :width], header)
    assert words in refusal("logprob", named, "x.csv", "-o", "l.npy", *arguments.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "empty"), ("a,b\n", "x.csv"), ("length,width\n1,x\n", "not numeric"),
     ("length,width\n1,nan\n", "NaN")],
)  # fmt: skip
def test_values_that_are_no_numbers_are_refused(content, words, named, refusal) -> None:
    Path("x.csv").write_text(content)
    assert words in refusal("logprob", named, "x.csv", "-o", "l.npy")


def test_a_missing_file_and_a_taken_output_are_refused(moons: Path, refusal) -> None:
    assert "there is no file y.csv" in refusal("logprob", moons, "y.csv", "-o", "l.npy")
    written("x.csv", PICKED)
    assert "x.csv exists" in refusal("logprob", moons, "x.csv", "-o", "x.csv")
