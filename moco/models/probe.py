"""Check before training that a network takes the images of a run and returns one feature vector per image."""

from typing import Any

import torch
from torch import Tensor, nn

from moco.models.first_layer import input_channels
from moco.models.modes import evaluating


def output_error(network: nn.Module, size: int, channels: int | None = None) -> str:
    """Return why a backbone does not compute features (2, num_features) from images (2, C, S, S); "" if it does.

    The forward pass runs on the meta device, which computes shapes only. If that fails, it runs on the device of the
    weights, because a network may hold tensors that are neither parameters nor buffers.

    Args:
        network: a backbone with the attribute `num_features`, on any device; it is not changed.
        size: S.
        channels: C; None: as many as the network's first layer takes.
    """
    images = torch.zeros(2, channels or input_channels(network), size, size)
    wanted = (2, network.num_features)
    with evaluating(network), torch.no_grad():
        try:
            found = _shape(_on_meta(network, images))
        except Exception:
            try:
                found = _shape(network(images.to(next(network.parameters()).device)))
            except Exception as error:  # whatever the network raises
                text = " ".join(str(error).split())
                return f"it fails for images of {size}x{size} pixels ({text[:300] or type(error).__name__})"
    if found == wanted:
        return ""
    return f"for 2 images of {size}x{size} pixels it returns {found}, not features of shape {wanted}"


def _on_meta(network: nn.Module, images: Tensor) -> Any:
    tensors = [*network.named_parameters(), *network.named_buffers()]
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    on_device = images.to("meta", next(network.parameters()).dtype)
    return torch.func.functional_call(network, on_meta, (on_device,))


def _shape(output: Any) -> Any:
    return tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
