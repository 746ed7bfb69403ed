"""Memory: allocator settings, peak use, and a one-sentence out-of-memory error."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Parameters of mallopt(3) in glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 64 * 2**20  # bytes that glibc requests from the system beyond what it needs, the value of M_TOP_PAD


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system. Return whether this was set.

    A step allocates and frees the same large tensors again and again. By default glibc maps each one anew, and the
    system clears its pages at the first access. Other C libraries, and settings of the user in MALLOC_... or
    GLIBC_TUNABLES, are not changed.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_TOP_PAD, _PAD))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of its tensors on a GPU, of all its memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":  # torch counts no peak on MPS; this includes freed memory that torch keeps
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Texts that identify an out-of-memory error. On a CPU, torch raises a plain RuntimeError for it.
_MESSAGES = ("not enough memory", "can't allocate memory", "CUDA error: out of memory", "MPS backend out of memory")


class OutOfMemory(ValueError):
    """The memory of a device ran out; the message is one sentence that names the settings to change."""


@contextmanager
def explain_out_of_memory(device: torch.device, fix: str) -> Iterator[None]:
    """Convert an out-of-memory error into `OutOfMemory`; `fix` ends its message and says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in _MESSAGES):
            raise
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if device.type == "cuda":
            total = torch.cuda.mem_get_info(device)[1]
        used = f"{peak_memory(device) / 2**30:.1f} of {total / 2**30:.1f} GiB were in use"
        raise OutOfMemory(f"out of memory on {device}: {used} before the allocation failed; {fix}") from error


def training_fix(
    batch_size: int, processes: int, accumulate: int, group: int | None, on_gpu: bool, precision: str
) -> str:
    """Return the settings to change if a training step does not fit, as `fix` of `explain_out_of_memory`.

    Of these settings, only `accumulate` can change when a run resumes, and only if BN normalizes in groups. `group` is
    the number of images of a group, or None without groups.
    """
    images = batch_size // processes // accumulate
    parts = [each for each in range(2, images // group + 1) if images % (each * group) == 0] if group else []
    same = "and run the command again, which resumes with the same results"
    fixes = [f"set accumulate={each * accumulate} {same}, or " for each in parts[:1]]
    lower = "precision=bf16, " * (on_gpu and precision == "fp32")
    return (
        f"a micro-batch has {images} images ({batch_size=} / {processes} processes / {accumulate=}): "
        f"{''.join(fixes)}start another run, run=DIR, with {lower}a smaller batch_size or augment.size"
    )
