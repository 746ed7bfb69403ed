"""`python -m moco.knn`: weighted kNN on the features of an encoder and of its baselines.

Legend: M training images, L classes.
"""

import shlex
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.config import ConfigError, require
from moco.config.knn import KnnConfig
from moco.data.base import Progress
from moco.data.keyed import VALIDATION, permutation
from moco.data.sources import Source
from moco.data.video import video_of
from moco.evaluation.average_precision import average_precision
from moco.evaluation.features import Network, pixels
from moco.evaluation.knn_classifier import (
    KnnSettings,
    classes_of_draws,
    knn_shares,
    leave_one_out,
)
from moco.evaluation.metrics import Metrics, compute_metrics, confusion_of, mean_known
from moco.evaluation.subject import encoders, labels_of, targets_of
from moco.evaluation.subsets import draw_labels, naming_field
from moco.evaluation.task import Result, Task, changed_settings, frames_note, open_task, record_results
from moco.runs.results import prepare
from moco.runtime.console import log, log_next, percent, progress_bar, table
from moco.runtime.next_command import command


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
            log(f"k={max(config.k)} exceeds the {references:,} reference images: all of them vote, k={references}")
        ks = list(dict.fromkeys(min(k, references) for k in config.k))
        networks = encoders(task.subject, config.compare, task.device)
        projection = config.features == "projection"
        found = [_evaluate(task, name, each if projection else each.backbone, ks) for name, each in networks]
        if "pixels" in config.compare:
            found.append(_evaluate(task, "pixels", pixels, ks))
        _report(task, found)
    return found


def _count_references(train: Source, config: KnnConfig) -> int:
    """Return the number of labeled references; refuse `labels_per_class` above the size of a class."""
    if not config.labels_per_class:
        return len(train)
    require(
        train.multi_labels is None,
        f"labels_per_class={config.labels_per_class} needs one class per image, and these images can have "
        "several labels: set labels_per_class=0",
    )
    with naming_field("labels_per_class", config.labels_per_class):
        return len(draw_labels(labels_of(train), config.labels_per_class, 0))


def _evaluate(task: Task[KnnConfig], name: str, network: Network, ks: list[int]) -> Result:
    """Choose k and temperature on the training split, then evaluate on the held-out split.

    `ks` are the distinct values of `config.k`; a value above the number of references is replaced by this number.
    """
    config = task.config

    def features(source: Source) -> Tensor:
        return task.features(network, source, f"{name}: features of {len(source):,} images")

    bank = features(task.train)  # (M, D)
    if config.half:
        bank = F.normalize(bank, dim=1).half()  # unit length, so that any range of features fits
    settings = KnnSettings(ks[0], config.temperature[0], config.labels_per_class, config.draws, config.seed)
    settings = replace(settings, query_chunk=config.queries_at_once, bank_chunk=config.references_at_once)
    choice: dict[str, Any] = {}
    if len(ks) * len(config.temperature) > 1:
        settings, choice = _choose(task, name, bank, ks, settings)
    queries = features(task.held_out)
    with progress_bar(f"{name}: nearest neighbors") as progress:
        metrics = _metrics(task, bank, queries, settings, progress)
    used = {"features": config.features, "half": config.half, "precision": config.precision, "draws": len(metrics)}
    used |= {name: getattr(settings, name) for name in ("k", "temperature", "labels_per_class", "seed")}
    multi_label = task.train.multi_labels is not None
    figures = metrics[0].to_json() if multi_label else summarize_draws(metrics)
    names = ("k", "temperature", "features", "choose_on", "half", "precision", "seed")
    changed = changed_settings(config, "knn", names)
    return Result(name, metrics, {"settings": used, "changed": changed, "figures": figures} | choice)


def _metrics(
    task: Task[KnnConfig], bank: Tensor, queries: Tensor, settings: KnnSettings, progress: Progress
) -> list[Any]:
    """Return the metrics of the held-out images, one per draw of labels; see `Result`."""
    trained, truth = task.train.multi_labels, task.held_out.multi_labels
    if trained is not None and truth is not None:
        shares = knn_shares(bank, torch.from_numpy(trained).to(bank.device), queries, settings, progress)
        return [average_precision(shares, truth, trained)]
    classes = len(task.train.classes)
    ranked = classes_of_draws(bank, labels_of(task.train), queries, classes, settings, progress)
    metrics = [compute_metrics(each, labels_of(task.held_out), classes) for each in ranked]
    # With fewer than five neighbors, fewer than five classes can have votes.
    return metrics if settings.k >= 5 else [replace(each, top5=None) for each in metrics]


def _choose(
    task: Task[KnnConfig], name: str, bank: Tensor, ks: list[int], settings: KnnSettings
) -> tuple[KnnSettings, dict[str, Any]]:
    """Choose k and temperature by leave-one-out on the training split.

    If several pairs (k, temperature) are equally good, the first of these pairs is chosen.

    Returns the settings with the chosen pair, and a dict with the entry "choice" of results.json.
    """
    config = task.config
    drawn = np.sort(permutation(config.seed, 0, len(bank), VALIDATION)[: config.choose_on])
    rows, groups = (torch.from_numpy(each).to(bank.device) for each in (drawn, task.groups))
    given = rows, ks, config.temperature, groups, settings
    with progress_bar(f"{name}: choosing k and temperature") as progress:
        grid = leave_one_out(bank, targets_of(task.train), *given, progress)
    i, j = np.unravel_index(grid.argmax(), grid.shape)
    choice = {"k": ks, "temperature": config.temperature, "leave_one_out": grid.tolist()}
    choice |= {"images": len(rows), "copies": int((np.bincount(task.groups)[task.groups] > 1).sum())}
    choice |= {"videos": True} if video_of(task.train.name(0)) else {}
    return replace(settings, k=ks[i], temperature=config.temperature[j]), {"choice": choice}


def pairs_of_draws(metrics: list[Metrics]) -> NDArray[np.int64]:
    """Concatenate `Metrics.pairs` of all draws, (P, 3)."""
    return np.concatenate([each.pairs for each in metrics])


def summarize_draws(metrics: list[Metrics]) -> dict[str, Any]:
    """Return the metrics for results.json; for several draws, their means and the standard deviation of top1."""
    values = metrics[0].to_json()
    if len(metrics) == 1:
        return values
    del values["interval95"]  # an interval over all draws would count each image several times
    return values | {
        "top1": float(np.mean([each.top1 for each in metrics])),
        "std": float(np.std([each.top1 for each in metrics])),
        "draws": len(metrics),
        "top5": mean_known([each.top5 for each in metrics]),
        "balanced": mean_known([each.balanced for each in metrics]),
        "per_class": [mean_known(each) for each in zip(*(each.per_class for each in metrics), strict=True)],
        "confusion": values["confusion"] and confusion_of(pairs_of_draws(metrics), len(metrics[0].per_class)).tolist(),
    }


def most_confused(pairs: NDArray[np.int64], classes: tuple[str, ...], most: int = 3) -> list[str]:
    """List the most frequent confusions: "cat as dog 12.5 %" if this share of the cats was predicted to be dogs.

    `pairs` (P, 3) are `Metrics.pairs` of one draw, or of several draws as `pairs_of_draws` concatenates them.
    """
    count = len(classes)
    codes, place = np.unique(pairs[:, 0] * count + pairs[:, 1], return_inverse=True)
    truth, predicted = np.divmod(codes, count)
    images = np.bincount(place, pairs[:, 2])
    share = 100 * images / np.bincount(truth, images, count)[truth]
    share[truth == predicted] = 0
    order = np.argsort(-share, kind="stable")[:most]
    return [f"{classes[truth[i]]} as {classes[predicted[i]]} {share[i]:.1f} %" for i in order if share[i]]


def _report(task: Task[KnnConfig], found: list[Result]) -> None:
    """Print the tables, write results.json, print the next commands."""
    config, train = task.config, task.train
    pretrained, draws = found[0], len(found[0].metrics)
    few = config.labels_per_class
    protocol = f"{few} label{'s' * (few > 1)} a class" if few else "all labels"  # as in earlier results.json files
    if "choice" in pretrained.details:
        _show_choice(pretrained, len(train))
    results = ["top-1 %", f"± over {draws} draws" if draws > 1 else "95 % interval", "top-5 %"]
    table(
        f"kNN, {protocol.replace(' a ', ' per ')}, {config.features} features",
        ["encoder", "k", "T", *(pretrained.cells() if pretrained.several_labels else results)],
        [_row(each) for each in found],
        f"on {len(task.held_out):,} held-out images; {pretrained.metrics[0].baselines(pretrained.encoder)}"
        + frames_note(task.held_out),
    )
    if not pretrained.several_labels and (pairs := most_confused(pairs_of_draws(pretrained.metrics), train.classes)):
        log(f"most frequent confusions of the pretrained encoder: {', '.join(pairs)}")
    log(f"written: {record_results(task, 'knn', protocol, found, config.features)}")
    live = task.subject.file.config.get("evaluate", {})
    if live.get("labels_per_class") and not config.labels_per_class and not pretrained.several_labels:
        fields = {name: live[name] for name in ("features", "labels_per_class", "draws")}
        fields |= {name: [live[name]] for name in ("k", "temperature")}
        fields |= {"compare": ["untrained", "pixels"], "seed": 0}
        log_next(
            command("moco.knn", config, **fields),
            "few labels, as during training; with all labels, accuracy can saturate",
        )
    log_next(command("moco.linear", config))
    log_next(shlex.join(["tensorboard", "--logdir", str(task.subject.output)]))


def _show_choice(pretrained: Result, training: int) -> None:
    choice, chosen = pretrained.details["choice"], pretrained.details["settings"]
    left_out = "itself as a neighbor"
    if choice["copies"]:
        others, have = "its copies", "byte-identical copies"
        if choice.get("videos"):
            others, have = "the other frames of its video", "such frames, or copies"
        left_out = f"itself and {others} as neighbors ({choice['copies']:,} images have {have})"
    rows, measure = [], "mAP" if pretrained.several_labels else "accuracy"
    for k, line in zip(choice["k"], choice["leave_one_out"], strict=True):
        marks = [" <" * ((k, each) == (chosen["k"], chosen["temperature"])) for each in choice["temperature"]]
        rows.append([str(k), *(percent(value) + mark for value, mark in zip(line, marks, strict=True))])
    table(
        f"choice: leave-one-out {measure} of the pretrained encoder on training images",
        ["k", *(f"T {temperature:g}" for temperature in choice["temperature"])],
        rows,
        f"on {choice['images']:,} of {training:,} images, each without {left_out}; < marks the chosen pair",
    )


def _row(result: Result) -> list[str]:
    values, settings = result.details["figures"], result.details["settings"]
    name = "raw pixels" if result.encoder == "pixels" else result.encoder
    k, temperature = str(settings["k"]), f"{settings['temperature']:g}"
    if result.several_labels:
        return [name, k, temperature, *result.cells().values()]
    spread = percent(values["std"]) if "std" in values else " – ".join(map(percent, values["interval95"]))
    return [name, k, temperature, percent(result.top1), spread, percent(result.top5)]
