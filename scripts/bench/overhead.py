"""A training step compared with its encoders only: forward and backward of f_q, and forward of f_k.

The rest (shuffle, logits, optimizer, momentum update, queue, measures) is overhead. Both variants use the same
precision, memory layout and batch.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial

import torch

from moco.runtime.memory import keep_freed_memory
from moco.runtime.precision import PRECISIONS, pick_precision
from scripts.bench.step import SIZE, encoder, inputs, ours
from scripts.bench.timing import Table, alternate, compared, seconds


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--queue", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--backbone", default="resnet18")


def run(options: Namespace) -> Iterator[Table]:
    """Yield a table per queue length: seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, _ = pick_precision("auto", encoder(options.backbone), SIZE, device)
    views, index = inputs(options.batch, device)
    f_q = encoder(options.backbone).to(device).train()
    f_q.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        keep_freed_memory()

    def encoders_only() -> None:
        with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
            with torch.no_grad():
                f_q(views[1])
            loss = f_q(views[0]).float().square().mean()
        f_q.zero_grad()
        loss.backward()

    for queue in options.queue:
        chosen = Namespace(**vars(options) | {"queue": queue})
        step = ours(chosen, views, index, precision, compiled=False)
        works = {"encoders only": encoders_only, "step": step}
        variants = {name: partial(seconds, work, options.clock) for name, work in works.items()}
        title = f"A step of {options.backbone}, batch {options.batch}, K {queue}, {precision}, s, {options.clock} time"
        yield compared(title, alternate(variants, options.rounds), "s", less_is_faster=True)
