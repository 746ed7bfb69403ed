"""`python -m moco.knn`: weighted kNN on the features of an encoder and of its baselines.

Legend: M training images, L classes.
"""

import shlex
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.config import ConfigError
from moco.config.knn import KnnConfig
from moco.data.keyed import VALIDATION, permutation
from moco.data.sources import Source
from moco.distributed import is_rank_zero
from moco.evaluation.features import Network, pixels
from moco.evaluation.knn_classifier import KnnSettings, leave_one_out, votes_of_draws
from moco.evaluation.metrics import HeldOut, Metrics, confusion_of, mean_known, ranking_metrics
from moco.evaluation.ranking import rank_classes
from moco.evaluation.subject import encoders, labels_of
from moco.evaluation.subsets import draw_labels, naming_field
from moco.evaluation.task import Result, Task, open_task, record_results
from moco.runs.results import prepare
from moco.runtime.console import log, log_next, percent, progress_bar, table
from moco.runtime.next_command import command

Grid = NDArray[np.float64]  # leave-one-out accuracy (k, temperature)


def evaluate_knn(config: KnnConfig) -> list[Result]:
    """Evaluate an encoder and its baselines by kNN; k and temperature are chosen on the training split.

    Returns a result for the pretrained encoder, then one for each name in `compare`, the same on every rank.
    Errors: see `open_task`.
    """
    with open_task(config) as task:
        file, train = task.subject.file, task.train
        if config.features == "projection" and not file.head_weights:
            problem = f"features=projection, but {file.source} ({file.layout}) has no projection head"
            raise ConfigError(f"{problem}: set features=backbone")
        references = _count_references(train, config)
        prepare(task.subject.output)
        log(
            f"{file.source} · {file.backbone}, {config.features} features · {task.data.name}: {len(train):,} training "
            f"and {len(task.held_out):,} held-out images, {len(train.classes)} classes"
        )
        if max(config.k) > references:
            log(f"k={max(config.k)} exceeds the {references:,} reference images: all of them vote")
        networks = encoders(task.subject, config.compare, task.device)
        projection = config.features == "projection"
        found = [_evaluate(task, name, each if projection else each.backbone) for name, each in networks]
        if "pixels" in config.compare:
            found.append(_evaluate(task, "pixels", pixels))
        _report(task, found)
        return [result for result, _, _ in found]


def _count_references(train: Source, config: KnnConfig) -> int:
    """Return the number of labeled references; refuse `labels_per_class` above the size of a class."""
    if not config.labels_per_class:
        return len(train)
    with naming_field("labels_per_class", config.labels_per_class):
        return len(draw_labels(labels_of(train), config.labels_per_class, 0))


def _evaluate(task: Task[KnnConfig], name: str, network: Network) -> tuple[Result, KnnSettings, Grid | None]:
    """Choose k and temperature on the training split, then open the held-out split once."""
    config, labels = task.config, labels_of(task.train)

    def features(source: Source) -> Tensor:
        return task.features(network, source, f"{name}: features of {len(source):,} images")

    held_out = HeldOut(lambda: features(task.held_out), labels_of(task.held_out))
    bank = features(task.train)  # (M, D)
    if config.half:
        bank = F.normalize(bank, dim=1).half()  # unit length, so that any range of features fits
    settings, grid = _choose(task, name, bank)
    queries, truth = held_out.open()
    with progress_bar(f"{name}: nearest neighbors", quiet=not is_rank_zero()) as progress:
        classes, reduce = len(task.train.classes), partial(rank_classes, votes=True)
        ranked = votes_of_draws(bank, labels, queries, classes, settings, progress, reduce)
        metrics = [ranking_metrics(each.cpu().numpy(), truth, classes) for each in ranked]
    if settings.k < 5:  # fewer than five classes can have votes
        metrics = [replace(each, top5=None) for each in metrics]
    used = {"features": config.features, "half": config.half}
    used |= {name: getattr(settings, name) for name in ("k", "temperature", "labels_per_class", "seed")}
    details = {"settings": used | {"draws": len(metrics)}, "figures": summarize_draws(metrics)}
    if grid is not None:
        details["choice"] = {"k": config.k, "temperature": config.temperature, "leave_one_out": grid.tolist()}
        details["choice"] |= {"images": min(config.choose_on, len(task.train)), "copies": task.copied}
    return Result(name, metrics, details), settings, grid


def _choose(task: Task[KnnConfig], name: str, bank: Tensor) -> tuple[KnnSettings, Grid | None]:
    """Choose k and temperature by leave-one-out on the training split; the first of equally good pairs.

    The grid is None if there is nothing to choose.
    """
    config = task.config
    settings = KnnSettings(config.k[0], config.temperature[0], config.labels_per_class, config.draws, config.seed)
    settings = replace(settings, query_chunk=config.queries_at_once, bank_chunk=config.references_at_once)
    if len(config.k) * len(config.temperature) == 1:
        return settings, None
    drawn = np.sort(permutation(config.seed, 0, len(bank), VALIDATION)[: config.choose_on])
    arrays = labels_of(task.train), drawn, task.groups
    labels, rows, groups = (torch.from_numpy(each).to(task.device) for each in arrays)
    with progress_bar(f"{name}: choosing k and temperature", quiet=not is_rank_zero()) as progress:
        grid = leave_one_out(bank, labels, rows, config.k, config.temperature, groups, settings, progress)
    i, j = np.unravel_index(grid.argmax(), grid.shape)
    return replace(settings, k=config.k[i], temperature=config.temperature[j]), grid


def total_pairs(metrics: list[Metrics]) -> NDArray[np.int64]:
    """Join the pairs (P, 3) of all draws."""
    return np.concatenate([each.pairs for each in metrics])


def total_confusion(metrics: list[Metrics]) -> NDArray[np.int64]:
    """Sum the confusion matrices (L, L) over the draws."""
    return confusion_of(total_pairs(metrics), len(metrics[0].per_class))


def summarize_draws(metrics: list[Metrics]) -> dict[str, Any]:
    """Return the metrics for results.json; of several draws the means, and the standard deviation of top1."""
    values = metrics[0].to_json()
    if len(metrics) == 1:
        return values
    del values["interval95"]  # it would count the images of each draw as different ones
    return values | {
        "top1": float(np.mean([each.top1 for each in metrics])),
        "std": float(np.std([each.top1 for each in metrics])),
        "draws": len(metrics),
        "top5": mean_known([each.top5 for each in metrics]),
        "balanced": mean_known([each.balanced for each in metrics]),
        "per_class": [mean_known(each) for each in zip(*(each.per_class for each in metrics), strict=True)],
        "confusion": None if values["confusion"] is None else total_confusion(metrics).tolist(),
    }


def most_confused(pairs: NDArray[np.int64], classes: tuple[str, ...], most: int = 3) -> list[str]:
    """List the most frequent confusions: "cat as dog 12.5 %" if this share of the cats was predicted to be dogs.

    `pairs` are those of `Metrics`, of one draw or several.
    """
    count = len(classes)
    codes, place = np.unique(pairs[:, 0] * count + pairs[:, 1], return_inverse=True)
    truth, predicted = np.divmod(codes, count)
    images = np.bincount(place, pairs[:, 2])
    share = 100 * images / np.bincount(truth, images, count)[truth]
    share[truth == predicted] = 0
    order = np.argsort(-share, kind="stable")[:most]
    return [f"{classes[truth[i]]} as {classes[predicted[i]]} {share[i]:.1f} %" for i in order if share[i]]


def _report(task: Task[KnnConfig], found: list[tuple[Result, KnnSettings, Grid | None]]) -> None:
    """Print the tables, write results.json, print the next commands."""
    config, train = task.config, task.train
    pretrained, settings, grid = found[0]
    draws = len(pretrained.metrics)
    few = config.labels_per_class
    protocol = f"{few} label{'s' * (few > 1)} a class" if few else "all labels"  # in results.json of earlier versions
    if grid is not None:
        _show_choice(task, settings, grid)
    table(
        f"kNN, {protocol.replace(' a ', ' per ')}, {config.features} features",
        ["encoder", "k", "T", "top-1 %", f"± over {draws} draws" if draws > 1 else "95 % interval", "top-5 %"],
        [_row(result, settings) for result, settings, _ in found],
        f"on {len(task.held_out):,} held-out images; {pretrained.metrics[0].baselines()}",
    )
    if pairs := most_confused(total_pairs(pretrained.metrics), train.classes):
        log(f"most frequent confusions of the pretrained encoder: {', '.join(pairs)}")
    log(f"written: {record_results(task, 'knn', protocol, [each[0] for each in found], config.features)}")
    live = task.subject.file.config.get("evaluate", {})
    if live.get("labels_per_class") and not config.labels_per_class:
        fields = {name: live[name] for name in ("features", "labels_per_class", "draws")}
        fields |= {name: [live[name]] for name in ("k", "temperature")}
        fields |= {"compare": ["untrained", "pixels"], "seed": 0}
        log_next(command("moco.knn", config, **fields), "few labels, as during training: all labels can saturate")
    log_next(command("moco.linear", config))
    log_next(shlex.join(["tensorboard", "--logdir", str(task.subject.output)]))


def _show_choice(task: Task[KnnConfig], chosen: KnnSettings, grid: Grid) -> None:
    config, count = task.config, len(task.train)
    left_out = "itself as a neighbor"
    if task.copied:
        left_out = f"itself and its copies as neighbors ({task.copied:,} images have byte-identical copies)"
    best = (config.k.index(chosen.k), config.temperature.index(chosen.temperature))
    table(
        "choice: leave-one-out accuracy of the pretrained encoder on training images",
        ["k", *(f"T {temperature:g}" for temperature in config.temperature)],
        [
            [str(k), *(percent(value) + (" <" if (i, j) == best else "") for j, value in enumerate(line))]
            for i, (k, line) in enumerate(zip(config.k, grid, strict=True))
        ],
        f"on {min(config.choose_on, count):,} of {count:,} images, each without {left_out}; < is chosen",
    )


def _row(result: Result, settings: KnnSettings) -> list[str]:
    values = result.details["figures"]
    spread = percent(values["std"]) if "std" in values else " – ".join(map(percent, values["interval95"]))
    name = "raw pixels" if result.encoder == "pixels" else result.encoder
    return [name, str(settings.k), f"{settings.temperature:g}", percent(result.top1), spread, percent(result.top5)]
