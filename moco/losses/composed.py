"""InfoNCE with its switches: one function for a method to call.

Legend: N queries, C dimension, K queue length, E extra negatives of each query.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses.debias import debiased_cross_entropy
from moco.losses.margin import Margin, add_margin
from moco.losses.queue import info_nce, info_nce_logits, mean_over_key_and_positives, positive_columns
from moco.losses.similarity import (
    ABSENT,
    Temperature,
    check_mask,
    full_precision,
    paired_similarity,
    similarity,
)


def contrast(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    negatives: Tensor | None = None,
    *,
    margin: float = 0.0,
    margin_kind: Margin = "arc",
    extra_negatives: Tensor | None = None,
    positives: Tensor | None = None,
    debias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`info_nce`, bit for bit, unless a switch is on.

    Margin, extra negatives and further positives go together. Debiasing goes with none of them: its estimator
    is one of an expectation over negatives as the data has them.

    Args:
        query: L2-normalized, shape (N, C).
        key: L2-normalized, shape (N, C), without gradient.
        queue: L2-normalized, shape (K, C), without gradient.
        temperature: T > 0; a tensor of shape () if learned.
        negatives: as in `info_nce`; to eliminate false negatives, `negatives & ~find_false_negatives(...)`.
        margin: on the similarity of each positive, see `add_margin`; 0 is none.
        margin_kind: see `add_margin`.
        extra_negatives: shape (N, E, C), see `mix_hard_negatives`; a zero vector takes no part.
        positives: boolean (N, K) or (1, K), see `multi_positive_info_nce`; it attracts false negatives.
        debias: the class prior tau+, see `debiased_cross_entropy`; 0 is none.

    Returns:
        The mean loss over the queries, shape (), and the detached logits of `info_nce`, shape (N, 1 + K), without
        margin and extra negatives, so that what is measured on them compares between runs.

    Raises:
        ValueError: for values and shapes that do not fit, and for debiasing together with another switch.
    """
    others = {"margin": margin != 0, "extra_negatives": extra_negatives is not None, "positives": positives is not None}
    on = [name for name, is_on in others.items() if is_on]
    if not on and debias == 0:
        return info_nce(query, key, queue, temperature, negatives)
    if on and debias != 0:
        raise ValueError(
            f"debias={debias} together with {', '.join(on)}: its estimate holds for the queue's keys as they are; "
            "use one or the other"
        )
    query = full_precision(query)
    logits = plain = info_nce_logits(query, key, queue, temperature, negatives)  # (N, 1+K)
    if debias != 0:
        return debiased_cross_entropy(logits, temperature, debias), plain.detach()
    positive = None
    if positives is not None:
        check_mask("positives", positives, (len(query), len(queue)))
        positive = positive_columns(positives, negatives, logits)  # (N, 1+K)
    if margin != 0:
        lowered = add_margin(paired_similarity(query, key), margin, margin_kind) / temperature  # (N, 1)
        rest = logits[:, 1:]  # (N, K)
        if positive is not None:
            rest = torch.where(
                positive[:, 1:], add_margin(similarity(query, queue), margin, margin_kind) / temperature, rest
            )
        logits = torch.cat([lowered, rest], dim=1)
    if extra_negatives is not None:
        logits = torch.cat([logits, _extra_logits(query, extra_negatives, temperature)], dim=1)  # (N, 1+K+E)
    if positive is None:
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # (N,)
        return F.cross_entropy(logits, labels), plain.detach()
    positive = F.pad(positive, (0, logits.shape[1] - positive.shape[1]))  # no extra negative is a positive
    return mean_over_key_and_positives(logits, positive), plain.detach()


def _extra_logits(query: Tensor, extra: Tensor, temperature: Temperature) -> Tensor:
    """Logits of each query's own negatives, shape (N, E)."""
    if extra.ndim != 3 or extra.shape[::2] != query.shape:
        raise ValueError(
            f"extra_negatives {tuple(extra.shape)} must have shape ({len(query)}, any number, {query.shape[1]})"
        )
    absent = (extra == 0).all(dim=2)  # (N, E)
    return (similarity(query, extra) / temperature).masked_fill(absent, ABSENT)
