"""The best classes of each image, from class scores or votes: a few numbers per image instead of one per class.

Legend: M images, L classes.
"""

import torch
from torch import Tensor

BEST = 5  # classes per image
NO_VOTE = -1
_AT_ONCE = 2**24  # scores in memory: 64 MiB of float32


def rank_classes(scores: Tensor, votes: bool = False) -> Tensor:
    """Return the five best classes of each image, or all if there are fewer: (M, min(5, L)), the best first.

    Args:
        scores: (M, L); the first of equal scores counts.
        votes: the scores are votes of neighbors; `NO_VOTE` replaces each class without a vote except the best class.
    """
    classes = scores.shape[1]
    parts = []
    for part in scores.split(max(1, _AT_ONCE // max(1, classes))):
        values, ranked = largest(part.float(), min(BEST, classes))
        if votes:
            ranked[:, 1:] = ranked[:, 1:].where(values[:, 1:] > 0, NO_VOTE)
        parts.append(ranked)
    return torch.cat(parts)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and their columns, descending; of equal ones the first (`topk` takes any)."""
    k = min(k, values.shape[1])
    top, at = values.topk(min(k + 1, values.shape[1]), dim=1)
    edge, at = top[:, k - 1 : k], at[:, :k]
    tied = (top[:, k:] == edge).any(dim=1)  # more equal values than places
    if tied.any():
        some, edge = values[tied], edge[tied]
        above, equal = some > edge, some == edge
        kept = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
        at[tied] = kept.nonzero()[:, 1].view(-1, k)
    at = at.sort(dim=1).values
    top, order = values.gather(1, at).sort(dim=1, descending=True, stable=True)
    return top, at.gather(1, order)
