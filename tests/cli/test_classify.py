"""`cnf mnist classify`: the run folder, the figures, resuming, and input that is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import cnf
from cnf.cli import folder, main
from cnf.cli.folder import RunFolder
from cnf.cli.mnist import classify
from cnf.cli.mnist.classifier import read_classifier
from cnf.odenet.classification import judge
from cnf.odenet.recipe import images_of, split
from cnf.odenet.settings import Settings

TINY = (
    "mnist", "classify", "--dataset", "digits", "--steps", "12", "--width", "4", "--batch-size",
    "32", "--method", "euler", "--nfe", "2", "--threads", "1",
)  # fmt: skip
SOLVERS = {
    "euler, 2": {"method": "euler", "nfe": 2},
    "dopri5, 1e-5": {"method": "dopri5", "rtol": 1e-5},
}
FILES = {
    folder.MODEL, folder.CONFIG, folder.FIGURES, folder.STEPS, folder.TRAINING, folder.CONFUSION
}  # fmt: skip
RUN = Path("runs/digits-odenet")


@pytest.fixture(autouse=True)
def _few_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "SOLVERS", SOLVERS)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def model(path: Path) -> bytes:
    return (path / folder.MODEL).read_bytes()


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / folder.STEPS).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests do not write into it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "SOLVERS", SOLVERS)
        assert main([*TINY, "--out", str(out), "--quiet"]) == 0
    return out


# what it leaves -----------------------------------------------------------------------------------


def test_a_run_folder_holds_all_that_it_promises(finished: Path) -> None:
    assert names(finished) == FILES
    assert len(losses(finished)) == 12
    for name in (folder.TRAINING, folder.CONFUSION):
        assert imread(finished / name).ndim == 3
    config = read_json(finished / folder.CONFIG)
    assert config["settings"]["net"] == "odenet" and config["settings"]["width"] == 4
    assert config["threads"] == 1


def test_figures_are_those_of_the_stored_net(finished: Path) -> None:
    figures = read_json(finished / folder.FIGURES)
    net, settings, shape = read_classifier(finished)
    assert shape == (1, 8, 8) and settings.dataset == "digits"
    data = images_of("digits", None, download=False)
    parts = split(data, settings.validation, settings.seed)
    test = judge(net, parts.test_images, parts.test_labels)
    assert figures["test_error"] == test.error
    assert figures["confusion"] == test.confusion.tolist()
    assert figures["wrong"] == (test.predictions != parts.test_labels).nonzero()[:, 0].tolist()
    assert sum(map(sum, figures["confusion"])) == figures["rows"]["test"] == 270
    assert figures["nfe"] == figures["nfe_backward"] == 2
    assert figures["solvers"].keys() == SOLVERS.keys()
    assert figures["solvers"]["euler, 2"]["validation_error"] == figures["validation_error"]


def test_the_test_images_are_read_once_after_selection(cnf_command, monkeypatch) -> None:
    seen = []

    def judged(net, images, labels, batch=500):
        seen.append(len(images))
        return judge(net, images, labels, batch)

    monkeypatch.setattr(classify, "judge", judged)
    monkeypatch.setattr("cnf.odenet.recipe.judge", judged)
    monkeypatch.setattr("cnf.odenet.classification.judge", judged)
    assert cnf_command(*TINY, "--validation", 100).code == 0
    assert seen[-1] == 270 and set(seen[:-1]) == {100}


def test_results_and_messages_are_apart(cnf_command) -> None:
    code, out, err = cnf_command(*TINY)
    assert code == 0
    lines = [line[:14].strip() for line in out.splitlines()]
    assert lines == ["test error", "validation", "parameters", "evaluations", "with solver", "",
                     "time", "files"]  # fmt: skip
    assert "training digits-odenet" in err and "in runs/digits-odenet" in err
    assert "step" not in err  # no terminal


def test_a_terminal_sees_how_it_goes(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    assert main(list(TINY)) == 0
    shown = err.getvalue()
    assert "step 12 of 12" in shown and "accuracy" in shown and "NFE 2 + 2" in shown


def test_json_is_all_of_stdout(cnf_command) -> None:
    code, out, err = cnf_command(*TINY, "--json", "--quiet")
    assert code == 0 and json.loads(out) == read_json(RUN / folder.FIGURES)
    assert all("warning" in line for line in err.splitlines())


def test_a_run_is_repeated_by_its_seed_and_never_overwritten(cnf_command, finished: Path) -> None:
    assert cnf_command(*TINY).code == 0 and cnf_command(*TINY, "--seed", 1).code == 0
    assert names(Path("runs")) == {"digits-odenet", "digits-odenet-2"}
    assert model(RUN) == model(finished) != model(Path("runs/digits-odenet-2"))


def test_overwrite_leaves_nothing_of_the_older_run(cnf_command) -> None:
    assert cnf_command(*TINY).code == 0
    (RUN / folder.DENSITY).write_bytes(b"of an older run")
    assert cnf_command(*TINY, "--overwrite").code == 0
    assert names(Path("runs")) == {"digits-odenet"} and names(RUN) == FILES


@pytest.mark.parametrize(
    "net", [("resnet",), ("mlp",), ("rk-net",), ("odenet", "--augment", "2", "--steady")]
)
def test_other_nets_are_trained_alike(net: tuple[str, ...], cnf_command) -> None:
    code, out, _ = cnf_command(*TINY, "--net", *net, "--steps", 2)
    assert code == 0 and "test error" in out
    assert names(Path(f"runs/digits-{net[0]}")) == FILES


@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_gradients_and_energy_are_passed_on(gradient: str, cnf_command) -> None:
    more = ("--method", "midpoint", "--nfe", 64, "--energy", "0.1")
    assert cnf_command(*TINY, "--steps", 2, "--gradient", gradient, *more).code == 0
    settings = read_json(RUN / folder.CONFIG)["settings"]
    assert (settings["gradient"], settings["energy"], settings["nfe"]) == (gradient, 0.1, 64)


def test_a_net_that_needs_its_solver_is_told(cnf_command, monkeypatch) -> None:
    monkeypatch.setattr(classify, "depends_on_solver", lambda *judged: True)
    assert "warning: the net is no ODE" in cnf_command(*TINY).err


# resuming -----------------------------------------------------------------------------------------


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happen) -> None:
    """Something happens once the record of that step was written."""
    add = RunFolder.add_step

    def added(self, record):
        add(self, record)
        if record["step"] == step:
            happen()

    monkeypatch.setattr(RunFolder, "add_step", added)


class Killed(BaseException):
    """In the place of SIGKILL: nothing is tidied up."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_goes_on(
    number: signal.Signals, cnf_command, monkeypatch, finished: Path
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(number))
        code, out, err = cnf_command(*TINY)
    assert (code, out) == (130, "")
    assert "cnf: interrupted; `cnf mnist classify --resume --out runs/digits-odenet`" in err
    assert len(losses(RUN)) == 5 and (RUN / folder.SNAPSHOT).exists()
    code, _, err = cnf_command(*TINY, "--resume")
    assert code == 0 and "going on with digits-odenet" in err
    assert model(RUN) == model(finished) and losses(RUN) == losses(finished)
    assert names(RUN) == FILES


def test_what_came_after_the_last_snapshot_is_done_again(
    cnf_command, monkeypatch, finished: Path
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 8, kill)
        kept = iter([False, True, False, False, True, False])  # after steps 3 and 6
        patch.setattr("cnf.training.snapshot.Interval.is_over", lambda self: next(kept))
        with pytest.raises(Killed):
            cnf_command(*TINY)
    assert len(losses(RUN)) == 8
    with (RUN / folder.STEPS).open("a") as file:
        file.write('{"phase": "cla')  # torn
    assert cnf_command("mnist", "classify", "--resume", "--out", RUN).code == 0
    assert model(RUN) == model(finished) and losses(RUN) == losses(finished)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    def command(out: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "cnf", *TINY, "--steps", "150", "--out", out, *more]

    here = {**os.environ, "PYTHONPATH": str(Path(cnf.__file__).parents[1])}
    run = subprocess.Popen(
        command("killed", "--save-every", "0.01"), cwd=tmp_path, env=here, stderr=subprocess.PIPE
    )
    steps, end = tmp_path / "killed" / folder.STEPS, time.monotonic() + 600
    while run.poll() is None and time.monotonic() < end:
        if steps.exists() and steps.read_text().count("\n") > 20:
            break
        time.sleep(0.005)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL, "it had finished before it was killed"
    for out, more in (("killed", ("--resume",)), ("whole", ())):
        subprocess.run(command(out, *more), cwd=tmp_path, env=here, check=True, capture_output=True)
    assert model(tmp_path / "killed") == model(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def stopped(cnf_command, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        assert cnf_command(*TINY).code == 130


def test_other_settings_are_refused_when_resuming(cnf_command, monkeypatch, refusal) -> None:
    stopped(cnf_command, monkeypatch)
    sentence = refusal(*TINY, "--resume", "--lr", "0.5")
    assert "has lr 0.01, not 0.5" in sentence


def test_a_snapshot_of_another_net_is_refused(cnf_command, monkeypatch, refusal) -> None:
    stopped(cnf_command, monkeypatch)
    config = read_json(RUN / folder.CONFIG)
    config["settings"]["width"] = 8
    (RUN / folder.CONFIG).write_text(json.dumps(config))
    command = ("mnist", "classify", "--resume", "--out", RUN, "--quiet")
    assert "is not of this run" in refusal(*command)
    for path in RUN.glob("snapshot*"):
        path.write_bytes(b"torn")
    assert "and the snapshot before it are damaged" in refusal(*command)


def test_there_must_be_something_to_resume(cnf_command, refusal) -> None:
    assert "holds no run to resume" in refusal(*TINY, "--resume")
    assert cnf_command(*TINY).code == 0
    assert "the run has finished" in refusal(*TINY, "--resume")


# refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mnist",), "TASK"),
        (("mnist", "paint"), "invalid choice: 'paint'"),
        ((*TINY, "--stem", "wide"), "unknown stem 'wide'"),
        ((*TINY, "--method", "rk5"), "unknown method 'rk5'"),
        ((*TINY, "--rtol", "1e-3"), "not allowed with argument --nfe"),
        ((*TINY, "--validation", "2000"), "validation=2000 leaves none"),
        ((*TINY, "--net", "mlp", "--energy", "0.1"), "mlp has none"),
        ((*TINY, "--drops", "0.5,1.5"), "'1.5' is not a number from 0 to below 1"),
        ((*TINY, "--resume", "--overwrite"), "not allowed with argument"),
        ((*TINY, "--device", "abacus"), "is no device"),
        (("mnist", "classify", "--data", "typo"), "there is no folder typo"),
        (("mnist", "classify", "--data", "."), "MNIST is neither in"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: tuple[str, ...], words: str, refusal) -> None:
    assert words in refusal(*arguments)


def test_a_density_is_not_asked_of_a_classifier(cnf_command, refusal, finished: Path) -> None:
    sentence = refusal("sample", finished, "-n", 3, "-o", "s.csv")
    assert "holds a classifier, which has no density" in sentence


def test_images_come_from_the_folder_that_was_named(cnf_command, monkeypatch) -> None:
    asked = []

    def mnist(root, *, name, download):
        asked.append((root, name, download))
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (60, 28, 28), dtype=np.uint8)
        return cnf.data.Images(name, images, np.arange(60) % 10, images, np.arange(60) % 10)

    monkeypatch.setattr("cnf.odenet.recipe.mnist", mnist)
    few = ("--steps", "1", "--width", "2", "--validation", "20", "--nfe", "2")
    for more in ((), ("--data", "here", "--dataset", "kmnist"), ("--no-download",)):
        assert cnf_command("mnist", "classify", *few, *more).code == 0
    assert asked == [(None, "mnist", True), ("here", "kmnist", False), (None, "mnist", False)]


def test_threads_are_given_to_torch(cnf_command) -> None:
    assert cnf_command(*TINY, "--steps", 1).code == 0
    assert torch.get_num_threads() == 1


def test_settings_are_what_the_page_lists(capsys) -> None:
    assert main(["mnist", "classify", "--help"]) == 0
    page = capsys.readouterr().out
    for name in vars(Settings()):
        flag = "--steady" if name == "timed" else "--" + name.replace("_", "-")
        assert flag in page


def test_a_run_that_goes_on_reads_the_images_that_it_began_with(
    cnf_command, monkeypatch, tmp_path
) -> None:
    asked = []

    def images_of(dataset, folder, download):
        asked.append((folder, download))
        return images("digits", None, False)

    images = classify.images_of
    monkeypatch.setattr(classify, "images_of", images_of)
    for out, more in (("one", ("--no-download",)), ("two", ("--data", "here"))):
        with monkeypatch.context() as patch:
            at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
            assert cnf_command(*TINY, *more, "--out", out).code == 130
        assert cnf_command("mnist", "classify", "--resume", "--out", out).code == 0
    assert asked[:2] == [(None, False)] * 2
    assert asked[2:] == [("here", False), (str(tmp_path / "here"), False)]


def test_another_preset_is_refused_when_resuming(cnf_command, monkeypatch, refusal) -> None:
    stopped(cnf_command, monkeypatch)
    assert "has preset 'quick', not 'paper'" in refusal(*TINY, "--resume", "--preset", "paper")


def test_overwrite_removes_programs_of_the_older_net(cnf_command) -> None:
    assert cnf_command(*TINY, "--steps", 1).code == 0
    program = RUN / "model-nfe8.pt2"
    program.write_text("of the older net")
    assert cnf_command(*TINY, "--steps", 1, "--overwrite").code == 0
    assert not program.exists()


def test_a_report_that_was_interrupted_is_made_when_the_run_goes_on(
    cnf_command, monkeypatch, finished: Path
) -> None:
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(classify, "_figures", interrupted)
        code, _, err = cnf_command(*TINY)
    assert code == 130
    assert err.count("goes on from here") == 1 and "cnf mnist classify --resume --out" in err
    assert cnf_command(*TINY, "--resume").code == 0
    assert model(RUN) == model(finished) and names(RUN) == FILES
