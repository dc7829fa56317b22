"""Run folders: a claim never meets another's, and comes to nothing without a trace."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cnf.cli.folder import claimed_folder, json_text
from cnf.error import InputError


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def claim(out: str = "runs/a", overwrite: bool = False) -> Path:
    with claimed_folder(out, overwrite) as folder:
        folder.begin({})
        return folder.path


def test_many_at_once_get_folders_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: claim(), range(24)))
    assert len(set(paths)) == 24
    assert {path.name for path in paths} == {"a", *(f"a-{i}" for i in range(2, 25))}


def test_a_run_under_way_keeps_its_folder() -> None:
    with claimed_folder("runs/a", False) as first, claimed_folder("runs/a", False) as second:
        assert [first.path, second.path] == [Path("runs/a"), Path("runs/a-2")]
    assert not Path("runs").exists()


def test_an_empty_folder_is_used_and_left() -> None:
    Path("mine").mkdir()
    with claimed_folder("mine", False) as folder:
        assert folder.path == Path("mine")
    assert list(Path().iterdir()) == [Path("mine")] and not any(Path("mine").iterdir())
    assert claim("mine") == Path("mine")


@pytest.mark.parametrize("name", ["mine", "mine/"])
def test_a_folder_of_other_files_is_passed_by(name: str) -> None:
    Path("mine").mkdir()
    Path("mine/note.txt").write_text("mine")
    assert claim(name) == Path("mine-2")
    with pytest.raises(InputError, match="other files and no run"):
        claim(name, overwrite=True)


def test_a_file_in_the_row_of_names_is_passed_by() -> None:
    claim()
    Path("runs/a-2").write_text("mine")
    assert claim() == Path("runs/a-3")


def test_the_current_folder_is_known_by_its_name(tmp_path: Path) -> None:
    assert claim(".") == tmp_path
    assert claim(".") == tmp_path.with_name(f"{tmp_path.name}-2")


def test_made_parents_go_with_a_failed_claim() -> None:
    with pytest.raises(RuntimeError), claimed_folder("a/b/c", False):
        raise RuntimeError
    assert not Path("a").exists()


def test_what_somebody_else_put_there_stays() -> None:
    with claimed_folder("a/b", False) as folder:
        (folder.path / "theirs.txt").write_text("x")
    assert Path("a/b/theirs.txt").exists()


def test_nothing_half_written_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed_folder("a", False) as folder:
        folder.begin({"seed": 1})
        with pytest.raises(TypeError):
            folder.write_json("config.json", {"seed": object()})
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            folder.write_json("config.json", {"seed": 2})
    assert json.loads(Path("a/config.json").read_text()) == {"format": 1, "seed": 1}
    assert {path.name for path in Path("a").iterdir()} == {"config.json", "metrics.jsonl"}


def test_json_has_null_for_what_is_not_finite() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, "é")], "b": {"c": -math.inf}, "d": True}
    assert json.loads(json_text(value)) == {"a": [None, 1.5, [None, "é"]], "b": {"c": None},
                                            "d": True}  # fmt: skip
