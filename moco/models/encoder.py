"""The encoder, which is a backbone and a projection head, and MoCo v3's predictor."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from moco.models.backbones import build_backbone
from moco.models.norm import BatchNormKind, convert_batch_norm


def projection_head(
    fan_in: int, hidden: int, dim: int, layers: int, norm: bool = False, last_norm: bool = True
) -> nn.Module:
    """Return a projection head, (N, D) -> (N, C).

    In MoCo v1 it is one linear layer, in v2 an MLP with ReLU, and in v3 an MLP with BN and ReLU.

    Args:
        fan_in: D, the number of features of the backbone.
        hidden: width of the hidden layers; 0: D, as in MoCo v2.
        dim: C, the dimension of the embedding.
        layers: number of linear layers, at least 1, else ValueError.
        norm: add BN after each linear layer but the last; linear layers then have no bias (v3's projector and
            predictor).
        last_norm: with `norm`, also add BN, without weight and bias, after the last layer (false for the predictor of
            v3's ResNet).
    """
    if layers < 1:
        raise ValueError(f"model.head_layers={layers} must be at least 1")
    widths = [fan_in, *[hidden or fan_in] * (layers - 1), dim]
    parts: list[nn.Module] = []
    for number, (start, end) in enumerate(pairwise(widths), 1):
        last = number == layers
        parts.append(nn.Linear(start, end, bias=not norm))
        if norm and (last_norm or not last):
            parts.append(nn.BatchNorm1d(end, affine=not last))
        if not last:
            parts.append(nn.ReLU())
    return nn.Sequential(*parts)


class Encoder(nn.Module):
    """Images to embeddings (N, C); `backbone` returns the features (N, D) for transfer."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(images))  # (N, D) -> (N, C)
        return out


def build_encoder(
    backbone: str,
    options: Mapping[str, Any],
    head_layers: int,
    head_hidden: int,
    dim: int,
    bn: BatchNormKind,
    bn_group_size: int,
    head_norm: bool = False,
) -> Encoder:
    """Return the encoder for the fields of the configuration group `model`; raise ValueError for invalid fields."""
    network = build_backbone(backbone, options)
    fan_in = network.num_features
    if not isinstance(fan_in, int):
        raise ValueError(f"model.backbone={backbone!r} must have an integer attribute num_features")
    encoder = Encoder(network, projection_head(fan_in, head_hidden, dim, head_layers, head_norm))
    convert_batch_norm(encoder, bn, bn_group_size)
    return encoder


def build_predictor(
    dim: int, hidden: int, layers: int, last_norm: bool, bn: BatchNormKind, bn_group_size: int
) -> nn.Module:
    """Return MoCo v3's predictor for queries, (N, C) -> (N, C); with 0 layers the identity."""
    if layers == 0:
        return nn.Identity()
    return convert_batch_norm(projection_head(dim, hidden, dim, layers, True, last_norm), bn, bn_group_size)
