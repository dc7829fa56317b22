"""A training that was put down goes on as if nothing had happened."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.error import InputError
from cnf.training import snapshot
from cnf.training.batches import Shuffled
from cnf.training.loop import Best, Plan, Progress, Training
from cnf.training.optimizer import SGD, Adam, Optimizer
from cnf.training.snapshot import Interval, Snapshots, opened, postponed_signals

CPU = torch.device("cpu")


class Fit(nn.Module):
    """Least squares with dropout: its loss depends on torch's random state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.layer(x) - y).square().mean()


def begun(optimizer: Optimizer) -> Training:
    torch.manual_seed(1)
    x = torch.randn(50, 3)
    module = Fit()
    plan = Plan("demo", steps=40, lr=0.02, validations=8, optimizer=optimizer)
    validate = lambda: module(x, x[:, :1]).item()  # noqa: E731
    batches = Shuffled((x, x[:, :1]), 16)
    return Training(module, batches, plan, validate=validate, best=Best())


def told(record: Progress) -> tuple[object, ...]:
    """A record without its times."""
    return record.step, record.steps, record.loss, record.lr, record.validation


@pytest.mark.parametrize("optimizer", [Adam(weight_decay=0.1), SGD()])
@pytest.mark.parametrize("stop", [1, 17, 40])
def test_a_resumed_training_ends_bit_for_bit_alike(
    stop: int, optimizer: Optimizer, tmp_path: Path
) -> None:
    path = tmp_path / "snapshot.pt"
    whole = begun(optimizer)
    records = []
    for record in whole:
        records.append(told(record))
        if record.step == stop:
            Snapshots(path).write(whole.state_dict(), CPU)
    torch.rand(7)  # what others drew meanwhile does not matter
    again, kept = begun(optimizer), Snapshots(path).read()
    assert kept.state["step"] == stop
    follow = Snapshots(path, begun=kept).follow(again, CPU)
    assert [told(record) for record in follow] == records[stop:]
    for one, other in (
        (whole.module.state_dict().values(), again.module.state_dict().values()),
        (whole.average.weights, again.average.weights),
        (whole.best.weights, again.best.weights),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert whole.best.score == again.best.score


def test_time_goes_on_where_it_stopped() -> None:
    first = begun(Adam())
    record = next(iter(first))
    state = first.state_dict()
    state["clock"]["elapsed"] = 100.0
    again = begun(Adam())
    again.load_state_dict(state)
    assert next(iter(again)).seconds > 100.0 > record.seconds


def test_what_tells_chance_comes_back(tmp_path: Path) -> None:
    training = begun(Adam())
    training.best.offer(5.0, training.average.weights, torch.tensor([4.0, 6.0]))
    Snapshots(tmp_path / "snapshot.pt").write(training.state_dict(), CPU)
    again = begun(Adam())
    again.load_state_dict(Snapshots(tmp_path / "snapshot.pt").read().state)
    assert again.best.lowest == 5.0 and again.best.losses.tolist() == [4.0, 6.0]


def test_a_snapshot_from_before_chance_was_told_has_its_lowest_score(tmp_path: Path) -> None:
    training = begun(Adam())
    training.best.offer(5.0, training.average.weights)
    state = training.state_dict()
    state["best"] = {name: state["best"][name] for name in ("score", "weights", "age")}
    again = begun(Adam())
    again.load_state_dict(state)
    assert again.best.lowest == 5.0
    again.best.offer(5.5, again.average.weights)
    assert again.best.score == 5.0


def test_batches_without_a_place_are_left_alone() -> None:
    module = Fit()
    x = torch.randn(4, 3)
    training = Training(module, lambda: (x, x[:, :1]), Plan("demo", steps=2),
                        validate=lambda: 0.0, best=Best())  # fmt: skip
    list(training)
    assert training.state_dict()["batches"] is None


# the file -----------------------------------------------------------------------------------------


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    """Two of them, of steps 1 and 2."""
    found = Snapshots(tmp_path / "s.pt")
    for step in (1, 2):
        found.write({"step": step}, CPU)
    return found


def test_the_random_state_comes_back(tmp_path: Path) -> None:
    Snapshots(tmp_path / "s.pt").write({}, CPU)
    expected = torch.rand(5)
    Snapshots(tmp_path / "s.pt").read().restore_random(CPU)
    assert torch.equal(torch.rand(5), expected)


def test_there_are_two_of_them_and_no_more(snapshots: Snapshots) -> None:
    snapshots.write({"step": 3}, CPU)
    assert {path.name for path in snapshots.path.parent.iterdir()} == {"s.pt", "s-before.pt"}
    assert snapshots.read().state == {"step": 3}
    assert Snapshots(snapshots.before).read().state == {"step": 2}
    snapshots.remove()
    assert not any(snapshots.path.parent.iterdir()) and not snapshots.exist


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_snapshot_is_whole_or_the_one_before(
    failing: str, snapshots: Snapshots, monkeypatch
) -> None:
    before = {path: path.read_bytes() for path in snapshots.path.parent.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match=r"No space left on device; what was there .* is kept"):
        snapshots.write({"step": 3}, CPU)
    assert {path: path.read_bytes() for path in snapshots.path.parent.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_a_disk_that_fills_up_in_the_middle_leaves_what_was_there(snapshots: Snapshots) -> None:
    code = (
        "import resource, signal, torch\n"
        "from pathlib import Path\n"
        "from cnf.training.snapshot import Snapshots\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"path = Path({str(snapshots.path)!r})\n"
        "state = {'step': 3, 'weights': torch.zeros(100_000)}\n"
        "Snapshots(path).write(state, torch.device('cpu'))"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(cnf.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True)
    assert run.returncode == 1 and "File too large; what was there" in run.stderr
    assert {path.name for path in snapshots.path.parent.iterdir()} == {"s.pt", "s-before.pt"}
    assert snapshots.read().state == {"step": 2}


def harmed(content: bytes) -> list[bytes]:
    flipped = bytearray(content)
    flipped[-300] ^= 1
    return [b"", content[:100], content[:-1], bytes(flipped), b"PK" + content[2:], b"no snapshot"]


@pytest.mark.parametrize("way", range(6))
def test_a_damaged_newest_gives_way_to_the_one_before(way: int, snapshots: Snapshots) -> None:
    snapshots.path.write_bytes(harmed(snapshots.path.read_bytes())[way])
    kept = snapshots.read()
    assert kept.state == {"step": 1}
    assert kept.warning == f"{snapshots.path} is damaged; going on from the one before it"
    with pytest.warns(UserWarning, match="is damaged; going on from the one before it"):
        found = opened(snapshots.path)
    assert found is not None and found.begun is not None and found.begun.state == {"step": 1}
    snapshots.before.write_bytes(b"no snapshot")
    with pytest.raises(InputError, match="and the snapshot before it are damaged"):
        snapshots.read()


def test_a_newest_that_is_not_there_yet_is_the_one_before(snapshots: Snapshots) -> None:
    snapshots.path.unlink()
    kept = snapshots.read()
    assert kept.state == {"step": 1} and kept.warning is None


def test_damaged_and_missing_snapshots_are_refused(tmp_path: Path) -> None:
    found = Snapshots(tmp_path / "s.pt")
    with pytest.raises(InputError, match=r"there is no .*s\.pt to resume from"):
        found.read()
    found.write({"step": 1}, CPU)
    for content in harmed(found.path.read_bytes()):
        found.path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged or no snapshot"):
            found.read()
    torch.save({"weights": torch.ones(2)}, found.path)
    with pytest.raises(InputError, match="is damaged or no snapshot"):
        found.read()


def test_no_code_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    content = io.BytesIO()
    torch.save({"random": {}, "state": Harm()}, content)
    bare, pickled = content.getvalue(), pickle.dumps(Harm(), protocol=2)
    for made in (bare, snapshot._sealed(bare), pickled, snapshot._sealed(pickled)):
        (tmp_path / "s.pt").write_bytes(made)
        with pytest.raises(InputError, match="is damaged or no snapshot"):
            Snapshots(tmp_path / "s.pt").read()
    assert not (tmp_path / "harm").exists()


def test_another_format_is_named(snapshots: Snapshots, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "FORMAT", 7)
    snapshots.write({}, CPU)
    monkeypatch.undo()
    with pytest.raises(InputError, match="has format 7, this version reads format 2 and older"):
        snapshots.read()


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    random = {"cpu": torch.get_rng_state()}
    torch.save({"format": 1, "random": random, "state": {"step": 4}}, tmp_path / "s.pt")
    assert Snapshots(tmp_path / "s.pt").read().state == {"step": 4}


# when ---------------------------------------------------------------------------------------------


def test_an_interval_is_over_once_each_time(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: now[0])
    interval = Interval(10)
    seen = []
    for now[0] in (5.0, 10.0, 12.0, 19.0, 21.0):
        seen.append(interval.is_over())
    assert seen == [False, True, False, False, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_block_and_a_second_does_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with postponed_signals() as came:
        assert not came()
        signal.raise_signal(number)
        assert came()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_snapshots_are_written_when_it_is_time(tmp_path: Path) -> None:
    """After the first step, at the interval, and at the end; then a signal stops the training."""
    seen = []
    found = Snapshots(tmp_path / "s.pt", every=1e9)
    for record in found.follow(begun(Adam()), CPU):
        seen.append((record.step, found.read().state["step"] if found.exist else None))
    assert seen[:3] == [(1, None), (2, 1), (3, 1)] and seen[-1] == (40, 1)
    assert found.read().state["step"] == 40
    stopped = Snapshots(tmp_path / "t.pt", every=1e9)
    with pytest.raises(KeyboardInterrupt):
        for record in stopped.follow(begun(Adam()), CPU):
            if record.step == 9:
                signal.raise_signal(signal.SIGTERM)
    assert stopped.read().state["step"] == 9
