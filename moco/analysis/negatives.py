"""Which negatives a query's gradient comes from, and how the temperature decides it.

    Understanding the Behavior of Contrastive Loss (Wang & Liu, CVPR 2021), Sec. 3

With P_ij the softmax of query i over its positive and its negatives, the loss's slopes by the similarities s are

    dL/ds_ii = -(1 / T) sum over j of P_ij  (the positive)        dL/ds_ij = P_ij / T  (a negative)

so the push on all negatives equals the pull on the positive, and r_ij, a negative's share of that push, is the softmax
over the negatives alone. Keys have unit length, so these shares are those of the gradients' lengths too.

Everything here takes the detached logits that `moco.losses.info_nce` returns, with -inf where an entry is no negative.

Legend: N queries, K negatives.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ENTRIES_AT_ONCE = 2**21  # logits at once: 8 MiB of float32, which stays near the processor's cache


@torch.no_grad()
def gradient_weights(logits: Tensor, temperature: float) -> Tensor:
    """The size of the loss's slope by each similarity, for each query by itself.

    Wang & Liu (2021), Sec. 3. Of a mean over N queries each is a 1 / N part.

    Args:
        logits: shape (N, 1 + K), the positive in column 0.
        temperature: the one in the logits.

    Returns:
        Shape (N, 1 + K), 0 ... 1 / T. Column 0 is (1 - P_ii) / T, the sum of the others, which are P_ij / T.

    Raises:
        ValueError: unless the temperature is above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    weights = logits.softmax(dim=1) / temperature  # (N, 1+K)
    weights[:, 0] = weights[:, 1:].sum(dim=1)  # 1 - P_ii without cancellation
    return weights


@torch.no_grad()
def relative_penalty(similarity: Tensor, temperature: float | Tensor) -> Tensor:
    """Each negative's share of a query's push: r_ij = exp(s_ij / T) / sum over negatives k of exp(s_ik / T).

    Wang & Liu (2021), Sec. 3, |dL/ds_ij| / |dL/ds_ii|: a Boltzmann distribution. As T falls to 0 the nearest takes all,
    as T grows all take alike. Over a grid of similarities and temperatures it is the curve of their figure:

        relative_penalty(torch.linspace(-1, 1, 201), torch.tensor([0.07, 0.2, 1.0])[:, None])  # (3, 201)

    Args:
        similarity: of the negatives, shape (..., K); -inf for an entry that is none.
        temperature: above 0, or a tensor that broadcasts against the similarities.

    Returns:
        Shape (..., K), 0 ... 1, summing to 1; nan in a row without any negative.
    """
    return (similarity / temperature).softmax(dim=-1)


@torch.no_grad()
def effective_negatives(weights: Tensor) -> Tensor:
    """How many negatives a query's gradient effectively comes from: exp of the entropy of their shares.

    The perplexity of r_ij (Hill's number of order 1), chosen over the inverse Simpson index so that it reads like the
    effective rank: k equal shares give k.

    Args:
        weights: `relative_penalty`, shape (..., K).

    Returns:
        Shape (...), 1 (one negative takes all) ... K.
    """
    entropy: Tensor = torch.special.entr(weights).sum(dim=-1)
    return entropy.exp()


@torch.no_grad()
def top_share(weights: Tensor, top: int) -> Tensor:
    """The share of a query's push that its `top` hardest negatives take.

    Args:
        weights: `relative_penalty`, shape (..., K).
        top: 1 ... K.

    Returns:
        Shape (...), top / K (all alike) ... 1.

    Raises:
        ValueError: if `top` is out of range.
    """
    if not 1 <= top <= weights.shape[-1]:
        raise ValueError(f"top={top} must be 1 ... {weights.shape[-1]}, the number of negatives")
    return weights.topk(top, dim=-1, sorted=False).values.sum(dim=-1)


class Hardness(NamedTuple):
    """Means over the queries, each of shape (), on the logits' device."""

    effective_negatives: Tensor  # see `effective_negatives`, 1 ... K
    top_share: Tensor  # see `top_share`, 0 ... 1
    push: Tensor  # sum over negatives of P_ij = 1 - P_ii, 0 (solved) ... 1: how much gradient is left


@torch.no_grad()
def hardness(logits: Tensor, top: int = 10) -> Hardness:
    """The three measures for a log, in one pass over the logits, a few queries at a time.

    Args:
        logits: shape (N, 1 + K), the positive in column 0; each row needs one negative or more.
        top: negatives of `top_share`; of fewer all count.

    Raises:
        ValueError: for logits without a query or a negative, or unless top is 1 or more.
    """
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be (N, 1 + K) with a query and a negative or more")
    rows = max(1, ENTRIES_AT_ONCE // logits.shape[1])
    parts = []
    for part in logits.split(rows):
        negatives = part[:, 1:]
        weights = relative_penalty(negatives, 1.0)  # (rows, K); logits are divided by T already
        push = (negatives.logsumexp(dim=1) - part[:, 0]).sigmoid()  # sum exp(neg) / (exp(pos) + sum exp(neg))
        share = top_share(weights, min(top, weights.shape[1]))
        parts.append(torch.stack([effective_negatives(weights), share, push]))
    return Hardness(*torch.cat(parts, dim=1).mean(dim=1))
