"""`cnf fit`: the run folder, the figures, and input that is refused before anything is written."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_breast_cancer, load_wine

from cnf.cli import folder
from cnf.error import InputError, IntegrationError
from cnf.flow.flow import Flow
from cnf.flow.regularizer import Regularizer

TINY = ("--steps", "3", "--hidden", "8,8", "--batch-size", "32")


def strict_json(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_a_run_folder_holds_all_that_it_promises(moons: Path) -> None:
    assert names(moons) == set(folder.FILES) - {folder.SAMPLES}
    assert Flow.load(moons / "model.safetensors").dim == 2
    steps = [strict_json(line) for line in (moons / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and {"phase", "step", "loss", "validation", "nfe"} <= steps[0].keys()
    for name in (folder.DENSITY, folder.TRAINING):
        assert imread(moons / name).shape[2] in (3, 4)


def test_the_settings_repeat_the_run(moons: Path, cnf_command) -> None:
    config = strict_json((moons / "config.json").read_text())
    assert config["data"]["name"] == "moons" and config["data"]["columns"] == ["x1", "x2"]
    assert config["data"]["rows"] == {"train": 500, "validation": 50, "held_out": 60}
    assert config["arguments"]["seed"] == 0 and config["flow"]["hidden"] == [8, 8]
    assert set(config["versions"]) >= {"cnf", "torch", "python"}

    assert cnf_command("fit", "moons", *TINY).code == 0
    first, second = (strict_json((run / "metrics.json").read_text())
                     for run in (moons, Path("runs/moons")))  # fmt: skip
    assert first["nll"] == second["nll"]


def test_figures_are_true(moons: Path) -> None:
    figures = strict_json((moons / "metrics.json").read_text())
    assert figures["gap"] > 0 and figures["gap_error"] > 0
    assert figures["entropy"] == pytest.approx(2.3939, abs=1e-4)
    assert figures["mass"] == pytest.approx(1, abs=0.02)
    assert figures["round_trip"] < 1e-3
    assert figures["nfe"] > 0 and figures["divergence"] == "ClosedForm"
    assert figures["steps"] == 3 and figures["bits"] is None


def test_results_and_messages_are_apart(cnf_command) -> None:
    code, out, err = cnf_command("fit", "moons", *TINY)
    assert code == 0
    assert "fitting moons, 500 rows of 2 columns, into runs/moons" in err
    lines = out.splitlines()
    starts = [line[:14].strip() for line in lines]
    assert starts == ["held-out NLL", "gap", "mass", "round trip", "integration", "evaluations",
                      "divergence", "time", "field", "files", "next", "", ""]  # fmt: skip
    assert "cnf sample runs/moons -n 1000" in out and "cnf logprob runs/moons" in out


def test_json_is_all_of_stdout_and_quiet_is_silent(cnf_command) -> None:
    code, out, err = cnf_command("fit", "moons", *TINY, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert strict_json(out) == strict_json(Path("runs/moons/metrics.json").read_text())


def test_a_run_is_never_overwritten(cnf_command) -> None:
    for name in ("moons", "moons-2", "moons-3"):
        before = {path: path.read_bytes() for path in Path().rglob("*.json*")}
        assert cnf_command("fit", "moons", *TINY).code == 0
        assert (Path("runs") / name / "model.safetensors").exists()
        assert all(path.read_bytes() == content for path, content in before.items())


def test_overwrite_replaces_a_run_and_what_it_left(cnf_command) -> None:
    run = Path("runs/moons")
    assert cnf_command("fit", "moons", *TINY).code == 0
    (run / "samples.png").write_bytes(b"of an older run")
    (run / "note.txt").write_text("mine")
    assert cnf_command("fit", "moons", *TINY, "--seed", "1", "--overwrite").code == 0
    assert names(Path("runs")) == {"moons"}
    assert names(run) == set(folder.FILES) - {folder.SAMPLES} | {"note.txt"}
    assert strict_json((run / "config.json").read_text())["arguments"]["seed"] == 1


def test_overwrite_spares_a_run_until_its_successor_trains(cnf_command, monkeypatch) -> None:
    assert cnf_command("fit", "moons", *TINY).code == 0
    before = {path: path.read_bytes() for path in Path("runs/moons").iterdir()}

    def fit(self, x, **settings):
        raise InputError("x cannot be fitted; try another")

    monkeypatch.setattr(Flow, "fit", fit)
    assert cnf_command("fit", "moons", *TINY, "--overwrite").code == 2
    assert {path: path.read_bytes() for path in Path("runs/moons").iterdir()} == before


def test_a_run_that_cannot_be_integrated_keeps_its_records(cnf_command, monkeypatch) -> None:
    fit = Flow.fit

    def stiff(self, x, **settings):
        fit(self, x, **settings)
        raise IntegrationError("step shrank to 1e-12 at t=0.5; try another method")

    monkeypatch.setattr(Flow, "fit", stiff)
    outcome = cnf_command("fit", "moons", *TINY)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.splitlines()[-1].startswith("cnf: step shrank to 1e-12")
    kept = {"config.json", "metrics.jsonl", "snapshot.pt", "snapshot-before.pt"}
    assert names(Path("runs/moons")) == kept


def test_a_failed_start_leaves_no_folder(cnf_command, monkeypatch) -> None:
    for error, code in ((KeyboardInterrupt(), 130), (IntegrationError("stiff; try rk4"), 1)):

        def fit(self, x, error=error, **settings):
            raise error

        monkeypatch.setattr(Flow, "fit", fit)
        assert cnf_command("fit", "moons", *TINY).code == code
        assert not Path("runs").exists()


def test_numbers_that_are_not_finite_are_null(cnf_command, monkeypatch) -> None:
    fit = Flow.fit

    def broken(self, x, callback, **settings):
        def spoilt(record):
            callback(replace(record, loss=math.nan, validation=math.inf))

        return fit(self, x, callback=spoilt, **settings)

    monkeypatch.setattr(Flow, "fit", broken)
    assert cnf_command("fit", "moons", *TINY).code == 0
    lines = Path("runs/moons/metrics.jsonl").read_text().splitlines()
    assert [strict_json(line)["loss"] for line in lines] == [None] * 3


def test_a_budget_too_small_for_a_step_is_still_a_run(cnf_command) -> None:
    assert cnf_command("fit", "moons", "--seconds", "1e-9", "--hidden", "8,8").code == 0
    assert names(Path("runs/moons")) == set(folder.FILES) - {folder.SAMPLES}


def test_coupling_and_regularizer_are_passed_on(cnf_command, monkeypatch) -> None:
    given = {}
    fit = Flow.fit

    def seen(self, x, **settings):
        given.update(settings)
        return fit(self, x, **settings)

    monkeypatch.setattr(Flow, "fit", seen)
    chosen = ("--coupling", "ot", "--kinetic", "0.02", "--jacobian", "0", "--steer", "0.1")
    assert cnf_command("fit", "moons", *TINY, *chosen).code == 0
    assert given["coupling"] == "ot"
    assert given["regularizer"] == Regularizer(kinetic=0.02, steer=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--kinetic -1", "argument --kinetic: '-1' is not a number above 0"),
        ("--steer 1.5", "steer must be a number from 0 to below 1, got 1.5"),
        ("--method fm --kinetic 1", "regularizer= is for maximum likelihood"),
        ("--method ml --coupling ot", "coupling= is for flow matching"),
        ("--coupling best", "invalid choice: 'best'"),
    ],
)
def test_what_would_not_be_used_is_refused(arguments: str, words: str, refusal) -> None:
    assert words in refusal("fit", "moons", *TINY, *arguments.split())


@pytest.mark.parametrize("method", ["fm", "ml"])
def test_the_method_is_passed_on(method: str, cnf_command) -> None:
    assert cnf_command("fit", "moons", *TINY, "--method", method, "--lr", "0.01").code == 0
    lines = Path("runs/moons/metrics.jsonl").read_text().splitlines()
    assert {strict_json(line)["phase"] for line in lines} == {method}


def test_digits_are_reported_in_bits(cnf_command) -> None:
    outcome = cnf_command("fit", "digits", *TINY)
    assert outcome.code == 0 and "bits per dimension" in outcome.out
    run = Path("runs/digits")
    assert names(run) == set(folder.FILES) - {folder.DENSITY}
    figures = strict_json((run / "metrics.json").read_text())
    assert figures["rows"] == 270  # images, not their copies
    expected = (figures["nll"] / 64 + math.log(17)) / math.log(2)
    assert figures["bits"] == pytest.approx(expected, abs=1e-4)
    assert strict_json((run / "config.json").read_text())["data"]["levels"] == 17
    for verb in (["sample", run, "-n", 5, "-o", "s.csv"], ["logprob", run, "s.csv", "-o", "l.csv"]):
        assert cnf_command(*verb).code == 0


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_a_table_with_text_and_labels_beside_numbers(load, cnf_command) -> None:
    load(as_frame=True).frame.to_csv("t.csv", index=False)
    code, _, err = cnf_command("fit", "t.csv", *TINY)
    assert code == 0 and "cnf: warning: repeated or whole numbers in column" in err
    assert "'target'" in err
    config = strict_json(Path("runs/t/config.json").read_text())
    assert config["data"]["named"] and config["data"]["columns"][-1] == "target"
    assert config["data"]["file"] == os.path.abspath("t.csv")
    assert imread("runs/t/density.png").ndim == 3


def test_columns_choose_and_dequantize_tells_its_noise(cnf_command) -> None:
    load_wine(as_frame=True).frame.to_csv("w.csv", index=False)
    code, _, err = cnf_command("fit", "w.csv", "--columns", "alcohol,proline", "--dequantize",
                               "--out", "r", *TINY)  # fmt: skip
    assert code == 0 and "warning" not in err
    data = strict_json(Path("r/config.json").read_text())["data"]
    assert data["columns"] == ["alcohol", "proline"]
    assert data["dequantized"] == {"proline": 1.0}
    np.savetxt("new.csv", [[13.0, 700.0]], delimiter=",", header="alcohol,proline", comments="")
    assert "uniform noise in column 'proline'" in cnf_command(
        "logprob", "r", "new.csv", "-o", "l.csv"
    ).err  # fmt: skip


def test_one_dimension_is_a_curve(cnf_command) -> None:
    np.save("a.npy", np.random.default_rng(0).normal(size=60))
    code, out, err = cnf_command("fit", "a.npy", *TINY)
    assert code == 0 and "warning" not in err and "mass" in out
    assert imread("runs/a/density.png").ndim == 3
    assert cnf_command("sample", "runs/a", "-n", 4, "-o", "s.npy").code == 0
    assert np.load("s.npy").shape == (4, 1)
    assert cnf_command("logprob", "runs/a", "a.npy", "-o", "l.npy").code == 0
    assert np.load("l.npy").shape == (60, 1)


WRONG_FILES = {
    "empty.csv": b"",
    "header.csv": b"a,b\n",
    "text.csv": b"a,b\n" + b"1.5,x\n" * 30,
    "nan.csv": b"a,b\n" + b"1.5,2.5\n" * 30 + b"nan,2.5\n",
    "ragged.csv": b"a,b\n1,2\n3\n",
    "short.csv": b"a,b\n" + b"".join(b"%d.5,%d.25\n" % (i, i * i) for i in range(9)),
    "constant.csv": b"a,b\n" + b"".join(b"%d.5,7\n" % i for i in range(30)),
    "only_constants.csv": b"a\n" + b"7\n" * 30,
    "numbers.txt": b"1 2\n3 4\n",
    "no_suffix": b"1,2\n3,4\n",
    "broken.npy": b"\x93NUMPY\x01\x00",
    "noise.npy": bytes(range(256)),
    "noise.npz": b"PK" + bytes(range(256)),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_cannot_be_used_is_refused(name: str, refusal, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRONG_FILES[name])
    assert name in refusal("fit", name, *TINY)


def test_constant_columns_are_named_with_the_remedy(refusal, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(WRONG_FILES["constant.csv"])
    sentence = refusal("fit", "t.csv", *TINY)
    assert "'b'" in sentence and "--columns a" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("missing.csv", "there is no file missing.csv"),
        ("moon", "did you mean 'moons'"),
        ("mnist", "8gaussians, checkerboard"),
        ("qqq", "'qqq' is no data set; known are"),
        (".", ". is a folder"),
        ("moons --rows 5", "--rows is 5"),
        ("digits --rows 50", "--rows is for toy sets"),
        ("t.csv --rows 50", "--rows is for toy sets"),
        ("moons --columns a", "are for files"),
        ("digits --dequantize", "are for files"),
        ("moons --device foo", "'foo' is no device"),
        ("moons --device meta", "'meta' is not on this machine"),
        ("moons --out t.csv", "t.csv is a file"),
        ("moons --out t.csv/run", "cannot be made"),
        ("moons --out full --overwrite", "full holds other files and no run"),
        ("moons --out /", "names no folder"),
        ("moons --out new/" + "x" * 300, "cannot be made"),
        ("t.csv --columns a,q", "no column 'q'"),
        ("t.csv --columns a,0", "chosen twice"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: str, words: str, refusal, tmp_path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    assert words in refusal("fit", *arguments.split())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(refusal, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refusal("fit", "moons", "--out", "locked/run", *TINY)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to fail to write to")
def test_a_place_where_nobody_can_write_is_refused(refusal) -> None:
    assert "cannot be made" in refusal("fit", "moons", "--out", "/proc/run", *TINY)


def test_the_callers_random_numbers_are_left_alone(cnf_command) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert cnf_command("fit", "moons", *TINY).code == 0
    assert torch.equal(torch.rand(3), expected)


def test_the_run_says_which_field_it_chose(cnf_command) -> None:
    """Bandwidth and widths that were given are kept, and all stand in the run's files."""
    code, out, _ = cnf_command(
        "fit", "moons", *TINY, "--hidden", "8,8", "--bandwidth", "1,2", "--json"
    )
    figures = json.loads(out)
    assert code == 0 and figures["hidden"] == [8, 8] and figures["bandwidth"] == [1.0, 2.0]
    config = json.loads(Path("runs/moons/config.json").read_text())
    assert config["flow"]["hidden"] == [8, 8] and config["flow"]["bandwidth"] == [1.0, 2.0]


@pytest.mark.parametrize("band", ["1", "2,1", "0,1", "a,b", "1,2,3"])
def test_a_band_without_a_meaning_is_refused(band: str, refusal) -> None:
    assert "--bandwidth" in refusal("fit", "moons", "--bandwidth", band)
