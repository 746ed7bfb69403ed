"""A training step of this project, compared with a plain implementation: MoCo with grouped BN on CIFAR-sized views.

The plain step follows the paper's Algorithm 1 directly: float32, contiguous memory, eager, logits as one matrix. Both
train ResNet-18 with the CIFAR stem on the same random views.

--compile adds the compiled step, which takes minutes to start.
"""

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.builder import KeyQueue, MoCo
from moco.config import OptimConfig
from moco.data.loader import Batch
from moco.models.encoder import Encoder, build_encoder
from moco.models.norm import set_calls_per_step
from moco.optim.optimizers import build_optimizer
from moco.runtime.memory import keep_freed_memory
from moco.runtime.precision import PRECISIONS, pick_precision
from moco.training.step import StepSettings, train_step
from moco.training.throughput import matrix_rate, step_flops
from scripts.bench.timing import Table, alternate, compared, per_second

SIZE, C, T, M, LR, DECAY, GROUP = 32, 128, 0.1, 0.99, 0.06, 5e-4, 32
Step = Callable[[], object]


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--compile", action="store_true")


def run(options: Namespace) -> Iterator[Table]:
    """Yield a table of images per second, and a table of the fraction of the machine's peak rate that is used."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, why = pick_precision("auto", encoder(options.backbone), SIZE, device)
    views, index = inputs(options.batch, device)
    steps: dict[str, Step] = {"plain: float32, contiguous": plain(options, views)}
    steps["float32, channels_last"] = ours(options, views, index, "fp32", compiled=False)
    if precision != "fp32":
        steps[f"{precision} ({why}), channels_last"] = ours(options, views, index, precision, compiled=False)
    if options.compile:
        steps[f"{precision}, channels_last, compiled"] = ours(options, views, index, precision, compiled=True)
    variants = {name: partial(per_second, options.batch, step, options.clock) for name, step in steps.items()}
    title = f"A step of {options.backbone} (CIFAR stem), batch {options.batch}, K {options.queue}, images/s"
    kept = device.type == "cpu" and keep_freed_memory()
    found = alternate(variants, options.rounds)
    yield compared(f"{title}{', freed memory kept in all' if kept else ''}, {options.clock} time", found, "images/s")
    method = MoCo(encoder(options.backbone), KeyQueue(options.queue, C), T)
    operations = step_flops(method, GROUP, SIZE, views=2)
    fastest = max(found, key=lambda name: sorted(found[name])[len(found[name]) // 2])
    rate = sorted(found[fastest])[len(found[fastest]) // 2] * operations
    peak = matrix_rate(device, PRECISIONS[precision])
    cells = [fastest, f"{rate / 1e9:,.0f}", f"{peak / 1e9:,.0f}", f"{100 * rate / peak:.0f} %"]
    yield Table("Use of the machine, GFLOP/s", ["", "step", f"matrix product, {precision}", "MFU"], [cells])


def encoder(backbone: str) -> Encoder:
    """Build a ResNet with the CIFAR stem and one linear layer, as in the official notebook."""
    torch.manual_seed(0)
    return build_encoder(backbone, {"stem": "cifar"}, 1, 0, C, "grouped", GROUP)


def inputs(batch: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Return two random views (N, 3, S, S) and the image indices (N,)."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(batch, 3, SIZE, SIZE, generator=generator).to(device) for _ in range(2)]
    return views, torch.arange(batch, device=device)


def ours(options: Namespace, views: list[Tensor], index: Tensor, precision: str, compiled: bool) -> Step:
    """Return `moco.training.step.train_step` with the arguments of a training run."""
    device = index.device
    method = MoCo(encoder(options.backbone), KeyQueue(options.queue, C, mask_own_keys=False), T).to(device)
    method.to(memory_format=torch.channels_last)
    set_calls_per_step(method, 1)
    optimizer = build_optimizer(method.train(), OptimConfig(weight_decay=DECAY))
    if compiled:
        method.encoder.compile()
        method.momentum_encoder.compile()
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    shuffles = [np.random.default_rng(view).permutation(len(index)) for view in range(2)]
    settings = StepSettings(LR, M, precision=PRECISIONS[precision], check_finite=device.type != "cuda")
    return partial(train_step, method, method, optimizer, scaler, Batch(index, views), shuffles, settings)


def plain(options: Namespace, views: list[Tensor]) -> Step:
    """Return a step that follows Algorithm 1 without optimizing for speed."""
    device = views[0].device
    f_q = encoder(options.backbone).to(device).train()
    f_k = copy.deepcopy(f_q)
    queue = F.normalize(torch.randn(options.queue, C, device=device), dim=1)
    optimizer = torch.optim.SGD(f_q.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    labels = torch.zeros(options.batch, dtype=torch.long, device=device)
    pointer = 0

    def step() -> None:
        nonlocal pointer
        q = F.normalize(f_q(views[0]), dim=1)  # (N, C)
        with torch.no_grad():
            for own, other in zip(f_k.parameters(), f_q.parameters(), strict=True):
                own.mul_(M).add_(other, alpha=1 - M)
            order = torch.randperm(options.batch, device=device)
            k = F.normalize(f_k(views[1][order]), dim=1)[order.argsort()]  # (N, C)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / T  # (N, 1+K)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slots = (pointer + torch.arange(options.batch, device=device)) % options.queue
        queue[slots] = k
        pointer = (pointer + options.batch) % options.queue
        loss.item()

    return step
