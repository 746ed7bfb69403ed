"""Which number format training computes in, when it is left to the machine: bfloat16 only where it is faster."""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GAIN = 1.2  # how much faster bfloat16 must be: a gain within the noise of a probe is no reason to round more
ROUNDS = 3
PIXELS = 4 * 224**2  # of one pass; fewer images of a larger size


def pick_precision(wanted: str, encoder: nn.Module, size: int, device: torch.device) -> tuple[str, str]:
    """The precision to train in, and in a few words why.

    A GPU multiplies bfloat16 many times faster than float32 or not at all. A CPU is asked twice: whether it has
    instructions for it (AMX, or AVX-512 with BF16; others emulate it and are several times slower), and then by a
    race of the encoder against itself.

    Args:
        wanted: fp32, bf16, fp16, or auto.
        encoder: what will be trained; only a copy of it runs.
        size: S, the side of the images that it will see.
        device: where.
    """
    if wanted != "auto":
        return wanted, "as configured"
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "the GPU has units for it") if able else ("fp32", "the GPU has no bfloat16 units")
    if not (_has("_is_amx_tile_supported") or _has("_is_avx512_bf16_supported")):
        return "fp32", "the CPU has no bfloat16 instructions"
    gain = _race(encoder, torch.zeros(max(1, min(32, PIXELS // size**2)), 3, size, size))
    return ("bf16" if gain >= GAIN else "fp32"), f"measured: bfloat16 takes {1 / gain:.2f} of float32's time"


def _has(name: str) -> bool:
    """What torch knows of the CPU; under these names in torch 2.11 to 2.15."""
    known: Callable[[], bool] | None = getattr(torch.cpu, name, None)
    return known is not None and known()


def _race(encoder: nn.Module, images: Tensor) -> float:
    """Float32's time over bfloat16's, of forward and backward in turns."""
    network = copy.deepcopy(encoder).eval()  # BN by its running statistics: any number of images will do
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.random.fork_rng(devices=[]):  # dropout must not move the run's own random numbers
        for number in range(1 + ROUNDS):
            for dtype, seconds in times.items():
                began = time.perf_counter()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    out = network(images)
                out.float().square().mean().backward()
                if number:  # the first is the warm-up
                    seconds.append(time.perf_counter() - began)
    return median(times[torch.float32]) / median(times[torch.bfloat16])
