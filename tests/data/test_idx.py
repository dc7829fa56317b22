"""IDX files are found, checked and downloaded; whatever is wrong ends in one sentence."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cnf
from cnf.data import idx
from cnf.data.idx import SETS, File, ImageSet, mnist
from cnf.error import InputError

SHAPES = {
    "train-images-idx3-ubyte": (6, 4, 4),
    "train-labels-idx1-ubyte": (6,),
    "t10k-images-idx3-ubyte": (3, 4, 4),
    "t10k-labels-idx1-ubyte": (3,),
}


def encoded(values: np.ndarray) -> bytes:
    """An IDX file, as http://yann.lecun.com/exdb/mnist described it."""
    header = bytes([0, 0, 8, values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def small(seed: int) -> dict[str, bytes]:
    """The four files of a set of nine images."""
    draw = np.random.default_rng(seed)
    return {
        name: encoded(draw.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8))
        for name, shape in SHAPES.items()
    }


FILES = {"mnist": small(0), "fashion": small(1), "kmnist": small(2)}


def small_set(name: str, mirrors: tuple[str, ...] = ()) -> ImageSet:
    md5 = {key: hashlib.md5(content).hexdigest() for key, content in FILES[name].items()}
    files = tuple(
        File(key, SHAPES[key], archive="0" * 32) if name == "kmnist" else File(key, shape, md5[key])
        for key, shape in SHAPES.items()
    )
    return ImageSet(name, SETS[name].title, files, mirrors, SETS[name].folders)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sets without mirrors, no CNF_DATA, and an empty cache."""
    monkeypatch.delenv("CNF_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(idx, "SETS", {name: small_set(name) for name in FILES})


def write(folder: Path, files: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def is_set(images: idx.Images, name: str) -> bool:
    contents = FILES[name].values()
    arrays = (images.train, images.train_labels, images.test, images.test_labels)
    return all(
        content.endswith(array.astype(np.uint8).tobytes())
        for content, array in zip(contents, arrays, strict=True)
    )


def refusal(*arguments: object, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        mnist(*arguments, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence and not sentence.endswith(".")
    return sentence


# found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
def test_files_are_found_in_the_folder_and_below_it(
    place: str, packed: bool, tmp_path: Path
) -> None:
    write(tmp_path / place, FILES["mnist"], packed)
    images = mnist(tmp_path)
    assert is_set(images, "mnist")
    assert images.train.shape == (6, 4, 4) and images.train.dtype == np.uint8
    assert images.test_labels.shape == (3,) and images.test_labels.dtype == np.int64
    images.train[0] = 0  # it is the caller's own


def test_names_with_a_dot_are_those_with_a_dash(tmp_path: Path) -> None:
    write(tmp_path, {name.replace("-idx", ".idx"): c for name, c in FILES["mnist"].items()})
    assert is_set(mnist(tmp_path), "mnist")


@pytest.mark.parametrize("name", FILES)
def test_each_set_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch) -> None:
    for each, files in FILES.items():
        write(tmp_path / each, files)
    monkeypatch.setenv("CNF_DATA", str(tmp_path))
    images = mnist(name=name)
    assert is_set(images, name) and images.name == name


def test_the_cache_is_looked_at_last(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "cache" / "cnf" / "mnist", FILES["mnist"])
    assert is_set(mnist(), "mnist")
    monkeypatch.setenv("CNF_DATA", str(tmp_path / "nothing"))
    assert is_set(mnist(), "mnist")


def test_a_data_folder_of_mnist_alone_does_not_stand_for_others(
    tmp_path: Path, monkeypatch
) -> None:
    write(tmp_path / "kept", FILES["mnist"])
    write(tmp_path / "cache" / "cnf" / "fashion", FILES["fashion"])
    monkeypatch.setenv("CNF_DATA", str(tmp_path / "kept"))
    assert is_set(mnist(name="fashion"), "fashion")


# refused ------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused() -> None:
    assert refusal(name="emnist").startswith("'emnist' is no set of images; known are mnist, ")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "typo").startswith(f"there is no folder {tmp_path / 'typo'}; ")
    assert not (tmp_path / "typo").exists()


def test_what_is_nowhere_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    sentence = refusal(download=False)
    assert sentence.startswith("MNIST is neither in ") and "CNF_DATA" in sentence
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, FILES["mnist"])
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert f"{tmp_path} holds no t10k-labels-idx1-ubyte" in refusal(tmp_path)


def spoilt(tmp_path: Path, change: Callable[[bytes], bytes], packed: bool = False) -> str:
    """What is said of MNIST's training images once they were changed."""
    write(tmp_path, FILES["mnist"], packed)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if packed else ""))
    path.write_bytes(change(path.read_bytes()))
    sentence = refusal(tmp_path)
    assert str(path) in sentence and ";" in sentence
    return sentence


@pytest.mark.parametrize("length", [0, 3, 10, 40])
def test_a_truncated_file_is_told_by_its_length(length: int, tmp_path: Path) -> None:
    assert f"is cut short: {length} bytes, expected 112" in spoilt(tmp_path, lambda x: x[:length])


def test_a_truncated_archive_is_told(tmp_path: Path) -> None:
    assert "is cut short" in spoilt(tmp_path, lambda x: x[:-20], packed=True)


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    damaged = spoilt(tmp_path, lambda x: x[:30] + b"\xff" * 8 + x[38:], packed=True)
    assert "is damaged" in damaged


def test_a_changed_byte_is_told_by_the_checksum(tmp_path: Path) -> None:
    sentence = spoilt(tmp_path, lambda x: x[:-1] + bytes([x[-1] ^ 1]))
    assert "is damaged: its MD5 checksum is not" in sentence


def test_a_longer_file_is_told(tmp_path: Path) -> None:
    assert "is too long" in spoilt(tmp_path, lambda x: x + b"0")


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\0\0\x0d\3" + bytes(200)])
def test_what_is_no_idx_file_is_told(content: bytes, tmp_path: Path) -> None:
    assert "is no IDX file of bytes of shape (6, 4, 4)" in spoilt(tmp_path, lambda x: content)


def test_another_sets_file_is_told_by_name(tmp_path: Path) -> None:
    other = FILES["fashion"]["train-images-idx3-ubyte"]
    sentence = spoilt(tmp_path, lambda x: other)
    assert "holds Fashion-MNIST's train-images-idx3-ubyte, not MNIST's" in sentence


def test_test_images_in_the_place_of_labels_are_told(tmp_path: Path) -> None:
    other = FILES["mnist"]["t10k-images-idx3-ubyte"]
    assert "holds MNIST's t10k-images-idx3-ubyte" in spoilt(tmp_path, lambda x: other)


def test_a_label_that_is_none_is_told(tmp_path: Path) -> None:
    files = FILES["kmnist"] | {"t10k-labels-idx1-ubyte": encoded(np.full(3, 11, np.uint8))}
    write(tmp_path, files)  # of this set the uncompressed checksums are not known
    assert "it holds the label 11" in refusal(tmp_path, name="kmnist")


# downloaded ---------------------------------------------------------------------------------------


class Mirror(http.server.ThreadingHTTPServer):
    """Serves what `pages` holds; counts how often each page was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.promise = 0  # bytes more in the header than are sent

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Mirror)
        server.asked.append(self.path[1:])
        page = server.pages.get(self.path[1:])
        if page is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(page) + server.promise))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A server on this machine, the only mirror of the small MNIST."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        offer(monkeypatch, server.address)
        server.pages = {f"{name}.gz": gzip.compress(c) for name, c in FILES["mnist"].items()}
        yield server
        server.shutdown()
        thread.join()


def offer(monkeypatch: pytest.MonkeyPatch, *mirrors: str) -> None:
    monkeypatch.setitem(idx.SETS, "mnist", small_set("mnist", mirrors))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_download_is_kept_and_not_repeated(mirror: Mirror, tmp_path: Path) -> None:
    assert is_set(mnist(), "mnist")
    kept = {f"cache/cnf/mnist/{name}.gz" for name in SHAPES}
    assert files_in(tmp_path) == kept
    assert is_set(mnist(), "mnist") and len(mirror.asked) == 4
    (tmp_path / "cache/cnf/mnist/t10k-labels-idx1-ubyte.gz").unlink()
    assert is_set(mnist(), "mnist") and len(mirror.asked) == 5  # what is missing, and no more


def test_a_download_goes_into_the_folder_that_was_named(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert is_set(mnist(tmp_path / "mine"), "mnist")
    assert files_in(tmp_path) == {f"mine/mnist/{name}.gz" for name in SHAPES}


def test_the_next_mirror_is_asked_where_one_fails(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, f"{mirror.address}elsewhere/", mirror.address)
    assert is_set(mnist(), "mnist") and len(mirror.asked) == 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda page: None, "404 Not Found"),
        (lambda page: page[:-20], "cut short"),
        (lambda page: gzip.compress(FILES["fashion"]["train-images-idx3-ubyte"]), "Fashion-MNIST"),
        (lambda page: b"<html>sign in</html>", "no IDX file"),
    ],
)
def test_a_failed_download_leaves_nothing(
    change: Callable[[bytes], bytes | None], reason: str, mirror: Mirror, tmp_path: Path
) -> None:
    name = "train-images-idx3-ubyte.gz"
    changed = change(mirror.pages.pop(name))
    mirror.pages |= {} if changed is None else {name: changed}
    sentence = refusal()
    start = "train-images-idx3-ubyte of MNIST could not be downloaded (127.0.0.1"
    assert sentence.startswith(start)
    assert reason in sentence and "CNF_DATA" in sentence
    assert not files_in(tmp_path)


def test_an_answer_that_ends_early_leaves_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.promise = 7
    assert "bytes" in refusal()
    assert not files_in(tmp_path)


def test_a_published_checksum_is_compared_where_it_is_all_that_is_known(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(idx.SETS, "kmnist", small_set("kmnist", (mirror.address,)))
    mirror.pages = {f"{name}.gz": gzip.compress(c) for name, c in FILES["kmnist"].items()}
    assert f"its MD5 checksum is not {'0' * 32}" in refusal(name="kmnist")
    assert not files_in(tmp_path)


def test_no_mirror_at_all_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer(monkeypatch, "http://127.0.0.1:9/")  # nobody listens there
    assert "could not be downloaded (127.0.0.1: " in refusal()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_download_leaves_nothing(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mnist()
    assert not files_in(tmp_path)


# the real ones ------------------------------------------------------------------------------------


def test_it_is_public() -> None:
    assert cnf.data.mnist is mnist


def test_every_set_says_where_its_files_come_from_and_how_they_are_known() -> None:
    for name, known in SETS.items():
        assert known.name == name and known.mirrors and known.folders[0] == name
        assert all(mirror.endswith("/") for mirror in known.mirrors)
        assert [file.shape[0] for file in known.files] == [60_000, 60_000, 10_000, 10_000]
        assert all(len(file.md5 or file.archive or "") == 32 for file in known.files)


REAL = os.environ.get("CNF_DATA")
IS_THERE = REAL is not None and any(idx._holding(SETS["mnist"], Path(REAL)))


@pytest.mark.skipif(not IS_THERE, reason="CNF_DATA names no folder with MNIST")
def test_real_mnist_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "SETS", SETS)
    images = mnist(REAL, download=False)
    assert images.train.shape == (60_000, 28, 28) and images.test.shape == (10_000, 28, 28)
    assert np.bincount(images.test_labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009
    ]  # fmt: skip
