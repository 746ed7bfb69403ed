"""Histograms of similarities, counted where they are.

Legend: B bins.
"""

import torch
from torch import Tensor

ENTRIES_AT_ONCE = 2**21  # similarities at once: their bin numbers are 16 MiB


@torch.no_grad()
def similarity_histogram(similarity: Tensor, bins: int = 100, weights: Tensor | None = None) -> Tensor:
    """How often each similarity occurs, in equal bins over -1 ... 1. On the device, and the host waits for nothing.

        positives = similarity_histogram(logits[:, 0] * temperature)
        negatives = similarity_histogram(logits[:, 1:] * temperature)
        push = similarity_histogram(similarity, weights=relative_penalty(similarity, temperature))

    Args:
        similarity: any shape; what rounding put beyond -1 or 1 counts in the outer bin, -inf (no negative) nowhere.
        bins: B, 1 or more.
        weights: what each entry counts, of the similarity's shape; None: 1. That of an absent entry is not looked at.

    Returns:
        Counts, int64, shape (B,), or with weights their sums, float64. Bin b is [-1 + 2 b / B, -1 + 2 (b + 1) / B); the
        last one includes 1.

    Raises:
        ValueError: unless there is a bin, or for weights of another shape.
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be 1 or more")
    if weights is not None and weights.shape != similarity.shape:
        raise ValueError(f"weights {tuple(weights.shape)} must have the similarity's shape {tuple(similarity.shape)}")
    dtype = torch.int64 if weights is None else torch.float64
    counts = torch.zeros(bins + 1, dtype=dtype, device=similarity.device)  # the last: absent
    parts = similarity.flatten().split(ENTRIES_AT_ONCE)
    weighted = [None] * len(parts) if weights is None else weights.flatten().split(ENTRIES_AT_ONCE)
    for part, weight in zip(parts, weighted, strict=True):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        at = ((part + 1) * (bins / 2)).floor().clamp(0, bins - 1)
        at = torch.where(part.isfinite(), at, float(bins)).long()
        counts.scatter_add_(0, at, torch.ones_like(at) if weight is None else weight.to(dtype))
    return counts[:bins]


def bin_edges(bins: int = 100) -> Tensor:
    """The B + 1 edges of `similarity_histogram`, float64."""
    return torch.linspace(-1, 1, bins + 1, dtype=torch.float64)
