"""`python -m moco.knn`: nearest neighbors of an encoder's features and of its baselines', subject in the same way.

Legend: M training images, Q held-out images, L classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import ConfigError, require
from moco.config.knn import KnnConfig
from moco.data.keyed import VALIDATION, permutation
from moco.data.sources import Source
from moco.distributed import is_rank_zero, world_size
from moco.evaluation.features import pixels
from moco.evaluation.knn_classifier import knn_votes, leave_one_out, votes_of_draws
from moco.evaluation.knn_report import Result, report
from moco.evaluation.metrics import HeldOut, figures
from moco.evaluation.subject import Subject, data_config, encoders, features_of, open_labeled, open_subject
from moco.runs.results import prepare
from moco.runtime.console import log, progress_bar
from moco.runtime.device import compute_context

Network = nn.Module | Callable[[Tensor], Tensor]


def evaluate_knn(config: KnnConfig) -> list[Result]:
    """See `moco.knn.knn`.

    Returns:
        A result for the pretrained encoder, then one for each name in `compare`; the same on every rank.
    """
    with compute_context(config) as device:
        return _judge_all(config, device)


def _judge_all(config: KnnConfig, device: torch.device) -> list[Result]:
    subject = open_subject(config)
    require(
        config.features == "backbone" or bool(subject.file.head_weights),
        f"features=projection, but {subject.file.source} ({subject.file.layout}) holds no projection head: "
        "set features=backbone",
    )
    bank, held_out = open_labeled(config, subject)
    available = _references(bank, config)
    prepare(subject.output)
    log(
        f"{subject.file.source} · {subject.file.backbone}, {config.features} features · "
        f"{data_config(config, subject).name}: {len(bank):,} training and {len(held_out):,} held-out images, "
        f"{len(bank.classes)} classes"
    )
    if max(config.k) > available:
        log(f"k={max(config.k)} exceeds the {available:,} reference images: all of them vote")
    results = [
        _judge(name, network, bank, held_out, subject, config, device)
        for name, network in _networks(subject, config, device)
    ]
    report(results, bank, held_out, subject, config)
    return results


def _references(bank: Source, config: KnnConfig) -> int:
    """How many references vote at most.

    Raises:
        ConfigError: if a class has fewer images than `labels_per_class`.
    """
    if not config.labels_per_class:
        return len(bank)
    assert bank.labels is not None
    labels, counts = np.unique(bank.labels, return_counts=True)
    fewest = int(counts.argmin())
    require(
        counts[fewest] >= config.labels_per_class,
        f"labels_per_class={config.labels_per_class}, but class {bank.classes[labels[fewest]]} has "
        f"{counts[fewest]} training images: lower it",
    )
    return config.labels_per_class * len(labels)


def _networks(subject: Subject, config: KnnConfig, device: torch.device) -> Iterator[tuple[str, Network]]:
    for name, encoder in encoders(subject, config.compare, device):
        yield name, encoder if config.features == "projection" else encoder.backbone
    if "pixels" in config.compare:
        yield "pixels", pixels


def _judge(
    name: str,
    network: Network,
    bank: Source,
    held_out: Source,
    subject: Subject,
    config: KnnConfig,
    device: torch.device,
) -> Result:
    """One encoder: choose k and temperature on the training split, then open the held-out split, once."""
    assert bank.labels is not None
    assert held_out.labels is not None
    held = HeldOut(lambda: _features(name, network, held_out, subject, config, device), held_out.labels)
    references = _features(name, network, bank, subject, config, device)  # (M, D)
    if config.half:
        references = F.normalize(references, dim=1).half()  # of length 1: any feature's range fits
    labels = torch.from_numpy(bank.labels).to(device)

    k, temperature, grid = config.k[0], config.temperature[0], None
    if len(config.k) * len(config.temperature) > 1:
        drawn = np.sort(permutation(config.seed, 0, len(bank), VALIDATION)[: config.choose_on])
        rows = torch.from_numpy(drawn).to(device)
        with progress_bar(f"choosing k and temperature, {name}", quiet=not is_rank_zero()) as progress:
            grid = leave_one_out(
                references,
                labels,
                rows,
                config.k,
                config.temperature,
                config.queries_at_once,
                config.references_at_once,
                progress,
            )
        best = np.unravel_index(grid.argmax(), grid.shape)  # of equal ones the first
        k, temperature = config.k[best[0]], config.temperature[best[1]]

    queries, truth = held.open()
    classes = len(bank.classes)
    if config.labels_per_class:
        few, draws, seed = config.labels_per_class, config.draws, config.seed
        votes = votes_of_draws(references, bank.labels, queries, k, temperature, classes, few, draws, seed)
    else:
        with progress_bar(f"nearest neighbors, {name}", quiet=not is_rank_zero()) as progress:
            sizes = (config.queries_at_once, config.references_at_once)
            votes = iter([knn_votes(references, labels, queries, k, temperature, classes, *sizes, progress)])
    each = [figures(one, truth, votes=True) for one in votes]
    if k < 5:  # there are no five classes to be among
        each = [replace(one, top5=None) for one in each]
    return Result(name, k, temperature, each, grid)


def _features(
    name: str, network: Network, source: Source, subject: Subject, config: KnnConfig, device: torch.device
) -> Tensor:
    """Features (M, D) on every rank, with a bar.

    Raises:
        ConfigError: for NaN or infinity among them.
    """
    done = 0
    with progress_bar(f"features of {len(source):,} images, {name}", quiet=not is_rank_zero()) as progress:

        def count(*call: Any) -> None:
            nonlocal done
            done = min(len(source), done + len(call[-1]) * world_size())
            progress(done, len(source))

        handle = network.register_forward_hook(count) if isinstance(network, nn.Module) else None
        features = features_of(network, source, subject, config, device)
        if handle is not None:
            handle.remove()
    if not torch.stack(features.aminmax()).isfinite().all():
        raise ConfigError(
            f"the {name} encoder of {subject.file.source} gives features that are NaN or infinite: "
            "its training diverged, take an older checkpoint=FILE"
        )
    return features
