"""InfoNCE with a queue of keys: MoCo's loss, and its variants, decoupled or with positives in the queue.

Legend: N queries, C dimension, K queue length, M candidates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses.positives import PositivesMean, check_positives_mean, cross_entropy_over_positives
from moco.losses.similarity import (
    ABSENT,
    Temperature,
    check_floating,
    check_mask,
    check_shapes,
    check_temperature,
    full_precision,
    paired_similarity,
    similarity,
)


def check_inputs(query: Tensor, key: Tensor, queue: Tensor, temperature: Temperature) -> None:
    """Raise ValueError unless T is valid and the tensors are floating-point of shapes (N, C), (N, C) and (K, C)."""
    check_temperature(temperature)
    check_shapes(query=(query, "NC"), key=(key, "NC"), queue=(queue, "KC"))
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
    check_inputs(query, key, queue, temperature)
    query = full_precision(query)
    positive = paired_similarity(query, key) / temperature  # (N, 1)
    negative = similarity(query, queue) / temperature  # (N, K)
    if negatives is not None:  # after the division: the gradient of -inf / T is nan for a learned T
        negative = negative.masked_fill(~negatives, ABSENT)
    return torch.cat([positive, negative], dim=1)  # (N, 1+K)


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Temperature, negatives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE with a queue: the cross entropy of `info_nce_logits` with class 0.

    For uniform logits the loss is log(1 + K), its chance level. Arguments and errors are those of `info_nce_logits`.

    Returns:
        The mean loss over the queries, shape (), and the detached logits, shape (N, 1 + K).
    """
    logits = info_nce_logits(query, key, queue, temperature, negatives)
    return cross_entropy_of_key(logits), logits.detach()


def decoupled_info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Temperature, negatives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the decoupled contrast with a queue: InfoNCE without the positive in the denominator.

    Yeh et al. (2022), "Decoupled contrastive learning", Eq. 6. For uniform logits the loss is log(K). Arguments,
    results and errors are those of `info_nce`. A query without a negative has loss 0.
    """
    logits = info_nce_logits(query, key, queue, temperature, negatives)
    return cross_entropy_of_key(logits, decoupled=True), logits.detach()


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
    queue. SupMoCo's own equation was not available for comparison; a public implementation differs in the denominator.
    If the positives are false negatives, it is the attraction loss of Huynh et al. (2022). UniMoCo (Dai et al., 2021)
    differs: log(1 + sum exp(negatives) * sum exp(-positives)).

    Without any positive in the queue, the loss is that of `info_nce`: bit for bit with mean="outside", up to rounding
    with mean="inside".

    Args:
        query, key, queue, temperature: as in `info_nce`; the key is always a positive of its query.
        positives: boolean (N, K) or (1, K), the queue entries that are positives too.
        negatives: as in `info_nce`; excluded entries are no candidates, even those in `positives`.
        mean: "outside" the logarithm, or "inside", see `cross_entropy_over_positives`.

    Results and errors are those of `info_nce`; a ValueError is also raised for another shape or type of `positives`.
    """
    check_mask("positives", positives, (len(query), len(queue)))
    logits = info_nce_logits(query, key, queue, temperature, negatives)  # (N, 1+K)
    if negatives is not None:
        positives = positives & negatives
    return cross_entropy_of_key(logits, positives, mean), logits.detach()


def cross_entropy_of_key(
    logits: Tensor, positives: Tensor | None = None, mean: PositivesMean = "outside", decoupled: bool = False
) -> Tensor:
    """Compute `cross_entropy_over_positives` of logits (N, M), in which column 0, the key's, is always a positive.

    The next K columns are those of the queue; `positives`, boolean (N, K) or (1, K), marks the positives among them.
    Any further columns are those of negatives.
    """
    check_positives_mean(mean)
    if positives is None and not decoupled:
        return _cross_entropy_of_column_0(logits)
    positive = torch.zeros_like(logits, dtype=torch.bool)
    positive[:, 0] = True
    if positives is not None:
        positive[:, 1 : 1 + positives.shape[1]] = positives
    if decoupled or mean == "inside":
        return cross_entropy_over_positives(logits, positive, mean, decoupled)
    # The mean of -log softmax over a row's positives equals -log softmax of column 0 plus a change, which is logits_0
    # minus the mean logit of the positives. The change is a sum of logits times weights; all weights are exactly 0 if
    # column 0 is the only positive.
    weights = -positive.to(logits.dtype) / positive.sum(dim=1, keepdim=True)  # (N, M)
    weights[:, 0] += 1
    change = (logits.masked_fill(~positive, 0.0) * weights).sum(dim=1)  # (N,)
    return _cross_entropy_of_column_0(logits) + change.mean()


def _cross_entropy_of_column_0(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
