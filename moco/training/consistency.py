"""One run, one set of pictures, one configuration: over all ranks, and over all attempts of a run.

Order of the samples, queue and labels refer to a picture by its number. Other pictures under the same numbers would be
trained on without a word.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moco.config import DataConfig, require
from moco.data.base import names_digest
from moco.data.sources import Source, Sources
from moco.distributed import all_gather_object
from moco.runs import checkpoint
from moco.runs.directory import flatten

# What may differ between ranks: where the data lie on a machine, and how it works on them.
OF_THE_MACHINE = ("data.root", "data.eval_root", "data.workers", "device", "threads")

Identity = dict[str, Any]


def identity(source: Source) -> Identity:
    """What tells a list of pictures from another: {"length": N, "sha256": of their names in order}, plain types.

    Names are relative to data.root, which so may move. A stream's are those of its shards, without the place that they
    are fetched from; of pictures in memory their size counts too. Two names never join to look like two others.
    """
    return {"length": len(source), "sha256": names_digest(source, with_size=True)}


def refuse_other_data(run: Path, state: Mapping[str, Any], now: Identity, data: DataConfig) -> None:
    """Raises ConfigError if the checkpoint `state` of a run was trained on other pictures than there are `now`.

    A checkpoint older than this check says nothing of its data, and is taken as it is.
    """
    there = state.get("data", now)
    if there == now:
        return
    if there["length"] != now["length"]:
        what = f"{there['length']:,} pictures, and now there are {now['length']:,}"
    else:
        what = f"{now['length']:,} pictures, and now there are as many with other names, or in another order"
    file = next(
        (
            each
            for each in checkpoint.list_checkpoints(run / "checkpoints")
            if checkpoint.step_of(each) == state["step"]
        ),
        None,
    )
    replaced = (
        "; data.on_bad_image=replace stands in for a picture that cannot be read, not for one that is gone, behind "
        "which all others have new numbers" * (data.on_bad_image == "replace")
    )
    require(
        False,
        f"run={run} was trained on {what} (data.root={data.root}), but its queue and the order of its samples know "
        f"them by number{replaced}: put them back as they were, or start another run from these weights, "
        f"run=DIRECTORY init_from={file or 'CHECKPOINT'}",
    )


def refuse_other_settings(config: Mapping[str, Any]) -> None:
    """Raises ConfigError on every rank if one was given other settings than rank 0. Collective.

    Args:
        config: this rank's, nested.
    """
    flat = {name: value for name, value in flatten(config).items() if name not in OF_THE_MACHINE}
    first, *others = all_gather_object(lambda: flat)
    for number, other in enumerate(others, start=1):
        differing = [
            f"{name} ({other.get(name)!r}, on rank 0 {first.get(name)!r})"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        require(
            not differing,
            f"rank {number} has another configuration than rank 0: {'; '.join(differing)}. Start the same command, "
            "with the same files of configuration, on every machine",
        )


def open_consistently(open_data: Callable[[], Sources]) -> tuple[Sources, Identity]:
    """The data set, and what the pictures to train on are, on every rank. Collective; what one raises all raise.

    Raises:
        ConfigError: on every rank, if one found other pictures than rank 0.
    """
    kept: list[Sources] = []

    def opened() -> dict[str, Identity]:
        kept.append(open_data())
        sources = kept[0]
        parts = {"training": sources.train, "reference": sources.bank, "held-out": sources.held_out}
        known = {id(part): identity(part) for part in parts.values() if part is not None}  # train may be the bank too
        return {name: known[id(part)] for name, part in parts.items() if part is not None}

    first, *others = all_gather_object(opened)
    for number, other in enumerate(others, start=1):
        require(first.keys() == other.keys(), f"rank {number} found other splits than rank 0: {_SAME}")
        for name, there in first.items():
            here = other[name]
            require(
                here["length"] == there["length"],
                f"rank {number} has {here['length']:,} {name} pictures and rank 0 has {there['length']:,}: {_SAME}",
            )
            require(
                here == there,
                f"rank {number} has other {name} pictures than rank 0, {there['length']:,} each, or in another order: "
                f"{_SAME}",
            )
    return kept[0], first["training"]


_SAME = "give every machine the same data under data.root and data.eval_root, with the same names"
