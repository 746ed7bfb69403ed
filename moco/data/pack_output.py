"""The output folder of moco.pack while it is unfinished: its settings and its finished parts.

During packing, `output/parts/` contains the settings and, for each finished shard, its part of the index. A finished
folder that is damaged is changed back to an unfinished one: the parts are restored from index.json and the files of
rows (train.npy, ...), which together hold all of their content.

Legend: N images, n images of one shard.
"""

import io
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moco.config import RunWarning, require
from moco.config.pack import PackConfig
from moco.data.base import Source
from moco.data.shard_index import INDEX, PARTS, VERSION, damaged_files, read_sealed, row_type, sealed
from moco.digest import digest
from moco.files import atomic_write, write_errors, write_json
from moco.runtime.console import progress_bar

SETTINGS = "settings.json"
# `pictures` is compared after the other fields. The name of the label column may be given or left out: it is not
# compared, because the digests in `pictures` include the labels.
_NOT_COMPARED = ("pictures", "data.label_column")


class Part(NamedTuple):
    """The entries of the index about one finished shard. An interrupted command resumes after the last part."""

    rows: NDArray[np.void]  # (n,); empty if all images of the part were skipped
    shard: dict[str, Any]  # file, bytes, sha256; {} if all images were skipped
    next_image: int  # the source's first image after this part
    source_bytes: int  # size of the part's images before packing
    skipped: list[list[str]]  # name, kind and reason of each unreadable image


def part_path(output: Path, split: str, number: int) -> Path:
    """Return the path of part `number` of a split, in an unfinished folder."""
    return output / PARTS / f"{split}-{number:06}.npz"


def write_part(path: Path, part: Part) -> None:
    """Write a part to a file, atomically."""
    about = json.dumps([part.shard, part.next_image, part.source_bytes, part.skipped])
    archive = io.BytesIO()  # a signal may interrupt savez, and a ZipFile of a closed file then prints a traceback
    np.savez(archive, rows=part.rows, about=np.array(about))
    with atomic_write(path) as temporary:
        temporary.write_bytes(archive.getvalue())


def read_part(path: Path) -> Part:
    """Read a part from the file that `write_part` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Part(file["rows"], *json.loads(str(file["about"])))


def join_rows(path: Path, parts: Sequence[Path]) -> int:
    """Join the rows of all parts into one .npy file, one part in memory at a time; return their number N."""
    shapes = [(len(rows), rows.dtype["name"].itemsize) for rows in (read_part(part).rows for part in parts)]
    count, width = sum(length for length, _ in shapes), max(bytes_ for _, bytes_ in shapes)
    dtype = row_type(width)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for part in parts:
            file.write(read_part(part).rows.astype(dtype).tobytes())
    return count


def settings(config: PackConfig, splits: dict[str, Source]) -> dict[str, Any]:
    """Return everything that determines the shards, by field name; `pictures` describes the images of each split."""
    data = config.data
    with progress_bar("reading the images' names and dates") as progress:
        images = {}
        for number, (name, source) in enumerate(splits.items()):
            labels = None if source.labels is None else torch.from_numpy(np.asarray(source.labels, np.int64))
            labels_digest = digest({"classes": list(source.classes), "labels": labels})[:24]  # 24 of 64 digits suffice
            images[name] = {"count": len(source), "sha256": source.content_digest(), "labels": labels_digest}
            progress(number + 1, len(splits))
    quality = config.quality if config.short_side else None
    shards = {"short_side": config.short_side, "quality": quality, "shard_mb": config.shard_mb}
    labels_of = {"data.name": data.name, "data.labels": data.labels, "data.label_column": data.label_column}
    return shards | labels_of | {"pictures": images}


def refuse_other_settings(output: Path, found: dict[str, Any], requested: dict[str, Any]) -> None:
    """Raise a ConfigError that names each difference, if the folder was packed from other images or settings."""
    differing = [
        f"{name}={found.get(name)} (now {value})"
        for name, value in requested.items()
        if name not in _NOT_COMPARED and found.get(name) != value
    ]
    if not differing and found["pictures"] != requested["pictures"]:
        differing.append(_image_difference(found, requested))
    require(
        not differing,
        f"output={output} contains shards with {'; '.join(differing)}: choose another output, or remove that folder",
    )


def _image_difference(found: dict[str, Any], requested: dict[str, Any]) -> str:
    both = found["pictures"], requested["pictures"]
    content = [{name: (split["count"], split["sha256"]) for name, split in each.items()} for each in both]
    if content[0] == content[1]:
        old, new = found["data.label_column"], requested["data.label_column"]
        return f"other labels or classes of the same images (data.label_column={old!r}; now {new!r})"
    counts = [", ".join(f"{split['count']:,} {name}" for name, split in each.items()) for each in both]
    return f"other images, or image files whose size or modification time differs ({counts[0]}; now {counts[1]})"


def begin(output: Path, requested: dict[str, Any]) -> None:
    """Create the folder of parts. If it exists, refuse to continue with other settings than those in it."""
    file = output / PARTS / SETTINGS
    if file.is_file():
        found = read_sealed(file, f"remove {output} and start again")["settings"]
        refuse_other_settings(output, found, requested)
        return
    others = sorted(each.name for each in output.iterdir() if each.name not in (".lock", PARTS))
    require(not others, f"output={output} contains no shards, but {', '.join(others[:1])}: choose another folder")
    with write_errors(output):
        _write_settings(output, requested)


def _write_settings(output: Path, requested: dict[str, Any]) -> None:
    (output / PARTS).mkdir(exist_ok=True)
    write_json(output / PARTS / SETTINGS, sealed({"version": VERSION, "settings": requested}))


def verify(output: Path, index: dict[str, Any]) -> bool:
    """Return whether every file of a finished folder is intact; if not, reopen the folder, so that `pack` repairs it.

    Warns:
        RunWarning: naming a damaged file.
    """
    with progress_bar("checking shards") as progress:
        damaged = damaged_files(output, index, progress)
    if not damaged:
        return True
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    warnings.warn(
        f"damaged (SHA-256): {output / damaged[0]}{more}; each split is packed again from its first damaged shard on",
        RunWarning,
        stacklevel=2,
    )
    with write_errors(output):
        _reopen(output, index, damaged)
    return False


def _reopen(output: Path, index: dict[str, Any], damaged: list[str]) -> None:
    """Restore the state before the index was written. The index is removed last, so this can be interrupted."""
    shutil.rmtree(output / PARTS, ignore_errors=True)
    _write_settings(output, index["settings"])
    for name, split in index["splits"].items():
        if split["rows"] in damaged:  # the positions of its images are lost
            continue
        rows = np.load(output / split["rows"], mmap_mode="r", allow_pickle=False)
        first, shards = 0, iter(split["shards"])
        for number, part in enumerate(split["parts"]):
            stop = first + part["rows"]
            shard = next(shards) if part["rows"] else {}
            restored = Part(rows[first:stop], shard, part["end"], part["before"], part["skipped"])
            write_part(part_path(output, name, number), restored)
            first = stop
    (output / INDEX).unlink()
