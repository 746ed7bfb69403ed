"""Compare variants, which take turns in one process."""

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Variant = Callable[[], float]  # does the work once and returns its measurement


def processor() -> float:
    """Return the processor time of this process and of its finished workers, in seconds."""
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def _wall() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # include the queued work
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"wall": _wall, "processor": processor}


def per_second(count: int, work: Callable[[], object], clock: str) -> float:
    """Call `work`, which processes `count` items, and return the number of items per second."""
    read = CLOCKS[clock]
    start = read()
    work()
    return count / (read() - start)


def seconds(work: Callable[[], object], clock: str) -> float:
    """Call `work` and return the seconds that it takes."""
    return 1 / per_second(1, work, clock)


def alternate(variants: Mapping[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Measure each variant once per round, after one warm-up round.

    The variants take turns, so that other load on the machine affects all of them.
    """
    measurements: dict[str, list[float]] = {name: [] for name in variants}
    for name, variant in [pair for _ in range(1 + rounds) for pair in variants.items()]:
        measurements[name].append(variant())
    return {name: each[1:] for name, each in measurements.items()}


@dataclass(frozen=True)
class Table:
    """A table of results."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def compared(title: str, measurements: Mapping[str, Sequence[float]], unit: str, less_is_faster: bool = False) -> Table:
    """Return one row per variant: median, quartiles, and the speed relative to the first variant.

    The relative speed is the median of the ratios within each round, since a round's measurements are close in time.
    """
    first = next(iter(measurements.values()))
    rows = []
    for name, values in measurements.items():
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        ratios = [a / b if less_is_faster else b / a for a, b in zip(first, values, strict=True)]
        rows.append([name, _plain(middle), f"{_plain(low)} – {_plain(high)}", f"{statistics.median(ratios):.2f}"])
    return Table(title, ["", unit, "quartiles", "× the first"], rows)


def _plain(value: float) -> str:
    """Format with three digits, or without decimals from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def stream_rate(open_stream: Callable[[], Iterable[object]], batch_size: int, clock: str) -> float:
    """Return the images per second of a stream that yields batches of `batch_size` images.

    The wall clock starts at the first batch, since the start of the workers does not matter in a long run. The
    processor clock counts everything, since a worker's time is known only after it has ended.
    """
    read = CLOCKS[clock]
    start, batches = read(), 0
    for _ in open_stream():
        if batches == 0 and clock == "wall":
            start = read()
        batches += 1
    return batch_size * (batches - (clock == "wall")) / (read() - start)
