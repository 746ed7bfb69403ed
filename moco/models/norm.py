"""Batch normalization over groups of the global batch, so that its statistics do not depend on the number of GPUs.

Eight GPUs with 32 images each normalize eight groups of 32. Here the size of a group is configured, so one GPU with 256
images has the same eight groups. Keys are shuffled so that the group of a key reveals nothing about its query (MoCo,
section 3.3, "Shuffling BN").

Legend: N local batch, C channels, G groups, g images per group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.distributed import sum_over_ranks, world_size
from moco.models.fused_norm import fused_batch_norm, has_kernel
from moco.models.grouped_norm import grouped_batch_norm
from moco.models.sync_norm import sync_batch_norm

BatchNormKind = Literal["grouped", "sync", "batch"]

# Device types on which one fused operation updates the running statistics, because the host takes as long to launch a
# kernel as the GPU takes to compute a small layer. The fused operation rounds differently.
FUSED_DEVICES: tuple[str, ...] = ("cuda",)

# On such a device, groups of at most this many values are normalized in one call, which copies the batch before and
# after. For larger groups, the copies take longer than the kernel launches that the single call saves. This is an
# estimate, not measured, see docs/gpu.md.
LARGEST_TOGETHER = 2**22


class GroupedBatchNorm(nn.Module):
    """BN over consecutive groups of `group_size` images; group_size 0 means the global batch ("sync").

    Has the parameters and buffers of `nn.BatchNorm2d`, with the same names. For any number of micro-batches, running
    statistics are updated once per view, in the order of the views, with the mean over the view's groups. An
    `nn.BatchNorm2d` that is called once per view, with the global batch, updates its statistics equally often.

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
        self.uneven = False  # for "sync": ranks may normalize different numbers of samples, such as boxes
        self.views, self.micro_batches, self.view_by_view = 1, 1, False  # see `set_calls_per_step`
        self.call = 0  # number of calls in this step; not saved, because checkpoints are saved between steps
        self.counted: list[GroupedBatchNorm] = [self]  # the layers whose calls this layer counts
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
        count = len(x) // (self.group_size or len(x))
        running, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        if self._is_fused(x, compiled=True) and has_kernel(x, self.weight, count):
            self._count_call()
            return fused_batch_norm(x, *affine, running, count, self.momentum, self.eps)
        if torch.compiler.is_compiling():
            return self._normalize_at_once(x)
        if self._is_fused(x) and count == 1:
            self._count_call()
            return F.batch_norm(x, *running, *affine, training=True, momentum=self.momentum, eps=self.eps)
        groups = x.split(self.group_size or len(x))
        dtype = torch.promote_types(x.dtype, torch.float32)
        statistics = x.new_zeros(2, len(groups), x.shape[1], dtype=dtype)  # (2, G, C), means and variances
        if self._are_normalized_together(groups):
            out = grouped_batch_norm(x, self.weight, self.bias, statistics, self.eps)
        else:
            # momentum=1 makes batch_norm write each group's own statistics into its row.
            parts = [
                F.batch_norm(group, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
                for group, mean, var in zip(groups, *statistics, strict=True)
            ]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._track(*statistics.mean(dim=1))
        return out

    def _normalize_at_once(self, x: Tensor) -> Tensor:
        """BN over all groups at once, for compiled code, where a loop would become separate kernels for each group."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        values = values.unflatten(0, (-1, self.group_size or len(x)))  # (G, g, C, ...)
        dims = [1, *range(3, values.dim())]
        var, mean = torch.var_mean(values, dims, correction=0, keepdim=True)  # (G, 1, C, 1, ...)
        count = values[0].numel() // values.shape[2]
        with torch.no_grad():
            self._track(mean.mean(dim=0).flatten(), var.mean(dim=0).flatten() * count / (count - 1))
        out = ((values - mean) * (var + self.eps).rsqrt()).flatten(0, 1)
        return self._scale_and_shift(out).to(x.dtype)

    def _normalize_sync(self, x: Tensor) -> Tensor:
        """BN over all ranks. The variance needs a second sum over the batch: E[x^2] - E[x]^2 cancels in float32."""
        if self._is_fused(x) and not self.uneven:
            self._count_call()
            affine, running = (self.weight, self.bias), (self.running_mean, self.running_var)
            return sync_batch_norm(x, *affine, *running, self.momentum, self.eps)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count: Any = values.numel() // values.shape[1] * world_size()
        if self.uneven:
            count = sum_over_ranks(values.new_tensor(values.numel() // values.shape[1]))
        mean = sum_over_ranks(values.sum(dims)) / count  # (C,)
        centered = values - mean.view(shape)
        var = sum_over_ranks(centered.square().sum(dims)) / count  # (C,)
        self._track(mean.detach(), var.detach() * count / (count - 1))
        return self._scale_and_shift(centered * (var + self.eps).rsqrt().view(shape)).to(x.dtype)

    def _scale_and_shift(self, out: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return out
        shape = [1, -1] + [1] * (out.dim() - 2)
        return out * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics with one call's statistics, (C,) each.

        With V views of m micro-batches, the first call multiplies the running statistics by (1 - momentum)^V. A call
        for view v adds its statistics times momentum (1 - momentum)^(V - 1 - v) / m.
        """
        if self._is_fused(mean):
            self._count_call()
            torch._foreach_lerp_([self.running_mean, self.running_var], [mean, var], weight=self.momentum)
            return
        calls, kept = self.views * self.micro_batches, 1 - self.momentum
        if torch.compiler.is_compiling():
            at = self.compiled_call
            shrink = torch.where(at == 0, kept**self.views, 1.0)
            share: Any = self.momentum * kept ** (self.views - 1 - self._view(at)) / self.micro_batches
            self.num_batches_tracked.add_((at == 0) * self.views)
            self.running_mean.mul_(shrink).add_(mean * share)
            self.running_var.mul_(shrink).add_(var * share)
            at.add_(1).remainder_(calls)
            return
        if self.call == 0:
            self.running_mean.mul_(kept**self.views)
            self.running_var.mul_(kept**self.views)
        share = self.momentum * kept ** (self.views - 1 - self._view(self.call)) / self.micro_batches
        self.running_mean.add_(mean, alpha=share)
        self.running_var.add_(var, alpha=share)
        self._count_call()

    def _is_fused(self, x: Tensor, compiled: bool = False) -> bool:
        """Return whether one fused operation can update the running statistics: each call must be a whole view.

        Args:
            compiled: whether the operation may also run in compiled code.
        """
        whole = x.device.type in FUSED_DEVICES and self.micro_batches == 1
        return whole and (compiled or not torch.compiler.is_compiling())

    def _are_normalized_together(self, groups: Sequence[Tensor]) -> bool:
        """Return whether one call normalizes all groups. torch refuses groups with a single number per channel."""
        group = groups[0]
        return (
            len(groups) > 1
            and group.device.type in FUSED_DEVICES
            and group.shape[1] < group.numel() <= LARGEST_TOGETHER
        )

    def _count_call(self) -> None:
        if torch.compiler.is_compiling():  # `micro_batches` is 1: each call is a view
            if self.counted:
                torch._foreach_add_([layer.num_batches_tracked for layer in self.counted], 1)
            return
        if self.call == 0 and self.counted:
            torch._foreach_add_([layer.num_batches_tracked for layer in self.counted], self.views)
        self.call = (self.call + 1) % (self.views * self.micro_batches)

    def _view(self, call: Any) -> Any:
        """Return the view to which call number `call` of the step belongs."""
        return call // self.micro_batches if self.view_by_view else call % self.views


def convert_batch_norm(module: nn.Module, kind: BatchNormKind, group_size: int) -> nn.Module:
    """Replace each BatchNorm1d and BatchNorm2d by a `GroupedBatchNorm` with the same parameters and buffers.

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
def untracked(module: nn.Module, backward: bool = False) -> Iterator[None]:
    """Keep the running statistics of every BN layer unchanged by forward passes in this context.

    By default, the forward passes change the running statistics, and the end of the context restores them. Restoring
    overwrites tensors, and autograd refuses tensors that were overwritten after the forward pass. If a backward pass
    may follow, set `backward`: then a momentum of 0 keeps the running statistics unchanged, and the end of the context
    restores only the numbers of calls.
    """
    kinds = GroupedBatchNorm | nn.modules.batchnorm._BatchNorm
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, kinds)]
    buffers = [x for layer in layers for x in layer.buffers(recurse=False) if not (backward and x.is_floating_point())]
    values = [x.clone() for x in buffers]
    calls = [(layer, layer.call) for layer in layers if isinstance(layer, GroupedBatchNorm)]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers if backward else ():
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        for layer, call in calls:
            layer.call = call


def set_calls_per_step(module: nn.Module, views: int, micro_batches: int = 1, view_by_view: bool = False) -> None:
    """Set how often every grouped BN layer is called in an optimizer step: once per view and micro-batch.

    Args:
        views: V, the views that the network encodes one after the other.
        micro_batches: m, per view.
        view_by_view: True: all micro-batches of the first view come first, then those of the second. False: all views
            of the first micro-batch come first, then those of the second.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GroupedBatchNorm)]
    for layer in layers:
        layer.views, layer.micro_batches, layer.view_by_view = views, micro_batches, view_by_view
        layer.call = 0
        layer.compiled_call.zero_()
        layer.counted = layers if layer is layers[0] else []  # the first layer counts the calls of all layers
