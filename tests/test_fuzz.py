"""Broken files end in one sentence: no reader raises anything but InputError, and none hangs.

Some hundreds of files by default, thousands with `pytest -m slow`.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cnf
from cnf.cli import main
from cnf.cli.folder import read_run
from cnf.data.idx import File, ImageSet, mnist
from cnf.data.table import read_table
from cnf.error import InputError

PATIENCE = 20.0  # seconds for one file on a busy machine: what hangs takes longer
CASES = pytest.mark.parametrize(
    "files", [pytest.param(60, id="some"), pytest.param(1500, id="many", marks=pytest.mark.slow)]
)


# broken files -------------------------------------------------------------------------------


@st.composite
def broken(draw: st.DrawFn, *whole: bytes) -> bytes:
    """One of the files, cut, with bytes changed, put in, taken out or repeated, as often as not."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 12))
        match draw(st.sampled_from(("cut", "change", "insert", "delete", "repeat"))):
            case "cut":
                del content[place:]
            case "change":
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=4))
            case "insert":
                content[place:place] = draw(st.sampled_from(PIECES) | st.binary(max_size=8))
            case "delete":
                del content[place : place + length]
            case "repeat":
                content[place:place] = content[place : place + length] * draw(st.integers(1, 30))
    return bytes(content)


PIECES = (
    b"\0", b"\n", b"\r", b'"', b",", b";", b"\t", b"nan", b"1e999", b"-", b"{", b"}", b"[" * 40,
    b"null", b"NaN", b"Infinity", b"\xff\xfe", b"\xef\xbb\xbf", b"9" * 400, b"-1", b"\\u0000",
)  # fmt: skip


def outcome(read: Callable[[], object]) -> object:
    """What a reader returns, or the sentence with which it refuses."""
    start = time.perf_counter()
    try:
        found = read()
    except InputError as error:
        found = str(error)
        assert found.strip() and len(found) < 1000
    assert time.perf_counter() - start < PATIENCE
    return found


def examined(files: int, strategy: st.SearchStrategy, check: Callable[..., None]) -> None:
    """`check` on as many examples, the same in every run."""
    quiet = settings(
        max_examples=files, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    quiet(given(strategy)(check))()


# tables -------------------------------------------------------------------------------------


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


ROWS = np.random.default_rng(0).normal(size=(5, 3))
TABLES = {
    ".csv": (
        b"a,b,c\n1,2,3\n4,5.5,-6e3\n",
        b"0.1;0.2\n0.3;0.4\n",
        b'"x y"\t"z"\r\n1\t2\r\n3\t4\r\n',
        "\ufeffé,b\n1,2\n".encode(),
        b"1\n2\n3\n",
    ),
    ".npy": (npy(ROWS), npy(ROWS.astype(np.float32)), npy(np.arange(6)), npy(ROWS > 0)),
    ".npz": (npz(x=ROWS), npz(a=ROWS, b=ROWS), npz()),
}


@CASES
@pytest.mark.parametrize("suffix", TABLES)
def test_a_broken_table_is_read_or_refused(suffix: str, files: int, tmp_path: Path) -> None:
    path = tmp_path / f"table{suffix}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = outcome(lambda: read_table(path))
        if not isinstance(found, str):
            assert found.values.ndim == 2 and found.values.size > 0
            assert found.values.shape[1] == len(found.columns)
            assert np.isfinite(found.values).all()

    examined(files, broken(*TABLES[suffix]) | st.binary(max_size=60), check)


# images -------------------------------------------------------------------------------------


def idx(shape: tuple[int, ...]) -> bytes:
    values = np.arange(np.prod(shape), dtype=np.uint8) % 10
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values.tobytes()


SMALL = (("images", (3, 2, 2)), ("labels", (3,)), ("t-images", (2, 2, 2)), ("t-labels", (2,)))


@CASES
@pytest.mark.parametrize("place", range(4), ids=[name for name, _ in SMALL])
def test_a_broken_idx_file_is_read_or_refused(
    place: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ImageSet("mnist", "Small", tuple(File(*one) for one in SMALL), (), ("mnist",))
    monkeypatch.setattr("cnf.data.idx.SETS", {"mnist": small})
    for name, shape in SMALL:
        (tmp_path / name).write_bytes(idx(shape))
    whole = idx(SMALL[place][1])

    def check(content: bytes) -> None:
        (tmp_path / SMALL[place][0]).write_bytes(content)
        found = outcome(lambda: mnist(tmp_path, download=False))
        if not isinstance(found, str):
            assert found.train.shape == (3, 2, 2) and found.test_labels.shape == (2,)

    examined(files, broken(whole, gzip.compress(whole)) | st.binary(max_size=40), check)


# flows and runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("fuzzed") / "run"
    tiny = ("--steps", "2", "--hidden", "4", "--batch-size", "8", "--rows", "300", "--quiet")
    assert main(["fit", "moons", "--out", str(folder), *tiny]) == 0
    return folder


def damaged_headers(whole: bytes) -> st.SearchStrategy[bytes]:
    """safetensors files whose header is damaged and whose length field still fits it."""
    size = int.from_bytes(whole[:8], "little")

    def framed(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + whole[8 + size :]

    return broken(whole[8 : 8 + size]).map(framed)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=6),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part),
    max_leaves=4,
)


@st.composite
def other_settings(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file in whose settings one value is of any other kind, or gone."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    stored = json.loads(header["__metadata__"]["cnf"])
    name = draw(st.sampled_from(sorted(stored)))
    if draw(st.booleans()):
        stored[name] = draw(ANYTHING)
    else:
        del stored[name]
    header["__metadata__"]["cnf"] = json.dumps(stored)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


@CASES
@pytest.mark.parametrize("kind", ["bytes", "header", "settings"])
def test_a_broken_model_is_loaded_or_refused(
    kind: str, files: int, run: Path, tmp_path: Path
) -> None:
    whole, path = (run / "model.safetensors").read_bytes(), tmp_path / "model.safetensors"
    strategies = {"bytes": broken, "header": damaged_headers, "settings": other_settings}

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = outcome(lambda: cnf.Flow.load(path))
        assert isinstance(found, str | cnf.Flow)

    examined(files, strategies[kind](whole), check)


@st.composite
def other_json(draw: st.DrawFn, whole: bytes) -> bytes:
    """A JSON object with one value, at any depth, that is of any other kind or gone."""
    top = part = json.loads(whole)
    while True:
        name = draw(st.sampled_from(sorted(part)))
        if not (isinstance(part[name], dict) and part[name] and draw(st.booleans())):
            break
        part = part[name]
    if draw(st.booleans()):
        part[name] = draw(ANYTHING)
    else:
        del part[name]
    return json.dumps(top).encode()


@CASES
@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_a_broken_config_is_read_or_refused(
    kind: str, files: int, run: Path, tmp_path: Path
) -> None:
    whole = (run / "config.json").read_bytes()
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())

    def check(content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        outcome(lambda: read_run(str(tmp_path), torch.device("cpu")))

    examined(files, {"bytes": broken, "values": other_json}[kind](whole), check)


VERBS = {
    "sample": ("sample", "run", "-n", "2", "-o", "out.csv"),
    "logprob": ("logprob", "run", "rows.csv", "-o", "out.csv"),
    "plot": ("plot", "run", "--what", "training", "-o", "out.png"),
}


@CASES
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "metrics.jsonl"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_a_broken_run_leaves_no_partial_output(
    verb: str,
    name: str,
    files: int,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for path in run.iterdir():
        if path.suffix != ".png":
            Path("run", path.name).write_bytes(path.read_bytes())
    Path("rows.csv").write_text("0.5,0.25\n1,2\n")
    whole, before = (run / name).read_bytes(), set(Path().rglob("*"))

    def check(content: bytes) -> None:
        Path("run", name).write_bytes(content)
        start = time.perf_counter()
        code = main(VERBS[verb])
        assert time.perf_counter() - start < PATIENCE
        out, err = capsys.readouterr()
        made = set(Path().rglob("*")) - before
        if code == 0:
            made = {path.unlink() or path.suffix for path in made}
            assert made == {Path(VERBS[verb][-1]).suffix}
        else:
            assert code == 2 and out == "" and err.startswith("cnf: ") and not made

    examined(max(files // 6, 5), broken(whole), check)
