"""The speed of training end to end on CIFAR-10, from images to weights: this project's and lightly's MoCo v2.

--data is CIFAR-10 as a folder of images, which both keep in memory. lightly is set up as in its CIFAR-10 benchmark: its
transform of PIL images in two loader processes, its memory bank, projection head and loss, SGD, float32. Ours is the
loop of `moco.train` with the precision chosen for the machine. Backbone, batch, queue, head and temperature are the
same. Our BN uses groups of 32 images; lightly's uses the whole batch, which is cheaper.
"""

import copy
import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from moco.builder import KeyQueue, MoCo
from moco.config import DataConfig, OptimConfig
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import Source, load_source
from moco.models.backbones import build_backbone
from moco.models.encoder import build_encoder
from moco.models.norm import set_calls_per_step
from moco.optim.optimizers import build_optimizer
from moco.runtime.memory import keep_freed_memory
from moco.runtime.precision import PRECISIONS, pick_precision
from moco.training.step import StepSettings, train_step
from scripts.bench.recipes import views
from scripts.bench.timing import Table, alternate, compared, stream_rate

C, T, M, LR, DECAY, WORKERS = 128, 0.1, 0.99, 0.06, 5e-4, 2


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=3, help="steps per round; the first is not counted")
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--backbone", default="resnet18")


def run(options: Namespace) -> Iterator[Table]:
    """Yield one table: images per second."""
    source = load_source(DataConfig("folder", options.data, resident=True)).train
    keep_freed_memory()
    backbone_options: dict[str, object] = (
        {"stem": "cifar"} if options.backbone.startswith("resnet") else {"width": 24, "strides": (2, 1, 2, 1, 2)}
    )
    variants = {
        "lightly": partial(stream_rate, lightly_epoch(options, source, backbone_options), options.batch, options.clock),
        "moco": partial(stream_rate, our_epoch(options, source, backbone_options), options.batch, options.clock),
    }
    title = f"CIFAR-10 end to end, {options.backbone}, batch {options.batch}, K {options.queue}, images/s"
    yield compared(f"{title}, {options.clock} time", alternate(variants, options.rounds), "images/s")


def our_epoch(
    options: Namespace, source: Source, backbone_options: dict[str, object]
) -> Callable[[], Iterator[object]]:
    """Return a function that yields after each step of this project."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    encoder = build_encoder(options.backbone, backbone_options, 2, 0, C, "grouped", 32)
    precision, _ = pick_precision("auto", encoder, 32, device)
    method = MoCo(encoder, KeyQueue(options.queue, C), T).to(device)
    method.to(memory_format=torch.channels_last)
    set_calls_per_step(method, 1)
    optimizer = build_optimizer(method.train(), OptimConfig(weight_decay=DECAY))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    plan = Plan(len(source), options.batch, epochs=1, seed=0)
    read_loss_late = device.type == "cuda"

    def steps() -> Iterator[object]:
        stream = batches(source, plan, views("cifar"), device, workers=0)
        for number, batch in enumerate(islice(stream, options.batches)):
            shuffles = plan.shuffles(number, 2)
            settings = StepSettings(LR, M, precision=PRECISIONS[precision], check_finite=not read_loss_late)
            yield train_step(method, method, optimizer, scaler, batch, shuffles, settings)

    return steps


def _lightly(name: str) -> Any:
    """Import a module of lightly, which only this comparison needs."""
    try:
        return importlib.import_module(f"lightly.{name}")
    except ModuleNotFoundError as error:
        raise SystemExit("this comparison needs lightly: pip install lightly") from error


class _Images:
    """A data set of images in memory, (N, 3, S, S), with lightly's transform."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = _lightly("transforms").MoCoV2Transform(input_size=32, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = self.transform(Image.fromarray(self.images[i]))
        return seen


def lightly_epoch(
    options: Namespace, source: Source, backbone_options: dict[str, object]
) -> Callable[[], Iterator[object]]:
    """Return a function that yields after each step with lightly's parts, in the order of lightly's example."""
    assert source.images is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    backbone = build_backbone(options.backbone, backbone_options)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    f_q = (
        nn.Sequential(backbone, _lightly("models.modules.heads").MoCoProjectionHead(width, width, C)).to(device).train()
    )
    f_k = copy.deepcopy(f_q)
    utilities = _lightly("models.utils")
    utilities.deactivate_requires_grad(f_k)
    loss_of = _lightly("loss").NTXentLoss(temperature=T, memory_bank_size=(options.queue, C)).to(device)
    optimizer = torch.optim.SGD(f_q.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    images = _Images(source.images)

    def steps() -> Iterator[object]:
        loader = DataLoader(  # type: ignore[var-annotated]
            images,  # type: ignore[arg-type]
            batch_size=options.batch,
            shuffle=True,
            drop_last=True,
            num_workers=WORKERS,
        )
        for first, second in islice(loader, options.batches):
            utilities.update_momentum(f_q, f_k, m=M)
            q = f_q(first.to(device))
            with torch.no_grad():
                order = torch.randperm(len(second))
                k = f_k(second.to(device)[order])[order.argsort()]
            loss = loss_of(q, k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    return steps
