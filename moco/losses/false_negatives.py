"""False negatives: queue entries that likely have the query's class, and so should not be its negatives."""

import torch
from torch import Tensor

from moco.losses.similarity import ABSENT, check_floating, check_mask, similarity


@torch.no_grad()
def find_false_negatives(
    support: Tensor,
    queue: Tensor,
    *,
    threshold: float | None = None,
    top: int | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """Return the queue entries that likely have the query's class (Huynh et al., 2022, false negative cancellation).

    The criterion is the similarity of an entry to the query's own key. This key is the only support view, and comes
    from the same encoder as the keys of the queue. (The paper aggregates several support views.)

        found = find_false_negatives(key, queue, threshold=0.7, candidates=negatives)
        elimination:  info_nce(query, key, queue, temperature, negatives & ~found)
        attraction:   multi_positive_info_nce(query, key, queue, temperature, found, negatives)

    Args:
        support, queue: L2-normalized, shapes (N, C) and (K, C).
        threshold: find entries with a similarity above it; -1 ... 1.
        top: find the entries with the `top` highest similarities; 1 ... K. With `threshold`, both conditions hold.
        candidates: boolean (N, K) or (1, K), the entries to search; None: all.

    Returns:
        Boolean, shape (N, K), True for the entries found.
    """
    if threshold is None and top is None:
        raise ValueError("threshold=None and top=None: pass one of them, or both")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be a cosine, -1 ... 1")
    if top is not None and not 1 <= top <= len(queue):
        raise ValueError(f"top={top} must be 1 ... {len(queue)}, the length of the queue")
    check_mask("candidates", candidates, (len(support), len(queue)))
    check_floating(support=support, queue=queue)
    cosine = similarity(support, queue)  # (N, K)
    if candidates is not None:
        cosine = cosine.masked_fill(~candidates, ABSENT)
    found = cosine > (ABSENT if threshold is None else threshold)  # (N, K)
    if top is not None:
        found &= torch.zeros_like(found).scatter_(1, cosine.topk(top, dim=1).indices, True)
    return found
