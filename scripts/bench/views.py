"""Two views of images in memory, with the CIFAR-10 notebook's recipe: this project's loader, and PIL transforms.

--data is a folder of images of one size, such as CIFAR-10's. Both variants return batches of normalized float views.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import islice

import torch

from moco.config import DataConfig
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import load_source
from scripts.bench import official
from scripts.bench.recipes import views
from scripts.bench.timing import Table, alternate, compared, stream_rate

BATCH, WORKERS = 512, 2


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument(
        "--batches", type=int, default=20, help=f"number of batches of {BATCH} images, per round and variant"
    )


def run(options: Namespace) -> Iterator[Table]:
    """Yield one table: views per second."""
    source = load_source(DataConfig("folder", options.data, resident=True)).train
    assert source.images is not None
    images = source.images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, 3)
    plan = Plan(len(source), BATCH, epochs=1 + options.batches * BATCH // len(source), seed=0)
    order = [int(i) for _, index in islice(plan.samples(0), options.batches) for i in index]
    recipe = views("cifar")

    def resident() -> Iterator[object]:
        return islice(batches(source, plan, recipe, torch.device("cpu"), workers=0), options.batches)

    def pil() -> Iterator[object]:
        return iter(official.loader(images, official.cifar_notebook(), order, BATCH, WORKERS))

    variants = {
        f"PIL transforms, {WORKERS} workers": lambda: stream_rate(pil, 2 * BATCH, options.clock),
        "resident": lambda: stream_rate(resident, 2 * BATCH, options.clock),
    }
    side = images.shape[1]
    title = f"Two views of resident images ({side} x {side}), views/s, {options.clock} time"
    yield compared(title, alternate(variants, options.rounds), "views/s")
