"""BN in groups on a GPU by the kernels of `moco.kernels.batch_norm`: two launches per pass, and no copies of groups.

Legend: N batch, C channels, G groups.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moco.kernels import fused
from moco.models.sync_norm import memory_format


def has_kernel(x: Tensor, weight: Tensor | None, groups: int) -> bool:
    """Return whether these kernels can normalize a batch: several groups, on a GPU, not in float64, channels last.

    For one group, torch's own operation takes the host less time (docs/gpu.md). A group with one number per channel is
    left to torch, which refuses it.
    """
    if (
        groups == 1
        or not fused(x.device)
        or x.dtype == torch.float64
        or (weight is not None and weight.dtype == torch.float64)
    ):
        return False
    last = x.dim() == 2 or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return last and x.numel() > groups * x.shape[1]


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor],
        groups: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalize (N, C) or (N, C, H, W) over each of G groups of consecutive images.

        Updates the running statistics as `F.batch_norm` does, with the mean over the groups.
        """
        from moco.kernels.batch_norm import batch_norm

        x = x.contiguous(memory_format=memory_format(x))
        out, saved = batch_norm(x, weight, bias, running, groups, momentum, eps)
        ctx.save_for_backward(x, weight, saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from moco.kernels.batch_norm import batch_norm_backward

        x, weight, saved = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=memory_format(x))
        by_x, by_affine = batch_norm_backward(grad, x, weight, saved)
        by_weight, by_bias = (each if ctx.needs_input_grad[1] else None for each in by_affine)
        return by_x, by_weight, by_bias, None, None, None, None


fused_batch_norm: Callable[..., Tensor] = _FusedBatchNorm.apply
