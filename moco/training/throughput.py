"""Use of the device while training: images per second, data wait, MFU, peak memory; and a torch profile on request."""

import copy
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from moco.config import TrainConfig
from moco.distributed import is_rank_zero, world_size
from moco.models.first_layer import input_channels
from moco.runtime.memory import peak_memory
from moco.runtime.precision import PRECISIONS
from moco.runtime.speed import StepTimes

SIDE = {"cpu": 1024, "mps": 4096, "cuda": 8192}  # number of rows and columns of the matrices in `matrix_rate`
PROFILED = 5  # steps in a profile, after as many steps of warm-up


def encoder_flops(encoder: nn.Module, images: int, size: int) -> tuple[int, int]:
    """Count the floating point operations per image of a forward pass, and of a forward and backward pass.

    Only convolutions and matrix products are counted; a multiply-add counts as two operations. The encoder is copied to
    the device "meta", so nothing is computed.

    Args:
        encoder: images (N, channels, S, S) to embeddings (N, C).
        images: N, a multiple of the size of the encoder's BN groups.
        size: S, the side of an image in pixels.
    """
    shadow = copy.deepcopy(encoder).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        out = shadow(torch.empty(images, input_channels(encoder), size, size, device="meta"))
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward // images, counter.get_total_flops() // images


def step_flops(method: Any, images: int, size: int, views: int, small: tuple[int, int] = (0, 0)) -> int:
    """Count the floating point operations of the encoders per sample of the batch; see `encoder_flops`.

    Without a momentum encoder, the encoder makes a forward and a backward pass for each of the `views`. With a momentum
    encoder, the encoder makes `method.passes` forward and backward passes, and the momentum encoder as many forward
    passes. `small` is (number of small views, their size).
    """
    forward, both = encoder_flops(method.encoder, images, size)
    if getattr(method, "momentum_encoder", None) is None:
        return views * both
    of_small = small[0] * encoder_flops(method.encoder, images, small[1])[1] if small[0] else 0
    return int(method.passes) * (both + forward) + of_small


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the highest rate of a large matrix product, in floating point operations per second."""
    side = SIDE[device.type]
    a = torch.ones(side, side, device=device, dtype=dtype)
    waits: dict[str, Callable[[], object]] = {"cuda": partial(torch.cuda.synchronize, device)}
    wait = (waits | {"mps": torch.mps.synchronize}).get(device.type, lambda: None)
    times = []
    for _ in range(5):
        wait()
        began = time.perf_counter()
        a @ a
        wait()
        times.append(time.perf_counter() - began)
    if device.type == "cuda":
        del a
        torch.cuda.reset_peak_memory_stats(device)  # the matrices are no part of the run's peak
    return 2 * side**3 / min(times)


class Throughput:
    """Measures the speed of training between two records, and its median over this attempt.

    Args:
        method: before it is compiled.
        precision: fp32, bf16 or fp16.
        log: prints a line if the operations of the model cannot be counted.
        unfinished: whether there are steps to take; otherwise nothing is measured.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Any,
        device: torch.device,
        precision: str,
        log: Callable[[str], None],
        unfinished: bool,
    ) -> None:
        self._device, self._times = device, StepTimes(device, config.batch_size)
        self.add_step = self._times.add_step
        self._records: list[dict[str, float]] = []
        self._flops, self._peak = 0, 1.0
        if not is_rank_zero() or not unfinished:
            return
        images = config.batch_size // world_size() // config.accumulate
        try:
            augment = config.augment
            small = augment.small_views, augment.small_size
            self._flops = step_flops(method, images, augment.size, augment.views, small)
        except (RuntimeError, NotImplementedError) as error:  # an operation without a shape-only implementation
            reason = (str(error).splitlines() or [""])[0]
            log(f"no MFU: the operations of model.backbone={config.model.backbone} cannot be counted ({reason})")
        # CPUs hardly support float16: the rate of a float16 product on a CPU is not that of training under autocast.
        measured = "fp32" if device.type == "cpu" and precision == "fp16" else precision
        self._peak = matrix_rate(device, PRECISIONS[measured]) * world_size()

    def record(self) -> dict[str, float]:
        """Return the means over the steps since the last record."""
        values = self._times.record()
        if self._flops:
            # The measured peak is too low if the machine was busy with other work at that time.
            rate = self._flops * values["speed/images_per_second"]
            self._peak = max(self._peak, rate)
            values["speed/mfu"] = rate / self._peak
        self._records.append(values)
        return values

    def summary(self) -> str:
        """Describe the medians over the records of this attempt; "" without records."""
        if not self._records:
            return ""
        names = self._records[0]
        medians = {name.removeprefix("speed/"): median(each[name] for each in self._records) for name in names}
        mfu = f", MFU {100 * medians['mfu']:.0f} % of {self._peak / 1e9:,.0f} GFLOP/s measured" if self._flops else ""
        kind = "process" if self._device.type == "cpu" else "GPU"
        return (
            f"{medians['images_per_second']:,.0f} images/s, data wait {100 * medians['data_wait']:.0f} %{mfu}, "
            f"peak memory {peak_memory(self._device) / 2**30:.1f} GiB ({kind})"
        )


class Profile:
    """Profiles a few steps: `trace.json.gz` is for a browser, `table.txt` lists the most expensive operations."""

    def __init__(self, folder: Path, device: torch.device, log: Callable[[str], None]) -> None:
        self._folder, self._log, self._gpu = folder, log, device.type == "cuda"
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + self._gpu]
        plan = schedule(wait=0, warmup=PROFILED, active=PROFILED, repeat=1)
        self._profile: profile | None = profile(
            activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True
        )
        self._left = 2 * PROFILED
        if not self._gpu:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it reports the missing GPU as an error
        self._profile.start()

    def step(self) -> None:
        """Call after every step of training; does nothing once the profile is written."""
        if self._profile is not None:
            self._left -= 1
            self._profile.step()
            if not self._left:
                self.close()

    def close(self) -> None:
        """End the profile; with too few steps nothing is written."""
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()
            if self._left:
                done = 2 * PROFILED - self._left
                self._log(f"profile=true needs {2 * PROFILED} steps, and there were {done}: no profile is written")

    def _write(self, finished: Any) -> None:
        if self._left:  # torch also calls this when a profile is stopped early
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._folder / "trace.json.gz"))
        order = "self_cuda_time_total" if self._gpu else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
        (self._folder / "table.txt").write_text(table)
        self._log(f"profile of {PROFILED} steps: {self._folder}/table.txt; trace.json.gz opens in ui.perfetto.dev")
