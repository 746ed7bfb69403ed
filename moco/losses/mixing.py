"""Hard negatives by mixing: MoCHi.

Legend: N queries, C dimension, K queue length, s negatives mixed from two negatives, s' negatives mixed from a negative
and the query.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses.similarity import ABSENT, check_floating, check_mask, similarity


@torch.no_grad()
def mix_hard_negatives(
    query: Tensor,
    queue: Tensor,
    hardest: int,
    pair_uniforms: Tensor,
    query_uniforms: Tensor,
    negatives: Tensor | None = None,
) -> Tensor:
    """Return the synthetic negatives of MoCHi (Kalantidis et al., 2020), Section 4: candidates besides the queue.

    They are mixed from the `hardest` negatives n of a query q, the negatives most similar to q. If `negatives` allows
    fewer than `hardest` for a query, they are mixed from all that it allows.

        s negatives:    h  = normalize(a n_i + (1 - a) n_j),   a from U(0, 1)
        s' negatives:   h' = normalize(b q   + (1 - b) n_j),   b from U(0, 0.5)

    h' is closer to the query than n_j. h lies between n_i and n_j and can be closer to the query than both; i = j is
    not excluded and yields n_i. The random numbers u are arguments: a = u, i and j = floor(hardest u), b = u / 2.

    Args:
        query, queue: L2-normalized, shapes (N, C) and (K, C).
        hardest: number of hardest negatives to choose from, 1 ... K.
        pair_uniforms: in [0, 1), shape (N, s, 3), for i, j and a.
        query_uniforms: in [0, 1), shape (N, s', 2), for j and b.
        negatives: as in `info_nce`; an entry that it excludes is not mixed.

    Returns:
        Unit vectors without gradient, shape (N, s + s', C), the s mixed pairs first. For a query without any negative
        all its vectors are zero, and `contrast` ignores these zero vectors.

    Raises:
        ValueError: for arguments of another shape, or `hardest` outside 1 ... K.
    """
    if not 1 <= hardest <= len(queue):
        raise ValueError(f"hardest={hardest} must be 1 ... {len(queue)}, the length of the queue")
    for name, uniforms, numbers in [("pair_uniforms", pair_uniforms, 3), ("query_uniforms", query_uniforms, 2)]:
        if uniforms.ndim != 3 or len(uniforms) != len(query) or uniforms.shape[2] != numbers:
            raise ValueError(f"{name} {tuple(uniforms.shape)} must have shape ({len(query)}, any number, {numbers})")
    check_mask("negatives", negatives, (len(query), len(queue)))
    check_floating(query=query, queue=queue)
    cosine = similarity(query, queue)  # (N, K)
    query, queue = query.to(cosine.dtype), queue.to(cosine.dtype)
    if negatives is not None:
        cosine = cosine.masked_fill(~negatives, ABSENT)
    top = cosine.topk(hardest, dim=1)
    available = (top.values > ABSENT).sum(dim=1, keepdim=True)  # (N, 1)

    def choose(uniform: Tensor) -> Tensor:
        """Return one of a query's hardest negatives for each number: (N, s) -> (N, s, C)."""
        last = (available - 1).clamp(min=0)
        position = torch.minimum((uniform * available).long(), last)  # u * available may be rounded up
        return queue[top.indices.gather(1, position)]

    i, j, a = pair_uniforms.to(cosine.dtype).unbind(dim=2)
    pairs = a[..., None] * choose(i) + (1 - a[..., None]) * choose(j)  # (N, s, C)
    j, uniform = query_uniforms.to(cosine.dtype).unbind(dim=2)
    b = uniform[..., None] / 2  # U(0, 0.5)
    with_query = b * query[:, None] + (1 - b) * choose(j)  # (N, s', C)
    mixed = F.normalize(torch.cat([pairs, with_query], dim=1), dim=2)  # (N, s+s', C)
    return mixed * (available[..., None] > 0)
