"""BN of all groups of a batch in one call, for GPUs: a call per group would launch G times as many kernels.

Each channel of each group becomes a channel of its own. BN of these G C channels over g images is BN in groups.

Legend: N batch, C channels, G groups, g images per group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moco.models.sync_norm import memory_format


class _GroupedBatchNorm(torch.autograd.Function):
    """BN in groups, with its gradient.

    The results are copies, not views: for an in-place operation on a view, autograd copies the gradient three times.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, eps: float
    ) -> Tensor:
        """Normalize (N, C, ...) over each of G groups of consecutive images.

        Writes the groups' means and unbiased variances to `statistics`, (2, G, C), which must be 0.
        """
        ctx.groups, ctx.eps = statistics.shape[1], eps
        values = _to_channels(x, ctx.groups)
        scale, shift = (None if each is None else each.repeat(ctx.groups) for each in (weight, bias))  # (G C,)
        means, variances = statistics.flatten(1)  # (G C,) each; momentum 1 writes the statistics of this call
        out, mean, inverse = torch.native_batch_norm(values, scale, shift, means, variances, True, 1.0, eps)
        ctx.save_for_backward(values, scale, mean, inverse)
        return _to_images(out, ctx.groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, mean, inverse = ctx.saved_tensors
        grad, needed = _to_channels(grads[0], ctx.groups), ctx.needs_input_grad[:3]
        statistics = None, None, mean, inverse, True, ctx.eps
        by_x, *by_affine = torch.ops.aten.native_batch_norm_backward(grad, values, scale, *statistics, needed)
        by_weight, by_bias = (
            each.unflatten(0, (ctx.groups, -1)).sum(dim=0) if wanted else None
            for each, wanted in zip(by_affine, needed[1:], strict=True)
        )
        return _to_images(by_x, ctx.groups) if needed[0] else None, by_weight, by_bias, None, None


def _to_channels(x: Tensor, groups: int) -> Tensor:
    """Copy (N, C, ...) to (g, G C, ...), in the same memory format."""
    shape = len(x) // groups, groups * x.shape[1], *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    out.unflatten(1, (groups, -1)).copy_(x.unflatten(0, (groups, -1)).transpose(0, 1))  # (g, G, C, ...)
    return out


def _to_images(x: Tensor, groups: int) -> Tensor:
    """Copy (g, G C, ...) to (N, C, ...), in the same memory format."""
    shape = len(x) * groups, x.shape[1] // groups, *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    out.unflatten(0, (groups, -1)).copy_(x.unflatten(1, (groups, -1)).transpose(0, 1))  # (G, g, C, ...)
    return out


grouped_batch_norm: Callable[..., Tensor] = _GroupedBatchNorm.apply
