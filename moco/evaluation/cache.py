"""Features on disk: computed once for a key, found again for the same key, and never for another.

Legend: M images, D dimension, W processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.digest import digest
from moco.distributed import all_gather_object, on_rank_zero, rank, world_size

Compute = Callable[[Sequence[int]], Iterator[Tensor]]  # rows of a source to their features, batch by batch


def key_of(parts: Mapping[str, Any]) -> str:
    """A name for what the features are made of: hexadecimal digits of the SHA-256 over plain values and tensors."""
    return digest(dict(parts))[:24]


def cached(folder: Path, key: str, count: int, width: int, compute: Compute) -> Tensor:
    """Features (M, D) that lie in `folder/KEY.npy`, float32, in the source's order; written there first if need be.

    The tensor is a view of the file: the system reads what is asked for, so no process has to hold all of it. Each rank
    computes and writes M / W rows. The file gets its name when it is whole, so an interrupted writer leaves nothing
    that could be taken for features. All processes must see the folder.

    Args:
        folder: made if it is not there.
        key: see `key_of`.
        count, width: M and D.
        compute: gives the features of some rows, in their order.

    Raises:
        OSError: if the folder cannot be written to.
        Exception: what `compute` raises on any rank, on every rank.
    """
    path = folder / f"{key}.npy"
    if not on_rank_zero(lambda: _whole(path, count, width)):
        temporary = on_rank_zero(lambda: _start(path, count, width))
        share = -(-count // world_size())
        mine = range(min(count, rank() * share), min(count, (rank() + 1) * share))
        # Ranks wait here for each other: only a file that all have finished gets its name.
        written = sum(all_gather_object(lambda: _fill(temporary, mine, compute)))
        assert written == count, f"{written} of {count} rows were computed"
        on_rank_zero(lambda: temporary.replace(path))
    # Copy on write: torch wants memory that may be written to; nothing ever goes back to the file.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _whole(path: Path, count: int, width: int) -> bool:
    try:
        known = np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # not there, or cut short by a copy that failed
        return False
    return bool(known.shape == (count, width) and known.dtype == np.float32)


def _start(path: Path, count: int, width: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(count, width))
    return temporary


def _fill(path: Path, rows: range, compute: Compute) -> int:
    """Writes the features of these rows and says how many there were."""
    out = np.lib.format.open_memmap(path, mode="r+")
    done = rows.start
    for batch in compute(rows) if rows else iter(()):
        out[done : done + len(batch)] = batch.cpu().numpy()
        done += len(batch)
    out.flush()
    return done - rows.start
