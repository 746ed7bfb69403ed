"""Activation checkpointing: the same losses and gradients from fewer kept activations; refused for blocks with BN."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.config import ConfigError
from moco.methods.moco_v3 import MoCoV3
from moco.models.backbones import build_backbone
from moco.models.encoder import build_encoder, build_predictor
from moco.models.modes import checkpoint_activations

VIT = {"dim": 32, "depth": 4, "heads": 2, "img_size": 32, "patch_size": 4}
CONV_STEM = {"dim": 32, "depth": 2, "heads": 2, "stem": "conv", "img_size": 32}


def step(backbone: str, options: dict[str, Any], activations: bool) -> tuple[dict[str, Tensor], int]:
    """Return loss, gradients and buffers of a step of MoCo v3, and the bytes that it keeps for the backward pass."""
    torch.manual_seed(0)
    encoder = build_encoder(backbone, options, 2, 24, 8, "grouped", 4, head_norm=True)
    method = MoCoV3(encoder, build_predictor(8, 24, 2, True, "grouped", 4))
    if activations:
        checkpoint_activations(encoder.backbone, backbone)
    views, kept = [torch.randn(8, 3, 32, 32) for _ in range(2)], dict[int, int]()

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(1)  # for drop-path
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = method(views, method.encode_keys(views), torch.arange(8))
    output.loss.backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return found | {"loss": output.loss.detach()} | dict(method.named_buffers()), sum(kept.values())


@pytest.mark.parametrize(
    ("backbone", "options"),
    [("vit", VIT), ("vit", VIT | {"drop_path_rate": 0.5}), ("vit", CONV_STEM), ("timm/convnext_atto", {})],
)
def test_it_computes_the_same_with_less_memory(backbone: str, options: dict[str, Any]) -> None:
    (plain, much), (checkpointed, less) = (step(backbone, options, activations) for activations in (False, True))
    assert plain.keys() == checkpointed.keys()
    assert len(plain) > 20
    for name, value in plain.items():
        assert torch.equal(value, checkpointed[name]), name
    assert less < 0.6 * much


@pytest.mark.parametrize("backbone", ["resnet18", "convnet", "timm/resnet18"])
def test_blocks_with_batch_norm_are_refused(backbone: str) -> None:
    network: nn.Module = build_backbone(backbone, {})
    with pytest.raises(ConfigError, match=rf"=true needs .* without BN, but {backbone} lacks .*=false, .*vit_base"):
        checkpoint_activations(network, backbone)
