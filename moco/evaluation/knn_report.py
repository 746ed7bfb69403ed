"""What `python -m moco.knn` says and leaves: its tables, its entries in results.json, what to run next."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco.config.knn import KnnConfig
from moco.data.sources import Source
from moco.distributed import on_rank_zero
from moco.evaluation.metrics import Figures
from moco.evaluation.subject import Subject, about
from moco.runs.results import record
from moco.runtime.console import log, percent, table
from moco.runtime.next_command import command

NAMES = {"pixels": "raw pixels"}  # others are called what they are


@dataclass(frozen=True, eq=False)
class Result:
    """What came out for one encoder."""

    name: str  # pretrained, untrained or pixels
    k: int
    temperature: float
    each: list[Figures]  # on the held-out images: one, or with few labels one a draw
    grid: NDArray[np.float64] | None  # leave-one-out accuracy (k, temperature), None where there was nothing to choose

    @property
    def top1(self) -> float:
        return float(np.mean([one.top1 for one in self.each]))

    def confusion(self) -> NDArray[np.int64]:
        """(L, L), row is the truth; over several draws their sum."""
        total: NDArray[np.int64] = np.sum([one.confusion for one in self.each], axis=0)
        return total

    def plain(self) -> dict[str, Any]:
        """The figures for results.json."""
        known = self.each[0].plain()
        if len(self.each) == 1:
            return known
        known |= {
            "top1": self.top1,
            "std": float(np.std([one.top1 for one in self.each])),  # over the draws
            "draws": len(self.each),
            "top5": _mean([one.top5 for one in self.each]),
            "per_class": [_mean(values) for values in zip(*(one.per_class for one in self.each), strict=True)],
            "confusion": None if known["confusion"] is None else self.confusion().tolist(),
        }
        del known["interval95"]  # it would take the draws' images for as many different ones
        return known


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def protocol(config: KnnConfig) -> str:
    """How much of the labels is used, in words."""
    few = config.labels_per_class
    return f"{few} label{'s' * (few > 1)} a class" if few else "all labels"


def confused(confusion: NDArray[np.int64], classes: tuple[str, ...], most: int = 3) -> list[str]:
    """The pairs of classes taken for each other most: such as "cat for dog 12.5 %", of the images that show a cat."""
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    order = np.argsort(-share, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [f"{classes[a]} for {classes[b]} {share[a, b]:.1f} %" for a, b in pairs if share[a, b]]


def report(results: list[Result], bank: Source, held_out: Source, subject: Subject, config: KnnConfig) -> None:
    """results.json, the tables, and what to run next."""
    first = results[0]
    chosen_on = min(config.choose_on, len(bank))
    if first.grid is not None:
        at = (config.k.index(first.k), config.temperature.index(first.temperature))
        table(
            "choice: leave-one-out accuracy of the pretrained encoder on training images",
            ["k", *(f"T {temperature:g}" for temperature in config.temperature)],
            [
                [str(k), *(percent(value) + (" <" if (i, j) == at else "") for j, value in enumerate(line))]
                for i, (k, line) in enumerate(zip(config.k, first.grid, strict=True))
            ],
            f"on {chosen_on:,} of {len(bank):,}, none its own neighbor; < is taken",
        )
    draws = len(first.each)
    table(
        f"kNN, {protocol(config)}, {config.features} features",
        ["encoder", "k", "T", "top-1 %", f"± over {draws} draws" if draws > 1 else "95 % interval", "top-5 %"],
        [_line(result) for result in results],
        f"on {len(held_out):,} held-out images; chance is {100 / len(bank.classes):.1f} %",
    )
    pairs = confused(first.confusion(), bank.classes)
    if pairs:
        log(f"most confused by the pretrained encoder: {', '.join(pairs)}")
    entries = [_entry(result, chosen_on, bank, held_out, subject, config) for result in results]
    log(f"figures: {on_rank_zero(lambda: record(subject.output, entries, subject.step))}")
    for hint in _next(subject, config):
        log(f"next: {hint}")


def _line(result: Result) -> list[str]:
    known = result.plain()
    spread = percent(known["std"]) if "std" in known else " – ".join(map(percent, known["interval95"]))
    name = NAMES.get(result.name, result.name)
    return [name, str(result.k), f"{result.temperature:g}", percent(known["top1"]), spread, percent(known["top5"])]


def _entry(
    result: Result, chosen_on: int, bank: Source, held_out: Source, subject: Subject, config: KnnConfig
) -> dict[str, Any]:
    """One encoder's entry of results.json."""
    entry: dict[str, Any] = {
        "command": "knn",
        "encoder": result.name,
        "protocol": protocol(config),
        **about(subject, config, bank, held_out, config.features),
        "settings": {
            "features": config.features,
            "k": result.k,
            "temperature": result.temperature,
            "labels_per_class": config.labels_per_class,
            "draws": config.draws if config.labels_per_class else 1,
            "half": config.half,
            "seed": config.seed,
        },
        "figures": result.plain(),
    }
    if result.grid is not None:
        entry["choice"] = {
            "k": config.k,
            "temperature": config.temperature,
            "leave_one_out": result.grid.tolist(),
            "images": chosen_on,
        }
    return entry


def _next(subject: Subject, config: KnnConfig) -> Iterator[str]:
    """Commands that go on from here."""
    live = subject.file.config.get("evaluate", {})
    if live.get("labels_per_class") and not config.labels_per_class:
        few = {name: live[name] for name in ("features", "labels_per_class", "draws")}
        few |= {"k": [live["k"]], "temperature": [live["temperature"]], "compare": ["untrained", "pixels"], "seed": 0}
        yield f"{command('moco.knn', config, **few)}  (few labels, as while training: all labels can saturate)"
    yield command("moco.linear", config)
    yield shlex.join(["tensorboard", "--logdir", str(subject.output)])
