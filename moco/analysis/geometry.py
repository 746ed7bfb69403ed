"""Where embeddings lie on the unit sphere: alignment, uniformity, tolerance.

    Understanding Contrastive Representation Learning through Alignment and Uniformity (Wang & Isola, ICML 2020)
    Understanding the Behavior of Contrastive Loss (Wang & Liu, CVPR 2021)

Features may have any length; they are normalized here. A zero vector stays zero.

Legend: N pairs, M samples, C dimension, L classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS_AT_ONCE = 2**22  # distances in memory at once: 16 MiB of float32
MOST_SHARPNESS = 20.0  # exp(-4 t) of antipodal points is still a normal float32


@torch.no_grad()
def alignment(query: Tensor, key: Tensor, alpha: float = 2.0) -> Tensor:
    """How near the two views of a sample are: the mean of |q - k|^alpha over positive pairs.

    Wang & Isola (2020), Sec. 4.1, L_align. With alpha = 2 it is 2 - 2 times the mean positive similarity.

    Args:
        query: shape (N, C).
        key: shape (N, C), row n the positive of query n.
        alpha: above 0.

    Returns:
        Shape (), 0 (the views agree) ... 2**alpha (antipodal).

    Raises:
        ValueError: without a pair, or for shapes or an alpha that do not fit.
    """
    if query.shape != key.shape or query.ndim != 2 or len(query) == 0:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must both be (N, C) with N of 1 or more"
        )
    if alpha <= 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    distance: Tensor = torch.linalg.vector_norm(_unit(query) - _unit(key), dim=1)  # (N,)
    return distance.pow(alpha).mean()


@torch.no_grad()
def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """How evenly features cover the sphere: the log of the mean Gaussian potential exp(-t |x - y|^2) of distinct pairs.

    Wang & Isola (2020), Sec. 4.1, L_uniform. Lower is more uniform. Of the M (M - 1) / 2 pairs, each counted once,
    no more than `PAIRS_AT_ONCE` are in memory (or one row of M).

    Args:
        features: shape (M, C).
        t: sharpness, above 0 and at most 20.

    Returns:
        Shape (), -4 t (two antipodal points) ... 0 (collapse). For t = 2 and points uniform on a sphere of large C
        about -4 + 8 / C.

    Raises:
        ValueError: if there is no pair or t is out of range.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {tuple(features.shape)} must be (M, C) with M of 2 or more: one vector has no pair")
    if not 0 < t <= MOST_SHARPNESS:
        raise ValueError(f"t={t} must be above 0 and at most {MOST_SHARPNESS}")
    x, samples = _unit(features), len(features)
    half = x.square().sum(dim=1) / 2  # (M,), 1/2, or 0 for a zero vector
    rows = max(1, PAIRS_AT_ONCE // samples)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, samples, rows):
        rest = x[start:]  # pairs with an earlier row are counted already
        # -|x - y|^2 / 2 = x y - |x|^2 / 2 - |y|^2 / 2, above 0 only by rounding; (rows, M - start)
        exponent = torch.addmm(-half[start:], rest[:rows], rest.T) - half[start : start + rows, None]
        potential = exponent.clamp_(max=0).mul_(2 * t).exp_()
        total += potential.triu_(diagonal=1).sum(dtype=torch.float64)  # above the diagonal: j > i
    return (total / (samples * (samples - 1) / 2)).log().to(x.dtype)


@torch.no_grad()
def tolerance(features: Tensor, labels: Tensor) -> Tensor:
    """How near samples of one class are: the mean similarity of same-class pairs.

    Wang & Liu (2021), Sec. 4 (the uniformity-tolerance dilemma). Pairs are of two distinct samples. Summed over the
    classes' means, |sum of x|^2 - sum of |x|^2 = sum over pairs of x . y, so that no M x M matrix is made.

    Args:
        features: shape (M, C).
        labels: the samples' classes, integers of shape (M,).

    Returns:
        Shape (), -1 ... 1; 1 if each class is one point.

    Raises:
        ValueError: if no class has two samples, or shapes do not fit.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)} and labels {tuple(labels.shape)} must be (M, C) and (M,)")
    x = _unit(features).double()
    classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    pairs = int((counts * (counts - 1)).sum())
    if pairs == 0:
        raise ValueError(f"none of the {len(classes)} classes has two samples, so there is no same-class pair")
    sums = x.new_zeros(len(classes), x.shape[1]).index_add_(0, inverse, x)  # (L, C)
    return ((sums.square().sum() - x.square().sum()) / pairs).to(_precise(features).dtype)


class UniformityTolerance(NamedTuple):
    """The two sides of Wang & Liu's dilemma, each of shape ()."""

    uniformity: Tensor
    tolerance: Tensor


def uniformity_tolerance(features: Tensor, labels: Tensor, t: float = 2.0) -> UniformityTolerance:
    """Both at once: a point of Wang & Liu's (2021) figures, which the temperature moves along. Lower T, more uniform.

    Args:
        features: shape (M, C).
        labels: shape (M,).
        t: see `uniformity`. (The paper shows -uniformity, so that both grow; the sign is left as Wang & Isola's.)

    Raises:
        ValueError: see `uniformity` and `tolerance`.
    """
    return UniformityTolerance(uniformity(features, t), tolerance(features, labels))


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_precise(x), dim=1)
