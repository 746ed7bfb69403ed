"""How many dimensions embeddings fill: effective rank, decay of the spectrum, standard deviation.

    RankMe (Garrido et al., ICML 2023)
    alpha-ReQ (Agrawal et al., NeurIPS 2022)
    Exploring Simple Siamese Representation Learning (Chen & He, CVPR 2021)

Spectra are of the smaller Gram matrix in float64: cheap for any number of samples, and exact to about 1e-8 of
the largest singular value, which is below RankMe's own epsilon.

Legend: M samples, C dimension, R = min(M, C).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7  # RankMe's for float32
FIRST_RANK, LAST_RANK = 4, 100  # of the eigenvalues that alpha-ReQ's published code fits, counted from 1
NOISE = 1e-12  # of the largest eigenvalue; what is smaller is rounding


@torch.no_grad()
def rank_me(features: Tensor, epsilon: float = EPSILON) -> Tensor:
    """The effective rank: exp of the entropy of the singular values' shares.

    Garrido et al. (2023), Eq. 1: exp(-sum over k of p_k log p_k), p_k = sigma_k / |sigma|_1 + epsilon. The paper takes
    25,600 samples, raw embeddings and no centring, and compares runs of one method only. Normalize or center before,
    if wanted.

    Args:
        features: shape (M, C).
        epsilon: above 0.

    Returns:
        Shape (), 1 (all on one line, or all zero; epsilon adds about 2e-6 R) ... R (all directions alike).

    Raises:
        ValueError: without a sample, or unless epsilon is above 0.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features {tuple(features.shape)} must be (M, C) with one sample or more")
    if epsilon <= 0:
        raise ValueError(f"epsilon={epsilon} must be above 0: the logarithm of an empty direction's share has none")
    sigma = _gram_spectrum(features.double()).sqrt()  # (R,)
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + epsilon
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy.exp().float()


@torch.no_grad()
def covariance_spectrum(features: Tensor) -> Tensor:
    """Eigenvalues of the centered features' covariance (divided by M), falling, float64, shape (R,).

    Raises:
        ValueError: with fewer than two samples.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {tuple(features.shape)} must be (M, C) with two samples or more")
    centered = features.double() - features.double().mean(dim=0)
    return _gram_spectrum(centered) / len(features)


def alpha_req(features: Tensor, first: int = FIRST_RANK, last: int = LAST_RANK) -> Tensor:
    """The exponent alpha of the covariance spectrum's power law, lambda_i ~ i^-alpha.

    Agrawal et al. (2022): good features have alpha near 1; smaller is a flat, noisy spectrum, larger one that few
    directions fill. The paper fits "the full set"; its published code fits ranks 4 to 100, each weighted with 1 / rank
    (so that each octave of ranks weighs alike), which is the default here. Of a shorter spectrum all that lies above
    rounding is taken. The fit is a line through (log i, log lambda_i) by weighted least squares.

    Args:
        features: shape (M, C); the paper's are the backbone's.
        first: the first rank of the fit, counted from 1.
        last: the last one.

    Returns:
        Shape (), any number; 0 for a flat spectrum.

    Raises:
        ValueError: if fewer than two eigenvalues are in the range.
    """
    return power_law_exponent(covariance_spectrum(features), first, last)


@torch.no_grad()
def power_law_exponent(spectrum: Tensor, first: int = FIRST_RANK, last: int = LAST_RANK) -> Tensor:
    """The fit of `alpha_req` on eigenvalues that are known, falling, shape (R,)."""
    if not 1 <= first < last:
        raise ValueError(f"first={first} and last={last} must be ranks from 1 on, in this order")
    usable = int((spectrum > spectrum[:1] * NOISE).sum())
    last = min(last, usable)
    if last <= first:
        raise ValueError(
            f"{usable} eigenvalues above rounding, but the fit begins at rank {first} and needs two or more: take "
            "first=1, more samples, or see the features as collapsed"
        )
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=spectrum.device)
    x, y, weight = rank.log(), spectrum[first - 1 : last].double().log(), 1 / rank
    weight = weight / weight.sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return (-(weight * x * y).sum() / (weight * x * x).sum()).float()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Each dimension's standard deviation over the samples, of normalized features.

    Chen & He (2021), Sec. 4.1, Fig. 2: 0 means collapse, and 1 / sqrt(C) on average a uniform spread over the sphere.

    Args:
        features: shape (M, C); normalized here. The deviation is the population's (divided by M).

    Returns:
        Shape (C,); the root of its mean square is at most 1 / sqrt(C).

    Raises:
        ValueError: with fewer than two samples.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {tuple(features.shape)} must be (M, C) with two samples or more")
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    return unit.std(dim=0, correction=0)


def spread(features: Tensor) -> Tensor:
    """The mean of `feature_std` in units of 1 / sqrt(C): 0 (collapse) ... 1 (uniform), whatever C. Shape ()."""
    return feature_std(features).mean() * math.sqrt(features.shape[1])


def _gram_spectrum(x: Tensor) -> Tensor:
    """Squared singular values of x (M, C), falling, shape (R,)."""
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T  # (R, R)
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(0).clamp(min=0)
