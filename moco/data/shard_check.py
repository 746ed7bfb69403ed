"""Check a packed folder without its original images: the SHA-256 of every file that moco.pack wrote."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moco.config import DataConfig
from moco.data.labels import first_names
from moco.data.shard_index import damaged_files, read_index
from moco.runtime.console import log, progress_bar
from moco.runtime.provenance import provenance


def check_shards(data: DataConfig) -> dict[str, Any]:
    """Read every file of the packed folder `data.root`, print what is wrong, and return the report, for a JSON file.

    Raises:
        FileNotFoundError, ValueError: see `read_index`.
    """
    folder = Path(data.root).expanduser().absolute()
    index = read_index(folder, f"data.root={data.root} ({folder})")
    with progress_bar("checking shards") as progress:
        damaged = damaged_files(folder, index, progress)
    splits: dict[str, Any] = index["splits"]
    images = ", ".join(f"{split['pictures']:,} {name.replace('_', '-')}" for name, split in splits.items())
    shards = sum(len(split["shards"]) for split in splits.values())
    state = damage(damaged) or "every file is intact (SHA-256)"
    log(f"{images} images in {shards:,} shard{'s' * (shards > 1)}; {state}")
    counts = {name: split["pictures"] for name, split in splits.items()}
    return {"provenance": provenance(), "data": asdict(data), "splits": counts, "damaged": damaged}


def damage(damaged: list[str]) -> str:
    """Return how many files of a packed folder are missing or damaged, and some of their names; "" for none."""
    many = f"{len(damaged):,} file{'s are' if len(damaged) > 1 else ' is'}"
    return f"{many} missing or damaged (SHA-256): {first_names(damaged)}" if damaged else ""
