"""What the parts of `python -m scripts.bench gpu` share: a check, a step of a recipe, and measurements of calls."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.api import train_config
from moco.config import TrainConfig
from moco.data.loader import Batch, batches
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.data.sources import ArraySource
from moco.distributed import Order, rank, world_size
from moco.optim.optimizers import build_optimizer
from moco.runtime.device import set_float32_precision
from moco.runtime.precision import pick_precision
from moco.training import build
from moco.training.step import Measures, train_step

LR, MOMENTUM = 0.03, 0.99
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Check:
    """One line of a part. `passed` is None for a figure without a limit."""

    what: str
    measured: str
    wanted: str = ""
    passed: bool | None = None


def below(what: str, value: float, limit: float, unit: str = "") -> Check:
    """Return a check that a value is at most a limit."""
    return Check(what, f"{value:.3g}{unit}", f"≤ {limit:g}{unit}", value <= limit)


def equal(what: str, found: object, wanted: object) -> Check:
    """Return a check that two values are the same."""
    return Check(what, str(found), str(wanted), found == wanted)


class Setting(NamedTuple):
    """Where and how large a part runs."""

    device: torch.device
    tiny: bool


class Recipe:
    """A training step of a recipe on random images, with the arguments of a run of moco.train."""

    def __init__(self, overrides: list[str], setting: Setting, device: torch.device | None = None) -> None:
        """Build the step. `device`, if given, replaces the setting's."""
        self.config, self.device = train_config(overrides), device or setting.device
        config = self.config
        if config.compile:
            torch.compiler.reset()  # forget the compiled networks of earlier recipes
        if setting.tiny and config.data.name != "digits":
            make_tiny(config)
        n, size, count = config.batch_size, config.augment.size, config.augment.views
        self.method = build.make_method(config, np.arange(n) % 10, self.device).train()
        self.precision, _ = pick_precision(config.precision, self.method.encoder, config.augment.size, self.device)
        set_float32_precision(config.tf32)
        self.optimizer = build_optimizer(self.method, config.optim)
        self.forward = build.distribute(config, self.method, self.device)
        build.set_batch_norm_calls(self.method, config.accumulate)
        generator = torch.Generator().manual_seed(0)
        own = slice(rank() * n // world_size(), (rank() + 1) * n // world_size())  # this rank's share
        views = [torch.randn(n, 3, size, size, generator=generator)[own].to(self.device) for _ in range(count)]
        self.batch = Batch(torch.arange(n)[own].to(self.device), views)
        shuffles = [np.random.default_rng(view).permutation(n) for view in range(count)]
        self.shuffles = shuffles if config.model.shuffle_keys else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        settings = build.step_settings(config, self.method, self.device, self.precision, self.device.type != "cuda")
        self.settings = replace(settings, lr=LR, momentum=MOMENTUM)

    def step(self, batch: Batch | None = None, shuffles: Sequence[Order] | None = None) -> Measures:
        """Take one step, by default always on the same batch; on a GPU the host does not wait for it."""
        shuffles = shuffles or self.shuffles
        parts = self.method, self.forward, self.optimizer, self.scaler, batch or self.batch, shuffles
        return train_step(*parts, self.settings)

    def plan(self, images: int, epochs: int) -> Plan:
        """Return the samples of each step of some epochs."""
        return Plan(images, self.config.batch_size, epochs, self.config.seed)

    def batches(self, source: ArraySource, epochs: int) -> Generator[Batch, None, None]:
        """Yield the batches of some epochs of images in memory, as in a run."""
        views = build_views(self.config.augment)
        return batches(source, self.plan(len(source), epochs), views, self.device, workers=0)

    def train(self, source: ArraySource, epochs: int) -> Iterator[Measures]:
        """Yield the measures of each step of some epochs, as in a run."""
        plan = self.plan(len(source), epochs)
        for number, batch in enumerate(self.batches(source, epochs)):
            yield self.step(batch, plan.shuffles(number, len(batch.views)) if self.shuffles else None)

    def gradient(self) -> Tensor:
        """Return the gradient of the last step as one vector, in float64 on the CPU."""
        parts = [p.grad.flatten().double().cpu() for p in self.method.encoder.parameters() if p.grad is not None]
        return torch.cat(parts)


def make_tiny(config: TrainConfig) -> None:
    """Replace the network and the sizes by small ones."""
    config.model.backbone, config.model.options = "convnet", {"width": 4}
    config.model.bn_group_size = min(config.model.bn_group_size, 8)
    config.batch_size, config.accumulate, config.augment.size = 16, 1, 32


def random_images(count: int, side: int) -> ArraySource:
    """Return random images in the host's memory."""
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ArraySource(images, [""] * count)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device, rounds: int, calls: int = 1) -> float:
    """Return the median time of a call over some rounds, after a warm-up; each round waits only at its end."""
    times = []
    for number in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        if number:
            times.append(1e3 * (time.perf_counter() - began) / calls)
    return median(times)


def peak_gib(work: Callable[[], object], device: torch.device) -> float:
    """Return the peak of allocated GPU memory in a call; nan on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def losses_of(recipe: Recipe) -> list[float]:
    """Return the losses of five steps."""
    return [float(recipe.step()["loss"]) for _ in range(5)]


def largest_difference(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference between losses."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def stepped(overrides: list[str], setting: Setting) -> Tensor:
    """Return the gradient of a recipe's first step."""
    recipe = Recipe(overrides, setting)
    recipe.step()
    return recipe.gradient()


@contextmanager
def errors_on_waits(device: torch.device) -> Iterator[None]:
    """Let torch raise an error where the host waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
