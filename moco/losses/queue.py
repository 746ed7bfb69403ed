"""InfoNCE with a queue of keys: MoCo's loss, and its variants, decoupled or with positives in the queue.

Legend: N queries, C dimension, K queue length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses.positives import PositivesMean, cross_entropy_over_positives
from moco.losses.similarity import (
    ABSENT,
    Temperature,
    check_floating,
    check_mask,
    check_temperature,
    full_precision,
    paired_similarity,
    similarity,
)


def check_shapes(query: Tensor, key: Tensor, queue: Tensor) -> None:
    """Raise ValueError unless the shapes are (N, C), (N, C) and (K, C), none empty, and the numbers floating-point."""
    fits = query.ndim == 2 and query.shape == key.shape and queue.ndim == 2 and queue.shape[1] == query.shape[1]
    if not fits or 0 in query.shape or len(queue) == 0:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and queue {tuple(queue.shape)} "
            "must have shapes (N, C), (N, C) and (K, C), each at least 1"
        )
    check_floating(query=query, key=key, queue=queue)


def info_nce_logits(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Temperature, negatives: Tensor | None = None
) -> Tensor:
    """Return the similarity of each query to its key (column 0) and to the queue's keys, divided by the temperature.

    MoCo (He et al., 2020), Algorithm 1 and Eq. 1. Computed in float32 (or float64) even under autocast.

    Args:
        query: L2-normalized, shape (N, C).
        key: L2-normalized, shape (N, C), without gradient. Row n is the positive of query n.
        queue: L2-normalized, shape (K, C), without gradient.
        temperature: T > 0; a tensor of shape () if learned.
        negatives: boolean (N, K) or (1, K), the negatives of each query, e.g. without unfilled entries and the query's
            own stale keys; None: all entries of the queue.

    Returns:
        Logits, shape (N, 1 + K). The positive is class 0, so the labels are all zero.

    Raises:
        ValueError: for an invalid temperature or shape.
    """
    check_temperature(temperature)
    check_shapes(query, key, queue)
    query = full_precision(query)
    positive = paired_similarity(query, key) / temperature  # (N, 1)
    negative = similarity(query, queue) / temperature  # (N, K)
    if negatives is not None:  # after the division: the gradient of -inf / T is nan for a learned T
        negative = negative.masked_fill(~negatives, ABSENT)
    return torch.cat([positive, negative], dim=1)  # (N, 1+K)


def first_cross_entropy(logits: Tensor) -> Tensor:
    """Return the mean cross entropy of (N, M) with class 0."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Temperature, negatives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE with a queue: the cross entropy of `info_nce_logits` with class 0.

    For uniform logits the loss is log(1 + K), its chance level. Arguments and errors are those of `info_nce_logits`.

    Returns:
        The mean loss over the queries, shape (), and the detached logits, shape (N, 1 + K).
    """
    logits = info_nce_logits(query, key, queue, temperature, negatives)
    return first_cross_entropy(logits), logits.detach()


def decoupled_info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Temperature, negatives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the decoupled contrast with a queue: InfoNCE without the positive in the denominator.

    Yeh et al. (2022), "Decoupled contrastive learning", Eq. 6. For uniform logits the loss is log(K). Arguments,
    results and errors are those of `info_nce`. A query without a negative has loss 0.
    """
    logits = info_nce_logits(query, key, queue, temperature, negatives)
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[:, 0] = True
    return cross_entropy_over_positives(logits, own, decoupled=True), logits.detach()


def multi_positive_info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    positives: Tensor,
    negatives: Tensor | None = None,
    mean: PositivesMean = "outside",
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE with positives in the queue: the mean over a query's key and its positives in the queue.

    Each positive has one softmax term over the key and all of the queue. If the positives are the keys of the query's
    class, this is SupMoCo (Majumder et al., 2021) in the form of SupCon's L_out (Khosla et al., 2020, Eq. 2) on a
    queue. SupMoCo's own equation was not available for comparison, and a public implementation has a different
    denominator. If they are false negatives, it is the attraction loss of Huynh et al. (2022). UniMoCo (Dai et al.,
    2021) differs: log(1 + sum exp(negatives) * sum exp(-positives)).

    Without any positive in the queue it is `info_nce`, bit for bit.

    Args:
        query, key, queue, temperature: as in `info_nce`; the key is always a positive of its query.
        positives: boolean (N, K) or (1, K), the queue entries that are positives too.
        negatives: as in `info_nce`; excluded entries are no candidates, even those in `positives`.
        mean: "outside" the logarithm, or "inside", see `cross_entropy_over_positives`.

    Returns:
        As `info_nce`.
    """
    check_mask("positives", positives, (len(query), len(queue)))
    logits = info_nce_logits(query, key, queue, temperature, negatives)  # (N, 1+K)
    if negatives is not None:
        positives = positives & negatives
    if mean != "outside":
        columns = positive_columns(positives, logits)
        return cross_entropy_over_positives(logits, columns, mean), logits.detach()
    return mean_over_key_and_positives(logits, positive_columns(positives, logits)), logits.detach()


def mean_over_key_and_positives(logits: Tensor, positive: Tensor) -> Tensor:
    """Compute `mean_over_positives` where column 0, the key's, is always a positive.

    For one row, the mean of -log softmax over the positives is that of column 0, plus a change: logits_0 minus the mean
    logit of the positives. The change is one product; its weights are exactly 0 if there are no other positives.
    """
    weights = -positive.to(logits.dtype) / positive.sum(dim=1, keepdim=True)  # (N, M)
    weights[:, 0] += 1
    change = (logits.masked_fill(~positive, 0.0) * weights).sum(dim=1)  # (N,)
    return first_cross_entropy(logits) + change.mean()


def positive_columns(positives: Tensor, logits: Tensor) -> Tensor:
    """Return the columns of `info_nce_logits` that are positives: the key's and those in the queue, (N, 1 + K)."""
    return F.pad(positives.expand(len(logits), -1), (1, 0), value=True)
