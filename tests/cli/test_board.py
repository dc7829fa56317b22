"""`--tensorboard`: the numbers of metrics.jsonl as curves."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from cnf.cli.board import Board

TINY = ("--steps", "3", "--hidden", "8,8", "--batch-size", "32")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads in a folder: (step, value) of every curve."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def recorded(folder: Path, name: str) -> list[tuple[str, int, float]]:
    """Phase, place and value in metrics.jsonl, where there is one."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = enumerate(map(json.loads, lines), start=1)
    return [(r["phase"], i, r[name]) for i, r in records if r[name] is not None]


def test_a_fit_s_curves_are_those_of_its_record(cnf_command):
    pytest.importorskip("tensorboard")
    for _ in range(2):  # the second time over the first
        code, _, err = cnf_command("fit", "moons", "--tensorboard", "--overwrite", "--quiet", *TINY)
        assert (code, err) == (0, "")
    found = curves(Path("runs/moons/tensorboard"))
    for name in ("loss", "lr", "seconds"):
        expected = recorded(Path("runs/moons"), name)
        assert {tag for tag in found if tag.endswith(f"/{name}")} == {
            f"{phase}/{name}" for phase, *_ in expected
        }
        for phase, step, value in expected:
            assert (step, pytest.approx(value)) in found[f"{phase}/{name}"]
    assert sum(len(curve) for tag, curve in found.items() if tag.endswith("/loss")) == 3


def test_a_classifier_s_curves_have_its_validation(cnf_command):
    pytest.importorskip("tensorboard")
    small = ("--dataset", "digits", "--epochs", "1", "--width", "4", "--out", "run", "--quiet")
    assert cnf_command("mnist", "classify", *small, "--tensorboard").code == 0
    found = curves(Path("run/tensorboard"))
    (tag,) = (tag for tag in found if tag.endswith("/validation"))
    assert [value for _, value in found[tag]] == pytest.approx(
        [value for *_, value in recorded(Path("run"), "validation")]
    )


def test_a_run_without_it_has_no_event_files(moons):
    assert not (moons / "tensorboard").exists()


def test_what_is_resumed_goes_on_over_what_was_lost(tmp_path):
    pytest.importorskip("tensorboard")

    def add(steps, factor):
        board = Board(tmp_path / "events")
        for step in steps:
            board.add(step, {"phase": "ml", "step": 1, "loss": factor * step, "nfe": None})
        board.add(steps[-1] + 1, {"phase": "ml", "step": 1, "loss": math.nan})
        board.close()

    add([1, 2, 3, 4], 1.0)
    add([3, 4, 5], 10.0)  # a snapshot was written after step 2
    assert curves(tmp_path / "events") == {
        "ml/loss": [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    }


def test_a_package_that_is_missing_is_named_with_its_remedy(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    sentence = refusal("fit", "moons", "--tensorboard", "--quiet", *TINY)
    assert "pip install tensorboard" in sentence
