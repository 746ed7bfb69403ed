"""Contrastive losses: pure functions of tensors. Whoever calls them gathers across processes first.

Legend: N queries, C dimension, K queue length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_logits(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, negatives: Tensor | None = None
) -> Tensor:
    """Similarity of each query to its key (column 0) and to the queue's keys, over the temperature.

    MoCo (He et al., 2020), Algorithm 1 and Eq. 1. Computed in float32 (or float64) whatever autocast says: at
    temperature 0.07 a bf16 similarity is off by up to 0.06 in the logit.

    Args:
        query: L2-normalised, shape (N, C).
        key: L2-normalised, shape (N, C), without gradient. Row n is the positive of query n.
        queue: L2-normalised, shape (K, C), without gradient.
        temperature: T > 0.
        negatives: optional boolean (N, K) or (1, K); False takes a queue entry out of a query's
            negatives (an unfilled entry, the query's own stale key).

    Returns:
        Logits, shape (N, 1 + K). The positive is class 0, so the labels are all zero.

    Raises:
        ValueError: if the temperature is not positive or the shapes do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if query.shape != key.shape or queue.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and queue {tuple(queue.shape)} "
            "must have shapes (N, C), (N, C) and (K, C)"
        )
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key, queue = query.to(dtype), key.to(dtype), queue.to(dtype)
        positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
        negative = query @ queue.T  # (N, K)
    if negatives is not None:
        negative = negative.masked_fill(~negatives, float("-inf"))
    return torch.cat([positive, negative], dim=1) / temperature  # (N, 1+K)


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, negatives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE with a queue: the cross entropy of `info_nce_logits` with class 0.

    For uniform logits the loss is log(1 + K), its chance level.

    Returns:
        The mean loss over the queries, shape (), and the detached logits, shape (N, 1 + K).

    Raises:
        ValueError: see `info_nce_logits`.
    """
    logits = info_nce_logits(query, key, queue, temperature, negatives)
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # (N,)
    return F.cross_entropy(logits, labels), logits.detach()
