"""`cnf export`: a program that gives the net's answers, within a budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cnf.cli import main
from cnf.cli.folder import MODEL
from cnf.cli.mnist.classifier import read_classifier

TINY = (
    "mnist", "classify", "--dataset", "digits", "--steps", "2", "--width", "4", "--batch-size",
    "32", "--method", "rk4", "--nfe", "4", "--threads", "1", "--quiet",
)  # fmt: skip


@pytest.fixture(scope="module")
def odenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


def test_the_program_is_the_net_within_the_budget(odenet: Path, cnf_command) -> None:
    code, out, err = cnf_command("export", odenet, "--nfe", 9, "-o", "p.pt2")
    assert (code, err) == (0, "") and out.startswith("p.pt2: 8 evaluations by rk4, ")
    net, *_ = read_classifier(odenet)
    net.block.nfe = 9
    images = torch.rand(3, 1, 8, 8)
    program = torch.export.load("p.pt2").module()
    assert torch.allclose(program(images), net(images), atol=1e-5)


def test_it_goes_into_the_run_folder_and_replaces_nothing(odenet: Path, cnf_command) -> None:
    code, out, _ = cnf_command("export", odenet, "--nfe", 2, "--method", "euler", "--json")
    figures = json.loads(out)
    assert code == 0 and figures["nfe"] == 2 and figures["method"] == "euler"
    assert Path(figures["file"]) == odenet / "model-nfe2.pt2"
    again = cnf_command("export", odenet, "--nfe", 2, "--method", "euler")
    assert again.code == 2 and "exists; give another name" in again.err
    assert cnf_command("export", odenet, "--nfe", 2, "--method", "euler", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--nfe", "3"), "nfe=3 pays for none"),
        (("--nfe", "8", "--method", "rk5"), "unknown method 'rk5'"),
        (("--nfe", "8", "--method", "kvaerno5"), "no fixed number of evaluations"),
        (("--nfe", "8", "-o", "p.onnx"), "give it the suffix .pt2"),
        (("--nfe", "8", "-o", "no/p.pt2"), "there is no folder no"),
        ((), "--nfe"),
        (("--nfe", "8", "--device", "abacus"), "'abacus' is no device"),
    ],
)
def test_wrong_use_is_one_sentence(more: tuple[str, ...], words: str, odenet, refusal) -> None:
    assert words in refusal("export", odenet, *more)


def test_other_runs_are_refused(moons: Path, refusal, cnf_command) -> None:
    assert "holds a flow and no classifier" in refusal("export", moons, "--nfe", 8)
    assert "holds no model.safetensors" in refusal("export", "nowhere", "--nfe", 8)
    assert cnf_command(*TINY[:4], *TINY[4:10], "--net", "mlp", "--out", "mlp", "--quiet").code == 0
    assert "has no ODE" in refusal("export", "mlp", "--nfe", 8)


def test_a_damaged_classifier_is_called_one(odenet: Path, refusal, tmp_path: Path) -> None:
    shutil.copytree(odenet, tmp_path / "run")
    model = tmp_path / "run" / MODEL
    whole = model.read_bytes()
    for content in (whole[:200], b"", whole.replace(b"shape", b"shane", 1)):
        model.write_bytes(content)
        sentence = refusal("export", "run", "--nfe", 8)
        assert "is no file that `cnf mnist classify` wrote; restore it or train again" in sentence
        assert "flow" not in sentence
