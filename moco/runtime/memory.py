"""Memory: the allocator's habits, the most that was used, and one sentence where there is not enough."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Numbers of mallopt(3) in glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Lets glibc hold on to freed memory instead of giving it back to the system and faulting it in anew.

    A step frees and takes the same large tensors again and again, and by default glibc takes each as a mapping of its
    own, whose pages the system clears at every first touch. Left alone are other C libraries, and what the user has set
    through MALLOC_... or GLIBC_TUNABLES.

    Returns:
        Whether it was set.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_TOP_PAD, _PAD))


def peak_memory(device: torch.device) -> int:
    """The most that this process has held so far, in bytes: on a GPU in its tensors, on a CPU altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# On a CPU torch has no class of its own for it.
_SAID = ("not enough memory", "can't allocate memory", "CUDA error: out of memory")


class OutOfMemory(ValueError):
    """A step that does not fit; the message is one sentence that says what to change."""


@contextmanager
def explain_out_of_memory(device: torch.device, fix: str) -> Iterator[None]:
    """Makes one sentence of torch's many where something does not fit into the device's memory.

    Args:
        device: whose memory.
        fix: what was asked for, and what to change, as the end of a sentence.

    Raises:
        OutOfMemory: in place of the allocator's error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in _SAID):
            raise
        on_gpu = device.type == "cuda"
        total = (
            torch.cuda.mem_get_info(device)[1] if on_gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        raise OutOfMemory(
            f"out of memory on {device}: {peak_memory(device) / 2**30:.1f} of {total / 2**30:.1f} GiB were taken "
            f"before the next tensor failed; {fix}"
        ) from error


def training_fix(batch_size: int, processes: int, accumulate: int, on_gpu: bool, precision: str) -> str:
    """What to change where a step does not fit.

    Args:
        batch_size: of the global batch.
        processes: W.
        accumulate: micro-batches.
        on_gpu: whether half precision halves the memory.
        precision: fp32, bf16 or fp16.
    """
    lower = ", precision=bf16" if on_gpu and precision == "fp32" else ""
    return (
        f"{batch_size // processes // accumulate} images went through at once (batch_size={batch_size} / {processes} "
        f"processes / accumulate={accumulate}): set accumulate={2 * accumulate} (the same mathematics where BN works "
        f"in groups){lower}, or a smaller batch_size or augment.size; the same command then goes on from the last "
        "checkpoint, where there is one"
    )
