"""A fit that was stopped goes on as if nothing had happened, in whatever phase it was."""

from __future__ import annotations

import copy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cnf
from cnf.error import InputError
from cnf.flow import pilot
from cnf.training.loop import Progress
from cnf.training.snapshot import Snapshots

STEPS = 60


@pytest.fixture(autouse=True)
def _small_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "WIDTHS", ((8, 8), (4, 4), (6, 6)))
    monkeypatch.setattr("cnf.flow.transport.WIDTHS", pilot.WIDTHS)
    monkeypatch.setattr(pilot, "LEAST_STEPS", 2)
    monkeypatch.setattr(pilot, "SHARE", 0.4)  # 24 steps, four for each of six


class Killed(BaseException):
    """In the place of SIGKILL."""


class Dropout(nn.Module):
    """A field whose training draws random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.4]]))

    def forward(self, t, x):
        return nn.functional.dropout(torch.tanh(x @ self.weight), 0.2, self.training)


def rows(count: int = 300, columns: int = 2) -> torch.Tensor:
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] ** 2 + 0.3 * x[:, 1]
    return x


KINDS = {
    "chosen": {},
    "closed": {"hidden": (8, 8), "bandwidth": None},
    "hutchinson": {"hidden": (8,), "divergence": cnf.Hutchinson()},
    "base": {"base": cnf.StudentT(2), "hidden": (8, 8)},
    "context": {"context": 1, "context_dropout": 0.2, "hidden": (8, 8)},
}


def new(kind: str) -> cnf.Flow:
    if kind == "field":
        return cnf.Flow(2, field=Dropout(), method="rk4", step_size=0.5, gradient="backprop")
    return cnf.Flow(2, seed=0, **copy.deepcopy(KINDS[kind]))


def told(record: Progress) -> tuple[object, ...]:
    """A record without its times."""
    return (record.phase, record.step, record.steps, record.loss, record.lr, record.validation,
            record.nfe)  # fmt: skip


def fitted(
    flow: cnf.Flow, snapshot: Snapshots | Path | None = None, stop: int = 0, **settings
) -> list[tuple[object, ...]]:
    """The records of a fit; it is killed at the record `stop`, before its snapshot."""
    records: list[tuple[object, ...]] = []

    def keep(record: Progress) -> None:
        records.append(told(record))
        if len(records) == stop:
            raise Killed

    data = rows(columns=2 + flow.context)
    context = data[:, 2:].round() if flow.context else None
    settings = {"steps": STEPS, "seed": 0, "batch_size": 64, "progress": False, **settings}
    try:
        flow.fit(data[:, :2], context, snapshot=snapshot, callback=keep, **settings)
    except Killed:
        assert stop
    return records


def equal(one: cnf.Flow, other: cnf.Flow) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def often(path: Path) -> Snapshots:
    """Snapshots after every step."""
    return Snapshots(path, every=0.0)


@pytest.mark.parametrize("stop", [2, 5, 6, 21, 25, 26, 40, 58, 59, 60])
def test_it_ends_bit_for_bit_alike_wherever_it_was_stopped(stop: int, tmp_path: Path) -> None:
    path, whole, again = tmp_path / "s.pt", new("chosen"), new("chosen")
    expected = fitted(whole)
    phases = [phase for phase, *_ in expected]
    assert (phases.count("pilot"), len(phases)) == (24, STEPS) and phases[-1] == "ml"
    fitted(new("chosen"), often(path), stop)
    torch.rand(5)  # what others drew meanwhile does not matter
    assert fitted(again, path) == expected[stop - 1 :]
    assert again.shape == whole.shape and equal(again, whole)


@pytest.mark.parametrize("kind", [*list(KINDS)[1:], "field"])
@pytest.mark.parametrize("stop", [3, 12])
def test_every_kind_of_flow_goes_on(kind: str, stop: int, tmp_path: Path) -> None:
    path, whole, again = tmp_path / "s.pt", new(kind), new(kind)
    settings = {"steps": 12, "method": "ml" if kind in ("field", "base") else "auto"}
    settings |= {"coupling": "ot"} if kind == "closed" else {}
    expected = fitted(whole, **settings)
    fitted(new(kind), often(path), stop, **settings)
    assert fitted(again, path, **settings) == expected[stop - 1 :]
    assert equal(again, whole)


def test_a_fit_without_a_seed_goes_on_with_its_own_split(tmp_path: Path) -> None:
    path, whole, again = tmp_path / "s.pt", new("chosen"), new("chosen")
    torch.manual_seed(8)
    expected = fitted(whole, seed=None)
    torch.manual_seed(8)
    fitted(new("chosen"), often(path), 31, seed=None)
    assert fitted(again, path, seed=None) == expected[30:] and equal(again, whole)


def test_it_may_be_stopped_again_and_again(tmp_path: Path) -> None:
    path, whole = tmp_path / "s.pt", new("chosen")
    expected = fitted(whole)
    seen = fitted(new("chosen"), often(path), 7)[:-1]
    for stop in (1, 4, 20, 9):
        kept = Snapshots(path, 0.0, Snapshots(path).read())
        seen += fitted(new("chosen"), kept, stop)[:-1]
    last = new("chosen")
    assert seen + fitted(last, path) == expected and equal(last, whole)


def test_the_same_flow_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    path, whole, flow = tmp_path / "s.pt", new("chosen"), new("chosen")
    expected = fitted(whole)

    def stop(record: Progress) -> None:
        if record.phase == "fm" and record.step == 5:
            signal.raise_signal(signal.SIGINT)

    settings = {"steps": STEPS, "seed": 0, "batch_size": 64, "progress": False, "snapshot": path}
    with pytest.raises(KeyboardInterrupt):
        flow.fit(rows(), callback=stop, **settings)
    assert not equal(flow, whole) and torch.isfinite(flow.log_prob(rows(9))).all()
    assert fitted(flow, path) == expected[29:] and equal(flow, whole)


def test_a_fit_that_has_ended_returns_at_once(tmp_path: Path) -> None:
    path, first, again = tmp_path / "s.pt", new("chosen"), new("chosen")
    assert len(fitted(first, path)) == STEPS
    assert fitted(again, path) == [] and equal(again, first)
    assert again.shape == first.shape and again.open_shape == (False, False)


def test_time_that_was_used_counts(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    settings = {"seconds": 30.0, "progress": False, "seed": 0}
    fitted(new("closed"), often(path), 3, steps=None, **settings)
    kept = Snapshots(path).read()
    kept.state["training"]["clock"]["elapsed"] = 17.9  # of 18, for flow matching
    records: list[Progress] = []

    def stop(record: Progress) -> None:
        records.append(record)
        if record.phase == "ml":
            raise Killed

    with pytest.raises(Killed):
        new("closed").fit(rows(), batch_size=64, callback=stop,
                          snapshot=Snapshots(path, begun=kept), **settings)  # fmt: skip
    assert 17.9 < records[0].seconds < 19 and 17.9 < records[-1].seconds < 21
    assert records[-1].remaining < 12.1


# refused ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    fitted(new("closed"), often(tmp_path / "s.pt"), 10)
    return tmp_path / "s.pt"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 61}, r"is of a fit with steps=60, not 61; give the same"),
        ({"seed": 1}, "with seed=0, not 1"),
        ({"lr": 0.5}, "with lr=None, not 0.5"),
        ({"coupling": "ot"}, "with coupling='independent', not 'ot'"),
        ({"regularizer": cnf.Regularizer(kinetic=1.0)}, "with regularizer='Regularizer"),
        ({"validation": rows(20)}, "with rows=270, not 300"),
    ],
)
def test_other_settings_are_refused(settings: dict, words: str, kept: Path) -> None:
    with pytest.raises(InputError, match=words):
        fitted(new("closed"), kept, **settings)


def test_other_data_are_refused(kept: Path) -> None:
    settings = {"steps": STEPS, "seed": 0, "batch_size": 64, "progress": False, "snapshot": kept}
    with pytest.raises(InputError, match="is of a fit to other data"):
        new("closed").fit(rows() + 1, **settings)
    with pytest.raises(InputError, match="with rows=270, not 180"):
        new("closed").fit(rows(200), **settings)


def test_another_flow_is_refused(kept: Path) -> None:
    with pytest.raises(InputError, match=r"is of a fit with Flow\(own_field=None, not 'cnf.nets"):
        fitted(cnf.Flow(2, field=cnf.nets.MLP(2, (3,))), kept)


def test_a_snapshot_of_something_else_is_refused(tmp_path: Path) -> None:
    Snapshots(tmp_path / "s.pt").write({"step": 1}, torch.device("cpu"))
    with pytest.raises(InputError, match="is of no fit of a flow"):
        fitted(new("closed"), tmp_path / "s.pt")


@pytest.mark.parametrize("name", ["none/s.pt", "."])
def test_a_place_for_no_file_is_refused_before_training(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file in a folder that exists"):
        fitted(new("closed"), tmp_path / name)


def test_a_damaged_snapshot_gives_way_to_the_one_before(kept: Path) -> None:
    whole, again = new("closed"), new("closed")
    expected = fitted(whole)
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"s\.pt is damaged; going on from the one before it"):
        assert fitted(again, kept) == expected[8:]
    assert equal(again, whole)


def test_a_memory_map_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnf.flow.split.LAZY_BYTES", 100)
    np.save(tmp_path / "x.npy", rows().numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    flows = [new("closed") for _ in range(3)]
    settings = {"steps": 20, "seed": 0, "batch_size": 64, "progress": False}
    flows[0].fit(x, **settings)

    def stop(record: Progress) -> None:
        if record.step == 12:
            raise Killed

    with pytest.raises(Killed):
        flows[1].fit(x, callback=stop, snapshot=often(tmp_path / "s.pt"), **settings)
    flows[2].fit(x, snapshot=tmp_path / "s.pt", **settings)
    assert equal(flows[0], flows[2])


def test_numbers_of_numpy_are_kept_and_read_again(tmp_path: Path) -> None:
    settings = {"steps": np.int64(3), "lr": np.float32(1e-3), "seed": np.int64(4)}
    settings |= {"progress": False, "snapshot": tmp_path / "s.pt"}
    first, again = (new("closed").fit(rows(), **settings) for _ in range(2))
    assert equal(first, again)


@pytest.mark.parametrize("validation", [0.2, rows()[:50].clone()], ids=["share", "own"])
def test_other_rows_to_train_on_are_refused(validation, tmp_path: Path) -> None:
    x = rows()
    settings = {"steps": 2, "seed": 0, "progress": False, "validation": validation}
    new("closed").fit(x, snapshot=tmp_path / "s.pt", **settings)
    x = x.clone()
    x[len(x) // 2] += 1.0
    with pytest.raises(InputError, match="is of a fit to other data"):
        new("closed").fit(x, snapshot=tmp_path / "s.pt", **settings)


def test_other_tolerances_are_refused(tmp_path: Path) -> None:
    settings = {"steps": 2, "seed": 0, "progress": False, "snapshot": tmp_path / "s.pt"}
    cnf.Flow(2, hidden=(4, 4), rtol=1e-4).fit(rows(), **settings)
    with pytest.raises(InputError, match=r"is of a fit with Flow\(rtol=0.0001, not 1e-06"):
        cnf.Flow(2, hidden=(4, 4), rtol=1e-6).fit(rows(), **settings)


def test_a_snapshot_that_says_less_of_its_fit_is_gone_on_from(tmp_path: Path) -> None:
    """As older versions wrote it."""
    snapshots = Snapshots(tmp_path / "s.pt")
    settings = {"steps": 2, "seed": 0, "progress": False, "snapshot": snapshots.path}
    whole = new("closed").fit(rows(), **settings)
    state = snapshots.read().state
    kept = state["origin"]["settings"]
    for name in [name for name in kept if name.startswith("Flow(") or name == "training data"]:
        del kept[name]
    del state["training"]["module"]["flow.field.sines"]
    snapshots.write(state, torch.device("cpu"))
    assert equal(new("closed").fit(rows(), **settings), whole)
