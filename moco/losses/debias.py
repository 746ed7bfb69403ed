"""Debiased InfoNCE: some of the negatives are of the query's own class; in expectation, take them out again."""

import torch
from torch import Tensor

from moco.losses.similarity import ABSENT, Temperature, check_temperature


def debiased_cross_entropy(logits: Tensor, temperature: Temperature, prior: float) -> Tensor:
    """The debiased contrastive loss (Chuang et al., 2020), Eq. 7 and 8, of `info_nce_logits`.

    With tau+ the probability that a negative is of the query's class, N g takes the place of the sum over N negatives:

        g = max((mean of exp(negative) - tau+ exp(positive)) / (1 - tau+), exp(-1 / T))

    The lower bound is what unit vectors can reach. There is one sample of the positive term, the key (M = 1).
    The bound apart, which only rounding meets there, tau+ = 0 is `info_nce`.

    Args:
        logits: shape (N, 1 + K), the positive in column 0; -inf where a queue entry is no negative.
        temperature: the one in the logits.
        prior: tau+, 0 <= tau+ < 1; for C balanced classes 1 / C.

    Returns:
        The mean loss over the queries, shape ().

    Raises:
        ValueError: if the prior is out of range or the temperature is not positive.
    """
    check_temperature(temperature)
    if not 0 <= prior < 1:
        raise ValueError(f"prior={prior} must be at least 0 and below 1, the share of a class among the negatives")
    count = (logits[:, 1:] > ABSENT).sum(dim=1).to(logits.dtype)  # (N,)
    top = logits.detach().amax(dim=1)  # (N,), taken out so that no exponential overflows
    positive = logits[:, 0] - top
    negatives = (logits[:, 1:] - top[:, None]).exp().sum(dim=1)
    estimate = (negatives - prior * count * positive.exp()) / (1 - prior)  # (N,), N g
    bound = count * torch.exp(-1 / temperature - top)
    return ((positive.exp() + torch.maximum(estimate, bound)).log() - positive).mean()
