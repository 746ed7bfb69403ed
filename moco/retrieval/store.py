"""The folder that moco.embed writes: what it holds, when it may go on, when it is complete.

features.part.npy and progress.json while it grows; in the end features.npy (rows, D), index.csv or index.parquet with
a line for each row, features.json (what the features are of), and unreadable.csv where pictures were skipped.

Legend: M pictures, D dimension.
"""

import importlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco.config import ConfigError, require
from moco.data.sources import Source
from moco.files import atomic_write, write_csv, write_json

FEATURES, PART, PROGRESS, ABOUT = "features.npy", "features.part.npy", "progress.json", "features.json"
_ROWS = 65_536  # of a table or of features in memory at once

Stored = dict[str, Any]  # what features.json says; progress.json says the same and how far it is


@dataclass(frozen=True, eq=False)
class Embedding:
    """Features on disk and the pictures they are of."""

    folder: Path
    features: NDArray[Any]  # (rows, D), mapped from the file
    ids: NDArray[np.int64]  # (rows,), each row's picture in the source
    source: Source
    stored: Stored
    computed: bool = True  # by this command; otherwise all was there already


def open_embedding(folder: Path, source: Source) -> Embedding:
    """A complete output with its pictures."""
    stored = read_about(folder)
    ids = np.setdiff1d(np.arange(len(source)), np.array([int(row) for row in stored["unreadable"]], np.int64))
    return Embedding(folder, np.load(folder / FEATURES, mmap_mode="r"), ids, source, stored)


def read_about(folder: Path) -> Stored:
    """What a complete output says of itself.

    Raises:
        ConfigError: if it is none, or not complete.
    """
    require(folder.is_dir(), f"{folder} does not exist: make it with python -m moco.embed output={folder} ...")
    if (folder / PROGRESS).exists() and not (folder / FEATURES).exists():
        raise ConfigError(f"{folder} is not complete: start the same moco.embed again, it goes on where it stopped")
    require(
        (folder / FEATURES).is_file() and (folder / ABOUT).is_file(),
        f"{folder} holds no {FEATURES} of moco.embed: name its output",
    )
    return _read(folder / ABOUT)


def begin(folder: Path, stored: Stored) -> Stored | None:
    """The state to go on from, with the file for the features made; None if all is there.

    Raises:
        ConfigError: if the folder holds something else, or the disk is too small.
    """
    if (folder / FEATURES).exists() and (folder / ABOUT).exists():
        _refuse_other(folder, _read(folder / ABOUT), stored | {"images_at_once": None})
        _clean(folder)  # of a process that was ended at its last line
        return None
    if (folder / PROGRESS).exists() and (folder / PART).exists():
        state = _read(folder / PROGRESS)
        if state["done"] > 0:  # with nothing done there is nothing to go on with
            _refuse_other(folder, state, stored)
            return stored | {"done": state["done"], "unreadable": state["unreadable"]}
    ours = {PROGRESS, PART, f"{PROGRESS}.tmp", "search"}
    others = [each.name for each in folder.iterdir() if not each.name.startswith(".") and each.name not in ours]
    require(
        not others,
        f"output={folder} holds something else ({', '.join(sorted(others)[:3])}): choose another, such as "
        f"output={folder / 'features'}",
    )
    count, dimension = stored["pictures"]["count"], stored["dimension"]
    size = count * dimension * np.dtype(stored["dtype"]).itemsize
    free = shutil.disk_usage(folder).free
    require(
        free > size,
        f"output={folder}: {count:,} × {dimension} {stored['dtype']} take {size / 1e9:,.1f} GB, and "
        f"{free / 1e9:,.1f} GB are free there: choose another output"
        + (", or dtype=float16" if stored["dtype"] == "float32" else ""),
    )
    (folder / PART).unlink(missing_ok=True)
    np.lib.format.open_memmap(folder / PART, mode="w+", dtype=stored["dtype"], shape=(count, dimension))
    state = stored | {"done": 0, "unreadable": {}}
    write_json(folder / PROGRESS, state)
    return state


def _refuse_other(folder: Path, there: Stored, now: Stored) -> None:
    """Raises ConfigError if what is there was made by another encoder, of other pictures or in another way."""
    differing = []
    if there["encoder"]["sha256"] != now["encoder"]["sha256"]:
        differing.append(f"another encoder ({there['encoder']['source']}, step {there['encoder']['step']})")
    at = there["pictures"]["root"] or there["pictures"]["name"]
    if there["pictures"]["sha256"] != now["pictures"]["sha256"]:
        differing.append(f"other pictures ({there['pictures']['count']:,} of {at}, split={there['pictures']['split']})")
    elif there["pictures"].get("content") != now["pictures"]["content"]:
        differing.append(f"pictures of {at} that have changed since")
    differing += [
        f"{'images' if name == 'look' else name}={there[name]} (now {now[name]})"
        for name in ("look", "features", "normalize", "dtype", "images_at_once")
        if now[name] is not None and there[name] != now[name]
    ]
    require(
        not differing,
        f"{folder} holds features of {' and '.join(differing)}: choose another output, or remove that folder",
    )


def finish(folder: Path, source: Source, kind: str, state: Stored | None) -> None:
    """Gives the files their final names, features.npy last: with it all is there. On a complete output, the table."""
    stored = _read(folder / ABOUT) if state is None else state
    bad = {int(row): why for row, why in stored["unreadable"].items()}
    require(len(bad) < len(source), f"none of the {len(source):,} pictures can be read, the first: {bad.get(0)}")
    if state is None and (folder / f"index.{kind}").exists():
        return
    ids = [i for i in range(len(source)) if i not in bad]
    _write_table(folder, source, ids, kind)
    if state is None:
        return
    features = folder / PART
    if bad:
        lines = ([i, source.name(i), bad[i]] for i in sorted(bad))
        write_csv(folder / "unreadable.csv", ["id", "path", "reason"], lines)
        features = _without(folder, ids)
    write_json(folder / ABOUT, {name: value for name, value in state.items() if name != "done"} | {"rows": len(ids)})
    features.replace(folder / FEATURES)
    _clean(folder)


def _clean(folder: Path) -> None:
    """Takes away what only an unfinished output needs."""
    for name in (PART, PROGRESS):
        (folder / name).unlink(missing_ok=True)


def _without(folder: Path, ids: Sequence[int]) -> Path:
    """The rows `ids` of the features in a new file, a part at a time."""
    every = np.load(folder / PART, mmap_mode="r")
    path = folder / "features.tmp.npy"
    kept = np.lib.format.open_memmap(path, mode="w+", dtype=every.dtype, shape=(len(ids), every.shape[1]))
    for start in range(0, len(ids), _ROWS):
        kept[start : start + _ROWS] = every[ids[start : start + _ROWS]]
    kept.flush()
    return path


def _read(path: Path) -> Stored:
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: remove {path.parent} and start again") from error
    if not isinstance(there, dict) or not {"encoder", "pictures", "unreadable"} <= there.keys():
        raise ConfigError(f"{path} is none of moco.embed: choose another output")
    return there


def _columns(source: Source) -> list[str]:
    return ["row", "id", "path", *(["label", "class"] if source.labels is not None else [])]


def _lines(source: Source, ids: Sequence[int]) -> Iterator[list[Any]]:
    """Of each row: its number, the picture's number in the data set and name, where there are labels those."""
    for row, i in enumerate(ids):
        line: list[Any] = [row, i, source.name(i)]
        if source.labels is not None:
            label = int(source.labels[i])
            line += [label, source.classes[label]]
        yield line


def _write_table(folder: Path, source: Source, ids: Sequence[int], kind: str) -> None:
    if kind == "csv":
        write_csv(folder / "index.csv", _columns(source), _lines(source, ids))
    else:
        _write_parquet(folder / "index.parquet", _columns(source), _lines(source, ids))


def _write_parquet(path: Path, columns: Sequence[str], lines: Iterator[Sequence[Any]]) -> None:
    arrow, parquet = pyarrow()
    text = {"path", "class"}
    schema = arrow.schema([(name, arrow.string() if name in text else arrow.int64()) for name in columns])
    with atomic_write(path) as temporary, parquet.ParquetWriter(str(temporary), schema) as writer:
        while part := list(islice(lines, _ROWS)):
            values = [list(column) for column in zip(*part, strict=True)]
            plain = [
                [_utf8(value) for value in column] if name in text else column
                for name, column in zip(columns, values, strict=True)
            ]
            writer.write_table(arrow.table(plain, schema=schema))


def _utf8(name: str) -> str:
    """Parquet's strings are UTF-8: other bytes of a path are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "table=parquet needs pyarrow: pip install 'momentum-contrast[parquet]', or set table=csv"
        ) from error
