"""`cnf mnist generate`, `sample` and `bpd`: the run folder, its figures, what goes on from it."""

from __future__ import annotations

import json
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import cnf
from cnf.cli import folder, main
from cnf.cli.folder import RunFolder
from cnf.cli.mnist import classify, image_picture, image_report
from cnf.cli.mnist.image_parser import FLAGS_OFF
from cnf.flow.image_settings import ImageSettings

SMALL = (
    "mnist", "generate", "--dataset", "digits", "--steps", "6", "--field", "mlp", "--width", "1",
    "--batch-size", "32", "--validation", "40", "--threads", "1", "--images", "6", "--samples",
    "12", "--nfe", "4",
)  # fmt: skip
RUN = Path("runs/digits-flow")
EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = {
    folder.SAMPLES, folder.CLASSES, folder.BETWEEN, folder.NEIGHBOURS, folder.TRAINING
}  # fmt: skip
FILES = {folder.MODEL, folder.CONFIG, folder.FIGURES, folder.STEPS, *PICTURES}


@pytest.fixture(autouse=True, scope="module")
def _few() -> None:
    sizes = {
        image_picture: {"IMAGES": 4, "EACH": 1, "PAIRS": 2, "STEPS": 3, "DRAWN": 2, "NEAREST": 2},
        image_report: {"REFERENCE": 40},
        classify: {"SOLVERS": {"dopri5, 1e-5": {"method": "dopri5", "rtol": 1e-3}}},
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in sizes.items():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `cnf mnist classify`."""
    out = tmp_path_factory.mktemp("judge") / "net"
    tiny = ("--steps", "4", "--width", "4", "--method", "euler", "--nfe", "2", "--quiet")
    assert main(["mnist", "classify", "--dataset", "digits", *tiny, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def small(judge: Path) -> tuple[str, ...]:
    return (*SMALL, "--classifier", str(judge))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: tuple[str, ...]) -> Path:
    """A finished run; tests do not write into it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main([*small, "--draws", "2", "--out", str(out), "--quiet"]) == 0
    return out


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def model(path: Path) -> bytes:
    return (path / folder.MODEL).read_bytes()


# what it leaves -----------------------------------------------------------------------------------


def test_a_run_folder_holds_all_that_it_promises(finished: Path) -> None:
    assert names(finished) == FILES
    for name in PICTURES:
        assert imread(finished / name).ndim == 3
    steps = (finished / folder.STEPS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(1, 7))
    config = read_json(finished / folder.CONFIG)
    assert config["settings"]["dataset"] == "digits" and config["settings"]["field"] == "mlp"
    assert config["threads"] == 1 and config["arguments"]["task"] == "generate"


def test_figures_are_bounds_with_errors_and_samples_beside_test_images(finished: Path) -> None:
    figures = read_json(finished / folder.FIGURES)
    assert figures["images"] == 6 and figures["draws"] == 2
    assert figures["bits_per_dim"] > 0 and figures["bits_per_dim_error"] > 0
    assert figures["weighted_bits_per_dim"] < figures["bits_per_dim"]
    for one in (figures["samples"], figures["test"]):
        assert 0 <= one["recognized"] <= 1 and sum(one["histogram"]) == pytest.approx(1)
        assert one["distance"] > 0 and one["nearest"] > 0 and one["images"] == 12
    assert figures["samples"]["given"] == 20  # two of each class
    assert figures["rows"] == {"train": 1487, "validation": 40, "test": 270}
    assert figures["steps"] == 6


def test_the_stored_flow_is_the_one_that_was_judged(finished: Path) -> None:
    figures = read_json(finished / folder.FIGURES)
    flow = cnf.ImageFlow.load(finished / folder.MODEL)
    assert (flow.shape, flow.levels, flow.classes) == ((1, 8, 8), 17, 10)
    test = cnf.data.load_digits().test[:6].reshape(-1, 1, 8, 8).astype(np.uint8)
    assert float(flow.bits_per_dim(test, draws=2)) == pytest.approx(
        figures["bits_per_dim"], abs=1e-6
    )


def test_results_and_messages_are_apart(cnf_command, small: tuple[str, ...]) -> None:
    code, out, err = cnf_command(*small)
    assert code == 0
    lines = [line[:14].strip() for line in out.splitlines()]
    assert lines == ["bits/dim", "recognized", "classes", "Fréchet", "nearest", "parameters",
                     "time", "files", "next", ""]  # fmt: skip
    assert "an upper bound, of 6 test images" in out
    assert "training digits-flow" in err and "step" not in err  # no terminal


def test_json_is_all_of_stdout_and_a_run_is_never_overwritten(
    cnf_command, small: tuple[str, ...]
) -> None:
    code, out, err = cnf_command(*small, "--json", "--quiet")
    assert code == 0 and err == ""
    assert json.loads(out) == read_json(RUN / folder.FIGURES)
    before = model(RUN)
    assert cnf_command(*small, "--quiet", "--seed", 1).code == 0
    assert names(Path("runs")) == {"digits-flow", "digits-flow-2"} and model(RUN) == before


def test_a_flow_without_classes_is_not_asked_for_any(cnf_command, small: tuple[str, ...]) -> None:
    code, out, _ = cnf_command(*small, "--unconditional")
    assert code == 0 and "recognized" not in out
    assert names(RUN) == FILES - {folder.CLASSES}
    assert cnf.ImageFlow.load(RUN / folder.MODEL).classes == 0


def test_a_classifier_is_trained_where_none_is_named(cnf_command, monkeypatch) -> None:
    trained = []

    def finish(place: Path, given: tuple[str, ...], arguments) -> None:
        trained.append((place, given[:2]))
        tiny = ("--steps", "2", "--width", "4", "--quiet", "--out", str(place))
        assert main(["mnist", "classify", "--dataset", "digits", *tiny]) == 0

    monkeypatch.setattr(image_report, "finished", finish)
    assert cnf_command(*SMALL).code == 0
    assert trained == [(RUN / "classifier", ("--dataset", "digits"))]
    assert read_json(RUN / folder.FIGURES)["classifier"] == str(RUN / "classifier")


# going on -----------------------------------------------------------------------------------------


def at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM comes once the record of that step was written."""
    add = RunFolder.add_step

    def added(self, record):
        add(self, record)
        if record["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "add_step", added)


def test_a_run_that_was_stopped_ends_bit_for_bit_alike(
    cnf_command, monkeypatch, small: tuple[str, ...], finished: Path
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 3)
        code, out, err = cnf_command(*small)
    assert (code, out) == (130, "")
    assert "`cnf mnist generate --resume --out runs/digits-flow` goes on from here" in err
    assert (RUN / folder.SNAPSHOT).exists()
    code, _, err = cnf_command(*small, "--resume")
    assert code == 0 and "going on with digits-flow" in err
    assert model(RUN) == model(finished) and names(RUN) == FILES


def test_a_trained_run_is_judged_anew(cnf_command, small: tuple[str, ...]) -> None:
    assert cnf_command(*small).code == 0
    before = read_json(RUN / folder.FIGURES), model(RUN)
    code, out, err = cnf_command(*small, "--resume", "--images", 4)
    assert code == 0 and "is trained" in err and "of 4 test images" in out
    after = read_json(RUN / folder.FIGURES)
    assert after["images"] == 4 and after["samples"] == before[0]["samples"]
    assert after["steps"] == 6 and model(RUN) == before[1] and names(RUN) == FILES


# samples ------------------------------------------------------------------------------------------


def test_samples_become_a_picture_or_pixels(cnf_command, finished: Path) -> None:
    draw = ("mnist", "sample", finished, "--nfe", 4, "--seed", 1)
    code, out, _ = cnf_command(*draw, "-n", 9)
    assert code == 0 and "9 images of 8 x 8 pixels in samples.png" in out
    assert imread("samples.png").ndim == 3
    classes = ("--classes", "3,5", "--guidance", "1.5", "-o", "s.npy", "--json")
    code, out, _ = cnf_command(*draw, "-n", 5, *classes)
    assert json.loads(out) == {"file": "s.npy", "shape": [5, 1, 8, 8], "classes": [3, 5, 3, 5, 3]}
    pixels = np.load("s.npy")
    flow = cnf.ImageFlow.load(finished / folder.MODEL)
    expected = flow.sample(5, torch.tensor([3, 5, 3, 5, 3]), guidance=1.5, seed=1, nfe=4)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, expected.numpy())


def test_bits_are_measured_as_in_the_library(cnf_command, finished: Path) -> None:
    code, out, _ = cnf_command("mnist", "bpd", finished, "--images", 5, "--draws", 2, "--json")
    assert code == 0
    found = json.loads(out)
    flow = cnf.ImageFlow.load(finished / folder.MODEL)
    test = cnf.data.load_digits().test[:5].reshape(-1, 1, 8, 8).astype(np.uint8)
    expected = flow.bits_per_dim(test, draws=2)
    assert found["bits_per_dim"] == pytest.approx(expected.value)
    assert found["weighted_bits_per_dim"] == pytest.approx(expected.weighted)
    code, out, _ = cnf_command("mnist", "bpd", finished, "--images", 5)
    assert out.startswith("bits/dim      ") and "an upper bound, of 5 test images" in out


# examples -----------------------------------------------------------------------------------------


def test_outliers_are_looked_for_by_three_scores(
    monkeypatch, capsys, tmp_path: Path, finished: Path
) -> None:
    picture = tmp_path / "outliers.png"
    words = ["--run", finished, "--images", 6, "--probes", 1, "--out", picture]
    monkeypatch.setattr("sys.argv", ["mnist_outliers.py", *map(str, words)])
    runpy.run_path(str(EXAMPLES / "mnist_outliers.py"), run_name="__main__")
    header, *rows, end = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["p", "typicality", "complexity"]
    assert [row.split()[0] for row in rows] == ["noise", "rotated", "blurred", "inverted"]
    for row in rows:
        areas = [float(word) for word in row.split()[1::3]]
        assert len(areas) == 3 and all(0 <= area <= 1 for area in areas)
    assert str(picture) in end and imread(picture).ndim == 3


def test_the_example_is_the_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["mnist_flow.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "mnist_flow.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: cnf mnist generate")


# refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample",), "name either a run folder"),
        (("sample", "RUN", "--pretrained"), "name either a run folder"),
        (("sample", "typo"), "typo holds no model.safetensors"),
        (("sample", "RUN", "-o", "s.csv"), "-o s.csv is no picture or array"),
        (("sample", "RUN", "--classes", "10"), "--classes names 10"),
        (("sample", "RUN", "--classes", "three"), "'three' is not a whole number"),
        (("sample", "RUN", "--guidance", "nan"), "'nan' is not a number"),
        (("sample", "NET"), "holds no image flow"),
        (("bpd", "RUN", "--draws", "0"), "'0' is not a whole number above 0"),
        (("generate", "--dataset", "faces"), "invalid choice: 'faces'"),
        (("generate", "--data", "typo"), "there is no folder typo"),
        ((*SMALL[1:], "--validation", "2000"), "validation=2000 leaves none"),
        ((*SMALL[1:], "--resume"), "holds no run to resume"),
        ((*SMALL[1:], "--field", "multiscale"), "is told no classes"),
        ((*SMALL[1:], "--field", "multiscale", "--unconditional"), "use method='ml'"),
        ((*SMALL[1:], "--device", "abacus"), "is no device"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: tuple[str, ...], words: str, refusal, finished: Path, judge: Path
) -> None:
    places = {"RUN": finished, "NET": judge}
    assert words in refusal("mnist", *(places.get(word, word) for word in arguments))


def test_other_settings_are_refused_when_resuming(
    refusal, cnf_command, monkeypatch, small: tuple[str, ...]
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2)
        assert cnf_command(*small).code == 130
    assert "has width 1, not 2" in refusal(*small, "--resume", "--width", 2)


def test_a_flow_over_images_is_none_over_a_table(refusal, finished: Path) -> None:
    assert "see `cnf mnist sample --help`" in refusal("sample", finished, "-n", 3, "-o", "s.csv")


def test_images_of_another_size_have_no_bits(refusal, monkeypatch, finished: Path) -> None:
    def mnist(root, *, name, download):
        images = np.zeros((60, 28, 28), dtype=np.uint8)
        return cnf.data.Images(name, images, np.arange(60) % 10, images, np.arange(60) % 10)

    monkeypatch.setattr("cnf.odenet.recipe.mnist", mnist)
    sentence = refusal("mnist", "bpd", finished, "--dataset", "fashion", "--images", 3)
    assert "8 x 8 with pixels to 16" in sentence and "28 x 28 with pixels to 255" in sentence


def test_settings_are_what_the_page_lists(capsys) -> None:
    assert main(["mnist", "generate", "--help"]) == 0
    page = capsys.readouterr().out
    for name in vars(ImageSettings()):
        assert FLAGS_OFF.get(name, "--" + name.replace("_", "-")) in page


def test_a_classifier_that_cannot_judge_is_refused_before_training(
    refusal, monkeypatch, finished: Path
) -> None:
    def never(*arguments):
        raise AssertionError("trained for nothing")

    monkeypatch.setattr("cnf.cli.mnist.generate._trained", never)
    sentence = refusal(*SMALL, "--classifier", "typo")
    assert "typo holds no model.safetensors; name the folder of a finished run" in sentence


def test_overwrite_leaves_no_classifier_of_other_images(cnf_command, small) -> None:
    assert cnf_command(*small).code == 0
    (RUN / "classifier").mkdir()
    assert cnf_command(*small, "--overwrite").code == 0
    assert not (RUN / "classifier").exists()
