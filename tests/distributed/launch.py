"""Run a function on several processes (gloo), or in this one."""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # Meet in a file: a port could be in use.
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(minutes=3), rank=rank, world_size=world)  # a hang fails the test
    try:
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, fork: bool = False) -> list[Any]:
    """Return the result of `function(*arguments)` on each rank; the function must be at the top level of a module.

    With `fork`, the processes start without importing everything again; the caller must have no other threads.
    """
    if world == 1:
        return [function(*arguments)]
    with tempfile.TemporaryDirectory() as folder:
        # A fork server imports the modules once for all tests; it computes nothing, so that forking it is safe.
        multiprocessing.set_forkserver_preload(
            ["pytest", "torch._dynamo", "moco.training.step", "moco.methods.moco_v3", "moco.evaluation.features"]
        )
        torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _rank, (world, folder, function, arguments), nprocs=world, start_method="fork" if fork else "forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
