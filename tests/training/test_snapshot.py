"""A training that was put down goes on as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cnf.error import InputError
from cnf.training import snapshot
from cnf.training.batches import Shuffled
from cnf.training.loop import Best, Plan, Progress, Training
from cnf.training.optimizer import SGD, Adam, Optimizer
from cnf.training.snapshot import Interval, postponed_signals, read_snapshot, write_snapshot

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
            write_snapshot(path, whole.state_dict(), CPU)
    torch.rand(7)  # what others drew meanwhile does not matter
    again = begun(optimizer)
    again.load_state_dict(read_snapshot(path, CPU))
    assert again.step == stop
    assert [told(record) for record in again] == records[stop:]
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


def test_batches_without_a_place_are_left_alone() -> None:
    module = Fit()
    x = torch.randn(4, 3)
    training = Training(module, lambda: (x, x[:, :1]), Plan("demo", steps=2),
                        validate=lambda: 0.0, best=Best())  # fmt: skip
    list(training)
    assert training.state_dict()["batches"] is None


# the file -----------------------------------------------------------------------------------------


def test_the_random_state_comes_back(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "s.pt", {}, CPU)
    expected = torch.rand(5)
    read_snapshot(tmp_path / "s.pt", CPU)
    assert torch.equal(torch.rand(5), expected)


def test_a_snapshot_is_whole_or_the_one_before(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "s.pt"
    write_snapshot(path, {"step": 1}, CPU)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(path, {"step": 2}, CPU)
    assert read_snapshot(path, CPU) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["s.pt"]


def test_damaged_and_missing_snapshots_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    with pytest.raises(InputError, match=r"there is no .*s\.pt to resume from"):
        read_snapshot(path, CPU)
    write_snapshot(path, {"step": 1}, CPU)
    whole = path.read_bytes()
    for content in (b"", whole[:100], b"PK" + whole[2:-30], b"no zip at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged or no snapshot"):
            read_snapshot(path, CPU)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(InputError, match="is damaged or no snapshot"):
        read_snapshot(path, CPU)


def test_no_code_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": 1, "random": {}, "state": Harm()}, tmp_path / "s.pt")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Harm(), protocol=2))
    for name in ("s.pt", "p.pt"):
        with pytest.raises(InputError, match="is damaged or no snapshot"):
            read_snapshot(tmp_path / name, CPU)
    assert not (tmp_path / "harm").exists()


def test_another_format_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "FORMAT", 7)
    write_snapshot(tmp_path / "s.pt", {}, CPU)
    monkeypatch.undo()
    with pytest.raises(InputError, match="has format 7, this version reads format 1"):
        read_snapshot(tmp_path / "s.pt", CPU)


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
