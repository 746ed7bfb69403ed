"""The index of a folder of tar shards that `moco.pack` writes: its files and their checksums.

A packed folder contains:

    train-000000.tar ...   plain WebDataset: 000000000.jpg and, with labels, 000000000.cls, in the source's order
    train.npy              one row per image (`row_type`): shard, offset, size, checksum, label, name
    held_out-000000.tar, held_out.npy, bank-000000.tar, bank.npy      the same for the other splits, if there are any
    skipped.csv            the images that were left out, and why
    index.json             classes, settings, the SHA-256 of every file above and of its own content; written last
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco.config.quoting import override
from moco.config.types import type_error
from moco.data.base import Progress
from moco.untrusted import read_json

# PARTS: the folder of finished parts, which exists until the output is complete.
INDEX, PARTS, SKIPPED, VERSION = "index.json", "parts", "skipped.csv", 2
SPLITS = ("train", "bank", "held_out")


def row_type(name_bytes: int) -> np.dtype[np.void]:
    """Return the type of one image's row: 28 bytes of numbers, and `name_bytes` for the name.

    `shard` is the number of the shard; `offset` and `size` locate the image's file inside the shard; `crc` is the
    CRC-32 of that file; `label` is -1 without a label; `name` is the image's name in its source, in the file system's
    encoding.
    """
    fields: list[tuple[str, str]] = [("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("crc", "<u4")]
    return np.dtype([*fields, ("label", "<i4"), ("name", f"S{max(1, name_bytes)}")])


def read_index(folder: Path, where: str) -> dict[str, Any]:
    """Read the index of a packed folder; the error about a missing index begins with `where`.

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: if the index is damaged, or has another version.
    """
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{where} {_without_index(folder)}")
    fix = f"restore it from a copy, or remove {folder} and pack the images again"
    index = read_sealed(file, fix)
    if flaw := next(_flaws(index), ""):
        raise ValueError(f"{file} is damaged ({flaw}): {fix}")
    return index


# The types of the values in index.json, in each of its splits, and in each shard of a split.
_INDEX: dict[str, Any] = {"classes": list[str], "splits": Mapping, "settings": Mapping, "skipped": str}
_SPLIT: dict[str, Any] = {"rows": str, "sha256": str, "pictures": int, "labelled": bool, "shards": list, "parts": list}
_SHARD: dict[str, Any] = {"file": str, "bytes": int, "sha256": str}
# A `moco.data.pack_output.Part` as stored: "end" is its `next_image`, "before" its `source_bytes`.
_PART: dict[str, Any] = {"rows": int, "end": int, "before": int, "skipped": list}


def _flaws(index: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `moco.pack` would write differently. Use only the first result: later checks rely on earlier ones."""
    yield from _differences(index, _INDEX, "the index")
    if not {"train"} <= set(index["splits"]) <= set(SPLITS):
        yield f"splits has the names {', '.join(index['splits'])}"
    for name, split in index["splits"].items():
        yield from _differences(split, _SPLIT, name)
        for kind, schema in (("shards", _SHARD), ("parts", _PART)):
            for each in split[kind]:
                yield from _differences(each, schema, f"{name}.{kind}")
        for file in (split["rows"], *(shard["file"] for shard in split["shards"])):
            if file in ("", ".", "..") or Path(file).name != file:
                yield f"{name} names {file!r}, which is not in the folder"


def _differences(value: Any, schema: dict[str, Any], name: str) -> Iterator[str]:
    """Yield a sentence about each entry that has another type, is missing or is negative."""
    if error := type_error(name, value, schema, exact=True):
        yield error
    invalid = (key for key in schema if key not in value or (isinstance(value[key], int) and value[key] < 0))
    yield from (f"{name}.{key} is missing or negative" for key in invalid)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return the values with their SHA-256, for a JSON file: most files with a flipped bit are still valid JSON."""
    return value | {"sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


def read_sealed(file: Path, fix: str) -> dict[str, Any]:
    """Read a JSON file of `sealed` values; return them without the SHA-256.

    Raises:
        ValueError: if the file has another version, or is damaged; the message about damage ends with `fix`.
    """
    try:
        value = read_json(file)
    except ValueError:
        value = None
    found = value.get("version") if isinstance(value, dict) else None
    if isinstance(found, int) and found != VERSION:
        newer = "install a newer moco" if found > VERSION else "pack the images again, into another folder"
        raise ValueError(f"{file} has version {found}, and this moco reads version {VERSION}: {newer}")
    content = {name: each for name, each in value.items() if name != "sha256"} if isinstance(value, dict) else {}
    if value != sealed(content):
        raise ValueError(f"{file} is damaged: {fix}")
    return content


def _without_index(folder: Path) -> str:
    """Describe a folder without an index, and the fix."""
    if not folder.exists():
        return "does not exist: set it to the output of moco.pack"
    if not folder.is_dir():
        return "is a file, not a folder: set it to the output of moco.pack"
    if (folder / PARTS).is_dir():
        return "is not completely packed: run the same moco.pack command again to resume"
    if any(folder.glob("*.tar")):
        root = override("data.root", f"{folder}/NAME-{{000000..000009}}.tar")
        return (
            f"contains tar files but no {INDEX}: stream them with data=webdataset {root} data.length=N (N images "
            "per epoch), or pack the images with moco.pack"
        )
    return f"contains no {INDEX}: make shards with python -m moco.pack data.root=IMAGES {override('output', folder)}"


def damaged_files(folder: Path, index: dict[str, Any], progress: Progress) -> list[str]:
    """Read every file of a packed folder and return the names of those that are missing or have changed."""
    splits = index["splits"].values()
    files = {split["rows"]: split["sha256"] for split in splits} | {SKIPPED: index["skipped"]}
    files |= {shard["file"]: shard["sha256"] for split in splits for shard in split["shards"]}
    damaged = []
    for number, (name, digest) in enumerate(files.items()):
        if not is_intact(folder / name, digest):
            damaged.append(name)
        progress(number + 1, len(files))
    return damaged


def is_intact(path: Path, digest: str) -> bool:
    """Return whether the file exists, can be read, and has this SHA-256."""
    try:
        return file_digest(path) == digest
    except OSError:
        return False


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
