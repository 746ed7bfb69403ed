"""The device, the threads and the process group of a command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moco.config import ComputeConfig, require
from moco.distributed import process_group


def pick_device(name: str) -> torch.device:
    """Return the device of this process; for "auto" a GPU if there is one.

    Raises:
        ConfigError: if name is "cuda" and there is no GPU.
    """
    require(name != "cuda" or torch.cuda.is_available(), "device=cuda, but torch finds no GPU here: set device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu" with the number of threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, threads={torch.get_num_threads()}"


@contextmanager
def compute_context(config: ComputeConfig, timeout_minutes: float = 10.0) -> Iterator[torch.device]:
    """Set the number of CPU threads, join torchrun's process group if there is one, and yield the device.

    Raises:
        ConfigError: if device=cuda and there is no GPU.
        PeerLost: if another process exits within the block, or does not respond for `timeout_minutes`.
    """
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    with process_group(device, timeout_minutes):
        yield device
