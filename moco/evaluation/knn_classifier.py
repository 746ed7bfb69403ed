"""Weighted k-nearest-neighbor classification on frozen features (Wu et al., CVPR 2018, section 3.4).

Queries and references are taken in parts, so memory is a part of one times a part of the other, whatever their number.
With several processes each answers some of the parts of the queries; every rank must call, and every rank gets all.

Legend: M reference ("bank") features, Q queries, D dimension, L classes.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.config import EvaluateConfig
from moco.data.keyed import DRAW_LABELS, permutation
from moco.distributed import rank, sum_over_ranks, world_size

QUERIES_AT_ONCE, REFERENCES_AT_ONCE = 1024, 65536

Progress = Callable[[int, int], None]  # called with (done, total)


class Accuracy(NamedTuple):
    """Top-1 accuracy in percent; over several draws of the labels their mean and standard deviation."""

    mean: float
    std: float
    draws: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} %" + (f" ± {self.std:.1f}" if self.draws > 1 else "")


def nearest(
    bank: Tensor, queries: Tensor, k: int, own: Tensor | None = None, bank_chunk: int = REFERENCES_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Each query's k nearest references by cosine, the nearest first; of equally near ones the lower row first.

    Args:
        bank: features (M, D), of any length and precision; they are normalized here, a part at a time.
        queries: (Q, D).
        k: neighbors; more than there are means all.
        own: (Q,), each query's own row in the bank, which is no neighbor of it.
        bank_chunk: references at once; memory is Q x (k + bank_chunk).

    Returns:
        Similarity and row in the bank, each (Q, min(k, M)), or one neighbor fewer with `own` where k reaches M.
    """
    k = min(k, len(bank) - (own is not None))
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for part in _parts(len(bank), bank_chunk):
        similarity = queries @ F.normalize(bank[part].float(), dim=1).T  # (Q, part)
        if own is not None:
            inside = ((own >= part.start) & (own < part.stop)).nonzero().squeeze(1)
            similarity[inside, own[inside] - part.start] = -torch.inf
        values, found = _largest(similarity, k)
        # The rows so far stand before this part's, so of equal ones the lower row still stands first.
        best, at = _largest(torch.cat([best, values], dim=1), k)
        rows = torch.cat([rows, found + part.start], dim=1).gather(1, at)
    return best, rows


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their places, falling; of equal ones the first, where `topk` takes any."""
    k = min(k, values.shape[1])
    top, at = values.topk(min(k + 1, values.shape[1]), dim=1)
    edge, at = top[:, k - 1 : k], at[:, :k]
    tied = (top[:, k:] == edge).any(dim=1)  # more equal ones than places
    if tied.any():
        some, edge = values[tied], edge[tied]
        above, level = some > edge, some == edge
        kept = above | (level & (level.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
        at[tied] = kept.nonzero()[:, 1].view(-1, k)
    at = at.sort(dim=1).values
    top, order = values.gather(1, at).sort(dim=1, descending=True, stable=True)
    return top, at.gather(1, order)


def _votes(similarity: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Votes (Q, L) of neighbors with this similarity and these labels, both (Q, k), the nearest first."""
    # Less the largest, which no vote changes: exp(1 / 0.01) is beyond float32.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def _parts(length: int, most: int) -> list[slice]:
    """0 ... length in parts of at most `most` that differ by one in size.

    A short last part would be multiplied by another of BLAS's kernels, which rounds differently: equal references could
    then seem unequal.
    """
    count = -(-length // most)
    return [slice(start, stop) for start, stop in pairwise(length * i // count for i in range(count + 1))]


def _mine(length: int, most: int, progress: Progress | None) -> Iterator[slice]:
    """This rank's parts of the queries: the parts are the same for any number of ranks, and so are their results."""
    parts = _parts(length, most)[rank() :: world_size()]
    for done, part in enumerate(parts):
        if progress is not None:
            progress(done, len(parts))
        yield part


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    temperature: float,
    classes: int,
    chunk: int = QUERIES_AT_ONCE,
    bank_chunk: int = REFERENCES_AT_ONCE,
    progress: Progress | None = None,
) -> Tensor:
    """The votes for each class: its share of the k nearest by cosine, weighted with exp(similarity / temperature).

    Args:
        bank: features (M, D), of any length.
        bank_labels: (M,), classes from 0.
        queries: (Q, D).
        k: neighbors; more than M means all M.
        temperature: above 0.
        classes: L.
        chunk, bank_chunk: queries and references at once; memory is chunk x bank_chunk.
        progress: called with (done, total).

    Returns:
        Shape (Q, L), in units of the nearest neighbor's vote.
    """
    votes = torch.zeros(len(queries), classes, device=queries.device)
    for part in _mine(len(queries), chunk, progress):
        similarity, rows = nearest(bank, queries[part], k, bank_chunk=bank_chunk)
        votes[part] = _votes(similarity, bank_labels[rows], temperature, classes)
    return sum_over_ranks(votes)  # others have zeros here, so nothing is rounded


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float, chunk: int = QUERIES_AT_ONCE
) -> Tensor:
    """Each query's class (Q,): the one with most votes, of equal ones the first. Arguments: see `knn_votes`."""
    return knn_votes(bank, bank_labels, queries, k, temperature, int(bank_labels.max()) + 1, chunk).argmax(dim=1)


def leave_one_out(
    bank: Tensor,
    bank_labels: Tensor,
    rows: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    chunk: int = QUERIES_AT_ONCE,
    bank_chunk: int = REFERENCES_AT_ONCE,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Accuracy on the reference set itself, where no sample is its own neighbor: to choose k and temperature by.

    The neighbors are searched for once, for the largest k.

    Args:
        bank, bank_labels, chunk, bank_chunk, progress: see `knn_votes`.
        rows: which references are the queries, (Q,).
        ks, temperatures: the grid.

    Returns:
        Percent, shape (len(ks), len(temperatures)).
    """
    classes = int(bank_labels.max()) + 1
    right = torch.zeros(len(ks), len(temperatures), dtype=torch.int64, device=bank.device)
    for part in _mine(len(rows), chunk, progress):
        own = rows[part]
        similarity, found = nearest(bank, bank[own], max(ks), own, bank_chunk)
        truth, labels = bank_labels[own], bank_labels[found]
        for i, k in enumerate(ks):
            for j, temperature in enumerate(temperatures):
                votes = _votes(similarity[:, :k], labels[:, :k], temperature, classes)
                right[i, j] += (votes.argmax(dim=1) == truth).sum()
    counts: NDArray[np.int64] = sum_over_ranks(right).cpu().numpy()
    return 100 * counts / len(rows)


def draw_labels(labels: NDArray[np.int64], per_class: int, draw: int, seed: int = 0) -> NDArray[np.int64]:
    """Positions of `per_class` samples of each class, a function of seed and draw: every encoder gets the same.

    Raises:
        ValueError: if a class has fewer samples.
    """
    order = permutation(seed, 0, len(labels), stream=DRAW_LABELS + draw)
    picked = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    if any(len(each) < per_class for each in picked):
        raise ValueError(
            f"evaluate.labels_per_class={per_class}, but the smallest class has {min(map(len, picked))} samples"
        )
    return np.concatenate(picked)


def votes_of_draws(
    bank: Tensor,
    bank_labels: NDArray[np.int64],
    queries: Tensor,
    k: int,
    temperature: float,
    classes: int,
    labels_per_class: int,
    draws: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Votes (Q, L) with few labels a class, once for each draw of them. Arguments: see `knn_votes`, `draw_labels`."""
    for draw in range(draws):
        rows = draw_labels(bank_labels, labels_per_class, draw, seed)
        at = torch.from_numpy(rows).to(bank.device)
        few = torch.from_numpy(bank_labels[rows]).to(bank.device)
        yield knn_votes(bank[at], few, queries, k, temperature, classes, progress=progress)


def knn_accuracy(
    bank: Tensor,
    bank_labels: NDArray[np.int64],
    queries: Tensor,
    labels: NDArray[np.int64],
    k: int = 200,
    temperature: float = 0.1,
    labels_per_class: int = 0,
    draws: int = 100,
    progress: Progress | None = None,
) -> Accuracy:
    """kNN accuracy with all labels, or with few labels a class averaged over many draws of them.

    With all labels kNN saturates on easy data and shows nothing of the encoder; few labels do.

    Args:
        bank, queries: features (M, D) and (Q, D).
        bank_labels, labels: (M,) and (Q,).
        k, temperature: see `knn_votes`.
        labels_per_class: 0 uses the whole bank, once.
        draws: how many draws of the few labels.
        progress: see `knn_votes`; of each draw anew.
    """
    truth = torch.from_numpy(labels).to(bank.device)
    classes = int(bank_labels.max()) + 1
    if labels_per_class:
        each = votes_of_draws(
            bank, bank_labels, queries, k, temperature, classes, labels_per_class, draws, progress=progress
        )
    else:
        all_labels = torch.from_numpy(bank_labels).to(bank.device)
        each = iter([knn_votes(bank, all_labels, queries, k, temperature, classes, progress=progress)])
    scores = [100 * (votes.argmax(dim=1) == truth).double().mean().item() for votes in each]
    return Accuracy(float(np.mean(scores)), float(np.std(scores)), len(scores))


def knn_title(setting: EvaluateConfig) -> str:
    """What the live accuracy is, in words."""
    if setting.labels_per_class:
        labels = f"{setting.labels_per_class} label{'s' * (setting.labels_per_class > 1)} a class"
        return f"held-out kNN, {labels}, {setting.draws} draws"
    return f"held-out kNN (k {setting.k})"
