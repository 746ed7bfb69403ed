"""The device, the threads and the process group of a command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moco.config import ComputeConfig, require
from moco.distributed import process_group, world_size


def pick_device(name: str, tf32: bool = False) -> torch.device:
    """Return the device of this process; for "auto" a CUDA GPU if there is one, else the CPU.

    After this call, a CUDA GPU computes float32 in IEEE single precision, or in TF32 if `tf32` is true.

    Raises:
        ConfigError: if name is "cuda" or "mps" and there is no such GPU, or for "mps" with several processes.
    """
    if name == "mps":
        require(torch.backends.mps.is_available(), "device=mps, but torch finds no MPS device here: set device=cpu")
        one = int(os.environ.get("WORLD_SIZE", "1")) == 1
        require(one, "device=mps with torchrun: torch has no collectives on MPS; start one process, or set device=cpu")
        return torch.device("mps")
    require(name != "cuda" or torch.cuda.is_available(), "device=cuda, but torch finds no GPU here: set device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # measures cuDNN's algorithms for each new shape, see `many_shapes`
    set_float32_precision(tf32)
    return device


@contextmanager
def many_shapes() -> Iterator[None]:
    """Let cuDNN choose its algorithms without measuring them, for images of many shapes. Also usable as a decorator."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def set_float32_precision(tf32: bool) -> None:
    """Let GPUs compute convolutions and matrix products of float32 numbers in TF32, or in IEEE single precision.

    By default torch computes convolutions in TF32.
    """
    # These two lines also set torch's newer fields `fp32_precision`. torch.compile fails if only the newer fields are
    # set to TF32.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def float64_device(device: torch.device) -> torch.device:
    """Return the device for computations in float64: the CPU in place of MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu" or "mps" with the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads={torch.get_num_threads()}"


def describe_devices(device: torch.device) -> str:
    """Return the number of processes and the device of each, such as "2 x cpu, threads=1"."""
    return f"{world_size()} x {describe_device(device)}"


@contextmanager
def compute_context(config: ComputeConfig, timeout_minutes: float = 10.0) -> Iterator[torch.device]:
    """Set the number of CPU threads, join torchrun's process group if there is one, and yield the device.

    Raises:
        ConfigError: see `pick_device`.
        PeerLost: if another process exits within the block, or does not respond for `timeout_minutes`.
    """
    device = pick_device(config.device, config.tf32)
    if config.threads:
        torch.set_num_threads(config.threads)
    with process_group(device, timeout_minutes):
        yield device
