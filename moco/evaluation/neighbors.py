"""Search among features: nearest neighbors, groups of near-duplicates, outliers.

A similarity is a cosine, computed in double precision and rounded to a multiple of 2**-23, the resolution of float32.
So equal images tie, ties are ordered by row, and results depend neither on the block size nor on the device. (The kNN
classifier has a faster search in float32, see `moco.evaluation.knn_classifier.nearest`.)

Legend: M images, Q queries, D feature dimension, B rows per block, k neighbors.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from moco.data.base import Progress

Features = NDArray[Any]  # (M, D) of any float type, in memory or a memmap: read B rows at a time

BLOCK = 4096  # B: a product has B x B numbers, 130 MB in double precision
_STEPS = 2**23
_ROW_BITS = 38  # a similarity in steps (25 bits with its sign) and a row share one int64
_LAST_ROW = 2**_ROW_BITS - 1
_NOTHING = -(2**62)
_MOST_LINKS = 2**20  # links kept until they are merged into the groups


def _unit(rows: Features, device: torch.device | None) -> Tensor:
    """Return rows of length 1 (or 0), in double precision, on the device."""
    return F.normalize(torch.from_numpy(np.array(rows)).to(device).double(), dim=1)


def _steps(a: Tensor, b: Tensor) -> Tensor:
    return ((a @ b.T) * _STEPS).round().long()


def nearest(
    features: Features,
    queries: Features,
    k: int,
    exclude: NDArray[np.int64] | None = None,
    block: int = BLOCK,
    device: torch.device | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Find each query's k most similar rows, the most similar first; of equal ones, the lower row first.

    Args:
        features, queries: (M, D) and (Q, D).
        k: neighbors; more than M means all.
        exclude: one row per query that it must not find, such as its own, shape (Q,); -1 for none.
        block: B; changes memory, not results.
        device: for the products.

    Returns:
        Similarities and rows, both (Q, k).
    """
    k = min(k, len(features) - (exclude is not None and bool((exclude >= 0).any())))
    found = []
    for start in range(0, len(queries), block):
        part = _unit(queries[start : start + block], device)  # (B, D)
        best = torch.full((len(part), 0), _NOTHING, device=device)  # (B, <= k)
        for first in range(0, len(features), block):
            steps = _steps(part, _unit(features[first : first + block], device))  # (B, B)
            # One integer that orders by similarity, then by row: no two are equal, so the order is unique.
            keys = (steps << _ROW_BITS) + (_LAST_ROW - first - torch.arange(steps.shape[1], device=device))
            if exclude is not None:
                at = torch.from_numpy(exclude[start : start + block]).to(device) - first  # (B,)
                here = ((at >= 0) & (at < steps.shape[1])).nonzero()[:, 0]
                keys[here, at[here]] = _NOTHING
            pool = torch.cat([best, keys], dim=1)
            best = pool.topk(min(k, pool.shape[1]), dim=1).values
        found.append(best.cpu())
    keys = torch.cat(found).numpy() if found else np.zeros((0, k), np.int64)  # (Q, k)
    return (keys >> _ROW_BITS) / _STEPS, _LAST_ROW - (keys & _LAST_ROW)


def outlier_scores(
    features: Features,
    k: int,
    block: int = BLOCK,
    device: torch.device | None = None,
    progress: Progress = lambda *_: None,
) -> NDArray[np.float64]:
    """Compute each row's mean similarity (M,) to its k nearest others; outliers have low scores.

    The features are (M, D), M >= 2; for k, block and device see `nearest`. Progress counts rows.
    """
    scores = np.zeros(len(features))
    for start in range(0, len(features), block):
        rows = np.arange(start, min(start + block, len(features)))
        scores[rows] = nearest(features, features[start : start + block], k, rows, block, device)[0].mean(axis=1)
        progress(int(rows[-1]) + 1, len(features))
    return scores


def duplicate_groups(
    features: Features,
    threshold: float,
    block: int = BLOCK,
    device: torch.device | None = None,
    progress: Progress = lambda *_: None,
) -> list[NDArray[np.int64]]:
    """Find groups of rows that are connected by chains of similarities of at least `threshold`.

    All pairs of rows are compared in blocks of B x B. Memory stays at one number per row for any number of links.

    Args:
        features, block, device: see `nearest`.
        threshold: cosine, above -1, at most 1.
        progress: called with (pairs of blocks done, their number).

    Returns:
        The groups of at least two rows, each in ascending order; the largest first, then by first row.
    """
    group = np.arange(len(features))  # each row's group so far
    links: list[NDArray[np.int64]] = []
    least, waiting, done = round(threshold * _STEPS), 0, 0
    blocks = -(-len(features) // block)
    for start in range(0, len(features), block):
        part = _unit(features[start : start + block], device)
        for first in range(start, len(features), block):  # the upper triangle: each pair once
            steps = _steps(part, part if first == start else _unit(features[first : first + block], device))
            found = (steps >= least).nonzero().cpu().numpy() + np.array([start, first])  # (links, 2)
            done += 1
            if len(found):
                links.append(found)
                waiting += len(found)
            if waiting > _MOST_LINKS:
                group, links, waiting = _merged(group, links), [], 0
            progress(done, blocks * (blocks + 1) // 2)
    group = _merged(group, links)
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return sorted((each for each in groups if len(each) > 1), key=lambda rows: (-len(rows), int(rows[0])))


def _merged(group: NDArray[np.int64], links: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Merge links (each (L, 2)) into the groups (M,); a group's number is that of its first row."""
    edges = np.concatenate([np.stack([np.arange(len(group)), group], axis=1), *links])
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(group),) * 2)
    _, labels = connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)
    merged: NDArray[np.int64] = first[labels]
    return merged
