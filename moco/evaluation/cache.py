"""A cache of features on disk, one file per key.

Legend: M images, D feature dimension, W processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco.distributed import all_gather_object, on_rank_zero, rank, world_size
from moco.files import FileLocked, lock, reserve, temporary_name

Compute = Callable[[Sequence[int]], Iterator[Tensor]]  # yields the features of the given rows, in batches


def cached(folder: Path, key: str, count: int, width: int, compute: Compute) -> Tensor:
    """Return the float32 features (M, D) of `folder/KEY.npy`; compute and write them first if the file is missing.

    The key is a digest of everything that determines the features. The tensor is a view of the file, so no process has
    to hold all of it. Each rank computes and writes M / W rows; all processes must see the folder. The file gets its
    name when it is complete, so an interrupted run leaves no incomplete features. (`moco.files.atomic_write` does the
    same for a file that one process writes.) Two commands may compute the same key at once: each writes its own file.

    Raises:
        WriteError: if the disk is full; the space for all features is reserved first.
        OSError: if the folder cannot be written to.
        Exception: whatever `compute` raises on any rank; every rank raises this exception.
    """
    path = folder / f"{key}.npy"
    if not on_rank_zero(lambda: _is_complete(path, count, width)):
        with ExitStack() as cleanup:  # used on rank 0
            temporary = on_rank_zero(lambda: _create(path, count, width, cleanup))
            share = -(-count // world_size())
            mine = range(min(count, rank() * share), min(count, (rank() + 1) * share))
            # The ranks wait for each other here, so all of them have finished before the file gets its name.
            written = sum(all_gather_object(lambda: _fill(temporary, mine, compute)))
            assert written == count, f"{written} of {count} rows were computed"
            on_rank_zero(lambda: temporary.replace(path))
    # Copy on write: torch needs writable memory, and changes must not reach the file.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _is_complete(path: Path, count: int, width: int) -> bool:
    try:
        stored = np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # missing, or truncated by a failed copy
        return False
    return bool(stored.shape == (count, width) and stored.dtype == np.float32)


def _create(path: Path, count: int, width: int, cleanup: ExitStack) -> Path:
    """Remove abandoned files; create a file of zeros that `cleanup` removes. A lock shows that a file is in use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f"{path.name}.*.tmp"):
        try:
            lock(_lock_of(abandoned)).close()
        except (FileLocked, OSError):  # another command computes the same features
            continue
        abandoned.unlink(missing_ok=True)
        _lock_of(abandoned).unlink(missing_ok=True)
    temporary = temporary_name(path)
    cleanup.callback(_lock_of(temporary).unlink, missing_ok=True)
    cleanup.enter_context(lock(_lock_of(temporary)))
    cleanup.callback(temporary.unlink, missing_ok=True)
    np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(count, width))
    reserve(temporary)
    return temporary


def _lock_of(temporary: Path) -> Path:
    return temporary.with_suffix(".lock")


def _fill(path: Path, rows: range, compute: Compute) -> int:
    """Write the features of these rows and return their number."""
    out = np.lib.format.open_memmap(path, mode="r+")
    done = rows.start
    for batch in compute(rows) if rows else iter(()):
        out[done : done + len(batch)] = batch.cpu().numpy()
        done += len(batch)
    out.flush()
    return done - rows.start
