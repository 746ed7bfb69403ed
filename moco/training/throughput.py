"""How well the machine is used: floating point operations, what the device could do at best, a profile."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied to see what the device can do
PROFILED = 5  # steps in a profile, behind as many that warm up


def encoder_flops(encoder: nn.Module, images: int, size: int) -> tuple[int, int]:
    """Floating point operations of one image's forward pass, and of its forward and backward pass.

    Convolutions and matrix products, a multiply-add being two; counted on a copy without memory: nothing is computed.

    Args:
        encoder: (N, 3, S, S) to (N, C).
        images: N of one pass, a number that its batch normalization divides into groups.
        size: S.
    """
    shadow = copy.deepcopy(encoder).to("meta").train()
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            out = shadow(torch.empty(images, 3, size, size, device="meta"))
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops() // images)
    return counts[0], counts[1]


def step_flops(method: Any, images: int, size: int, views: int) -> int:
    """Floating point operations that the encoders need for one sample of the batch.

    Args:
        method: as in `moco.training.step`.
        images, size: see `encoder_flops`.
        views: V, all of which a method without a momentum encoder sends through the one it has.
    """
    forward, both = encoder_flops(method.encoder, images, size)
    if getattr(method, "momentum_encoder", None) is None:
        return views * both
    return int(method.passes) * (both + forward)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product: what the device does reach."""
    side = SIDE["cpu" if device.type == "cpu" else "cuda"]
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Profile:
    """torch's profiler over a few steps: a trace for a browser and a table of the costliest operations.

    Args:
        folder: where `trace.json.gz` and `table.txt` go.
        device: where the steps run.
        on_done: gets a line that says where they are.
    """

    def __init__(self, folder: Path, device: torch.device, on_done: Callable[[str], None]) -> None:
        self._folder, self._on_done, self._gpu = folder, on_done, device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
        plan = schedule(wait=0, warmup=PROFILED, active=PROFILED, repeat=1)
        self._profile: profile | None = profile(
            activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True
        )
        self._left = 2 * PROFILED
        self._profile.start()

    def step(self) -> None:
        """Behind every step of training; costs nothing once the profile is written."""
        if self._profile is not None:
            self._left -= 1
            self._profile.step()
            if not self._left:
                self.close()

    def close(self) -> None:
        """Ends it; one that saw fewer steps than it wanted says so and writes nothing."""
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()
            if self._left:
                self._on_done(
                    f"profile=true needs {2 * PROFILED} steps, and saw {2 * PROFILED - self._left}: none is written"
                )

    def _write(self, finished: Any) -> None:
        if self._left:  # torch hands over what it has when it is stopped
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._folder / "trace.json.gz"))
        order = "self_cuda_time_total" if self._gpu else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
        (self._folder / "table.txt").write_text(table)
        self._on_done(f"profile of {PROFILED} steps: {self._folder}/table.txt; trace.json.gz opens in ui.perfetto.dev")
