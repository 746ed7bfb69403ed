"""Histograms of similarities, computed on their device.

Legend: B bins.
"""

import torch
from torch import Tensor

from moco.losses.similarity import full_precision

ENTRIES_AT_ONCE = 2**21  # similarities at once: their bin numbers take 16 MiB


@torch.no_grad()
def similarity_histogram(similarity: Tensor, bins: int = 100, weights: Tensor | None = None) -> Tensor:
    """Count similarities in equal bins over -1 ... 1. The host does not wait for the device.

        positives = similarity_histogram(logits[:, 0] * temperature)
        negatives = similarity_histogram(logits[:, 1:] * temperature)
        push = similarity_histogram(similarity, weights=relative_penalty(similarity, temperature))

    Args:
        similarity: any shape. Values outside -1 ... 1, from rounding, count in the outer bins; -inf and nan do not.
        bins: B, at least 1.
        weights: of each entry, in the shape of the similarity; None: 1. Not used where the similarity is -inf or nan.

    Returns:
        Counts, int64, shape (B,), or sums of weights, float64. Bin b is [-1 + 2 b / B, -1 + 2 (b + 1) / B); the last
        one includes 1.
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    if weights is not None and weights.shape != similarity.shape:
        raise ValueError(f"weights {tuple(weights.shape)} must have the similarity's shape {tuple(similarity.shape)}")
    dtype = torch.int64 if weights is None else torch.float64
    counts = torch.zeros(bins + 1, dtype=dtype, device=similarity.device)  # the additional one counts -inf and nan
    parts = similarity.flatten().split(ENTRIES_AT_ONCE)
    weighted = [None] * len(parts) if weights is None else weights.flatten().split(ENTRIES_AT_ONCE)
    for part, weight in zip(parts, weighted, strict=True):
        part = full_precision(part)
        at = ((part + 1) * (bins / 2)).floor().clamp(0, bins - 1)
        at = torch.where(part.isfinite(), at, float(bins)).long()
        counts.scatter_add_(0, at, torch.ones_like(at) if weight is None else weight.to(dtype))
    return counts[:bins]


def bin_edges(bins: int = 100) -> Tensor:
    """Return the B + 1 edges of `similarity_histogram`, float64."""
    return torch.linspace(-1, 1, bins + 1, dtype=torch.float64)
