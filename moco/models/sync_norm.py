"""BN over the global batch on GPUs, with torch's kernels for it: one collective gathers the statistics of all ranks.

`nn.SyncBatchNorm` calls the same kernels, but makes the host wait in every layer, to find ranks without images. Here
every rank has the same number of images.

Legend: N local batch, C channels, W processes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moco.distributed import gather, sum_over_ranks, world_size


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalize (N, C, ...) on a GPU over all ranks; update the running statistics as `F.batch_norm` does.

        The forward and the backward pass are collectives. For the backward pass, the input is kept in its own dtype.
        """
        x = x.contiguous(memory_format=memory_format(x))
        local = torch.stack(torch.batch_norm_stats(x, eps))  # (2, C), means and 1 / standard deviations
        means, inverses = gather(local[None]).unbind(1)  # (W, C) each
        counts, ctx.int_counts = _counts(world_size(), x.numel() // x.shape[1], local.dtype, x.device)
        statistics = means, inverses, running_mean, running_var, momentum, eps, counts
        mean, inverse = torch.batch_norm_gather_stats_with_counts(x, *statistics)  # (C,), of the global batch
        ctx.save_for_backward(x, weight, mean, inverse)
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grad, needed = grads[0].contiguous(memory_format=memory_format(x)), ctx.needs_input_grad[:3]
        # (C,): sums of the gradient, and of the gradient times (x - mean); the gradients w.r.t. weight and bias
        *sums, by_weight, by_bias = torch.batch_norm_backward_reduce(grad, x, mean, inverse, weight, *needed)
        by_x = None
        if needed[0]:
            grad_sum, centered_sum = sum_over_ranks(torch.stack(sums))  # (C,) each, of the global batch
            by_x = torch.batch_norm_backward_elemt(
                grad, x, mean, inverse, weight, grad_sum, centered_sum, ctx.int_counts
            )
        return by_x, by_weight if needed[1] else None, by_bias if needed[2] else None, None, None, None, None


sync_batch_norm: Callable[..., Tensor] = _SyncBatchNorm.apply


@cache
def _counts(processes: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many values a channel has on each process, (W,), in the types of the forward and backward kernels."""
    counts = torch.full((processes,), count, dtype=dtype, device=device)
    return counts, counts.to(torch.int32)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels-last if the input has that format and is not contiguous in the default format as well."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
