"""Faults of code for GPUs. Each is planted in a run by a patch, to see that the rehearsal finds it."""

from typing import Any

import torch
from torch.distributed import all_to_all_single

from moco.builder import KeyQueue
from moco.data.loader import Batch
from moco.distributed import rank
from moco.losses import contrast
from moco.models.encoder import Encoder
from moco.models.norm import GroupedBatchNorm
from moco.runtime.device import set_float32_precision
from moco.training.graph import StepGraph


def _host_tensor(query: torch.Tensor, *others: Any) -> Any:
    return contrast(query * torch.ones(len(query), 1), *others)


def _item(*inputs: Any) -> Any:
    loss, measures = contrast(*inputs)
    return loss, measures | {"rounded": torch.full_like(loss, loss.item())}


def _without_autocast(self: Encoder, images: torch.Tensor, forward: Any = Encoder.forward) -> Any:
    with torch.autocast(images.device.type, enabled=False):
        return forward(self, images)


def _mask_on_host(self: KeyQueue, index: torch.Tensor, negatives: Any = KeyQueue.negatives) -> Any:
    return negatives(self, index).cpu()


def _waiting_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device)


def _with_first_batch(repeat: Any = StepGraph._repeat) -> Any:
    batches: list[Batch] = []

    def repeat_first(self: StepGraph, passes: Any, batch: Batch, given: Any) -> Any:
        batches.append(batch)
        return repeat(self, passes, batches[0], given)

    return repeat_first


def _graph_break(self: GroupedBatchNorm, x: torch.Tensor, forward: Any = GroupedBatchNorm.forward) -> Any:
    torch._dynamo.graph_break()
    return forward(self, x)


def _unequal_exchange(out: torch.Tensor, x: torch.Tensor, input_split_sizes: Any, **more: Any) -> Any:
    """Let rank 0 send a row to rank 1 that belongs to itself."""
    first, second = input_split_sizes
    sent = [first - 1, second + 1] if rank() == 0 else [first, second]
    return all_to_all_single(out, x, input_split_sizes=sent, **more)


def _queued_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)


def _channels_last(self: GroupedBatchNorm, x: torch.Tensor, forward: Any = GroupedBatchNorm.forward) -> Any:
    return forward(self, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)


def _without_kernel(query: torch.Tensor, *others: Any) -> Any:
    torch.pdist(query)
    return contrast(query, *others)


def _wrong_gradient(self: Encoder, images: torch.Tensor, forward: Any = Encoder.forward) -> Any:
    found = forward(self, images)
    return found if images.device.type == "cpu" else 2 * found - found.detach()


# Names of faults, with what they replace, and by what.
PATCHES: dict[str, tuple[str, Any]] = {
    "host tensor": ("moco.builder.contrast", _host_tensor),
    "item": ("moco.builder.contrast", _item),
    "no autocast": ("moco.models.encoder.Encoder.forward", _without_autocast),
    "mask on the host": ("moco.builder.KeyQueue.negatives", _mask_on_host),
    "waiting copy": ("moco.distributed.copy_to_device", _waiting_copy),
    "TF32": ("moco.runtime.device.set_float32_precision", lambda tf32: set_float32_precision(True)),
    "graph break": ("moco.models.norm.GroupedBatchNorm.forward", _graph_break),
    "graph of one batch": ("moco.training.graph.StepGraph._repeat", _with_first_batch()),
    "no step before the capture": ("moco.training.graph.EAGER_STEPS", 0),
    "unequal exchange": ("torch.distributed.all_to_all_single", _unequal_exchange),
    "float64": ("moco.data.loader.float64_device", lambda device: device),
    "queued copy": ("moco.evaluation.features.copy_to_device", _queued_copy),
    "channels last": ("moco.models.norm.GroupedBatchNorm.forward", _channels_last),
    "no kernel": ("moco.builder.contrast", _without_kernel),
    "wrong gradient": ("moco.models.encoder.Encoder.forward", _wrong_gradient),
    "no wait for the batch": ("torch.cuda.Stream.wait_event", lambda stream, event: None),
}
