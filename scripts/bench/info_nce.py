"""InfoNCE, materialized and streamed: time, memory and error of forward and backward.

Memory is the peak increase of the resident memory of a fresh process in one pass (Linux). The error is the norm of the
error of the queries' gradient, relative to the norm of the gradient in float64.

"loss" is the loss only. "step" is the task of a training step: it also masks the queries' own stale keys and computes
contrast accuracy, which the streamed variant always measures.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses import info_nce
from moco.losses.streamed import BLOCK, ROWS, info_nce_streamed
from scripts.bench.machine import status_field
from scripts.bench.timing import Table, alternate, compared, seconds

K, C, T = 65536, 128, 0.07
IMAGES = 50_000  # images in the data set: for most queries, the queue holds an older key of the same image
Pass = Callable[[], Tensor]


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments of this comparison."""
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="N, the number of queries")
    parser.add_argument("--task", nargs="+", default=["loss", "step"], choices=["loss", "step"])
    parser.add_argument("--chunk", type=int, default=BLOCK["cpu"] // ROWS["cpu"])


def run(options: Namespace) -> Iterator[Table]:
    """Yield a table of times per size and task, and one of memory and error."""
    costs = []
    for n in options.sizes:
        error = errors(n, options.chunk)
        for task in options.task:
            passes = both_variants(n, task, options.chunk)
            variants = {name: partial(_milliseconds, each, options.clock) for name, each in passes.items()}
            what = f"InfoNCE, N {n}, K {K}, C {C}, {task}, chunk {options.chunk}, ms, {options.clock} time"
            yield compared(what, alternate(variants, options.rounds), "ms", less_is_faster=True)
            mb = {variant: peak_in_fresh_process(n, task, options.chunk, variant) for variant in passes}
            cells = [f"{value:.1f}" for value in (*mb.values(), mb["materialized"] / mb["streamed"])]
            costs.append([f"N {n}, {task}", *cells, *(f"{value:.1e}" for value in error.values())])
    columns = ["", "MB, materialized", "MB, streamed", "ratio", "error, materialized", "error, streamed"]
    yield Table("InfoNCE, peak memory of a pass, and the gradient's error", columns, costs)


def _milliseconds(work: Pass, clock: str) -> float:
    return 1e3 * seconds(work, clock)


def both_variants(n: int, task: str, chunk: int) -> dict[str, Pass]:
    """Return both variants as functions that return the gradient with respect to the queries."""
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(rows, C, generator=generator), dim=1) for rows in (n, n, K))
    index, queue_index = (torch.randint(IMAGES, (rows,), generator=generator) for rows in (n, K))

    def materialized() -> Tensor:
        q = query.clone().requires_grad_()
        mask = queue_index != index[:, None] if task == "step" else None
        loss, logits = info_nce(q, key, queue, T, mask)
        if task == "step":
            (logits[:, :1] > logits[:, 1:]).all(dim=1).float().mean()
        del logits  # as a step does
        return torch.autograd.grad(loss, q)[0]

    def streamed() -> Tensor:
        q = query.clone().requires_grad_()
        own = (index, queue_index) if task == "step" else None
        found = info_nce_streamed(q, key, queue, T, chunk=chunk, samples=own)
        found.measures(T)
        return torch.autograd.grad(found.loss, q)[0]

    return {"materialized": materialized, "streamed": streamed}


def peak(n: int, task: str, chunk: int, variant: str) -> float:
    """Measure the peak increase of the resident memory in one pass, in MB. Call it in a fresh process."""
    both_variants(2, task, chunk)[variant]()  # one-time allocations of the libraries
    work = both_variants(n, task, chunk)[variant]
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status_field("VmRSS")
    work()
    return (status_field("VmHWM") - before) / 1024  # `resource` has only the peak, which a new process inherits


def peak_in_fresh_process(n: int, task: str, chunk: int, variant: str) -> float:
    """Run `peak` in a fresh process. Its malloc returns freed memory to the system: reused memory would not count."""
    command = [sys.executable, "-m", "scripts.bench.info_nce", str(n), task, str(chunk), variant]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def errors(n: int, chunk: int) -> dict[str, float]:
    """Compare each variant's gradient with float64, some queries at a time to fit into memory."""
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(rows, C, generator=generator), dim=1).double() for rows in (n, n, K))
    exact = []
    for q, k in zip(query.split(64), key.split(64), strict=True):
        part = q.clone().requires_grad_()
        exact.append(torch.autograd.grad(info_nce(part, k, queue, T)[0] * len(q) / n, part)[0])
    reference = torch.cat(exact)
    return {
        name: float((each() - reference).norm() / reference.norm())
        for name, each in both_variants(n, "loss", chunk).items()
    }


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit("run python -m scripts.bench info_nce: it starts this module in processes of its own")
    print(peak(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]))
