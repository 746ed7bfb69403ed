"""Debiased InfoNCE: remove, in expectation, the negatives that have the query's own class."""

import torch
from torch import Tensor

from moco.losses.similarity import ABSENT, Temperature, check_temperature


def debiased_cross_entropy(logits: Tensor, temperature: Temperature, prior: float) -> Tensor:
    """Compute the debiased contrastive loss (Chuang et al., 2020), Eq. 7 and 8, from `info_nce_logits`.

    tau+ is the probability that a negative has the query's class. K g replaces the sum of exp(negative) over the K
    negatives:

        g = max((mean of exp(negative) - tau+ exp(positive)) / (1 - tau+), exp(-1 / T))

    The lower bound, exp(-1 / T), is the smallest exp(negative) of unit vectors. The key is the only positive: M = 1 in
    the paper. With tau+ = 0 the loss is `info_nce`, except where rounding reaches the bound.

    Args:
        logits: shape (N, 1 + K), the positive in column 0; -inf for a queue entry that is no negative.
        temperature: T, by which the logits were divided.
        prior: tau+, 0 <= tau+ < 1; for C balanced classes 1 / C.

    Returns:
        The mean loss over the queries, shape ().

    Raises:
        ValueError: for an invalid temperature or prior.
    """
    check_temperature(temperature)
    if not 0 <= prior < 1:
        raise ValueError(
            f"prior={prior} must be at least 0 and below 1; it is the share of a class among the negatives"
        )
    count = (logits[:, 1:] > ABSENT).sum(dim=1).to(logits.dtype)  # (N,)
    top = logits.detach().amax(dim=1)  # (N,), subtracted so that no exponential overflows
    positive = logits[:, 0] - top
    negatives = (logits[:, 1:] - top[:, None]).exp().sum(dim=1)
    estimate = (negatives - prior * count * positive.exp()) / (1 - prior)  # (N,), K g
    bound = count * torch.exp(-1 / temperature - top)
    return ((positive.exp() + torch.maximum(estimate, bound)).log() - positive).mean()
