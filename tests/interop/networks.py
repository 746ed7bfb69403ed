"""Small networks with BN statistics as after training."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco.interop.encoder_file import EncoderFile
from moco.models.backbones import build_backbone

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LOOK = {"size": 32, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
VIT: dict[str, Any] = {"img_size": 32, "depth": 2}  # of timm/vit_tiny_patch16_224


def trained(backbone: str = "resnet18", options: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """Return a cached network; tests must not change it."""
    return _trained(backbone, json.dumps(options or {}), seed)


@cache
def _trained(backbone: str, options: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = build_backbone(backbone, json.loads(options))
    for name, buffer in network.named_buffers():  # neither zeros nor ones
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn_like(buffer) / 20)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    side = json.loads(options).get("img_size", 224 if backbone.startswith("vit") else 32)
    features = network.eval().requires_grad_(False)(torch.rand(2, 3, side, side))
    assert features.std() > 0.01  # otherwise the comparison would prove nothing
    return network


def source(network: nn.Module, backbone: str = "resnet18", options: dict[str, Any] | None = None) -> EncoderFile:
    """Return what read_encoder would return for it."""
    return EncoderFile("x.pth", "plain state dict", backbone, options or {}, network.state_dict(), images=LOOK)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(path: Path, state: dict[str, Any]) -> Path:
    torch.save(state, path)
    return path
