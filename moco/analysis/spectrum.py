"""The number of dimensions that embeddings use: effective rank, decay of the spectrum, standard deviation.

    RankMe (Garrido et al., ICML 2023)
    alpha-ReQ (Agrawal et al., NeurIPS 2022)
    Exploring Simple Siamese Representation Learning (Chen & He, CVPR 2021)

Spectra are computed from the smaller Gram matrix in float64. This is cheap for any number of samples and accurate to
about 1e-8 of the largest singular value, below RankMe's own epsilon. Features that are not finite have nan measures.

Legend: M samples, C dimension, R = min(M, C).
"""

import math

import torch
from torch import Tensor

from moco.builder import unit_length

EPSILON = 1e-7  # RankMe's epsilon for float32
FIRST_RANK, LAST_RANK = 4, 100  # the eigenvalues that alpha-ReQ's published code fits, counted from 1
NOISE = 1e-12  # as a share of the largest eigenvalue; smaller eigenvalues are rounding errors


@torch.no_grad()
def rank_me(features: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Compute the effective rank of features (M, C): exp of the entropy of the normalized singular values.

    Garrido et al. (2023), Eq. 1: exp(-sum over k of p_k log p_k), p_k = sigma_k / |sigma|_1 + epsilon, epsilon above 0.
    The paper uses 25,600 samples of raw embeddings, neither centered nor normalized, and compares runs of one method
    only. The result has shape (). It is 1 if all features are zero or lie on one line through the origin (epsilon adds
    about 2e-6 R), and R if the features vary equally in all directions.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features {tuple(features.shape)} must be (M, C) with M at least 1")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be above 0 and finite: a zero singular value leads to log(epsilon)")
    sigma = _gram_spectrum(features.double()).sqrt()  # (R,)
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + epsilon
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy.exp().float()


@torch.no_grad()
def covariance_spectrum(features: Tensor) -> Tensor:
    """Compute the eigenvalues of the covariance (with divisor M) in descending order: float64, shape (R,)."""
    _require_two(features)
    centered = features.double() - features.double().mean(dim=0)
    return _gram_spectrum(centered) / len(features)


def alpha_req(features: Tensor, first: int = FIRST_RANK, last: int = LAST_RANK) -> Tensor:
    """Compute the exponent alpha of the power law of the covariance spectrum, lambda_i ~ i^-alpha.

    Agrawal et al. (2022): good backbone features (M, C) have alpha near 1. A smaller alpha is a flat, noisy spectrum; a
    larger one means that few directions are used. For the other arguments see `power_law_exponent`.
    """
    return power_law_exponent(covariance_spectrum(features), first, last)


@torch.no_grad()
def power_law_exponent(spectrum: Tensor, first: int = FIRST_RANK, last: int = LAST_RANK) -> Tensor:
    """Fit a line to (log i, log lambda_i) with weights 1 / i and return its negative slope, shape (); 0 if it is flat.

    The range and the weights are those of alpha-ReQ's published code; the paper fits "the full set". With the weights
    each octave of ranks counts equally.

    Args:
        spectrum: eigenvalues, descending, shape (R,).
        first: the first rank of the fit, counted from 1.
        last: the last rank; a shorter spectrum is used up to its last eigenvalue above rounding errors.

    Raises:
        ValueError: unless 1 <= first < last, or if fewer than two eigenvalues are in the range.
    """
    if not 1 <= first < last:
        raise ValueError(f"first={first} and last={last} must be ranks of at least 1 in ascending order")
    if bool(spectrum.isnan().any()):
        return spectrum.new_tensor(math.nan, dtype=torch.float32)
    usable = int((spectrum > spectrum[:1] * NOISE).sum())
    last = min(last, usable)
    if last <= first:
        raise ValueError(
            f"the spectrum has {usable} eigenvalues above rounding errors, but first={first} needs {first + 1}: the "
            "features may have collapsed; if not, use more samples or first=1"
        )
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=spectrum.device)
    x, y, weight = rank.log(), spectrum[first - 1 : last].double().log(), 1 / rank
    weight = weight / weight.sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return (-(weight * x * y).sum() / (weight * x * x).sum()).float()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Compute the standard deviation (with divisor M) of each dimension of the normalized features (M, C): (C,).

    Chen & He (2021), Sec. 4.1, Fig. 2: 0 is a collapse; a uniform distribution on the sphere has 1 / sqrt(C). The root
    mean square of the result over the dimensions never exceeds 1 / sqrt(C).
    """
    _require_two(features)
    return unit_length(features).std(dim=0, correction=0)


def spread(features: Tensor) -> Tensor:
    """Compute the mean of `feature_std` in units of 1 / sqrt(C): 0 (collapse) ... 1 (uniform) for any C. Shape ()."""
    return feature_std(features).mean() * math.sqrt(features.shape[1])


def _require_two(features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {tuple(features.shape)} must be (M, C) with M at least 2")


def _gram_spectrum(x: Tensor) -> Tensor:
    """Compute the squared singular values of x (M, C), descending, shape (R,); all nan if x is not finite."""
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T  # (R, R)
    if not bool(gram.isfinite().all()):  # `eigvalsh` would raise
        return torch.full_like(gram[0], math.nan)
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(0).clamp(min=0)
