"""The distribution of embeddings on the unit sphere: alignment, uniformity, tolerance.

    Understanding Contrastive Representation Learning through Alignment and Uniformity (Wang & Isola, ICML 2020)
    Understanding the Behaviour of Contrastive Loss (Wang & Liu, CVPR 2021)

The functions normalize their features; a zero vector stays zero. They raise ValueError for an invalid argument.

Legend: N pairs, M samples, C dimension, L classes.
"""

import math

import torch
from torch import Tensor

from moco.builder import unit_length

PAIRS_AT_ONCE = 2**22  # distances in memory: 16 MiB of float32
MOST_SHARPNESS = 20.0  # up to this t, exp(-4 t), the potential of antipodal points, is a normal float32


@torch.no_grad()
def alignment(query: Tensor, key: Tensor, alpha: float = 2.0) -> Tensor:
    """Compute the mean of |q - k|^alpha over positive pairs: the rows of query and key, both (N, C).

    Wang & Isola (2020), Sec. 4.1, L_align. With alpha = 2 the result is 2 - 2 s, where s is the mean similarity of the
    positive pairs. The result of shape () is 0 (equal views) ... 2**alpha (antipodal); alpha must be above 0.
    """
    if query.shape != key.shape or query.ndim != 2 or len(query) == 0:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must both be (N, C) with N at least 1")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be above 0 and finite")
    distance: Tensor = torch.linalg.vector_norm(unit_length(query) - unit_length(key), dim=1)  # (N,)
    return distance.pow(alpha).mean()


@torch.no_grad()
def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """Compute the log of the mean Gaussian potential exp(-t |x - y|^2) over distinct pairs; lower is more uniform.

    Wang & Isola (2020), Sec. 4.1, L_uniform, for features (M, C) and a sharpness t above 0 and at most 20. Each of the
    M (M - 1) / 2 pairs counts once. Memory holds at most `PAIRS_AT_ONCE` of them, or one row of M. The result of shape
    () is -4 t (two antipodal points) ... 0 (collapse): about -4 + 8 / C for t = 2 and uniform points on a sphere of
    large C.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {tuple(features.shape)} must be (M, C) with M at least 2, to form a pair")
    if not 0 < t <= MOST_SHARPNESS:
        raise ValueError(f"t={t} must be above 0 and at most {MOST_SHARPNESS}")
    x, samples = unit_length(features), len(features)
    half = x.square().sum(dim=1) / 2  # (M,), 1/2, or 0 for a zero vector
    rows = max(1, PAIRS_AT_ONCE // samples)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, samples, rows):
        rest = x[start:]  # pairs with an earlier row are already counted
        # -|x - y|^2 / 2 = x y - |x|^2 / 2 - |y|^2 / 2, above 0 only by rounding; (rows, M - start)
        exponent = torch.addmm(-half[start:], rest[:rows], rest.T) - half[start : start + rows, None]
        potential = exponent.clamp_(max=0).mul_(2 * t).exp_()
        total += potential.triu_(diagonal=1).sum(dtype=torch.float64)  # above the diagonal: j > i
    return (total / (samples * (samples - 1) / 2)).log().to(x.dtype)


@torch.no_grad()
def tolerance(features: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean similarity of pairs of distinct samples of the same class.

    Wang & Liu (2021), Sec. 4 (the uniformity-tolerance dilemma). Features are (M, C), labels integers (M,). The result
    has shape () and is -1 ... 1; it is 1 if each class is one point.

    Raises:
        ValueError: if no class has two samples, or for an invalid argument.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} must be (M, C) and (M,)")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are {str(labels.dtype).removeprefix('torch.')}; they must be integers")
    x = unit_length(features)
    classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    pairs = int((counts * (counts - 1)).sum())
    if pairs == 0:
        raise ValueError(f"none of the {len(classes)} classes has two samples, so there is no same-class pair")
    exact = x.double()
    sums = exact.new_zeros(len(classes), x.shape[1]).index_add_(0, inverse, exact)  # (L, C)
    # |sum of x|^2 - sum of |x|^2 of a class is the sum of x . y over its pairs, without an M x M matrix
    return ((sums.square().sum() - exact.square().sum()) / pairs).to(x.dtype)
