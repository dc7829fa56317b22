"""Commands that torchrun starts in two processes: one voice, one folder, one process's answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cnf.cli import main
from cnf.cli.folder import FIGURES, MODEL, SNAPSHOT, STEPS
from cnf.cli.rank import PERHAPS, refuse_unshared
from cnf.error import InputError

FIT = ("fit", "rows.npy", "--hidden", "8,8", "--batch-size", "64", "--quiet", "--json")
CLASSIFY = ("mnist", "classify", "--dataset", "digits", "--width", "4", "--stem", "fine", "--nfe",
            "4", "--batch-size", "32", "--quiet", "--json")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a table in it, where commands run."""
    rows = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def started(environment: dict[str, str], folder: Path, *arguments: str) -> Iterator[Any]:
    """A command in two processes that is under way."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "cnf", *arguments,
    ]  # fmt: skip
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def wait_for_steps(folder: Path, steps: int) -> None:
    """Until so many are on record."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / STEPS
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {steps} steps in {folder}")


def children(pid: int) -> list[int]:
    """Processes that a process started, the eldest first."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def without(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(folder / MODEL).items() if name not in names}


def test_a_fit_is_one_run_and_that_of_one_process(
    folder: Path, torchrun: Callable[..., Any]
) -> None:
    """Both fits go through flow matching and maximum likelihood, in single precision."""
    fit = (*FIT, "--steps", "40")
    assert main([*fit, "--out", "one"]) == 0
    ended = torchrun(folder, "-m", "cnf", *fit, "--out", "two")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)  # one object: the other rank prints nothing
    alone = json.loads((folder / "one" / FIGURES).read_text())
    assert figures["steps"] == alone["steps"]
    assert (folder / "two" / STEPS).read_text().count("\n") == alone["steps"]
    assert sorted(p.name for p in folder.iterdir()) == ["one", "rows.npy", "two"]
    one, two = without(folder / "one"), without(folder / "two")
    assert all(torch.allclose(two[name], one[name], atol=1e-3) for name in one)


def test_commands_of_one_process_are_refused() -> None:
    refuse_unshared(Namespace(verb="fit"), 2)
    refuse_unshared(Namespace(verb="mnist", task="classify"), 2)
    with pytest.raises(InputError, match="`cnf check` is one process's work, not that of 2 ranks"):
        refuse_unshared(Namespace(verb="check"), 2)


@pytest.mark.slow
def test_samples_and_log_densities_are_in_order_and_those_of_one_process(
    folder: Path, torchrun: Callable[..., Any]
) -> None:
    assert main([*FIT, "--steps", "30", "--out", "run"]) == 0
    for command, name in (
        (("sample", "run", "-n", "333", "--seed", "5"), "samples"),
        (("logprob", "run", "rows.npy"), "log_prob"),
    ):
        assert main([*command, "-o", f"{name}-1.npy"]) == 0
        ended = torchrun(folder, "-m", "cnf", *command, "-o", f"{name}-2.npy")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("\n") == 1
        one, two = (np.load(folder / f"{name}-{count}.npy") for count in (1, 2))
        assert one.shape == two.shape and np.abs(one - two).max() < 1e-5


@pytest.mark.slow
def test_a_classifier_is_trained_by_both(folder: Path, torchrun: Callable[..., Any]) -> None:
    ended = torchrun(folder, "-m", "cnf", *CLASSIFY, "--epochs", "1", "--out", "run")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert figures["test_error"] < 0.9
    assert json.loads((folder / "run" / "config.json").read_text())["ranks"] == 2
    assert not (folder / "run" / SNAPSHOT).exists()


@pytest.mark.slow
def test_a_flow_over_images_is_trained_by_both_and_judged_by_the_first(
    folder: Path, torchrun: Callable[..., Any]
) -> None:
    few = ("--steps", "4", "--width", "8", "--images", "10", "--samples", "10", "--nfe", "4")
    told = ("mnist", "generate", "--dataset", "digits", *few, "--out", "run", "--json")
    ended = torchrun(folder, "-m", "cnf", *told)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] == 4
    assert (folder / "run" / "samples.png").is_file()


TRAINED_AND_PARTED = """
from argparse import Namespace
from pathlib import Path

import torch

from cnf.cli.rank import joined
from cnf.training.ranks import here


def train():
    here().over(torch.nn.Linear(2, 1))(torch.ones(3, 2)).sum().backward()


def threads():
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


with joined(Namespace(verb="fit")):
    train()
    assert any("gloo" in name for name in threads()), threads()
assert not any("gloo" in name for name in threads()), threads()
"""


@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it(folder: Path, torchrun: Callable[..., Any]) -> None:
    """One that needs the interpreter while that ends aborts the process, and the others with it."""
    (folder / "program.py").write_text(TRAINED_AND_PARTED)
    ended = torchrun(folder, "program.py")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run_with_a_message(
    folder: Path, environment: dict[str, str], rank: int
) -> None:
    with started(environment, folder, *FIT, "--seconds", "100", "--out", "run") as process:
        wait_for_steps(folder / "run", 20)
        os.kill(children(process.pid)[rank], signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    # the other rank notices, or torchrun tells it first
    assert f"cnf: rank {1 - rank} of 2 has lost another rank" in told or PERHAPS in told


@pytest.mark.slow
@pytest.mark.parametrize("command", [(*FIT, "--steps", "300"), (*CLASSIFY, "--epochs", "4")])
def test_a_training_goes_on_after_a_rank_has_died(
    folder: Path,
    environment: dict[str, str],
    torchrun: Callable[..., Any],
    command: tuple[str, ...],
) -> None:
    """Bit for bit, as if nothing had happened."""
    command = (*command, "--save-every", "0.2", "--out")
    with started(environment, folder, *command, "run") as process:
        wait_for_steps(folder / "run", 60)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        process.communicate(timeout=60)
    assert (folder / "run" / SNAPSHOT).exists()
    for out, more in (("run", ("--resume",)), ("straight", ())):
        ended = torchrun(folder, "-m", "cnf", *command, out, *more)
        assert ended.returncode == 0, ended.stderr
    resumed, whole = without(folder / "run"), without(folder / "straight")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_both_and_keeps_what_there_is(
    folder: Path, environment: dict[str, str], number: int
) -> None:
    with started(environment, folder, *FIT, "--seconds", "100", "--out", "run") as process:
        wait_for_steps(folder / "run", 20)
        ranks = children(process.pid)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert "cnf: interrupted; the best weights so far are in run" in told
    assert (folder / "run" / MODEL).exists()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_what_is_wrong_is_told_once(folder: Path, torchrun: Callable[..., Any]) -> None:
    for arguments, sentence in (
        (("fit", "missing.npy"), "missing.npy"),
        (("fit", "rows.npy", "--batch-size", "1"), "a batch of 1 rows leaves none"),
    ):
        ended = torchrun(folder, "-m", "cnf", *arguments)
        assert ended.returncode == 1 and ended.stdout == ""
        told = [line for line in ended.stderr.splitlines() if line.startswith("cnf: ")]
        assert len(told) == 1 and sentence in told[0]
