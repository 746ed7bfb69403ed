"""Tar shards on local disk as a data set, read in any order through their index (`moco.data.shard_index`).

Memory: the rows of the index are mapped from their file; a process holds 8 bytes per image, for its label.

Legend: N images.
"""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.config import DataConfig
from moco.data.base import Source, Sources, entries_digest, labeled, labels_at
from moco.data.decode import ImageError, decode_bytes
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.shard_index import file_digest, read_index, row_type

OPEN_FILES = 64  # per process, whatever the number of shards


@dataclass(frozen=True, eq=False)
class ShardSource(Source):
    """One split of a packed folder, each image read on request."""

    root: str  # absolute
    shards: tuple[tuple[str, str], ...]  # name and SHA-256 of each
    rows: NDArray[np.void]  # (N,) of `row_type`, mapped from the file
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    pixel_format: PixelFormat = RGB

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        return decode_bytes(self.name(i), self.content(i), self.pixel_format)

    def name(self, i: int) -> str:
        return os.fsdecode(bytes(self.rows["name"][i]))

    def content(self, i: int) -> bytes:
        row = self.rows[i]
        name, digest = self.shards[int(row["shard"])]
        size = int(row["size"])
        try:
            # pread has no file position that processes or threads would share, so a forked process may use the file.
            file = _open(os.path.join(self.root, name), digest)
            data = os.pread(file.descriptor, size, int(row["offset"]))
        except OSError as error:
            raise self._error(i, name, "unreadable", error.strerror or str(error)) from error
        if len(data) < size:
            raise self._error(i, name, "truncated", f"only {len(data)} of its {size} bytes are there")
        if zlib.crc32(data) != int(row["crc"]):
            raise self._error(i, name, "damaged", "its checksum does not match the packed image")
        return data

    def content_fingerprints(self) -> NDArray[np.int64]:
        crc: NDArray[np.int64] = self.rows["crc"].astype(np.int64)
        return crc << 31 | (self.rows["size"] & 0x7FFFFFFF)

    def subset(self, rows: NDArray[np.int64]) -> "ShardSource":
        """Return some of the images; their rows of the index are copied into memory."""
        return replace(self, rows=self.rows[rows], labels=labels_at(self.labels, rows))

    def encoded_names(self) -> Iterable[bytes]:
        return list(self.rows["name"].tolist())

    def content_digest(self) -> str:
        return entries_digest(
            ([self.name(i), int(self.rows[i]["size"]), int(self.rows[i]["crc"])] for i in range(len(self))),
            pixel_format=self.pixel_format,
        )

    def _error(self, i: int, shard: str, kind: str, reason: str) -> ImageError:
        path = os.path.join(self.root, shard)
        return ImageError(f"cannot read image {self.name(i)} in {path}: {reason}", kind, f"{shard}: {reason}")


class _File:
    """A file that is closed with the last reference to it, so a thread can still read it after the cache drops it."""

    descriptor = -1

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@lru_cache(OPEN_FILES)
def _open(path: str, digest: str) -> _File:
    """Open a shard; the digest distinguishes it from an earlier shard with the same path."""
    return _File(path)


def open_shards(config: DataConfig) -> Sources:
    """Open a packed folder. If no bank of reference images was packed, labeled training images are the bank.

    The sizes of all shards and the SHA-256 of the index are checked here. The checksum of an image is checked whenever
    the image is read.

    Raises:
        FileNotFoundError: if the folder, its index or a shard does not exist.
        ValueError: if the index or a shard is damaged, or if the index has another version.
    """
    folder = Path(config.root).expanduser().absolute()
    index = read_index(folder, f"data.root={config.root} ({folder})")
    splits = {name: _open_split(folder, split, index["classes"]) for name, split in index["splits"].items()}
    sources = labeled(splits["train"], splits.get("held_out"))
    return replace(sources, bank=splits.get("bank", sources.bank))


def _open_split(folder: Path, split: dict[str, Any], classes: list[str]) -> ShardSource:
    file = folder / split["rows"]
    fix = "copy the complete output of moco.pack, or pack again"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {fix}")
    if file_digest(file) != split["sha256"]:
        raise ValueError(f"{file} is damaged (SHA-256): {fix}")
    for shard in split["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {fix}")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {shard['bytes']:,}: {fix}")
    rows: NDArray[np.void] = np.load(file, mmap_mode="r", allow_pickle=False)
    if not _are_valid(rows, split, len(classes)):
        raise ValueError(f"{file} is damaged (it has rows of another form, or outside of the shards): {fix}")
    shards = tuple((shard["file"], shard["sha256"]) for shard in split["shards"])
    labels = rows["label"].astype(np.int64) if classes and split["labelled"] else None
    return ShardSource(str(folder), shards, rows, labels, tuple(classes) if labels is not None else ())


# The columns whose values `_are_valid` checks, and how many rows it loads at once.
_RANGES, _ROWS_AT_ONCE = ("shard", "offset", "size", "label"), 65_536


def _are_valid(rows: NDArray[Any], split: dict[str, Any], classes: int) -> bool:
    """Return whether the rows are of `row_type`, are as many as the index states, and lie within their shards."""
    width = rows.dtype["name"].itemsize if rows.dtype.names and "name" in rows.dtype.names else 0
    if rows.ndim != 1 or len(rows) != split["pictures"] or rows.dtype != row_type(width):
        return False
    ends = np.array([each["bytes"] for each in split["shards"]], np.int64)
    for start in range(0, len(rows), _ROWS_AT_ONCE):  # in parts: there may be millions of rows
        shard, offset, size, label = (rows[start : start + _ROWS_AT_ONCE][name] for name in _RANGES)
        known = (shard >= 0) & (shard < len(ends)) & (label >= -1) & (label < max(classes, 1))
        if not known.all() or not ((offset >= 0) & (size >= 0) & (offset <= ends[shard] - size)).all():
            return False
    return True
