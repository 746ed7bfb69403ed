"""The feature maps of the backbones, and the encoder with a head for their cells."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.config import ConfigError
from moco.models.backbones import build_backbone
from moco.models.dense import DenseEncoder, build_dense_encoder, map_shape
from moco.models.encoder import build_encoder

NETWORKS: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "convnet": ({"width": 4, "pool": 2}, 16, (32, 4, 4)),
    "resnet18": ({}, 96, (512, 3, 3)),
    "vit_small": ({"img_size": 32, "patch_size": 8, "depth": 1} | {"dim": 16, "heads": 2}, 32, (16, 4, 4)),
    "timm/vit_tiny_patch16_224": ({"img_size": 48, "depth": 1}, 48, (192, 3, 3)),
    "timm/resnet10t": ({}, 64, (512, 2, 2)),
    "timm/swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 2}, 64, (768, 2, 2)),
}


def network(name: str) -> tuple[Any, int, tuple[int, ...]]:
    options, size, shape = NETWORKS[name]
    return build_backbone("vit" if name == "vit_small" else name, options), size, shape


def whole_map(backbone: Any, name: str, x: Tensor) -> Tensor:
    """Return the map (N, D, h, w), from what the networks document."""
    if name == "convnet":
        x = backbone.layers(x)
        return x
    if name.startswith("resnet"):
        x = nn.Sequential(*list(backbone.children())[:-2])(x)
        return x
    found: Tensor = backbone.forward_features(x)
    if "swin" in name:
        return found.permute(0, 3, 1, 2)
    if found.dim() == 3:
        side = int((found.shape[1] - 1) ** 0.5)
        return found[:, 1:].transpose(1, 2).reshape(len(x), -1, side, side)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_cells_are_those_of_the_feature_map_and_the_embedding_does_not_change(name: str) -> None:
    torch.manual_seed(0)
    backbone, size, shape = network(name)
    assert map_shape(backbone, size, 3) == shape
    head = nn.Linear(backbone.num_features, 5)
    encoder = DenseEncoder(backbone.eval(), head, nn.Linear(shape[0], 5))
    x = torch.randn(2, 3, size, size)
    embedding, cells, features = encoder(x, dense=True)
    assert cells.shape == (2, shape[1] * shape[2], 5)
    expected = whole_map(backbone, name, x)
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(cells, encoder.dense_head(features))
    torch.testing.assert_close(embedding, head(backbone(x)))
    assert encoder(x).shape == (2, 5)
    assert copy.deepcopy(encoder)(x, dense=True).features.shape == features.shape


def test_a_copy_keeps_its_own_map() -> None:
    encoder = DenseEncoder(network("convnet")[0].eval(), nn.Identity(), nn.Identity())
    other, x = copy.deepcopy(encoder), torch.randn(2, 3, 16, 16)
    before = encoder(x, dense=True).features
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(encoder(x, dense=True).features, before)
    assert other(x, dense=True).features.abs().max() == 0


def test_the_dense_head_has_the_layers_of_the_global_head() -> None:
    encoder = build_encoder("convnet", {"width": 4, "pool": 2}, 2, 0, 8, "grouped", 4)
    dense = build_dense_encoder(encoder, 2, 0, 8, size=16, channels=3, grid=0)
    shapes = [tuple(parameter.shape) for parameter in dense.dense_head.parameters()]
    assert shapes == [(32, 32), (32,), (8, 32), (8,)]  # as wide as the map, not as the pooled features
    assert dense.head is encoder.head


def test_a_backbone_without_a_known_map_is_refused() -> None:
    class Flat(nn.Flatten):
        num_features = 12

    with pytest.raises(
        ConfigError, match=r"the feature map of Flat is unknown: choose another backbone, or set .*map_layer"
    ):
        map_shape(Flat(), 2, 3)
