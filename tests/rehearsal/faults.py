"""Faults of code for GPUs. Each is planted in a run by a patch, to see that the rehearsal finds it."""

from typing import Any

import torch

from moco.builder import KeyQueue
from moco.losses import contrast
from moco.models.encoder import Encoder
from moco.models.norm import GroupedBatchNorm
from moco.runtime.device import set_float32_precision


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


def _graph_break(self: GroupedBatchNorm, x: torch.Tensor, forward: Any = GroupedBatchNorm.forward) -> Any:
    torch._dynamo.graph_break()
    return forward(self, x)


# Names of faults, with what they replace, and by what.
PATCHES: dict[str, tuple[str, Any]] = {
    "host tensor": ("moco.builder.contrast", _host_tensor),
    "item": ("moco.builder.contrast", _item),
    "no autocast": ("moco.models.encoder.Encoder.forward", _without_autocast),
    "mask on the host": ("moco.builder.KeyQueue.negatives", _mask_on_host),
    "waiting copy": ("moco.distributed.copy_to_device", _waiting_copy),
    "TF32": ("moco.runtime.device.set_float32_precision", lambda tf32: set_float32_precision(True)),
    "graph break": ("moco.models.norm.GroupedBatchNorm.forward", _graph_break),
    "no wait for the batch": ("torch.cuda.Stream.wait_event", lambda stream, event: None),
}
