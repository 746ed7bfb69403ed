"""The share of each negative in a query's gradient, and the effect of the temperature on it.

    Understanding the Behaviour of Contrastive Loss (Wang & Liu, CVPR 2021), Sec. 3

P_ij is the softmax of query i over its positive and its negatives. The gradient of the loss with respect to the
similarities s is

    dL/ds_ii = -(1 / T) sum over negatives j of P_ij  (the positive)        dL/ds_ij = P_ij / T  (a negative)

The push on all negatives together equals the pull on the positive. r_ij, the share of one negative in that push, is the
softmax over the negatives only. The gradient with respect to the query is the sum over all keys of dL/ds times the key.
Keys have unit length, so the lengths of the negatives' terms in this sum are proportional to r_ij, too. A function that
refuses an argument raises ValueError.

Legend: N queries, K negatives, B temperatures.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moco.losses.similarity import check_temperature

ENTRIES_AT_ONCE = 2**21  # logits at once: 8 MiB of float32, which fits into the processor's cache


@torch.no_grad()
def relative_penalty(similarity: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute each negative's share of the push: r_ij = exp(s_ij / T) / sum over negatives k of exp(s_ik / T).

    Wang & Liu (2021), Sec. 3, |dL/ds_ij| / |dL/ds_ii|: a Boltzmann distribution. At T near 0 the nearest negative gets
    all of the push, at a large T all negatives get equal shares. The curves of the paper's figure are

        relative_penalty(torch.linspace(-1, 1, 201), torch.tensor([0.07, 0.2, 1.0])[:, None])  # (3, 201)

    Args:
        similarity: of the negatives, shape (..., K); -inf for an entry that is not a negative.
        temperature: above 0; a number, or a tensor that broadcasts against the similarities.

    Returns:
        Shape (..., K), 0 ... 1, summing to 1; nan in a row without a negative.
    """
    check_temperature(temperature)
    return (similarity / temperature).softmax(dim=-1)


@torch.no_grad()
def effective_negatives(weights: Tensor) -> Tensor:
    """Compute how many negatives contribute to the gradient, shape (...): 1 (one negative has all) ... K.

    `weights` are the shares of the negatives, `relative_penalty` (..., K). The result is exp of their entropy: their
    perplexity, or Hill number of order 1. For k equal shares the result is k, as for the effective rank; the inverse
    Simpson index would be an alternative.
    """
    entropy: Tensor = torch.special.entr(weights).sum(dim=-1)
    return entropy.exp()


@torch.no_grad()
def top_share(weights: Tensor, top: int) -> Tensor:
    """Compute the share of the push on the `top` (1 ... K) hardest negatives: top / K (equal shares) ... 1.

    `weights` are the `relative_penalty`, shape (..., K). The result has shape (...).
    """
    if not 1 <= top <= weights.shape[-1]:
        raise ValueError(f"top={top} must be 1 ... {weights.shape[-1]}, the number of negatives")
    return weights.topk(top, dim=-1, sorted=False).values.sum(dim=-1)


class Hardness(NamedTuple):
    """Means over the queries, each of shape (), on the logits' device."""

    effective_negatives: Tensor  # 1 ... K
    top_share: Tensor  # 0 ... 1
    push: Tensor  # sum over negatives of P_ij = 1 - P_ii, 0 (solved) ... 1: how much gradient is left


@torch.no_grad()
def hardness(logits: Tensor, top: int = 10) -> Hardness:
    """Compute the means of `Hardness` in one pass over the logits, a few queries at a time.

    The logits (N, 1 + K) are those of `moco.losses.info_nce`: the positive in column 0, -inf for an entry that is not a
    negative. Each row needs a negative. `top` is that of `top_share`; a `top` above K is replaced by K.
    """
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be (N, 1 + K) with N and K at least 1")
    rows = max(1, ENTRIES_AT_ONCE // logits.shape[1])
    parts = []
    for part in logits.split(rows):
        negatives = part[:, 1:]
        weights = relative_penalty(negatives, 1.0)  # (rows, K); the logits are already divided by T
        push = (negatives.logsumexp(dim=1) - part[:, 0]).sigmoid()  # sum exp(neg) / (exp(pos) + sum exp(neg))
        share = top_share(weights, min(top, weights.shape[1]))
        parts.append(torch.stack([effective_negatives(weights), share, push]))
    return Hardness(*torch.cat(parts, dim=1).mean(dim=1))


class Explained(NamedTuple):
    """Softmax, loss and gradient of one query at B temperatures, float64."""

    softmax: Tensor  # (B, 1 + K)
    loss: Tensor  # (B,), -log of the positive's softmax
    gradient: Tensor  # (B, 1 + K), with respect to the similarities: below 0 for the positive; each row sums to 0


@torch.no_grad()
def explain_temperature(similarity: Tensor, answer: int, temperatures: Tensor) -> Explained:
    """Compute softmax, loss and gradient of one query with a few candidates at many temperatures.

        grid = torch.logspace(-2, 0, 100)
        right, wrong = (explain_temperature(torch.tensor([0.8, 0.5, 0.1]), answer, grid) for answer in (0, 1))

    `similarity` (1 + K,) holds the similarity of the query to each candidate, and `answer` is the index of the positive
    among the candidates. The `temperatures` (B,) are above 0. If the positive is the most similar candidate (right),
    loss and gradient vanish at a low T. Otherwise (wrong) loss and gradient are large at a low T, and the most similar
    negative gets all of the push.
    """
    if similarity.ndim != 1:
        raise ValueError(f"similarity {tuple(similarity.shape)} must be (1 + K,)")
    if not 0 <= answer < len(similarity):
        raise ValueError(f"answer={answer} must be one of the candidates 0 ... {len(similarity) - 1}")
    if not bool(similarity.isfinite().all()):
        raise ValueError(f"similarities {similarity.tolist()} must be finite")
    if not bool(((temperatures > 0) & temperatures.isfinite()).all()):
        raise ValueError(f"temperatures {temperatures.tolist()} must be above 0 and finite")
    t = temperatures.double()[:, None]  # (B, 1)
    log_p = (similarity.double() / t).log_softmax(dim=1)  # (B, 1+K)
    softmax = log_p.exp()
    target = torch.zeros_like(softmax)
    target[:, answer] = 1
    return Explained(softmax, -log_p[:, answer], (softmax - target) / t)
