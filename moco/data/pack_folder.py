"""What a folder of moco.pack holds: whether it is the same work, whether it is whole, and how it is mended.

While packing goes on, `output/parts/` holds the settings and, of each finished shard, its part of the index. A finished
folder that is damaged becomes such an unfinished one again: its index has all that its parts held.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.config import RunWarning, require
from moco.config.pack import PackConfig
from moco.data.packing import Part, part_path, write_part
from moco.data.shards import INDEX, PARTS, VERSION, damaged, read_sealed, sealed
from moco.data.sources import Source
from moco.evaluation.cache import key_of, source_digest
from moco.files import write_errors, write_json
from moco.runtime.console import progress_bar

SETTINGS = "settings.json"
# Of these the digests in `pictures` decide: the same labels may come from a column that was named, or found.
_TOLD = ("pictures", "data.label_column")


def settings(config: PackConfig, splits: dict[str, Source]) -> dict[str, Any]:
    """All that determines the shards, by the names of the fields; `pictures` is what is in each split."""
    data = config.data
    with progress_bar("looking at the pictures' names and dates", quiet=False) as progress:
        pictures = {}
        for number, (name, source) in enumerate(splits.items()):
            pictures[name] = {"count": len(source), "sha256": source_digest(source), "labels": _labels_digest(source)}
            progress(number + 1, len(splits))
    return {
        "short_side": config.short_side,
        "quality": config.quality if config.short_side else None,
        "shard_mb": config.shard_mb,
        "data.name": data.name,
        "data.labels": data.labels,
        "data.label_column": data.label_column,
        "pictures": pictures,
    }


def _labels_digest(source: Source) -> str:
    labels = None if source.labels is None else torch.from_numpy(np.asarray(source.labels, np.int64))
    return key_of({"classes": list(source.classes), "labels": labels})


def refuse_other(output: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ConfigError, naming each field, if the folder holds shards of other pictures, labels or settings."""
    differing = [
        f"{name}={there.get(name)} (now {value})"
        for name, value in wanted.items()
        if name not in _TOLD and there.get(name) != value
    ]
    if not differing and there["pictures"] != wanted["pictures"]:
        differing.append(_other_pictures(there, wanted))
    require(
        not differing,
        f"output={output} holds shards with {' and '.join(differing)}: choose another output, or remove that folder",
    )


def _other_pictures(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In which way they are others."""
    both = there["pictures"], wanted["pictures"]
    alone = [{name: (split["count"], split["sha256"]) for name, split in each.items()} for each in both]
    if alone[0] == alone[1]:
        columns = [repr(each["data.label_column"]) for each in (there, wanted)]
        return f"other labels or classes of the same pictures (data.label_column={columns[0]}; now {columns[1]})"
    counts = [", ".join(f"{split['count']:,} {name}" for name, split in each.items()) for each in both]
    return f"other pictures, or the same ones changed since ({counts[0]}; now {counts[1]})"


def begin(output: Path, wanted: dict[str, Any]) -> None:
    """Makes the folder for parts, or checks that what was begun there is the same.

    Raises:
        ConfigError: if the folder holds something else.
        ValueError: if what says so is damaged.
    """
    file = output / PARTS / SETTINGS
    if file.is_file():
        refuse_other(output, read_sealed(file, f"remove {output} and start again", VERSION)["settings"], wanted)
        return
    others = sorted(each.name for each in output.iterdir() if each.name not in (".lock", PARTS))
    require(not others, f"output={output} is not empty and holds no shards ({others[:1]}): choose another folder")
    with write_errors(output):
        _write_settings(output, wanted)


def _write_settings(output: Path, wanted: dict[str, Any]) -> None:
    (output / PARTS).mkdir(exist_ok=True)
    write_json(output / PARTS / SETTINGS, sealed({"version": VERSION, "settings": wanted}))


def is_whole(output: Path, about: dict[str, Any]) -> bool:
    """Reads every file of a finished folder; one that holds damage is unfinished then, from the first damaged shard on.

    Warns:
        RunWarning: naming what is damaged.
    """
    with progress_bar("checking shards", quiet=False) as progress:
        wrong = damaged(output, about, progress)
    if not wrong:
        return True
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    warnings.warn(
        f"not as written (SHA-256): {output / wrong[0]}{more}; packed again from a split's first damaged shard on",
        RunWarning,
        stacklevel=2,
    )
    with write_errors(output):
        _reopen(output, about, wrong)
    return False


def _reopen(output: Path, about: dict[str, Any], wrong: list[str]) -> None:
    """Puts the folder into the state before its index was written. The index goes last, so this can be interrupted."""
    shutil.rmtree(output / PARTS, ignore_errors=True)
    _write_settings(output, about["settings"])
    for name, split in about["splits"].items():
        if split["rows"] in wrong:  # nothing says any more where its pictures lie
            continue
        rows = np.load(output / split["rows"], mmap_mode="r", allow_pickle=False)
        first, shards = 0, iter(split["shards"])
        for number, part in enumerate(split["parts"]):
            end = first + part["rows"]
            shard = next(shards) if part["rows"] else {}
            again = Part(rows[first:end], shard, part["end"], part["before"], part["skipped"])
            write_part(part_path(output, name, number), again)
            first = end
    (output / INDEX).unlink()
