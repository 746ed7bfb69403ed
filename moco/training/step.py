"""One optimizer step: the paper's Algorithm 1, on one process or many, with or without micro-batches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco.builder import Method, Output, mean_measures
from moco.data.loader import Batch
from moco.distributed import Order, mean_over_ranks
from moco.runtime.errors import NonFiniteLoss
from moco.runtime.precision import autocast
from moco.runtime.sharding import whole
from moco.training.graph import Keys, StepGraph

Measures = dict[str, Tensor]  # each of shape ()

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class StepSettings:
    """Settings of one step."""

    lr: float
    momentum: float  # m of the momentum encoder
    accumulate: int = 1  # number of micro-batches
    precision: torch.dtype = torch.float32  # data type of autocast; no autocast with float32
    clip_grad: float = 0.0  # largest norm of the gradient; 0: no clipping
    # Check the loss and the gradient before the step changes anything: the host then waits for the device. If False,
    # the caller must check them later (`moco.training.nonfinite`). fp16 is always checked.
    check_finite: bool = True
    graph: StepGraph | None = None  # replays the forward and backward passes; None: the host launches each kernel


def train_step(
    method: Method,
    forward: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    shuffles: Sequence[Order] | None,
    settings: StepSettings,
    monitor: Callable[[Output, Sequence[Tensor], Tensor], Measures] | None = None,
) -> Measures:
    """Train on one global batch and return its measures (loss, contrast_accuracy, ...), averaged over all ranks.

    Args:
        forward: the method, or DDP around it.
        scaler: for fp16; disabled otherwise.
        batch: V views (n, channels, S, S) and the image indices (n,) of this rank.
        shuffles: one permutation of the global batch per view, or None.
        monitor: computes further measures from the output, views and indices of the last micro-batch, before the
            weights and the queue change.

    Raises:
        NonFiniteLoss: with `settings.check_finite` or in fp16, on all ranks, if loss or gradient is not finite on any
            rank; weights, BN's running statistics and queue are unchanged. A gradient that overflows in fp16 raises no
            error, see `_check_finite`.
    """
    statistics = _copy_statistics(forward) if settings.check_finite or scaler.is_enabled() else None
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
    optimizer.zero_grad(set_to_none=True)
    encode_keys = partial(_encode_keys, method, settings)
    differentiate = partial(_differentiate, forward, scaler, settings)
    # ------------------------------------------------------------------ Algorithm 1
    if settings.graph is None:
        keys = encode_keys(batch, shuffles)  # k = f_k(x_k), no gradient
        outputs = differentiate(batch, keys)  # q = f_q(x_q), logits, loss, gradient
    else:  # the same, as one CUDA graph
        outputs = settings.graph(encode_keys, differentiate, batch, shuffles, eager=monitor is not None)
    last = slice(-(len(batch.index) // settings.accumulate), None)  # the samples of the last micro-batch
    monitored = monitor(outputs[-1], [view[last] for view in batch.views], batch.index[last]) if monitor else {}

    scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    measures = _mean_measures(outputs, monitored) | {"gradient_norm": norm}
    finite = statistics is None or _check_finite(measures["loss"], norm, scaler, statistics)
    if settings.clip_grad:
        torch._foreach_mul_(gradients, (settings.clip_grad / (norm + 1e-6)).clamp(max=1.0))
    # A non-finite step must not call `scaler.step`: the scaler would skip the update, and if it is the first one, a
    # fused optimizer's state would stay uninitialized.
    if finite:
        scaler.step(optimizer)  # update f_q
    scaler.update()
    if finite:  # one optimizer step = one momentum update = one enqueue
        method.update_momentum_encoder(settings.momentum)  # f_k = m f_k + (1 - m) f_q
        if new_keys := [each.new_keys for each in outputs if each.new_keys is not None]:
            method.enqueue(torch.cat(new_keys), batch.index)  # enqueue k, dequeue the oldest keys
    # ------------------------------------------------------------------
    return measures


def _encode_keys(method: Method, settings: StepSettings, batch: Batch, shuffles: Sequence[Order] | None) -> Keys:
    """Return the keys of the batch, by view; see `MoCo.encode_keys`."""
    places = {} if batch.places is None else {"places": batch.places}  # for a method that uses them
    with autocast(batch.index.device, settings.precision):
        return method.encode_keys(batch.views, shuffles, len(batch.index) // settings.accumulate, **places)


def _differentiate(
    forward: nn.Module, scaler: torch.amp.GradScaler, settings: StepSettings, batch: Batch, keys: Keys
) -> list[Output]:
    """Return the output of each micro-batch; add the gradients of their losses to the `grad` of the parameters."""
    accumulate, micro_batch = settings.accumulate, len(batch.index) // settings.accumulate
    outputs: list[Output] = []
    for part in range(accumulate):
        at = slice(part * micro_batch, (part + 1) * micro_batch)
        with _no_sync(forward, part < accumulate - 1):
            with autocast(batch.index.device, settings.precision):
                output: Output = forward([view[at] for view in batch.views], keys, batch.index[at], at.start)
            scaler.scale(output.loss / accumulate).backward()
        outputs.append(output._replace(loss=output.loss.detach()))
    return outputs


def _copy_statistics(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return BN's running statistics, each with a copy of its present values."""
    return [(buffer, buffer.clone()) for name, buffer in module.named_buffers() if name.endswith(_STATISTICS)]


def _mean_measures(outputs: Sequence[Output], monitored: Measures) -> Measures:
    """Average over the micro-batches, then over the ranks; the monitor has measured a single micro-batch."""
    measures = mean_measures([{"loss": each.loss, **each.measures} for each in outputs]) | monitored
    averages = mean_over_ranks(torch.stack(list(measures.values())))  # one collective for all measures
    return dict(zip(measures, averages, strict=True))


def _check_finite(
    loss: Tensor, norm: Tensor, scaler: torch.amp.GradScaler, statistics: list[tuple[Tensor, Tensor]]
) -> bool:
    """Return whether to apply the step; if not, restore `statistics`, see `_copy_statistics`.

    The loss is averaged over the ranks, and the norm is that of the averaged gradient, so all ranks decide the same.

    Raises:
        NonFiniteLoss: if the loss or the norm is not finite, except for a gradient that overflows in fp16 at a scale of
            1 or more: then the step is skipped, and the scaler halves its scale.
    """
    finite_loss, finite_norm = torch.isfinite(torch.stack([loss, norm])).tolist()
    if finite_loss and finite_norm:
        return True
    for buffer, before in statistics:
        buffer.copy_(before)
    if finite_loss and scaler.is_enabled() and scaler.get_scale() >= 1:
        return False
    scaler.update(scaler.get_scale())  # allows the next step to call `unscale_` again
    raise NonFiniteLoss(f"loss {loss:.4g}, gradient norm {norm:.4g}")


def _no_sync(forward: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Let DDP average the gradients in the last micro-batch only."""
    if wanted and isinstance(forward, DistributedDataParallel):
        return forward.no_sync()
    return nullcontext()
