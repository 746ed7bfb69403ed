"""The cost of the measures during training: one call of `moco.training.monitor.Monitor`, compared with a step.

The digits recipe measures every 20 steps (analyse_every=2 x log_every=10), the others every 50 (5 x 10, the default).
The queue is full, so that all of its keys are measured. The second forward pass of the BN leak test is included.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.builder import KeyQueue, MoCo, Output
from moco.config import OptimConfig
from moco.data.loader import Batch
from moco.models.encoder import Encoder, build_encoder
from moco.models.norm import set_calls_per_step
from moco.optim.optimizers import build_optimizer
from moco.runtime.memory import keep_freed_memory
from moco.runtime.precision import PRECISIONS, pick_precision
from moco.training.monitor import Monitor
from moco.training.step import StepSettings, train_step
from scripts.bench.step import C, encoder
from scripts.bench.timing import Table, alternate, seconds

BATCH, GROUP, CLASSES, IMAGES = 128, 32, 10, 50_000


class Recipe(NamedTuple):
    """A network and how often it is measured."""

    title: str
    encoder: Callable[[], Encoder]
    dim: int
    size: int  # of an image
    queue: int
    steps: int  # from one measurement to the next
    plain: bool = False  # whether to use float32 and contiguous memory instead of the fastest settings


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--queue", type=int, nargs="*", default=[4096, 65536], help="queue lengths for ResNet-18")


def run(options: Namespace) -> Iterator[Table]:
    """Yield one table: milliseconds of a step and of a measurement, and the share of the measurement."""
    recipes = [Recipe("digits, K 512", _digits, 64, 16, 512, 20, plain=True)]
    recipes += [Recipe(f"ResNet-18, K {k}", partial(encoder, "resnet18"), C, 32, k, 50) for k in options.queue]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    rows = []
    for recipe in recipes:
        step, measurement = prepared(recipe, device)
        variants = {"step": step, "measurement": measurement}
        clocks = {name: partial(seconds, work, options.clock) for name, work in variants.items()}
        found = alternate(clocks, options.rounds)
        shares = [b / (recipe.steps * a) for a, b in zip(found["step"], found["measurement"], strict=True)]
        middle = [f"{1000 * median(found[name]):,.1f}" for name in variants]
        rows.append([recipe.title, *middle, str(recipe.steps), f"{median(shares):.2%}", f"{max(shares):.2%}"])
    yield Table(
        f"A step of {BATCH} images and a measurement of it, ms, {options.clock} time",
        ["", "step", "measurement", "steps between measurements", "share", "highest share"],
        rows,
    )


def prepared(recipe: Recipe, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a step without a measurement, and a measurement of the same step."""
    torch.manual_seed(0)
    network = recipe.encoder()
    precision = "fp32" if recipe.plain else pick_precision("auto", network, recipe.size, device)[0]
    method = MoCo(network, KeyQueue(recipe.queue, recipe.dim), 0.2).to(device)
    if not recipe.plain:
        method.to(memory_format=torch.channels_last)
    set_calls_per_step(method.train(), 1)
    keys = F.normalize(torch.randn(recipe.queue, recipe.dim, device=device), dim=1)
    method.queue.enqueue(keys, torch.randint(IMAGES, (recipe.queue,), device=device))
    labels = torch.randint(CLASSES, (IMAGES,), device=device)
    monitor = Monitor(method, labels, BATCH, True, PRECISIONS[precision])
    optimizer = build_optimizer(method, OptimConfig(weight_decay=5e-4))
    views = [torch.randn(BATCH, 3, recipe.size, recipe.size, device=device) for _ in range(2)]
    shuffles = [np.random.default_rng(view).permutation(BATCH) for view in range(2)]
    step = partial(
        train_step,
        method,
        method,
        optimizer,
        torch.amp.GradScaler(device.type, enabled=False),
        Batch(torch.arange(BATCH, device=device), views),
        shuffles,
        StepSettings(0.06, 0.99, precision=PRECISIONS[precision], check_finite=device.type == "cpu"),
    )
    seen: list[tuple[Output, Sequence[Tensor], Tensor]] = []

    def keep(*arguments: object) -> dict[str, Tensor]:
        seen.append(arguments)  # type: ignore[arg-type]
        return {}

    step(monitor=keep)
    return step, partial(monitor, *seen[0])


def _digits() -> Encoder:
    return build_encoder("convnet", {"width": 16, "pool": 4}, 2, 128, 64, "grouped", GROUP)
