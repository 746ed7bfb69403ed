"""Pictures in WebDataset tar shards on disk, read at random through an index: the format, and a source over it.

A packed folder, as `moco.pack` writes it:

    train-000000.tar ...   plain WebDataset: 000000000.jpg and, with labels, 000000000.cls, in the source's order
    train.npy              one row a picture (`row_type`): shard, offset, size, checksum, label, name
    held_out-000000.tar, held_out.npy, bank-000000.tar, bank.npy      likewise, where the data set has them
    skipped.csv            what was left out, and why
    index.json             classes, settings, the SHA-256 of every file above and of its own content; written last

Memory: the rows stay in their file, of which the system maps what is asked for; a process holds 8 bytes a picture, for
its label.

Legend: N images.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.data.decode import ImageError, decode_bytes

INDEX, PARTS, SKIPPED, VERSION = "index.json", "parts", "skipped.csv", 2
SPLITS = ("train", "bank", "held_out")
OPEN_FILES = 64  # of a process at a time, whatever the number of shards


def row_type(name_bytes: int) -> np.dtype[np.void]:
    """One picture's row of the index, 28 bytes and the longest name.

    `offset` and `size` are of the picture's file inside the shard; `crc` is its CRC-32; `label` is -1 where there is
    none; `name` is what the source called it, as the system's bytes.
    """
    fields: list[tuple[str, str]] = [("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("crc", "<u4")]
    return np.dtype([*fields, ("label", "<i4"), ("name", f"S{max(1, name_bytes)}")])


@dataclass(frozen=True, eq=False)
class ShardSource:
    """One split of a packed folder, each picture read when asked for."""

    root: str  # absolute
    shards: tuple[tuple[str, str], ...]  # name and SHA-256 of each
    rows: NDArray[np.void]  # (N,) of `row_type`, mapped from the file
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    @property
    def images(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        return decode_bytes(self.name(i), self.content(i))

    def content(self, i: int) -> bytes:
        """The bytes of image i's file.

        Raises:
            ImageError: if the shard cannot be read, or does not hold what was packed.
        """
        row = self.rows[i]
        name, digest = self.shards[int(row["shard"])]
        size = int(row["size"])
        try:
            # pread has no position that processes or threads could move for each other, so a fork may share the file.
            data = os.pread(_opened(os.path.join(self.root, name), digest).number, size, int(row["offset"]))
        except OSError as error:
            raise self._refusal(i, name, "unreadable", error.strerror or str(error)) from error
        if len(data) < size:
            raise self._refusal(i, name, "truncated", f"{len(data)} of its {size} bytes are there")
        if zlib.crc32(data) != int(row["crc"]):
            raise self._refusal(i, name, "damaged", "its bytes are not those that were packed (checksum)")
        return data

    def name(self, i: int) -> str:
        return os.fsdecode(bytes(self.rows["name"][i]))

    def subset(self, rows: NDArray[np.int64]) -> "ShardSource":
        """Some of the images, in the order of `rows`; their part of the index is copied into memory."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, rows=self.rows[rows], labels=labels)

    def _refusal(self, i: int, shard: str, kind: str, reason: str) -> ImageError:
        path = os.path.join(self.root, shard)
        return ImageError(f"cannot read image {self.name(i)} in {path}: {reason}", kind, f"{shard}: {reason}")


class _File:
    """A file open for reading until nobody holds it: one that is dropped while another thread reads it stays open."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(OPEN_FILES)
def _opened(path: str, digest: str) -> _File:
    """The shard; its digest tells it from another that was packed to the same place."""
    return _File(path)


def open_shards(root: str) -> dict[str, ShardSource]:
    """The splits of a packed folder: train, and bank and held_out where there are such.

    Sizes of all shards are checked, and the index by its SHA-256; each picture's checksum when it is read.

    Raises:
        FileNotFoundError: if the folder, its index or a shard is not there.
        ValueError: if the index or a shard is damaged, or the index of a newer version.
    """
    folder = Path(root).expanduser().absolute()
    about = read_index(folder, f"data.root={root} ({folder})")
    return {name: _open_split(folder, split, about["classes"]) for name, split in about["splits"].items()}


def read_index(folder: Path, where: str) -> dict[str, Any]:
    """What index.json says; `where` is how errors call the folder.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is damaged, or of another version.
    """
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{where} {_what_there_is(folder)}")
    about = read_sealed(file, f"take it from a copy, or remove {folder} and pack the pictures again", VERSION)
    assert isinstance(about["splits"], dict)
    return about


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Values for a JSON file, with the SHA-256 over them: a flipped bit leaves most files good JSON."""
    return value | {"sha256": _seal(value)}


def read_sealed(file: Path, mend: str, version: int) -> dict[str, Any]:
    """What `sealed` gave, without the seal.

    Args:
        file: JSON.
        mend: the way out if it is damaged.
        version: that it must be of.

    Raises:
        ValueError: if it is damaged, or of another version.
    """
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError):
        value = None
    found = value.get("version") if isinstance(value, dict) else None
    if isinstance(found, int) and found != version:
        newer = "install a newer moco" if found > version else "pack the pictures again, into another folder"
        raise ValueError(f"{file} is of version {found}, and this moco reads {version}: {newer}")
    if not isinstance(value, dict) or value.pop("sha256", None) != _seal(value):
        raise ValueError(f"{file} is damaged: {mend}")
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _what_there_is(folder: Path) -> str:
    """What a folder without an index is, and the way out."""
    if not folder.is_dir():
        return ("is a file, not a folder" if folder.exists() else "does not exist") + ": name the output of moco.pack"
    if (folder / PARTS).is_dir():
        return "is not packed to its end: start the same moco.pack again, it goes on where it stopped"
    if any(folder.glob("*.tar")):
        return (
            f"holds tar files but no {INDEX}: stream them with data=webdataset "
            f"'data.root={folder}/NAME-{{000000..000009}}.tar' data.length=IMAGES, or pack the pictures with moco.pack"
        )
    return f"holds no {INDEX}: make shards with python -m moco.pack data.root=IMAGES output={folder}"


def _open_split(folder: Path, about: dict[str, Any], classes: list[str]) -> ShardSource:
    file = folder / about["rows"]
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole folder that moco.pack wrote, or pack again")
    if digest_of(file) != about["sha256"]:
        raise ValueError(f"{file} is damaged (SHA-256): copy it again, or pack again")
    for shard in about["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy the whole folder that moco.pack wrote, or pack again")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes and was packed with {shard['bytes']:,}: copy it again, or "
                "pack again"
            )
    rows: NDArray[np.void] = np.load(file, mmap_mode="r", allow_pickle=False)
    shards = tuple((shard["file"], shard["sha256"]) for shard in about["shards"])
    labels = rows["label"].astype(np.int64) if classes and about["labelled"] else None
    return ShardSource(str(folder), shards, rows, labels, tuple(classes) if labels is not None else ())


def damaged(folder: Path, about: dict[str, Any], progress: Callable[[int, int], None]) -> list[str]:
    """The files whose bytes are not those that were packed, by name: each is read to its end.

    Args:
        folder: the packed one.
        about: what its index says.
        progress: called with (done, total).
    """
    splits = about["splits"].values()
    files = {split["rows"]: split["sha256"] for split in splits} | {SKIPPED: about["skipped"]}
    files |= {shard["file"]: shard["sha256"] for split in splits for shard in split["shards"]}
    wrong = []
    for number, (name, digest) in enumerate(files.items()):
        if not intact(folder / name, digest):
            wrong.append(name)
        progress(number + 1, len(files))
    return wrong


def intact(path: Path, digest: str) -> bool:
    """Whether the file is there, can be read, and has this SHA-256."""
    try:
        return digest_of(path) == digest
    except OSError:
        return False


def digest_of(path: Path) -> str:
    """A file's SHA-256, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
