"""The front door: help, exit codes, and where words go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cnf
from cnf.cli import fit, main
from cnf.error import IntegrationError
from cnf.training.loop import TrainingError

PYTHON = (sys.executable, "-m", "cnf")
HERE = {**os.environ, "PYTHONPATH": str(Path(cnf.__file__).parents[1])}  # from any folder


def raising(error: BaseException):
    def run(arguments: object) -> None:
        raise error

    return run


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from cnf.cli import main; main(['--help']); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=HERE, capture_output=True, text=True, check=True
    )
    *page, modules = run.stdout.splitlines()
    assert not {"torch", "numpy", "matplotlib"} & set(modules.split())
    assert "cnf fit moons" in "\n".join(page)


@pytest.mark.skipif(sys.platform == "win32", reason="no times of child processes there")
@pytest.mark.parametrize("module", ["cnf", "cnf.cli"])
def test_help_is_there_at_once(module: str) -> None:
    before = os.times()
    command = [sys.executable, "-m", module, "--help"]
    subprocess.run(command, env=HERE, capture_output=True, check=True)
    after = os.times()  # of the processor: others may keep it busy
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 0.5


VERBS = ("fit", "sample", "logprob", "check", "plot", "mnist", "export", "reproduce", "doctor")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_examples(verb: str, capsys) -> None:
    assert main([verb, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: cnf {verb} ")
    assert f"\n  cnf {verb} " in page


def test_version_goes_to_stdout(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cnf {cnf.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", f"name a verb: {', '.join(VERBS)}; see cnf --help"),
        ("fot", "invalid choice: 'fot'"),
        ("fit", "required: DATA; see cnf fit --help"),
        ("fit moons --steps 0", "argument --steps: '0' is not a whole number above 0"),
        ("fit moons --steps 1.5", "'1.5' is not a whole number"),
        ("fit moons --seconds -1", "'-1' is not a number above 0"),
        ("fit moons --seconds nan", "'nan' is not a number above 0"),
        ("fit moons --seconds inf", "'inf' is not a number above 0"),
        ("fit moons --seconds 1 --steps 1", "not allowed with argument"),
        ("fit moons --seed -1", "'-1' is not a whole number from 0"),
        ("fit moons --seed 99999999999999999999", "is not a whole number from 0"),
        ("fit moons --hidden 8,", "'' is not a whole number above 0"),
        ("fit moons --method newton", "invalid choice: 'newton'"),
        ("fit t.csv --columns a,,b", "'a,,b' leaves a name empty"),
        ("fit moons --step 3", "unrecognized arguments: --step 3"),
        ("sample runs/moons -n 0 -o a.csv", "argument -n: '0' is not"),
        ("sample runs/moons -n 3", "required: -o"),
        ("logprob runs/moons -o a.csv", "required: FILE"),
    ],
)
def test_wrong_use_is_a_sentence(arguments: str, words: str, refusal) -> None:
    assert words in refusal(*arguments.split())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (IntegrationError("step shrank\nat t=0.5; try rk4"), 1, "step shrank at t=0.5; try rk4"),
        (TrainingError("no batch was finite; try a smaller lr"), 1, "no batch was finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("the best weights are in r"), 130, "interrupted; the best weights"),
        (FileNotFoundError(2, "No such file", "a.npy"), 2, "a.npy: No such file"),
        (PermissionError(13, "Permission denied", "a.npy"), 2, "a.npy: Permission denied"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_errors_are_told_in_a_line(error, code, words, capsys, monkeypatch) -> None:
    monkeypatch.setattr(fit, "run", raising(error))
    assert main(["fit", "moons"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"cnf: {words}") and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch) -> None:
    monkeypatch.setattr(fit, "run", raising(error))
    with pytest.raises(type(error)):
        main(["fit", "moons"])


def test_the_exit_code_is_the_process_s(tmp_path: Path) -> None:
    run = subprocess.run(
        [*PYTHON, "fit", "moon"],
        cwd=tmp_path,
        env=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "did you mean 'moons'" in run.stderr and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    line = f"{sys.executable} -m cnf fit --help | true"
    run = subprocess.run(["bash", "-c", line], env=HERE, capture_output=True, text=True, check=True)
    assert run.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_an_interrupted_fit_keeps_its_best_weights(tmp_path: Path) -> None:
    def interruptible() -> None:  # a shell starts what runs in the background with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = [*PYTHON, "fit", "moons", "--steps", "100000", "--rows", "2000", "--hidden", "8,8"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=HERE, stderr=subprocess.PIPE, text=True,
        preexec_fn=interruptible,
    )  # fmt: skip
    record = tmp_path / "runs/moons/metrics.jsonl"
    while process.poll() is None and not (record.exists() and record.stat().st_size > 0):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cnf: interrupted; the best weights so far are in runs/moons" in err
    assert "Traceback" not in err
    assert main(["sample", str(tmp_path / "runs/moons"), "-n", "2", "-o",
                 str(tmp_path / "s.csv")]) == 0  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:117] can't allocate memory: 8 GB"),
     torch.OutOfMemoryError("CUDA out of memory.")],
)  # fmt: skip
def test_too_much_for_the_memory_is_one_sentence(error, monkeypatch, capsys):
    def run(arguments):
        raise error

    monkeypatch.setattr("cnf.cli.fit.run", run)
    assert main(["fit", "moons"]) == 2
    assert capsys.readouterr().err.startswith("cnf: the memory does not hold this; ask for less")


def test_another_runtime_error_keeps_its_traceback(monkeypatch):
    def run(arguments):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("cnf.cli.fit.run", run)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["fit", "moons"])
