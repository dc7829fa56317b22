"""Memory and time of an iteration against the depth, each measured in a process of its own."""

from __future__ import annotations

import pytest

from cnf.cli.reproduce import footprint
from cnf.cli.reproduce.footprint import Footprint, measured
from cnf.error import InputError
from cnf.odenet.settings import Settings

SETTINGS = Settings(
    dataset="digits", width=4, stem="fine", batch_size=16, method="dopri5", rtol=1e-3, nfe=None
)


def request(settings: Settings, depth: int, timed: int) -> dict:
    given = {"settings": vars(settings) | {"drops": []}, "depth": depth, "shape": [1, 8, 8]}
    return given | {"classes": 10, "device": "cpu", "threads": 1, "timed": timed}


@pytest.mark.slow
def test_a_net_is_measured_at_every_depth(monkeypatch) -> None:
    monkeypatch.setattr(footprint, "STEPS", (1, 3))
    found = footprint.footprint(SETTINGS, (1, 8, 8), 10, "cpu", 1)
    assert (found.unit, found.depths) == ("evaluation", (6, 18))
    assert all(size is not None and size >= 0 for size in found.bytes)
    assert 0 < found.seconds[0] < found.seconds[1] and "1 thread" in found.machine


@pytest.mark.parametrize(("net", "depth"), [("resnet", 3), ("mlp", 1), ("rk-net", 12)])
def test_the_depth_is_what_was_asked_for(net: str, depth: int) -> None:
    asked = 2 if net == "rk-net" else depth
    answer = measured(request(SETTINGS.changed(net=net), asked, timed=1))
    assert answer["depth"] in (depth, depth + 1)  # backprop looks at the field first
    assert answer["seconds"] > 0


def test_growth_is_that_of_the_deepest() -> None:
    found = Footprint("block", (6, 12, 24), (100.0, 112.0, 160.0), (1.0, 1.01, 1.04), "")
    assert found.growth(found.bytes) == 4.0
    assert found.growth(found.seconds) == 0.0  # within five percent
    assert Footprint("block", (1, 2), (None, None), (1.0, 2.0), "").growth((None, None)) is None
    assert Footprint(None, (1,), (1.0,), (1.0,), "").growth((1.0,)) is None


def test_a_process_that_fails_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"at depth 0 could not be measured .*is there memory"):
        footprint._asked(request(SETTINGS, 0, timed=0), {})
