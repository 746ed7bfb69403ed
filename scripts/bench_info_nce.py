"""Time and memory of InfoNCE, materialised and streamed: python scripts/bench_info_nce.py [--threads 2].

Forward and backward. The two forms take turns and their medians are compared, so that what else the machine does meets
both. Time is this process's own, user and system, with one thread, else the wall's. Memory is how far one pass raises
the resident memory of a fresh process at its peak (Linux). The error is that of the gradient by the queries,
relative to float64, norm to norm.

"loss" is the loss alone; "step" is what a training step asks for: the queries' own stale keys taken out of the
negatives, and contrast accuracy, which the streamed form has measured in any case.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses import info_nce
from moco.losses.streamed import CHUNK, info_nce_streamed

K, C, T = 65536, 128, 0.07
IMAGES = 50_000  # of the data set: an own key stands in the queue for every query or so
Form = Callable[[], Tensor]


def forms(n: int, task: str, chunk: int) -> dict[str, Form]:
    """Either form as a function from nothing to the gradient by the queries."""
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(rows, C, generator=generator), dim=1) for rows in (n, n, K))
    index, queue_index = (torch.randint(IMAGES, (rows,), generator=generator) for rows in (n, K))

    def materialised() -> Tensor:
        q = query.clone().requires_grad_()
        mask = queue_index != index[:, None] if task == "step" else None
        loss, logits = info_nce(q, key, queue, T, mask)
        if task == "step":
            (logits[:, :1] > logits[:, 1:]).all(dim=1).float().mean()
        del logits  # a step keeps them no longer
        return torch.autograd.grad(loss, q)[0]

    def streamed() -> Tensor:
        q = query.clone().requires_grad_()
        own = {"index": index, "queue_index": queue_index} if task == "step" else {}
        found = info_nce_streamed(q, key, queue, T, chunk=chunk, **own)
        found.measures()
        return torch.autograd.grad(found.loss, q)[0]

    return {"materialised": materialised, "streamed": streamed}


def times(n: int, task: str, chunk: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each form, taking turns; the first round warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {}
    for _ in range(1 + rounds):
        for name, form in forms(n, task, chunk).items():
            start = clock()
            form()
            taken.setdefault(name, []).append(1e3 * (clock() - start))
    return {name: statistics.median(each[1:]) for name, each in taken.items()}


def peak(n: int, task: str, chunk: int, form: str) -> float:
    """By how many MB one pass raises resident memory at its peak: to be asked in a process of its own."""
    forms(2, task, chunk)[form]()  # what libraries take once for all
    run = forms(n, task, chunk)[form]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """A field of this process's status in KiB; `resource` has a peak only, and one that an exec hands on."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_elsewhere(n: int, task: str, chunk: int, form: str, threads: int) -> float:
    """`peak` in a fresh process whose malloc gives freed tensors back: a pass that used them again would look small."""
    command = [sys.executable, __file__, "--threads", str(threads), "--chunk", str(chunk)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command += ["--peak", form, "--task", task, "--sizes", str(n)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def errors(n: int, chunk: int) -> dict[str, float]:
    """Each form's gradient against float64, row by row so that it fits into memory."""
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(rows, C, generator=generator), dim=1).double() for rows in (n, n, K))
    exact = []
    for q, k in zip(query.split(64), key.split(64), strict=True):
        part = q.clone().requires_grad_()
        exact.append(torch.autograd.grad(info_nce(part, k, queue, T)[0] * len(q) / n, part)[0])
    whole = torch.cat(exact)
    return {name: float((form() - whole).norm() / whole.norm()) for name, form in forms(n, "loss", chunk).items()}


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="N, the queries")
    parser.add_argument("--task", nargs="+", default=["loss", "step"], choices=["loss", "step"])
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=["materialised", "streamed"], help="print one peak; for the script itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.sizes[0], options.task[0], options.chunk, options.peak))
        return
    unit = "ms of processor" if options.threads == 1 else "ms"
    print(f"K {K}, C {C}, T {T}, chunk {options.chunk}, {options.threads} thread(s), torch {torch.__version__}\n")
    print(f"| N | of | {unit}, materialised | streamed | ratio | MB | MB | ratio | error | error |")
    print("|---" * 10 + "|")
    for n in options.sizes:
        error = errors(n, options.chunk)
        for task in options.task:
            ms = times(n, task, options.chunk, options.rounds)
            mb = {form: peak_elsewhere(n, task, options.chunk, form, options.threads) for form in ms}
            cells = [str(n), task]
            for figures, shape in ((ms, ".0f"), (mb, ".1f")):
                cells += [format(value, shape) for value in figures.values()]
                cells.append(f"{figures['materialised'] / figures['streamed']:.1f}")
            print("| " + " | ".join(cells + [f"{value:.1e}" for value in error.values()]) + " |", flush=True)


if __name__ == "__main__":
    main()
