"""Torch's operations that exist for CUDA only, in their plain form on a CPU: what the kernels compute.

Legend: C channels, W processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _shaped(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ...), in the type in which BN of x computes."""
    return values.to(_type(x)).view([1, -1] + [1] * (x.dim() - 2))


def _type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the means and 1 / standard deviations, (C,) each."""
    var, mean = torch.var_mean(x.to(_type(x)), _dims(x), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    inverses: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Combine (W, C) of W processes with counts (W,) images x pixels; update the running statistics."""
    shares = (counts / counts.sum())[:, None]
    mean = (means * shares).sum(dim=0)
    var = ((inverses**-2 - eps + (means - mean) ** 2) * shares).sum(dim=0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> Tensor:
    """Normalize, scale and shift."""
    out = (x - _shaped(mean, x)) * _shaped(inverse, x)
    if weight is not None and bias is not None:
        out = out * _shaped(weight, x) + _shaped(bias, x)
    return out.to(x.dtype)


def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, *needed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (C,) each: sums of the gradient and of the gradient x (x - mean); the gradients w.r.t. weight and bias."""
    total = grad.to(_type(x)).sum(_dims(x))
    by_centered = (grad.to(_type(x)) * (x - _shaped(mean, x))).sum(_dims(x))
    return total, by_centered, by_centered * inverse, total.clone()


def batch_norm_backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    total: Tensor,
    by_centered: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return the gradient with respect to x, from the sums over all processes."""
    n = counts.sum()
    slope = _shaped(by_centered / n * inverse**2, x)
    out = (grad.to(_type(x)) - _shaped(total / n, x) - (x - _shaped(mean, x)) * slope) * _shaped(inverse, x)
    return (out if weight is None else out * _shaped(weight, x)).to(x.dtype)


BATCH_NORM: Sequence[str] = (
    "batch_norm_stats",
    "batch_norm_gather_stats_with_counts",
    "batch_norm_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_backward_elemt",
)
