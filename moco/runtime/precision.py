"""The number format for training: with "auto", bfloat16 where it is faster than float32."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SPEEDUP = 1.2  # of bfloat16 over float32: a gain within the noise of the measurement does not justify more rounding
ROUNDS = 5  # measured rounds, after one to warm up
PIXELS = 4 * 224**2  # limit of the pixels per channel in one measured pass, which has 1 to 32 images


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which networks compute in this number format; for float32, one without effect."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def pick_precision(
    configured: str, encoder: nn.Module, size: int, device: torch.device, channels: int = 3
) -> tuple[str, str]:
    """Return the precision for training on images (`channels`, `size`, `size`), and the reason in a few words.

    For "auto", a GPU uses bfloat16 if the GPU has units for bfloat16. A CPU uses bfloat16 if the CPU has instructions
    for bfloat16 (AMX, or AVX-512 with BF16) and a copy of the encoder runs faster in bfloat16. Other CPUs emulate
    bfloat16 and are then several times slower.
    """
    if configured != "auto":
        return configured, "as configured"
    if device.type == "mps":
        return "fp32", "the only one on MPS"
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "the GPU has units for it") if able else ("fp32", "the GPU has no bfloat16 units")
    if not (_cpu_has("_is_amx_tile_supported") or _cpu_has("_is_avx512_bf16_supported")):
        return "fp32", "the CPU has no bfloat16 instructions"
    speedup = _measure_speedup(encoder, torch.zeros(max(1, min(32, PIXELS // size**2)), channels, size, size))
    precision = "bf16" if speedup >= MIN_SPEEDUP else "fp32"
    return precision, f"measured: bfloat16 takes {1 / speedup:.2f} of float32's time"


def _cpu_has(name: str) -> bool:
    """Return what torch reports about the CPU; torch 2.11 to 2.15 use these names."""
    known: Callable[[], bool] | None = getattr(torch.cpu, name, None)
    return known is not None and known()


def _measure_speedup(encoder: nn.Module, images: Tensor) -> float:
    """Return the time of forward and backward in float32, divided by the time in bfloat16.

    The two formats are measured alternately.

    The shortest time of each number format counts, because other programs can only make a measurement longer.
    """
    network = copy.deepcopy(encoder).eval()  # BN uses its running statistics, so any number of images works
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.random.fork_rng(devices=[]):  # dropout must not change the random numbers of the run
        for number in range(1 + ROUNDS):
            for dtype, seconds in times.items():
                began = time.perf_counter()
                with autocast(images.device, dtype):
                    out = network(images)
                out.float().square().mean().backward()
                if number:  # the first round is the warm-up
                    seconds.append(time.perf_counter() - began)
    return min(times[torch.float32]) / min(times[torch.bfloat16])
