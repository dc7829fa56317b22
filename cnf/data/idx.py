"""MNIST and its kin: 70,000 images of 28 × 28 pixels in IDX files, found on disk or downloaded."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from cnf.error import InputError
from cnf.replace import replacing

VARIABLE = "CNF_DATA"  # in the environment: where data are kept
TIMEOUT = 30.0  # seconds without a byte
LARGEST = 2**27  # bytes of a download or of what it unpacks to: the largest is 47 MB
CHUNK = 2**16
UNSIGNED_BYTES = 0x08  # the type of an IDX file's values


@dataclass(frozen=True, eq=False)
class Images:
    """Grey images and their classes, split into two parts.

    train, test: pixels 0 … peak as uint8, (n, height, width); *_labels: classes from 0 as int64,
    (n,); name: of the set; classes: how many.
    """

    name: str
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    peak: int = 255
    classes: int = 10


@dataclass(frozen=True)
class File:
    """One file of a set: its name without .gz, its shape, and MD5s of its bytes.

    md5: of the uncompressed bytes; archive: of the compressed file as its makers published it; None
    where it is not known.
    """

    name: str
    shape: tuple[int, ...]
    md5: str | None = None
    archive: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """A set of four files, in the order of `Images`; mirrors: addresses that end before a file's
    name; folders: where in a data folder its files may lie, its own first.
    """

    name: str
    title: str
    files: tuple[File, ...]
    mirrors: tuple[str, ...]
    folders: tuple[str, ...]


NAMES = (
    ("train-images-idx3-ubyte", (60_000, 28, 28)),
    ("train-labels-idx1-ubyte", (60_000,)),
    ("t10k-images-idx3-ubyte", (10_000, 28, 28)),
    ("t10k-labels-idx1-ubyte", (10_000,)),
)


def _files(md5: tuple[str, ...] = (), archive: tuple[str, ...] = ()) -> tuple[File, ...]:
    known = (md5 or (None,) * 4, archive or (None,) * 4)
    return tuple(File(*name, *sums) for name, *sums in zip(NAMES, *known, strict=True))


SETS = {
    "mnist": ImageSet(
        "mnist",
        "MNIST",
        _files(
            md5=(
                "6bbc9ace898e44ae57da46a324031adb",
                "a25bea736e30d166cdddb491f175f624",
                "2646ac647ad5339dbf082846283269ea",
                "27ae3e4e09519cfbb04c329615203637",
            )
        ),
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        ("mnist", "MNIST/raw"),
    ),
    "fashion": ImageSet(
        "fashion",
        "Fashion-MNIST",
        _files(
            md5=(
                "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "9018921c3c673c538a1fc5bad174d6f9",
                "8181f5470baa50b63fa0f6fddb340f0a",
                "15d484375f8d13e6eb1aabb0c3f46965",
            )
        ),
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        ("fashion", "fashion-mnist", "FashionMNIST/raw"),
    ),
    "kmnist": ImageSet(
        "kmnist",
        "KMNIST",
        _files(
            archive=(
                "bdb82020997e1d708af4cf47b453dcf7",
                "e144d726b3acfaa3e44228e80efcd344",
                "5c965bf0a639b31b8f53240b1b52f4d7",
                "7320c461ea6c1c855c0b718fb2a4b134",
            )
        ),
        (
            "https://storage.googleapis.com/kuzushiji-mnist/",
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ),
        ("kmnist", "KMNIST/raw"),
    ),
}


def mnist(
    root: str | os.PathLike[str] | None = None, *, name: str = "mnist", download: bool = True
) -> Images:
    """MNIST, Fashion-MNIST or KMNIST: 60,000 images to train on and 10,000 to test on.

    root: the folder that holds the four IDX files, gzip or plain, or a folder above it; None looks
    in the environment's CNF_DATA, then in the cache folder (~/.cache/cnf).
    name: "mnist", "fashion" or "kmnist"; download: fetch what is in none of them, into root or else
    into the cache.
    Raises InputError for files that are missing, cut short, damaged or of another set, and where
    the download fails.
    Sources: LeCun, Cortes and Burges 1998; Xiao, Rasul and Vollgraf 2017; Clanuwat et al. 2018.
    """
    if name not in SETS:
        raise InputError(f"{name!r} is no set of images; known are {', '.join(SETS)}")
    known = SETS[name]
    folder, is_kept = _located(known, root)
    parts = [_part(known, file, folder, download, is_kept) for file in known.files]
    return Images(name, parts[0], parts[1].astype(np.int64), parts[2], parts[3].astype(np.int64))


def where(name: str = "mnist") -> Path | None:
    """The folder in which `mnist` finds all four files of a set, None where it would download them.

    The files are not judged.
    """
    folder, _ = _located(SETS[name], None)
    return folder if all(_on_disk(folder, file) for file in SETS[name].files) else None


def cache_folder() -> Path:
    """Where downloads are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cnf"


# --- on disk --------------------------------------------------------------------------------------


def _located(known: ImageSet, root: str | os.PathLike[str] | None) -> tuple[Path, bool]:
    """The folder of the set's files, and whether it is the user's and holds some already."""
    if root is not None:
        if not Path(root).is_dir():
            raise InputError(f"there is no folder {root}; make it, or leave it out")
        found = next(_holding(known, Path(root)), None)
        return (Path(root, known.folders[0]), False) if found is None else (found, True)
    if given := os.environ.get(VARIABLE):
        for folder in _holding(known, Path(given)):
            if not _is_of_another(known, folder):  # one folder may hold MNIST and be given for all
                return folder, True
    return cache_folder() / known.folders[0], False


def _holding(known: ImageSet, root: Path) -> Iterator[Path]:
    """The folders in and below root that hold one of the set's files at least."""
    for folder in (*(root / part for part in known.folders), root):
        if any(_on_disk(folder, file) for file in known.files):
            yield folder


def _on_disk(folder: Path, file: File) -> Path | None:
    dotted = file.name.replace("-idx", ".idx")  # as some archives spell it
    named = (f"{name}{suffix}" for name in (file.name, dotted) for suffix in ("", ".gz"))
    return next((folder / name for name in named if (folder / name).is_file()), None)


def _is_of_another(known: ImageSet, folder: Path) -> bool:
    """Whether the first file that the folder holds is another set's."""
    paths = (_on_disk(folder, file) for file in known.files)
    path = next(path for path in paths if path is not None)
    try:
        owner = _owner(_unpacked(_read(path), str(path)))
    except InputError:
        return False
    return owner is not None and owner[0] is not known


def _part(known: ImageSet, file: File, folder: Path, download: bool, is_kept: bool) -> np.ndarray:
    """The array in one of the set's files."""
    path = _on_disk(folder, file)
    if path is not None:
        return _array(_unpacked(_read(path), str(path)), known, file, str(path))
    if is_kept:
        raise InputError(f"{folder} holds no {file.name}, plain or .gz; put it there beside others")
    if not download:
        raise InputError(
            f"{known.title} is neither in {folder} nor in {VARIABLE}; name its folder, or let it "
            "be downloaded"
        )
    return _downloaded(known, file, folder)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); is it yours?") from error


def _unpacked(content: bytes, place: str) -> bytes:
    """The bytes of an IDX file, of which `content` may be a gzip archive."""
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        with gzip.GzipFile(fileobj=BytesIO(content)) as file:
            return file.read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        what = "cut short" if isinstance(error, EOFError) else "damaged"
        raise InputError(f"{place} is {what}: {_lower(error)}; {_AGAIN}") from error


_AGAIN = "delete it and fetch it again"


def _array(content: bytes, known: ImageSet, file: File, place: str) -> np.ndarray:
    """The array in an IDX file, once it is known to be what its name says."""
    owner = _owner(content)
    if owner is not None and owner != (known, file):
        of, its = owner
        raise InputError(
            f"{place} holds {of.title}'s {its.name}, not {known.title}'s {file.name}; put the "
            "right file in its place"
        )
    header = bytes([0, 0, UNSIGNED_BYTES, len(file.shape)])
    header += b"".join(size.to_bytes(4, "big") for size in file.shape)
    expected = len(header) + math.prod(file.shape)
    if content[: len(header)] != header[: len(content)]:
        raise InputError(
            f"{place} is no IDX file of bytes of shape {file.shape}, which {file.name} is; {_AGAIN}"
        )
    if len(content) != expected:
        what = "cut short" if len(content) < expected else "too long"
        raise InputError(
            f"{place} is {what}: {len(content):,} bytes, expected {expected:,}; {_AGAIN}"
        )
    if file.md5 is not None and owner is None:
        raise InputError(f"{place} is damaged: its MD5 checksum is not {file.md5}; {_AGAIN}")
    values = np.frombuffer(content, np.uint8, offset=len(header)).reshape(file.shape).copy()
    if len(file.shape) == 1 and values.max(initial=0) > 9:
        raise InputError(f"{place} is damaged: it holds the label {values.max()}; {_AGAIN}")
    return values


def _owner(content: bytes) -> tuple[ImageSet, File] | None:
    """The set and the file whose checksum these bytes have."""
    found = _md5(content)
    pairs = ((known, file) for known in SETS.values() for file in known.files)
    return next((pair for pair in pairs if pair[1].md5 == found), None)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# --- from a mirror --------------------------------------------------------------------------------


def _downloaded(known: ImageSet, file: File, folder: Path) -> np.ndarray:
    """The array in a file of the first mirror that has it; the file is kept in the folder."""
    failures = []
    for mirror in known.mirrors:
        url = f"{mirror}{file.name}.gz"
        try:
            archive = _fetched(url)
            values = _array(_unpacked(archive, url), known, file, url)
            if file.archive is not None and _md5(archive) != file.archive:
                raise InputError(f"its MD5 checksum is not {file.archive}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{urlsplit(url).hostname}: {_reason(error)}")
            continue
        _keep(archive, folder / f"{file.name}.gz")
        return values
    raise InputError(
        f"{file.name} of {known.title} could not be downloaded ({', '.join(failures)}); try again, "
        f"or put the files into a folder and name it by {VARIABLE}"
    )


def _fetched(url: str) -> bytes:
    """What is at the address, with a bar on stderr where that is a terminal."""
    shown = sys.stderr.isatty()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        length = int(answer.headers.get("Content-Length") or 0)
        chunks = []
        with tqdm(
            total=length or None, desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True,
            file=sys.stderr, disable=not shown, leave=False,
        ) as bar:  # fmt: skip
            while chunk := answer.read(CHUNK):
                chunks.append(chunk)
                bar.update(len(chunk))
                if CHUNK * len(chunks) > LARGEST:
                    raise OSError(f"it sends more than {LARGEST:,} bytes")
    content = b"".join(chunks)
    if len(content) < length:
        raise OSError(f"it sent {len(content):,} of {length:,} bytes")
    return content


def _keep(archive: bytes, path: Path) -> None:
    """Write the file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(archive)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); name a folder that is yours to write by "
            f"{VARIABLE} or XDG_CACHE_HOME"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    inner = getattr(error, "reason", None)  # of a URLError, which wraps what went wrong
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    text = str(inner or error).removesuffix(f"; {_AGAIN}")
    return text or type(error).__name__


def _lower(error: Exception) -> str:
    text = str(error)
    return text[:1].lower() + text[1:]
