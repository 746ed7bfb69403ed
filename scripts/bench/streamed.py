"""Two MoCo v2 views of image files from loader workers: this project's and the official pipeline.

--data is a folder of photographs. The official workers return finished views. Ours return both crops in uint8, and the
rest of the augmentation runs on the device. The "complete" variants include this rest, in the main process on the CPU.
Workers in threads are compared with workers in processes.
"""

from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moco.config import DataConfig
from moco.data.augment import augment
from moco.data.folder import FolderSource
from moco.data.loader import CropDataset, batches, crops
from moco.data.plan import Plan
from moco.data.remote import Item
from moco.data.sources import load_source
from moco.data.view import View, draw
from scripts.bench import official
from scripts.bench.recipes import views
from scripts.bench.timing import Table, alternate, compared, stream_rate

CPU = torch.device("cpu")


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--passes", type=int, default=2, help="passes over the images, per round")
    parser.add_argument("--batch", type=int, default=16, help="images per batch")


def run(options: Namespace) -> Iterator[Table]:
    """Yield one table per number of workers: images per second."""
    source = load_source(DataConfig("folder", options.data)).train
    assert isinstance(source, FolderSource)
    plan = Plan(len(source), options.batch, options.passes, seed=0)
    paths = [source.path(i) for i in range(len(source))]
    order = [int(i) for _, index in plan.samples(0) for i in index]
    recipe = views("moco_v2")
    for workers in options.workers:
        streams: dict[str, Callable[[], Any]] = {
            "official, PIL": partial(
                official.loader, paths, official.moco_v2(recipe[0].size), order, options.batch, workers
            ),
            "ours, from processes": partial(crops, source, plan, recipe, CPU, workers),
            "ours, from threads": partial(_threads, source, plan, recipe, workers),
            "ours, from processes, complete": partial(batches, source, plan, recipe, CPU, workers),
            "ours, from threads, complete": partial(_threads_complete, source, plan, recipe, workers),
        }
        variants = {name: partial(stream_rate, each, options.batch, options.clock) for name, each in streams.items()}
        title = f"Two views of {len(source)} photographs, {workers} worker(s), images/s, {options.clock} time"
        yield compared(title, alternate(variants, options.rounds), "images/s")


def _threads(source: FolderSource, plan: Plan, recipe: list[View], workers: int) -> Iterator[Item]:
    """Do the workers' part in threads of this process, with as many batches prefetched as in a DataLoader."""
    dataset = CropDataset(source, recipe, plan.seed, replace=False)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Item | ValueError]] = deque()
        for step in plan.samples(0):
            waiting.append(pool.submit(dataset.__getitem__, step))
            if len(waiting) == 2 * workers:
                yield _item(waiting.popleft())
        while waiting:
            yield _item(waiting.popleft())


def _item(done: Future[Item | ValueError]) -> Item:
    item = done.result()
    assert not isinstance(item, ValueError), item
    return item


def _threads_complete(source: FolderSource, plan: Plan, recipe: list[View], workers: int) -> Iterator[list[Tensor]]:
    for epoch, index, _, (*crops_of_views, _), _ in _threads(source, plan, recipe, workers):
        yield [
            augment(each, draw(view, plan.seed, epoch, index, stream), view)
            for stream, (view, each) in enumerate(zip(recipe, crops_of_views, strict=True))
        ]
