"""All ranks, and all attempts of a run, must use the same images and the same configuration.

The order of the samples, the queue and the labels identify an image by its number. With other images under the same
numbers, training would continue without an error.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from moco.config import ConfigError, DataConfig, flatten, require
from moco.data.base import Source, Sources, names_digest
from moco.data.labels import first_names
from moco.distributed import all_gather_object
from moco.files import atomic_write
from moco.runs import checkpoint
from moco.untrusted import refuse_special_file

# Fields that may differ between ranks: the location of the data on a machine, and how it is processed there.
PER_MACHINE = ("data.root", "data.more_roots", "data.eval_root", "data.label_file", "data.workers", "device", "threads")

NAMES = "image_names.gz"  # in the run directory; lists the names so that an error can name the images that have changed
MOST_NAMES = 100_000  # a data set with more images has no such file

Identity = dict[str, Any]


def identity(source: Source) -> Identity:
    """Return {"length": N, "sha256": its `names_digest`} of a source."""
    return {"length": len(source), "sha256": names_digest(source, with_size=True)}


def record_names(run: Path, source: Source, resumed: bool) -> None:
    """Write the names of the images to `NAMES` in the run directory, unless there are more than `MOST_NAMES` images.

    A resumed run keeps its file.
    """
    file = run / NAMES
    names = list(islice(source.encoded_names(), MOST_NAMES + 1))
    if len(names) <= MOST_NAMES and not (resumed and file.exists()):
        with atomic_write(file) as temporary:
            temporary.write_bytes(gzip.compress(b"\0".join(names), mtime=0))


def _changed_names(run: Path, source: Source) -> str:
    """Name the images that are new or gone since `record_names`; "" if this is not known."""
    try:
        refuse_special_file(run / NAMES)
        with gzip.open(run / NAMES) as file:
            before = file.read(MOST_NAMES * 4096).split(b"\0", MOST_NAMES)
    except (OSError, ValueError, EOFError, zlib.error):  # no file was written, or it is damaged
        return ""
    now = list(source.encoded_names())
    parts = []
    for names, others, what in ((now, before, "new"), (before, now, "gone")):
        known = set(others)
        if changed := [os.fsdecode(name) for name in names if name not in known]:
            parts.append(f"{len(changed):,} {'is' if len(changed) == 1 else 'are'} {what}: {first_names(changed, 3)}")
    return f" ({'; '.join(parts)})" if parts else ""


def refuse_other_data(run: Path, state: Mapping[str, Any], now: Identity, data: DataConfig, source: Source) -> None:
    """Raise ConfigError if a checkpoint belongs to other images; checkpoints of early versions are not checked."""
    before = state.get("data", now)
    if before == now:
        return
    change = (
        f"{before['length']:,} images, and now there are {now['length']:,}"
        if before["length"] != now["length"]
        else f"{now['length']:,} images, and now they have other names or another order"
    )
    which = _changed_names(run, source)
    files = checkpoint.list_checkpoints(run / "checkpoints")
    file = next((each for each in files if checkpoint.step_of(each) == state["step"]), "CHECKPOINT")
    replaced = "; data.on_bad_image=replace replaces unreadable images, not missing ones"
    raise ConfigError(
        f"run={run} was trained on {change} (data.root={data.root}){which}. Its queue and sample order identify "
        f"images by their number{replaced if data.on_bad_image == 'replace' else ''}: restore the images, or start "
        f"another run from these weights, run=DIRECTORY init_from={file}"
    )


def refuse_other_settings(config: Mapping[str, Any]) -> None:
    """Raise ConfigError on every rank if a rank's configuration differs from rank 0's, except in `PER_MACHINE`.

    `config` holds nested dicts. Collective.
    """
    settings = {name: value for name, value in flatten(config).items() if name not in PER_MACHINE}
    first, *others = all_gather_object(lambda: settings)
    for rank, other in enumerate(others, start=1):
        differing = [
            f"{name} ({other.get(name)!r}, on rank 0 {first.get(name)!r})"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        require(
            not differing,
            f"rank {rank} has another configuration than rank 0: {'; '.join(differing)}. Start the same command with "
            "the same configuration files on every machine",
        )


def open_consistently(open_data: Callable[[], Sources]) -> tuple[Sources, Identity]:
    """Open the data set on every rank; return it with the identity of its training images. Collective.

    Raises:
        ConfigError: on every rank, if a rank has other images than rank 0.
    """
    opened: list[Sources] = []

    def identities() -> dict[str, Identity]:
        opened.append(open_data())
        parts = {"training": opened[0].train, "reference": opened[0].bank, "held-out": opened[0].held_out}
        known = {id(part): identity(part) for part in parts.values() if part is not None}  # a source can be two splits
        return {name: known[id(part)] for name, part in parts.items() if part is not None}

    fix = "give every machine the same data, with the same names, under data.root, data.more_roots and data.eval_root"
    first, *others = all_gather_object(identities)
    for rank, other in enumerate(others, start=1):
        require(first.keys() == other.keys(), f"rank {rank} has other splits than rank 0: {fix}")
        for name, expected in first.items():
            found, count = other[name]["length"], expected["length"]
            require(found == count, f"rank {rank} has {found:,} {name} images and rank 0 has {count:,}: {fix}")
            require(
                other[name] == expected,
                f"rank {rank} has other {name} images than rank 0, or in another order ({count:,} each): {fix}",
            )
    return opened[0], first["training"]
