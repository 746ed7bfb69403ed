"""The device part of MoCo v2's augmentation at 224 px, compared with the encoder, which must be the slower one.

--data is a folder of photographs. The device part is color, blur, flip and normalization of one view. The encoder's
part is forward and backward of ResNet-50 on one view. (A training step also runs the key encoder's forward.)
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import numpy as np
import torch

from moco.config import DataConfig
from moco.data.augment import augment
from moco.data.loader import crops
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.data.view import draw
from moco.models.backbones import build_backbone
from scripts.bench.recipes import views
from scripts.bench.timing import Table, alternate, compared, per_second


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--batch", type=int, default=16, help="images per batch")


def run(options: Namespace) -> Iterator[Table]:
    """Yield one table: views per second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, recipe = load_source(DataConfig("folder", options.data)).train, views("moco_v2")
    plan = Plan(len(source), options.batch, epochs=1, seed=0)
    crops_of_steps = [each[0] for _, _, _, each, _ in crops(source, plan, recipe[:1], device, workers=0)]
    encoder = build_backbone("resnet50", {}).to(device)
    steps = iter(range(10**9))  # each call uses the next batch and new parameters

    def device_part() -> torch.Tensor:
        step = next(steps)
        index = np.arange(options.batch) + step * options.batch
        return augment(crops_of_steps[step % len(crops_of_steps)], draw(recipe[0], 0, 0, index, 0), recipe[0])

    def four_batches() -> None:
        for _ in range(4):  # one batch is too short to time
            device_part()

    views_ready = device_part()

    def encode() -> None:
        encoder(views_ready).square().mean().backward()

    variants = {
        "ResNet-50, forward and backward": lambda: per_second(options.batch, encode, options.clock),
        "device part of the views": lambda: per_second(4 * options.batch, four_batches, options.clock),
    }
    title = f"224 px views on {device.type}, views/s, {options.clock} time"
    yield compared(title, alternate(variants, options.rounds), "views/s")
