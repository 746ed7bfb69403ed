"""Search among features: nearest neighbors, groups of near-duplicates, outliers.

A similarity is a cosine, computed in double precision and rounded to a multiple of 2**-23, the resolution of float32.
So equal images have equal similarities, rows with equal similarities are in ascending order, and results depend neither
on the block size nor on the device. (The kNN classifier has a faster search in float32, see
`moco.evaluation.knn_classifier.nearest`.)

Legend: M images, Q queries, D feature dimension, B rows per block, k neighbors.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.data.base import Progress

Features = NDArray[Any]  # (M, D) of any float type, in memory or a memmap: read B rows at a time
Rows = NDArray[np.int64]

BLOCK = 4096  # B: a product has B x B numbers, 130 MB in double precision
_STEPS = 2**23  # number of rounding steps in a similarity of 1
_ROW_BITS = 38  # a similarity in steps (25 bits with its sign) and a row share one int64
_LAST_ROW = 2**_ROW_BITS - 1
_NOTHING = -(2**62)  # the key of an excluded row, below the keys of all others


def _unit(rows: Features, device: torch.device | None) -> Tensor:
    """Return rows of length 1 (or 0), in double precision, on the device."""
    return F.normalize(torch.from_numpy(np.array(rows)).to(device).double(), dim=1)


def _steps(a: Tensor, b: Tensor) -> Tensor:
    """Return the similarities of all rows of two tensors of unit vectors, in rounding steps."""
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
        exclude: for each query, one row that is not a neighbor of it, such as its own row, shape (Q,); -1 for none.
        block: B; changes memory, not results.
        device: for the products.

    Returns:
        Similarities and rows, both (Q, min(k, M)), or (Q, min(k, M - 1)) if `exclude` names a row.
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

    The features are (M, D), M >= 2; for k, block and device see `nearest`. `progress` is called with (rows done, M).
    """
    scores = np.zeros(len(features))
    for start in range(0, len(features), block):
        rows = np.arange(start, min(start + block, len(features)))
        scores[rows] = nearest(features, features[start : start + block], k, rows, block, device)[0].mean(axis=1)
        progress(int(rows[-1]) + 1, len(features))
    return scores


def rows_with_neighbor(
    features: Features,
    threshold: float,
    block: int = BLOCK,
    device: torch.device | None = None,
    progress: Progress = lambda *_: None,
) -> Rows:
    """Find the rows that have a similarity of at least `threshold` to another row, in ascending order.

    All pairs of rows are compared in blocks of B x B.

    Args:
        features, block, device: see `nearest`.
        threshold: cosine, above -1, at most 1.
        progress: called with (pairs of blocks done, number of pairs of blocks).
    """
    has_neighbor = torch.zeros(len(features), dtype=torch.bool, device=device)
    least, done, blocks = round(threshold * _STEPS), 0, -(-len(features) // block)
    for start in range(0, len(features), block):
        part = _unit(features[start : start + block], device)
        for first in range(start, len(features), block):  # the upper triangle: each pair once
            other = part if first == start else _unit(features[first : first + block], device)
            near = _steps(part, other) >= least  # (B, B)
            if first == start:
                near.fill_diagonal_(False)
            has_neighbor[start : start + len(part)] |= near.any(dim=1)
            has_neighbor[first : first + len(other)] |= near.any(dim=0)
            done += 1
            progress(done, blocks * (blocks + 1) // 2)
    return np.flatnonzero(has_neighbor.cpu().numpy())


def duplicate_groups(
    features: Features,
    order: Rows,
    threshold: float,
    block: int = BLOCK,
    device: torch.device | None = None,
    progress: Progress = lambda *_: None,
) -> list[tuple[Rows, NDArray[np.float64]]]:
    """Form groups: a group is a row to keep and the rows whose similarity to the kept row is at least `threshold`.

    Rows are taken in `order`. A row that is in no group yet is kept, and every later row that is similar enough to it
    and in no group yet joins its group. So every row of a group is similar to its kept row; a similarity to another row
    of the group is not enough.

    Args:
        features, threshold, block, device: see `rows_with_neighbor`.
        order: the rows to group, the best first, shape (L,).
        progress: called with (rows done, L).

    Returns:
        A pair for each group of at least two rows: the rows of the group, and their similarities to the kept row. The
        kept row comes first, then the other rows by descending similarity. The largest group comes first; of equally
        large groups, the group with the lower kept row.
    """
    least = round(threshold * _STEPS)
    kept_by = np.full(len(order), -1)  # position in `order` of the kept row of each row's group; -1: in no group yet
    steps = np.zeros(len(order), np.int64)  # similarity to that kept row, in rounding steps

    def free(start: int) -> Rows:
        """Return the positions, in the block that begins at `start`, of rows that are in no group yet."""
        return start + np.flatnonzero(kept_by[start : start + block] < 0)

    for start in range(0, len(order), block):
        own = free(start)  # (b,), b <= B
        part = _unit(features[order[own]], device)
        within = _steps(part, part).cpu().numpy()  # (b, b)
        for i, position in enumerate(own):
            if kept_by[position] < 0:
                joins = (within[i] >= least) & (kept_by[own] < 0)
                joins[i] = True
                kept_by[own[joins]], steps[own[joins]] = position, within[i, joins]
        kept = np.flatnonzero(kept_by[own] == own)
        for first in range(start + block, len(order) if len(kept) else 0, block):
            later = free(first)
            near = _steps(part[torch.from_numpy(kept).to(device)], _unit(features[order[later]], device))  # (K, b)
            best = (near >= least).int().argmax(dim=0, keepdim=True)  # the first kept row that is similar enough
            found = near.gather(0, best)[0].cpu().numpy()
            joins = found >= least
            kept_by[later[joins]], steps[later[joins]] = own[kept[best[0].cpu().numpy()[joins]]], found[joins]
        progress(min(start + block, len(order)), len(order))
    members = np.lexsort((order, -steps, kept_by != np.arange(len(order)), kept_by))
    parts = np.split(members, np.flatnonzero(np.diff(kept_by[members])) + 1)
    groups = [(order[each], steps[each] / _STEPS) for each in parts if len(each) > 1]
    return sorted(groups, key=lambda group: (-len(group[0]), int(group[0][0])))
