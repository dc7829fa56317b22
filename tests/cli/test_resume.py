"""`cnf fit --resume`, the faults that a run survives, and the lock of its folder."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cnf
from cnf.cli import folder, main
from cnf.cli.folder import RunFolder, claimed_folder, resumed_folder, unfinished
from cnf.cli.lock import LOCK, is_locked, locked
from cnf.error import InputError
from cnf.flow import pilot
from cnf.training.snapshot import Snapshots

TINY = ("fit", "moons", "--steps", "20", "--hidden", "8,8", "--batch-size", "32", "--threads", "1",
        "--save-every", "0.000001")  # fmt: skip
RUN = Path("runs/moons")
HERE = {**os.environ, "PYTHONPATH": str(Path(cnf.__file__).parents[1])}


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Trials of the field take a third of few steps."""
    patch.setattr(pilot, "LEAST_STEPS", 1)
    patch.setattr(pilot, "SHARE", 0.3)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def model(path: Path) -> bytes:
    return (path / folder.MODEL).read_bytes()


def steps(path: Path) -> list[tuple[str, int, float]]:
    lines = map(json.loads, (path / folder.STEPS).read_text().splitlines())
    return [(line["phase"], line["step"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests do not write into it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        assert main([*TINY, "--out", str(out), "--quiet"]) == 0
    return out


class Killed(BaseException):
    """In the place of SIGKILL: nothing is tidied up."""


def kill() -> None:
    raise Killed


def at_record(monkeypatch: pytest.MonkeyPatch, number: int, happen) -> None:
    """Something happens once so many records were written."""
    add, count = RunFolder.add_step, 0

    def added(self, record):
        nonlocal count
        add(self, record)
        count += 1
        if count == number:
            happen()

    monkeypatch.setattr(RunFolder, "add_step", added)


@pytest.fixture
def killed(cnf_command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was killed at its 9th record, after its 8th snapshot."""
    with monkeypatch.context() as patch:
        at_record(patch, 9, kill)
        with pytest.raises(Killed):
            cnf_command(*TINY)
    return RUN


# going on -----------------------------------------------------------------------------------------


def test_a_killed_run_ends_as_if_nothing_had_happened(
    killed: Path, cnf_command, finished: Path
) -> None:
    assert folder.MODEL not in names(killed) and len(steps(killed)) == 9
    with (killed / folder.STEPS).open("a") as file:
        file.write('{"phase": "fm", "st')  # torn
    (killed / ".torn.tmp").write_bytes(b"half a snapsh")
    code, out, err = cnf_command("fit", "--resume", "--out", killed)
    assert code == 0 and "going on with moons" in err and "held-out NLL" in out
    assert model(killed) == model(finished) and steps(killed) == steps(finished)
    assert names(killed) == set(folder.FILES) - {folder.SAMPLES}
    figures = read_json(killed / folder.FIGURES)
    assert figures["nll"] == read_json(finished / folder.FIGURES)["nll"]
    assert figures["steps"] == 20
    config = read_json(killed / folder.CONFIG)
    assert config["arguments"]["steps"] == 20 and config["arguments"]["data"] == "moons"


def test_a_chosen_field_goes_on_too(cnf_command, monkeypatch) -> None:
    monkeypatch.setattr(pilot, "WIDTHS", ((8, 8), (4, 4)))
    monkeypatch.setattr("cnf.flow.transport.WIDTHS", pilot.WIDTHS)
    command = ("fit", "moons", "--steps", "30", "--batch-size", "32", "--threads", "1")
    assert cnf_command(*command, "--out", "whole").code == 0
    assert {phase for phase, *_ in steps(Path("whole"))} == {"pilot", "fm", "ml"}
    for stop in (4, 20):
        with monkeypatch.context() as patch:
            at_record(patch, stop, kill)
            with pytest.raises(Killed):
                cnf_command(*command, "--out", f"at{stop}", "--save-every", "1e-6")
        assert cnf_command("fit", "--resume", "--out", f"at{stop}").code == 0
        assert model(Path(f"at{stop}")) == model(Path("whole"))
        assert steps(Path(f"at{stop}")) == steps(Path("whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_model_and_a_run_that_goes_on(
    number: signal.Signals, cnf_command, monkeypatch, finished: Path
) -> None:
    with monkeypatch.context() as patch:
        at_record(patch, 5, lambda: signal.raise_signal(number))
        code, out, err = cnf_command(*TINY)
    assert (code, out) == (130, "") and len(steps(RUN)) == 5
    assert err.splitlines()[-1] == (
        "cnf: interrupted; the best weights so far are in runs/moons; "
        "`cnf fit --resume --out runs/moons` goes on from here"
    )
    assert cnf.Flow.load(RUN / folder.MODEL).dim == 2
    assert cnf_command("fit", "moons", "--resume").code == 0
    assert model(RUN) == model(finished) and steps(RUN) == steps(finished)


def test_a_run_that_was_only_to_be_judged_is_judged(cnf_command, monkeypatch, finished) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cnf.cli.fit.held_out", lambda *arguments: kill())
        with pytest.raises(Killed):
            cnf_command(*TINY)
    assert cnf_command("fit", "--resume", "--out", RUN).code == 0
    assert model(RUN) == model(finished) and steps(RUN) == steps(finished)
    assert read_json(RUN / folder.FIGURES)["steps"] == 20


def test_the_newest_unfinished_run_of_a_name_is_found(cnf_command, killed: Path) -> None:
    os.rename(killed, "runs/moons-3")
    for name in ("moons", "moons-2", "moons-three", "moonshine"):
        Path("runs", name).mkdir()
        Path("runs", name, folder.CONFIG).write_text("{}")
    assert unfinished("runs/moons") == "runs/moons-3"
    with locked(Path("runs/moons-3")):
        assert unfinished("runs/moons") == "runs/moons"
    assert cnf_command("fit", "moons", "--resume", "--quiet").code == 0
    assert folder.MODEL in names(Path("runs/moons-3"))


def test_a_table_is_found_from_another_folder(cnf_command, monkeypatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(80, 2)
    Path("t.csv").write_text("\n".join(f"{a},{b}" for a, b in x.tolist()))
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_record(patch, 4, kill)
        with pytest.raises(Killed):
            cnf_command(*TINY[:1], "t.csv", *TINY[2:], "--out", out)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["fit", "--resume", "--out", str(out), "--quiet"]) == 0


# refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--steps 21", "has steps 20, not 21; leave that out"),
        ("--seconds 5", "has seconds None, not 5.0"),
        ("--seed 1", "has seed 0, not 1"),
        ("--hidden 8", "has hidden [8, 8], not [8]"),
        ("--bandwidth none", "has bandwidth 'auto', not None"),
        ("--batch-size 33", "has batch-size 32, not 33"),
        ("--overwrite", "not allowed with argument"),
    ],
)
def test_other_settings_are_refused(arguments: str, words: str, killed: Path, refusal) -> None:
    assert words in refusal("fit", "--resume", "--out", killed, *arguments.split())


def test_other_data_are_refused(killed: Path, refusal) -> None:
    assert "has data 'moons', not 'rings'" in refusal("fit", "rings", "--resume", "--out", killed)


def test_there_must_be_something_to_resume(cnf_command, refusal, finished: Path) -> None:
    assert "name its folder with --out, or its DATA" in refusal("fit", "--resume")
    assert "holds no run to resume" in refusal("fit", "moons", "--resume")
    assert "the run has finished" in refusal("fit", "--resume", "--out", finished)
    assert "holds no classifier" in refusal("mnist", "classify", "--resume", "--out", finished) or (
        "the run has finished" in refusal("mnist", "classify", "--resume", "--out", finished)
    )


def test_a_run_of_a_newer_version_is_named(killed: Path, refusal) -> None:
    config = read_json(killed / folder.CONFIG)
    assert config["format"] == folder.FORMAT
    config |= {"format": 9, "versions": {"cnf": "4.0"}}
    (killed / folder.CONFIG).write_text(json.dumps(config))
    words = "is a run of format 9, written by cnf 4.0; this version reads format 1"
    assert words in refusal("fit", "--resume", "--out", killed)
    assert words in refusal("sample", killed, "-n", 3, "-o", "s.csv")


def test_a_run_of_an_older_version_is_read(killed: Path, cnf_command, finished: Path) -> None:
    config = read_json(killed / folder.CONFIG)
    del config["format"], config["threads"], config["arguments"]["steer"]
    (killed / folder.CONFIG).write_text(json.dumps(config))
    assert cnf_command("fit", "--resume", "--out", killed, "--threads", 1).code == 0
    assert model(killed) == model(finished)


# faults -------------------------------------------------------------------------------------------


def test_a_damaged_snapshot_gives_way_to_the_one_before(
    killed: Path, cnf_command, finished: Path
) -> None:
    path = killed / folder.SNAPSHOT
    path.write_bytes(path.read_bytes()[:-7])
    code, _, err = cnf_command("fit", "--resume", "--out", killed)
    assert code == 0
    assert f"cnf: warning: {path} is damaged; going on from the one before it" in err
    assert model(killed) == model(finished) and steps(killed) == steps(finished)


def test_two_damaged_snapshots_are_refused(killed: Path, refusal) -> None:
    for path in killed.glob("snapshot*"):
        path.write_bytes(b"torn")
    assert "and the snapshot before it are damaged" in refusal("fit", "--resume", "--out", killed)


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_snapshot_before(cnf_command, monkeypatch, finished: Path) -> None:
    with monkeypatch.context() as patch:
        at_record(patch, 6, lambda: patch.setattr(os, "fsync", full))
        code, out, err = cnf_command(*TINY)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "cnf: runs/moons/snapshot.pt: No space left on device; what was there before it is kept; "
        "make room, then `cnf fit --resume --out runs/moons` goes on"
    )
    assert not list(RUN.glob(".*")) and Snapshots(RUN / folder.SNAPSHOT).read().warning is None
    assert cnf_command("fit", "--resume", "--out", RUN).code == 0
    assert model(RUN) == model(finished) and steps(RUN) == steps(finished)


def test_a_full_disk_leaves_no_half_a_record(tmp_path: Path, monkeypatch) -> None:
    class Full(folder.FileIO):
        def write(self, line):  # type: ignore[no-untyped-def]
            return super().write(line[:3])

    with claimed_folder(str(tmp_path / "run"), False) as run:
        run.begin({})
        run.add_step({"step": 1})
        run.close()
        run._steps = Full(run.path / folder.STEPS, "a")
        with pytest.raises(OSError, match="No space left on device") as caught:
            run.add_step({"step": 2})
        assert caught.value.filename == str(run.path / folder.STEPS)
        assert (run.path / folder.STEPS).read_text() == '{"step": 1}\n'


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_refused_before_training(killed: Path, cnf_command) -> None:
    killed.chmod(0o500)
    try:
        code, _, err = cnf_command("fit", "--resume", "--out", killed)
    finally:
        killed.chmod(0o700)
    assert code == 2 and "cannot be written (Permission denied)" in err


def test_a_folder_on_a_read_only_disk_is_refused_before_training(
    killed: Path, refusal, monkeypatch
) -> None:
    opening = os.open

    def sealed(path, flags, *mode):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opening(path, flags, *mode)

    monkeypatch.setattr(os, "open", sealed)
    sentence = refusal("fit", "--resume", "--out", killed)
    assert "runs/moons cannot be written (Read-only file system)" in sentence
    sentence = refusal("fit", "moons", "--overwrite", "--out", killed)
    assert "runs/moons cannot be made or written (Read-only file system)" in sentence


# two in one folder --------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_by_name(killed: Path, refusal) -> None:
    with locked(killed):
        sentence = refusal("fit", "--resume", "--out", killed)
        assert f"{killed} is in use by process {os.getpid()} on " in sentence
        assert "is in use by process" in refusal("fit", "moons", "--overwrite", "--out", killed)
    assert not is_locked(killed) and LOCK not in names(killed)


def test_a_dead_process_keeps_nobody_out(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from cnf.cli.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=HERE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert is_locked(tmp_path)
    with pytest.raises(InputError, match=f"in use by process {holder.pid} on"), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    assert not is_locked(tmp_path) and names(tmp_path) == {LOCK}
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert names(tmp_path) == set()


def test_a_claim_and_its_resumption_hold_the_lock(tmp_path: Path) -> None:
    with claimed_folder(str(tmp_path / "run"), False) as run:
        run.begin({})
        assert is_locked(run.path)
        Snapshots(run.path / folder.SNAPSHOT).write({}, torch.device("cpu"))
    with resumed_folder(str(run.path)):
        assert is_locked(run.path)
        with pytest.raises(InputError, match="is in use"), resumed_folder(str(run.path)):
            pass
    assert not is_locked(run.path)


def test_what_a_run_left_that_never_began_may_be_overwritten(tmp_path: Path) -> None:
    for name in (folder.STEPS, LOCK, ".torn.tmp"):
        (tmp_path / name).touch()
    with claimed_folder(str(tmp_path), True) as run:
        assert run.path == tmp_path
        run.begin({})
    assert names(tmp_path) == {folder.STEPS, folder.CONFIG}


# kill -9 ------------------------------------------------------------------------------------------

FIT = ("fit", "moons", "--rows", "2000", "--steps", "400", "--batch-size", "64",
       "--hidden", "16,16", "--threads", "1")  # fmt: skip
CLASSIFY = ("mnist", "classify", "--dataset", "digits", "--steps", "250", "--width", "4",
            "--batch-size", "32", "--method", "euler", "--nfe", "2", "--threads", "1")  # fmt: skip


def command(arguments: tuple[str, ...], out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "cnf", *arguments, "--out", str(out), "--quiet", *more]


def seconds_of(arguments: tuple[str, ...], out: Path) -> float:
    start = time.monotonic()
    subprocess.run(command(arguments, out), env=HERE, check=True, capture_output=True)
    return time.monotonic() - start


def killed_after(arguments: tuple[str, ...], out: Path, ready, *more: str) -> bool:
    """Whether the run was killed, as soon as `ready()`, before it had ended."""
    run = subprocess.Popen(
        command(arguments, out, "--save-every", "0.05", *more), env=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    end = time.monotonic() + 600  # on a machine that is busy with other things
    while run.poll() is None and time.monotonic() < end and not ready():
        time.sleep(0.002)
    run.kill()
    said = run.communicate()[0].decode()
    assert run.returncode in (0, -signal.SIGKILL), said
    return run.returncode != 0


def records_in(out: Path) -> int:
    path = out / folder.STEPS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_fit_that_was_killed_twice_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(300, 2)))
    few = ("fit", str(tmp_path / "t.npy"), "--steps", "120", "--hidden", "8,8", "--threads", "1")
    seconds_of(few, whole)
    assert killed_after(few, out, lambda: records_in(out) > 20)
    assert killed_after(few, out, lambda: records_in(out) > 70, "--resume")
    subprocess.run(command(few, out, "--resume"), env=HERE, check=True, capture_output=True)
    assert model(out) == model(whole) and steps(out) == steps(whole)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [FIT, CLASSIFY], ids=["fit", "classify"])
def test_ten_kills_at_random_moments_change_no_bit(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """Each run is killed at a moment drawn from its whole length, while torch loads too."""
    whole, draw = tmp_path / "whole", random.Random(0)
    length = seconds_of(arguments, whole)
    kills = 0
    for i in range(10):
        out = tmp_path / f"run{i}"
        moment = time.monotonic() + draw.uniform(0, length)
        kills += killed_after(arguments, out, lambda moment=moment: time.monotonic() > moment)
        # without a snapshot it was killed before the first one, or had ended
        more = "--resume" if Snapshots(out / folder.SNAPSHOT).exist else "--overwrite"
        subprocess.run(command(arguments, out, more), env=HERE, check=True, capture_output=True)
        assert model(out) == model(whole) and steps(out) == steps(whole)
    assert kills >= 5


def test_a_config_without_data_is_refused(killed: Path, refusal) -> None:
    config = json.loads((killed / "config.json").read_text())
    del config["arguments"]["data"]
    (killed / "config.json").write_text(json.dumps(config))
    assert "holds no fit to resume" in refusal("fit", "--resume", "--out", killed)
