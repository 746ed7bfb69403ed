"""Weighted k-nearest-neighbor classification on frozen features (Wu et al., CVPR 2018, section 3.4).

Queries and references are processed in chunks, so memory is bounded by the product of the chunk sizes. Except for
`nearest`, the functions on features are collective: each rank processes a part of the chunks of queries, and all ranks
get all results.

Legend: M reference ("bank") features, Q queries, D dimension, L classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.config import EvaluateConfig
from moco.data.base import Progress
from moco.distributed import rank, sum_over_ranks, world_size
from moco.evaluation.average_precision import average_precision
from moco.evaluation.metrics import BEST, largest, rank_classes
from moco.evaluation.subsets import draw_labels

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class KnnSettings:
    """Settings of the classifier."""

    k: int = 200  # neighbors; more than M means all M
    temperature: float = 0.1  # above 0; a vote weighs exp(similarity / temperature)
    labels_per_class: int = 0  # labeled references per class; 0: all references, without repetitions
    draws: int = 100  # repetitions, each with other labeled references
    seed: int = 0  # of the draws
    query_chunk: int = 1024  # queries at once; both chunk sizes bound the memory, and do not change results
    bank_chunk: int = 65536  # references at once


class Accuracy(NamedTuple):
    """An accuracy in percent, and its spread: over draws of labels, or for retrieval the standard error over images."""

    mean: float
    std: float
    draws: int  # number of draws; for retrieval, of images

    def __str__(self) -> str:
        return f"{self.mean:.1f} %" + (f" ± {self.std:.1f}" if self.draws > 1 else "")


def nearest(
    bank: Tensor,
    queries: Tensor,
    k: int,
    groups: tuple[Tensor, Tensor] | None = None,
    bank_chunk: int = KnnSettings.bank_chunk,
) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest references by cosine, nearest first; of equally near ones, the lower row first.

    `moco.evaluation.neighbors.nearest` searches in double precision and rounds, so its results do not depend on the
    device, at several times the cost. This function stays in float32, so that accuracies equal those of earlier runs.

    Args:
        bank, queries: features (M, D) and (Q, D), of any norm and precision; they are normalized here.
        k: neighbors; more than M means all.
        groups: groups of the references (M,) and of the queries (Q,), as numbers, for queries that are references
            themselves: only references of other groups are neighbors of a query.
        bank_chunk: references at once; memory is Q x (k + bank_chunk).

    Returns:
        Similarity and row in the bank, each (Q, min(k, M)), or with `groups` (Q, min(k, M - 1)). The similarity is -inf
        in the places for which a query has no neighbor.
    """
    k = min(k, len(bank) - (groups is not None))
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for part in _chunks(len(bank), bank_chunk):
        similarity = queries @ F.normalize(bank[part].float(), dim=1).T  # (Q, chunk)
        if groups is not None:
            similarity.masked_fill_(groups[1][:, None] == groups[0][part], -torch.inf)
        values, found = largest(similarity, k)
        # Earlier chunks come first in the concatenation, so of equal similarities the one with the lower row is first.
        best, at = largest(torch.cat([best, values], dim=1), k)
        rows = torch.cat([rows, found + part.start], dim=1).gather(1, at)
    return best, rows


def _votes(similarity: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Sum the votes (Q, L) of neighbors with this similarity and these labels, both (Q, k), nearest first."""
    weights = _weights(similarity, temperature)
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def _shares(similarity: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the share of each label in the votes, (Q, L); `labels` are those of the neighbors, (Q, k, L)."""
    weights = _weights(similarity, temperature)
    votes = (weights.unsqueeze(1) @ labels.float()).squeeze(1)
    return votes / weights.sum(dim=1, keepdim=True).clamp(min=1)  # the nearest neighbor's weight is 1


def _weights(similarity: Tensor, temperature: float) -> Tensor:
    """Return the weights (Q, k) of the votes, relative to that of the nearest neighbor."""
    # Subtracting the largest similarity changes no ranking and avoids overflow: exp(1 / 0.01) exceeds float32. If a
    # query has no neighbor, the largest similarity is -inf and all votes are 0.
    return ((similarity - similarity[:, :1].clamp(min=-1)) / temperature).exp()


def _chunks(length: int, max_size: int) -> list[slice]:
    """Split 0 ... length into chunks of at most `max_size`; their sizes differ by at most one.

    BLAS multiplies a short last chunk with another kernel, which rounds differently: equal references would get
    unequal similarities.
    """
    count = -(-length // max_size)
    return [slice(start, stop) for start, stop in pairwise(length * i // count for i in range(count + 1))]


def _own_chunks(length: int, max_size: int, progress: Progress) -> Iterator[slice]:
    """Yield this rank's chunks of the queries and report progress. Chunk sizes do not depend on the number of ranks."""
    chunks = _chunks(length, max_size)[rank() :: world_size()]
    for done, chunk in enumerate(chunks):
        progress(done, len(chunks))
        yield chunk


def knn_classes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    classes: int,
    settings: KnnSettings,
    progress: Progress = lambda *_: None,
) -> Tensor:
    """Return each query's best classes by the votes of its k nearest references, exp(similarity / temperature) each.

    Args:
        bank, queries: features (M, D) and (Q, D), of any norm.
        bank_labels: (M,), classes from 0.
        classes: L.
        settings: all references vote; `labels_per_class` and `draws` have no effect here.

    Returns:
        The classes (Q, min(5, L)), the best first; `NO_VOTE` in place of a class that nobody votes for.
    """
    found = torch.zeros(len(queries), min(BEST, classes), dtype=torch.int64, device=queries.device)
    for chunk in _own_chunks(len(queries), settings.query_chunk, progress):
        similarity, rows = nearest(bank, queries[chunk], settings.k, bank_chunk=settings.bank_chunk)
        votes = _votes(similarity, bank_labels[rows], settings.temperature, classes)
        found[chunk] = rank_classes(votes, votes=True)
    return sum_over_ranks(found)  # other ranks hold zeros here


def knn_shares(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    settings: KnnSettings,
    progress: Progress = lambda *_: None,
) -> Tensor:
    """Return the share (Q, L) of each label in the votes of a query's neighbors, for images with several labels.

    Args: see `knn_classes`; `bank_labels` are (M, L), true for the labels of an image.
    """
    found = torch.zeros(len(queries), bank_labels.shape[1], device=queries.device)
    for chunk in _own_chunks(len(queries), settings.query_chunk, progress):
        similarity, rows = nearest(bank, queries[chunk], settings.k, bank_chunk=settings.bank_chunk)
        found[chunk] = _shares(similarity, bank_labels[rows], settings.temperature)
    return sum_over_ranks(found)  # other ranks hold zeros here


def classes_of_draws(
    bank: Tensor,
    bank_labels: Labels,
    queries: Tensor,
    classes: int,
    settings: KnnSettings,
    progress: Progress = lambda *_: None,
) -> Iterator[Tensor]:
    """Yield `knn_classes` once with all labels, or once per draw of `labels_per_class`. Arguments: see `knn_classes`.

    Raises:
        SubsetError: if a class has fewer than `labels_per_class` references.
    """
    labels = torch.from_numpy(bank_labels).to(bank.device)
    if not settings.labels_per_class:
        yield knn_classes(bank, labels, queries, classes, settings, progress)
        return
    for draw in range(settings.draws):
        drawn = draw_labels(bank_labels, settings.labels_per_class, draw, settings.seed)
        rows = torch.from_numpy(drawn).to(bank.device)
        yield knn_classes(bank[rows], labels[rows], queries, classes, settings, progress)


def leave_one_out(
    bank: Tensor,
    bank_labels: Labels | NDArray[np.bool_],
    rows: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    groups: Tensor,
    settings: KnnSettings = KnnSettings(),  # immutable
    progress: Progress = lambda *_: None,
) -> NDArray[np.float64]:
    """Compute the accuracy of each pair of k and temperature on references of the bank, to choose the best pair.

    The neighbors of a query are references of other groups. The search runs once, for the largest k. If references
    can have several labels each, the mAP takes the place of the accuracy.

    Args:
        bank: features (M, D).
        bank_labels: classes (M,), or which labels each reference has, (M, L).
        rows: the references that serve as queries, (Q,).
        ks, temperatures: the grid.
        groups: the number of the group of each reference, (M,); an image and its copies are one group.
        settings: only the chunk sizes apply.

    Returns:
        Percent, shape (len(ks), len(temperatures)).
    """
    max_k = min(max(ks), len(bank) - 1)
    similarity = torch.zeros(len(rows), max_k, device=bank.device)
    found = torch.zeros(len(rows), max_k, dtype=torch.int64, device=bank.device)
    for chunk in _own_chunks(len(rows), settings.query_chunk, progress):
        own = rows[chunk]
        similarity[chunk], found[chunk] = nearest(bank, bank[own], max_k, (groups, groups[own]), settings.bank_chunk)
    similarity, found = sum_over_ranks(similarity), sum_over_ranks(found)  # other ranks hold zeros
    labels, truth = torch.from_numpy(bank_labels).to(bank.device), bank_labels[rows.cpu().numpy()]
    values = torch.zeros(len(ks) * len(temperatures), dtype=torch.float64, device=bank.device)
    for cell, (k, temperature) in enumerate(product(ks, temperatures)):
        if cell % world_size() == rank():
            parts = (
                (similarity[part, :k], labels[found[part, :k]], temperature)
                for part in _chunks(len(rows), settings.query_chunk)
            )
            if bank_labels.ndim == 2:
                shares = torch.cat([_shares(*part) for part in parts])
                values[cell] = average_precision(shares, truth.astype(np.bool_), bank_labels.astype(np.bool_)).mean
            else:
                classes = int(bank_labels.max()) + 1
                predicted = torch.cat([_votes(*part, classes).argmax(dim=1) for part in parts])
                values[cell] = 100 * float((predicted.cpu().numpy() == truth).mean())
    grid: NDArray[np.float64] = sum_over_ranks(values).view(len(ks), -1).cpu().numpy()
    return grid


def knn_accuracy(
    bank: Tensor,
    bank_labels: Labels,
    queries: Tensor,
    labels: Labels,
    settings: KnnSettings = KnnSettings(),  # immutable
    progress: Progress = lambda *_: None,
) -> Accuracy:
    """Compute the kNN accuracy with all labels, or averaged over draws of few labels per class.

    On easy data the accuracy with all labels saturates and hides differences between encoders; few labels show them.

    Args:
        bank, queries: features (M, D) and (Q, D).
        bank_labels, labels: (M,) and (Q,).
        settings: all labels by default.
        progress: restarts with each draw.

    Raises:
        SubsetError: if a class has fewer than `labels_per_class` references.
    """
    truth = torch.from_numpy(labels).to(bank.device)
    classes = int(bank_labels.max()) + 1
    predictions = classes_of_draws(bank, bank_labels, queries, classes, settings, progress)
    scores = [100 * (each[:, 0] == truth).double().mean().item() for each in predictions]
    return Accuracy(float(np.mean(scores)), float(np.std(scores)), len(scores))


def knn_title(setting: EvaluateConfig, references: int | None = None) -> str:
    """Return the name and the settings of the kNN accuracy during training; `references`: their number, if known."""
    more = f", T {setting.temperature:g}" * (setting.temperature != EvaluateConfig.temperature)
    more += ", projection features" * (setting.features == "projection")
    if setting.labels_per_class:
        labels = f"{setting.labels_per_class} label{'s' * (setting.labels_per_class > 1)} per class"
        return f"held-out kNN, {labels}, {setting.draws} draws (± standard deviation of the draws){more}"
    k = f"{setting.k}, or all references if fewer" if references is None else min(setting.k, references)
    return f"held-out kNN (k {k}{more})"
