"""Count what a step at its real size asks of a GPU: python -m tests.rehearsal.count FILE CASE

CASE is a `Case` and FILE becomes its `Count`, in JSON. The process must have the environment of
`tests.rehearsal.build` with `null`, as in test_budgets.py: torch, its allocator, autograd, DDP and cuDNN's front end
are real, and no kernel computes anything. So a step of 256 images of 224 pixels takes seconds and little memory, and
its measures mean nothing.
"""

import ctypes
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from moco.config import TrainConfig
from moco.data.loader import CroppedBatch, batches
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.data.sources import ArraySource
from moco.optim.optimizers import build_optimizer
from moco.training import build
from moco.training.step import train_step
from tests.rehearsal.run import configuration, untimed

STEPS = 24  # the last but one is counted, the last one is traced
FIRST = 2  # from this step on, memory is allocated and kernels are compiled
IN_MEMORY = {"cifar10": (50_000, 32)}  # images and their side
DEVICE = torch.device("cuda", 0)
if "STANDIN_NULL" not in os.environ:
    sys.exit(
        "the emulated GPU is not loaded; "
        "to count, run: python -m pytest -s -m 'slow or long' tests/rehearsal/test_budgets.py"
    )
_LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"])
# What is counted: functions of the stand-in with their arguments. A call of cuDNN or cuBLAS is one launch, and so is a
# kernel that Triton launches through the driver.
_COUNTERS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "launches": {"counter": (4,), "libs": (1, 2, 3), "triton_launches": (0,)},
    "waits": {"counter": (0, 1, 2, 3)},
    "copies": {"counter": (5,)},
    "collectives": {"nccl": (1, 2, 3, 4)},
}


class Case(TypedDict):
    """What to count."""

    recipe: str  # with overrides: "moco_v2_imagenet precision=bf16"
    processes: int  # W; this process is rank 0


class Count(TypedDict):
    """What one step asked for."""

    case: Case
    batch: dict[str, int]  # crops and augmentation of the next batch, by the names of `_COUNTERS`
    step: dict[str, int]  # from the views to the new weights and the queue
    peak_bytes: int  # allocated by torch; with a CUDA graph, reserved
    host_ms: tuple[float, float]  # processor time for batch and step, without launches: the shortest of all steps
    places: dict[str, int]  # launches of the step by phase and operation


def _read() -> dict[str, int]:
    return {name: sum(_total(*each) for each in parts.items()) for name, parts in _COUNTERS.items()}


def _total(function: str, numbers: Sequence[int]) -> int:
    read = getattr(_LIBRARY, f"standin_{function}")
    read.restype = ctypes.c_long
    return sum(read(number) for number in numbers)


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


class _Trace(TorchDispatchMode):
    """Notes the launches of each operation of one step, by the part of the step."""

    def __init__(self, method: Any, optimizer: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "backward and measures"  # what is none of the parts below
        self.places: Counter[str] = Counter()
        for name in ("encode_keys", "forward", "update_momentum_encoder", "enqueue"):
            setattr(method, name, self._note(name, getattr(method, name)))
        optimizer.step = self._note("optimizer", optimizer.step)

    def _note(self, name: str, function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            outer, self.part = self.part, name
            out = function(*args, **kwargs)
            self.part = outer
            return out

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _read()
        out = func(*args, **(kwargs or {}))
        self.places[f"{self.part}: {func}"] += _difference(before, _read())["launches"]
        return out


@contextmanager
def _process_group(processes: int) -> Iterator[None]:
    """Be rank 0 of processes of which the others do not exist: collectives do nothing."""
    if processes == 1:
        yield
        return
    dist.init_process_group("nccl", rank=0, world_size=processes, store=HashStore(), device_id=DEVICE)
    with patch("torch.nn.parallel.distributed._verify_param_shape_across_processes"):
        yield
    dist.destroy_process_group()


def _crops(config: TrainConfig, plan: Plan) -> Iterator[CroppedBatch]:
    """Yield crops as loader processes make them: in pinned memory."""
    shape = plan.share, config.data.channels, config.augment.size, config.augment.size
    for epoch, index in plan.samples(0):
        crops = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(config.augment.views)]
        sizes = np.full((plan.share, 2), config.augment.size)
        yield epoch, index, index, [each.to(DEVICE, non_blocking=True) for each in crops], sizes


def count(case: Case) -> Count:
    """Take a few steps, and return what the last one asked for."""
    config = configuration(case["recipe"])
    images, side = IN_MEMORY.get(config.data.name, (100 * config.batch_size, 0))
    plan = Plan(images, config.batch_size, 1, 0, 0, case["processes"])
    source: Any = ArraySource(torch.zeros(images, 3, side, side, dtype=torch.uint8), [""] * images)
    loaded = nullcontext() if side else patch("moco.data.loader.crops", lambda *_: _crops(config, plan))
    with _process_group(case["processes"]), loaded:
        return _steps(case, config, plan, source)


def _steps(case: Case, config: TrainConfig, plan: Plan, source: Any) -> Count:
    views = build_views(config.augment, config.data)
    method = build.make_method(config, None, DEVICE)
    optimizer = build_optimizer(method, config.optim)
    build.set_batch_norm_calls(method, config.accumulate)
    forward = build.distribute(config, method.train(), DEVICE)
    untimed(forward)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    settings = replace(build.step_settings(config, method, DEVICE, config.precision, False), lr=0.1, momentum=0.99)
    stream = batches(source, plan, views, DEVICE, 0)

    times: list[tuple[float, float]] = []

    def step(number: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        before, began = _read(), time.process_time()
        batch = next(stream)
        between, made = _read(), time.process_time()
        shuffles = plan.shuffles(number, len(views)) if config.model.shuffle_keys else None
        with _Trace(method, optimizer) if number == STEPS - 1 else nullcontext() as trace:
            train_step(method, forward, optimizer, scaler, batch, shuffles, settings)
        times.append((made - began, time.process_time() - made))
        after = _read()
        return _difference(before, between), _difference(between, after), trace.places if trace else {}

    for number in range(STEPS - 1):
        torch.cuda.reset_peak_memory_stats()
        made, taken, _ = step(number)
    # What a graph holds is not allocated between its launches.
    peak = torch.cuda.max_memory_reserved() if config.cuda_graph else torch.cuda.max_memory_allocated()
    on_batch, on_step = (1000 * min(each) for each in zip(*times[FIRST:], strict=True))
    places = step(STEPS - 1)[2]
    return Count(case=case, batch=made, step=taken, peak_bytes=peak, host_ms=(on_batch, on_step), places=places)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(count(json.loads(sys.argv[2]))))
