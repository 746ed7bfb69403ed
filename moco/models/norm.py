"""Batch normalization over groups of the global batch, so that its statistics do not depend on the number of GPUs.

Eight GPUs with 32 images each normalize eight groups of 32. Here the size of a group is configured, so one GPU with 256
images has the same eight groups. Keys are shuffled so that the group of a key reveals nothing about its query (MoCo,
section 3.3, "Shuffling BN").

Legend: N local batch, C channels, G groups, g images per group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.distributed import sum_over_ranks, world_size

BatchNormKind = Literal["grouped", "sync", "batch"]


class GroupedBatchNorm(nn.Module):
    """BN over consecutive groups of `group_size` images; group_size 0 means the global batch ("sync").

    Has the parameters and buffers of `nn.BatchNorm2d`, with the same names. One optimizer step updates the running
    statistics once, with the mean over the step's groups, for any number of calls per step.

    Args:
        channels: C.
        group_size: g; must divide the batch of every training call (ValueError).
        eps, momentum, affine: as in `nn.BatchNorm2d`.
        after: the module that timm's fused norm layers apply after the normalization (their activation).
    """

    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        group_size: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.group_size, self.eps, self.momentum = group_size, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.after = after or nn.Identity()
        self.calls_per_step = 1  # views x micro-batches
        self.call = 0  # number of calls in this step; not saved, because checkpoints are saved between steps
        # Replaces `call` in compiled code, where each new value of a Python number would trigger recompilation.
        self.compiled_call: Tensor
        self.register_buffer("compiled_call", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...) -> (N, C, ...)
        out: Tensor = self.after(self._normalize(x))
        return out

    def _normalize(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.group_size and len(x) % self.group_size:
            raise ValueError(f"model.bn_group_size={self.group_size} does not divide a batch of {len(x)} images")
        if self.group_size == 0 and world_size() > 1:
            return self._normalize_sync(x)
        groups = x.split(self.group_size or len(x))
        dtype = torch.promote_types(x.dtype, torch.float32)
        statistics = x.new_zeros(2, len(groups), x.shape[1], dtype=dtype)  # (2, G, C), means and variances
        # momentum=1 makes batch_norm write each group's own statistics into its row.
        out = [
            F.batch_norm(group, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            for group, mean, var in zip(groups, *statistics, strict=True)
        ]
        self._track(*statistics.mean(dim=1))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _normalize_sync(self, x: Tensor) -> Tensor:
        """BN over all ranks; two passes, because E[x^2] - E[x]^2 cancels in float32."""
        values = x.float()
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = values.numel() // values.shape[1] * world_size()
        mean = sum_over_ranks(values.sum(dims)) / count  # (C,)
        centered = values - mean.view(shape)
        var = sum_over_ranks(centered.square().sum(dims)) / count  # (C,)
        self._track(mean.detach(), var.detach() * count / (count - 1))
        out = centered * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None and self.bias is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if torch.compiler.is_compiling():
            first = self.compiled_call == 0
            kept = torch.where(first, 1 - self.momentum, 1.0)
            self.num_batches_tracked.add_(first)
            self.running_mean.mul_(kept)
            self.running_var.mul_(kept)
            self.compiled_call.add_(1).remainder_(self.calls_per_step)
        elif self.call == 0:
            self.num_batches_tracked.add_(1)
            self.running_mean.mul_(1 - self.momentum)
            self.running_var.mul_(1 - self.momentum)
        share = self.momentum / self.calls_per_step
        self.running_mean.add_(mean, alpha=share)
        self.running_var.add_(var, alpha=share)
        if not torch.compiler.is_compiling():
            self.call = (self.call + 1) % self.calls_per_step


def convert_batch_norm(module: nn.Module, kind: BatchNormKind, group_size: int) -> nn.Module:
    """Replace every BatchNorm layer by `GroupedBatchNorm`, with its parameters and buffers.

    Args:
        module: any network, e.g. torchvision's or timm's.
        kind: "grouped": groups of `group_size`; "sync": the global batch; "batch": keep the layers, which normalize
            over the images of one call in one process.
        group_size: g, for "grouped".

    Returns:
        The same module, changed in place; if it is itself a BatchNorm layer, the new layer.
    """
    if kind == "batch":
        return module
    for name, child in module.named_children():
        setattr(module, name, convert_batch_norm(child, kind, group_size))
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return module
    # timm's BatchNormAct2d holds its dropout and activation inside.
    after = [layer for layer in (getattr(module, "drop", None), getattr(module, "act", None)) if layer is not None]
    size, momentum = 0 if kind == "sync" else group_size, 0.1 if module.momentum is None else module.momentum
    fused = nn.Sequential(*after) if after else None
    new = GroupedBatchNorm(module.num_features, size, module.eps, momentum, module.affine, fused)
    new.load_state_dict(module.state_dict(), strict=False)
    for name, parameter in module.named_parameters(recurse=False):
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new.train(module.training)


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every BN layer unchanged by forward passes in this context."""
    kinds = GroupedBatchNorm | nn.modules.batchnorm._BatchNorm
    layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    buffers = [(x, x.clone()) for layer in layers for x in layer.buffers(recurse=False)]
    calls = [(layer, layer.call) for layer in layers if isinstance(layer, GroupedBatchNorm)]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for layer, call in calls:
            layer.call = call


def set_calls_per_step(module: nn.Module, calls: int) -> None:
    """Set the number of calls per optimizer step (views x micro-batches) of every grouped BN layer."""
    for layer in module.modules():
        if isinstance(layer, GroupedBatchNorm):
            layer.calls_per_step, layer.call = calls, 0
            layer.compiled_call.zero_()
