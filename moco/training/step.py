"""One optimizer step: the paper's Algorithm 1, on one process or many, in one piece or in micro-batches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco.builder import Method, Output
from moco.distributed import mean_over_ranks
from moco.runtime.errors import NonFiniteLoss

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def train_step(
    method: Method,
    forward: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    views: Sequence[Tensor],
    index: Tensor,
    shuffles: Sequence[NDArray[np.int64]] | None,
    lr: float,
    momentum: float,
    accumulate: int = 1,
    precision: torch.dtype = torch.float32,
    clip_grad: float = 0.0,
    wait: bool = True,
    look: Callable[[Output, Sequence[Tensor], Tensor], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Trains on one global batch.

    Args:
        method: owns the momentum encoder and, where it has one, the queue.
        forward: the method, or DDP around it.
        scaler: for fp16; disabled otherwise.
        views: V tensors (n, 3, S, S), this rank's share.
        index: its sample indices, (n,).
        shuffles: one permutation of the global batch a view, or None.
        lr: learning rate of this step.
        momentum: m of this step.
        accumulate: micro-batches.
        precision: autocast's type; float32 is no autocast.
        clip_grad: largest gradient norm; 0 is no clipping.
        wait: let the host wait for the loss and its gradient before anything is changed. Without, nothing here waits
            for the device, and the caller must check both later (`moco.training.nonfinite`). fp16 always waits.
        look: measures the last micro-batch while weights and queue are those that its loss saw: gets its output, views
            and sample indices, gives further measures of shape ().

    Returns:
        This step's measures on the global batch (loss, contrast_accuracy, ...), each of shape ().

    Raises:
        NonFiniteLoss: with `wait`, on every rank together, if the loss or its gradient is not finite on any of them.
    """
    device, micro_batch = index.device, len(index) // accumulate
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    measures: dict[str, Tensor] = {}
    new_keys: list[Tensor] = []  # of each micro-batch
    wait = wait or scaler.is_enabled()
    statistics = [buffer for name, buffer in forward.named_buffers() if name.endswith(_STATISTICS)] if wait else []
    before = [buffer.clone() for buffer in statistics]
    # ------------------------------------------------------------------ Algorithm 1
    with autocast:
        keys = method.encode_keys(views, shuffles, micro_batch)  # {view: (n, C)}
    for part in range(accumulate):
        at = slice(part * micro_batch, (part + 1) * micro_batch)
        with _no_sync(forward, part < accumulate - 1):
            with autocast:
                output: Output = forward([view[at] for view in views], keys, index[at], at.start)
            scaler.scale(output.loss / accumulate).backward()
        if output.new_keys is not None:
            new_keys.append(output.new_keys)
        for name, value in {"loss": output.loss.detach(), **output.measures}.items():
            measures[name] = measures.get(name, 0) + value / accumulate
    if look is not None:
        measures |= look(output, [view[at] for view in views], index[at])

    scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    averages = mean_over_ranks(torch.stack(list(measures.values())))  # one collective for all of them
    measures = dict(zip(measures, averages, strict=True)) | {"gradient_norm": norm}
    # Loss and gradients are averages over the ranks by now, so all ranks decide alike.
    finite_loss, finite_norm = torch.isfinite(torch.stack([measures["loss"], norm])).tolist() if wait else (True, True)
    if statistics and not (finite_norm and finite_loss):
        torch._foreach_copy_(statistics, before)
    # fp16's scaler expects an overflow now and then: it skips that step and halves its scale, down to 1 and no further.
    overflow = finite_loss and not finite_norm and scaler.is_enabled() and scaler.get_scale() >= 1
    if not finite_loss or not (finite_norm or overflow):
        scaler.update(scaler.get_scale())  # forgets that this step's gradients were unscaled
        raise NonFiniteLoss(f"loss {measures['loss']:.4g}, gradient norm {norm:.4g}")
    if clip_grad:
        torch._foreach_mul_(gradients, (clip_grad / (norm + 1e-6)).clamp(max=1.0))
    if finite_norm:  # else a fused optimizer, told to skip its first step, would leave its state as the memory was
        scaler.step(optimizer)
    scaler.update()
    if finite_norm:  # one optimizer step = one momentum update = one enqueue
        method.update_momentum_encoder(momentum)
        if new_keys:
            method.enqueue(torch.cat(new_keys), index)
    # ------------------------------------------------------------------
    return measures


def _no_sync(forward: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """DDP averages gradients in the last micro-batch only."""
    if wanted and isinstance(forward, DistributedDataParallel):
        return forward.no_sync()
    return nullcontext()
