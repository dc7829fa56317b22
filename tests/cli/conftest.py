"""Small data and coarse grids, so that a run takes a second; one finished run for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cnf.cli import main, picture, source
from cnf.flow import report

TINY = ("--steps", "3", "--hidden", "8,8", "--batch-size", "32")


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def _small() -> Iterator[None]:
    sizes = {
        source: {"TOY_ROWS": 500, "TOY_VALIDATION": 50, "TOY_HELD_OUT": 60, "TRAIN_DRAWS": 1,
                 "VALIDATION_DRAWS": 1, "HELD_OUT_DRAWS": 2},
        picture: {"POINTS": 50, "IMAGES": 4, "CURVE": 30, "GRID": 20,
                  "PATHS": 5, "PATH_TIMES": 4, "ARROWS": 4, "FIELD_GRID": 6, "FRAMES": 3,
                  "FRAME_GRID": 5},
        report: {"CELLS": 30},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in sizes.items():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        yield


@pytest.fixture
def cnf_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs a command in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return command


@pytest.fixture
def refusal(cnf_command: Callable[..., Outcome]) -> Callable[..., str]:
    """The sentence with which a command refuses its input; nothing may have been written."""

    def refused(*arguments: object) -> str:
        before = contents(Path())
        outcome = cnf_command(*arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        *warnings, sentence = outcome.err.splitlines()
        assert all(line.startswith("cnf: warning: ") or "fitting" in line for line in warnings)
        assert sentence.startswith("cnf: ") and ";" in sentence
        assert contents(Path()) == before
        return sentence

    return refused


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def moons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on moons; tests do not write into it."""
    folder = tmp_path_factory.mktemp("finished") / "moons"
    assert main(["fit", "moons", "--out", str(folder), "--quiet", *TINY]) == 0
    return folder


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the columns length and width of a table that has others."""
    folder = tmp_path_factory.mktemp("named")
    values = np.random.default_rng(0).normal(size=(40, 3)) * [1, 2, 3]
    np.savetxt(folder / "t.csv", values, delimiter=",", header="length,height,width", comments="")
    out = folder / "run"
    data = [str(folder / "t.csv"), "--columns", "length,width"]
    assert main(["fit", *data, "--out", str(out), "--quiet", *TINY]) == 0
    return out
