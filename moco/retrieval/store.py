"""Begin, resume, finish and open the output folder of moco.embed.

An incomplete folder contains features.part.npy and progress.json. A complete one contains features.npy (rows, D),
index.csv or index.parquet with one line per row, features.json (the origin of the features), and unreadable.csv if
images were skipped.

Legend: D dimension.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco.config.base import ConfigError, require
from moco.config.quoting import override
from moco.data.sources import Source, folders
from moco.files import reserve, write_csv, write_json
from moco.reporting.gallery import ImageSet
from moco.retrieval.table import write_table
from moco.runtime.output_directory import ABOUT, FEATURES
from moco.untrusted import read_json

PARTIAL, PROGRESS = "features.part.npy", "progress.json"
_SELECTED = "features.tmp.npy"  # the readable rows of PARTIAL
_ROWS_AT_ONCE = 65_536  # rows of features in memory

About = dict[str, Any]
"""The content of features.json: encoder, images and settings. progress.json also has the number of completed chunks."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A complete output."""

    folder: Path
    images: ImageSet  # its features are mapped from the file
    about: About
    computed: bool = True  # whether this command computed it; False: the output was already complete


def origin_of(about: About) -> str:
    """Return the first folder of the images and the number of further folders as text, or the name of the data set."""
    images = about["pictures"]
    return folders(str(images["root"] or images["name"]), images.get("more_roots"))


def open_embedding(folder: Path, source: Source) -> Embedding:
    """Open a complete output with its images."""
    about = read_about(folder)
    rows = np.setdiff1d(np.arange(len(source)), np.array([int(row) for row in about["unreadable"]], np.int64))
    return Embedding(folder, ImageSet(source, rows, np.load(folder / FEATURES, mmap_mode="r")), about)


def read_about(folder: Path) -> About:
    """Read features.json; raise ConfigError if the folder is not a complete output of moco.embed."""
    if folder.is_file():
        is_output = (folder.parent / ABOUT).is_file()
        fix = f"set {override('index', folder.parent)}" if is_output else "name the output folder of moco.embed"
        raise ConfigError(f"index={folder} is a file: {fix}")
    create = f"create it with python -m moco.embed {override('output', folder)} ..."
    require(folder.is_dir(), f"index={folder} does not exist: {create}")
    if (folder / PROGRESS).exists() and not (folder / FEATURES).exists():
        raise ConfigError(f"{folder} is not complete: run the same moco.embed command again to resume")
    if not ((folder / FEATURES).is_file() and (folder / ABOUT).is_file()):
        inside = [override("index", each.parent) for each in sorted(folder.glob(f"*/{FEATURES}"))]
        fix = f", {' or '.join(inside)}" if inside else ""
        raise ConfigError(f"{folder} contains no {FEATURES} of moco.embed: name the output folder of moco.embed{fix}")
    return _read(folder / ABOUT)


def begin(folder: Path, about: About) -> About | None:
    """Return the state to resume from, and create the file of features if needed; None if the output is complete.

    Raises:
        ConfigError: if the folder contains something else, or too little disk space is free.
    """
    if (folder / FEATURES).exists() and (folder / ABOUT).exists():
        _refuse_other(folder, _read(folder / ABOUT), about | {"images_at_once": None})
        _remove_partial(folder)  # left by a process that ended within `finish`
        return None
    if (folder / PROGRESS).exists() and (folder / PARTIAL).exists():
        state = _read(folder / PROGRESS)
        if state["done"] > 0:
            _refuse_other(folder, state, about)
            return about | {"done": state["done"], "unreadable": state["unreadable"]}
    known = {PROGRESS, PARTIAL, _SELECTED, "search"}
    others = sorted(
        each.name
        for each in folder.iterdir()
        if not each.name.startswith(".") and each.name not in known and not each.match(f"{PROGRESS}*.tmp")
    )
    require(
        not others,
        f"output={folder} contains other files ({', '.join(others[:3])}): choose another folder, such as "
        f"{override('output', folder / 'features')}",
    )
    count, dimension, dtype = about["pictures"]["count"], about["dimension"], about["dtype"]
    size, free = count * dimension * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    require(
        free > size,
        f"output={folder}: {count:,} × {dimension} {dtype} need {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are "
        f"free: choose another output{', or dtype=float16' * (dtype == 'float32')}",
    )
    (folder / PARTIAL).unlink(missing_ok=True)
    np.lib.format.open_memmap(folder / PARTIAL, mode="w+", dtype=dtype, shape=(count, dimension))
    reserve(folder / PARTIAL)
    state = about | {"done": 0, "unreadable": {}}
    write_json(folder / PROGRESS, state)
    return state


def _refuse_other(folder: Path, there: About, now: About) -> None:
    """Raise ConfigError if the output was made with another encoder, other images or other settings."""
    differing = []
    there = {"precision": "fp32"} | dict(there)  # earlier versions did not write it
    if there["encoder"]["sha256"] != now["encoder"]["sha256"]:
        differing.append(f"another encoder ({there['encoder']['source']}, step {there['encoder']['step']})")
    images, origin = there["pictures"], origin_of(there)
    if images["sha256"] != now["pictures"]["sha256"]:
        differing.append(f"other images ({images['count']:,} of {origin}, split={images['split']})")
    elif images.get("content") != now["pictures"]["content"]:
        differing.append(f"images of {origin} that have changed since (size or time of a file)")
    differing += [
        f"{'images' if name == 'look' else name}={there[name]} (now {now[name]})"
        for name in ("look", "features", "normalize", "precision", "dtype", "images_at_once")
        if now[name] is not None and there[name] != now[name]
    ]
    require(
        not differing,
        f"{folder} contains features of {'; '.join(differing)}: choose another output, or remove that folder",
    )


def finish(folder: Path, source: Source, table: str, separator: str, state: About | None) -> None:
    """Write the table (see `write_table`), unreadable.csv and features.json; then rename the features to features.npy.

    Without a state the output is already complete, and only a missing table is written.
    """
    unreadable = {int(row): why for row, why in (state or _read(folder / ABOUT))["unreadable"].items()}
    require(
        len(unreadable) < len(source),
        f"none of the {len(source):,} images can be read (the first: {unreadable.get(0)}): name other images",
    )
    if state is None and (folder / f"index.{table}").exists():
        return
    ids = [i for i in range(len(source)) if i not in unreadable]
    write_table(folder, source, ids, table, separator)
    if state is None:
        return
    features = folder / PARTIAL
    if unreadable:
        reasons = ([i, source.name(i), why] for i, why in sorted(unreadable.items()))
        write_csv(folder / "unreadable.csv", ["id", "path", "reason"], reasons)
        features = _selected(folder, ids)
    write_json(folder / ABOUT, {name: value for name, value in state.items() if name != "done"} | {"rows": len(ids)})
    features.replace(folder / FEATURES)
    _remove_partial(folder)


def _remove_partial(folder: Path) -> None:
    for name in (PARTIAL, PROGRESS):
        (folder / name).unlink(missing_ok=True)


def _selected(folder: Path, ids: Sequence[int]) -> Path:
    """Copy the given rows of the features to a new file, `_ROWS_AT_ONCE` at a time."""
    every, path = np.load(folder / PARTIAL, mmap_mode="r"), folder / _SELECTED
    kept = np.lib.format.open_memmap(path, mode="w+", dtype=every.dtype, shape=(len(ids), every.shape[1]))
    reserve(path)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        kept[start : start + _ROWS_AT_ONCE] = every[ids[start : start + _ROWS_AT_ONCE]]
    kept.flush()
    return path


def _read(path: Path) -> About:
    try:
        about = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: remove {path.parent} and start again") from error
    if not isinstance(about, dict) or not {"encoder", "pictures", "unreadable"} <= about.keys():
        raise ConfigError(f"{path} is not from moco.embed: choose another output")
    return about
