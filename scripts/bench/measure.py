"""How things are compared: side by side in one process run, taking turns."""

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

Form = Callable[[], float]  # does its work once, and gives its figure


def processor() -> float:
    """Seconds of processor that this process has taken, with the workers that it has ended."""
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def _wall() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what is queued belongs to what was measured
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"wall": _wall, "processor": processor}


def per_second(count: int, work: Callable[[], object], clock: str) -> float:
    """How many things a second, where `work` does `count` of them."""
    read = CLOCKS[clock]
    start = read()
    work()
    return count / (read() - start)


def alternate(forms: Mapping[str, Form], rounds: int) -> dict[str, list[float]]:
    """The figures of each form, one a round.

    The forms take turns, so that what else the machine does meets all of them. A round that warms up comes first.
    """
    figures: dict[str, list[float]] = {name: [] for name in forms}
    for name, form in [pair for _ in range(1 + rounds) for pair in forms.items()]:
        figures[name].append(form())
    return {name: each[1:] for name, each in figures.items()}


@dataclass(frozen=True)
class Table:
    """What a comparison found, ready to be printed."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def compared(title: str, figures: Mapping[str, Sequence[float]], unit: str, less_is_faster: bool = False) -> Table:
    """One row a form: median, quartiles, and how many times as fast as the first form.

    The last is the median over the rounds of each round's own ratio: both of its figures come from the same moment.
    """
    first = next(iter(figures.values()))
    rows = []
    for name, values in figures.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        ratios = [a / b if less_is_faster else b / a for a, b in zip(first, values, strict=True)]
        rows.append([name, _plain(middle), f"{_plain(low)} – {_plain(high)}", f"{statistics.median(ratios):.2f}"])
    return Table(title, ["", unit, "quartiles", "× the first"], rows)


def _plain(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def stream_rate(opened: Callable[[], Iterable[object]], each: int, clock: str) -> float:
    """How many images a second a stream of batches delivers, `each` a batch, from its opening to its end.

    The wall's clock starts at the first batch, for the start of worker processes is no part of a long run. The
    processor's counts everything, for a worker's time is known when it has ended.
    """
    read = CLOCKS[clock]
    start, batches = read(), 0
    for _ in opened():
        if batches == 0 and clock == "wall":
            start = read()
        batches += 1
    return each * (batches - (clock == "wall")) / (read() - start)
