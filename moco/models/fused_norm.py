"""BN over groups of a batch on a GPU, by the kernels of `moco.kernels.batch_norm`.

The forward and the backward each launch two kernels, for any number of groups. No group is copied.

Legend: N batch, C channels, G groups.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moco.kernels import fused
from moco.models.sync_norm import memory_format


def has_kernel(x: Tensor, weight: Tensor | None, groups: int) -> bool:
    """Return whether these kernels can normalize a batch: several groups, on a GPU, not in float64.

    A batch of feature maps (N, C, H, W) must also be in torch's channels_last format.

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


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    groups: int,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the normalized batch, and the means and 1 / standard deviations of the groups, (2, G, C)."""
    from moco.kernels.batch_norm import batch_norm

    x = x.contiguous(memory_format=memory_format(x))
    return batch_norm(x, weight, bias, (running_mean, running_var), groups, momentum, eps)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to `x`, and to weight and bias, (2, C)."""
    from moco.kernels.batch_norm import batch_norm_backward

    x, grad = (each.contiguous(memory_format=memory_format(x)) for each in (x, grad))
    return batch_norm_backward(grad, x, weight, saved)


# Compiled code calls the kernels as operations. torch.compile can also compile the kernels itself, but it analyzes each
# call several times, which doubles the time that it needs for a ResNet-18 (docs/gpu.md).
_batch_norm = torch.library.custom_op("moco::batch_norm", _normalize, mutates_args=("running_mean", "running_var"))
_batch_norm_backward = torch.library.custom_op("moco::batch_norm_backward", _gradients, mutates_args=())


@_batch_norm.register_fake
def _(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    saved = x.new_empty(2, groups, x.shape[1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=memory_format(x)), saved


@_batch_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor) -> tuple[Tensor, Tensor]:
    by_affine = saved.new_empty(2, 0 if weight is None else x.shape[1])
    return torch.empty_like(x, memory_format=memory_format(x)), by_affine


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
        compute = _batch_norm if torch.compiler.is_compiling() else _normalize
        out, saved = compute(x, weight, bias, *running, groups, momentum, eps)
        ctx.save_for_backward(x, weight, saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        differentiate = _batch_norm_backward if torch.compiler.is_compiling() else _gradients
        by_x, by_affine = differentiate(grads[0], x, weight, saved)
        by_weight, by_bias = (each if ctx.needs_input_grad[1] else None for each in by_affine)
        return by_x, by_weight, by_bias, None, None, None, None


fused_batch_norm: Callable[..., Tensor] = _FusedBatchNorm.apply
