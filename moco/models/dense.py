"""The encoder of DenseCL: it embeds each image, and each cell of the backbone's feature map.

    Dense Contrastive Learning for Self-Supervised Visual Pre-Training (Wang et al., CVPR 2021)

The global head sees the pooled features, as in MoCo. The dense head applies one MLP to each cell, which the paper
writes as 1x1 convolutions. A ViT's cells are its patch tokens after the last normalization.

Legend: N images, S side of an image, D channels of the feature map, P = G x G cells, C embedding.
"""

import math
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import require
from moco.models.encoder import Encoder, projection_head
from moco.models.probe import output_error


class DenseOutput(NamedTuple):
    """The embeddings of images and of their cells, and the features from which the cells' embeddings are computed."""

    embedding: Tensor  # (N, C)
    cells: Tensor  # (N, P, C), row by row
    features: Tensor  # (N, P, D), row by row


class DenseEncoder(nn.Module):
    """A backbone with a global and a dense head.

    Args:
        backbone: images (N, channels, S, S) to features; its attribute `map_layer` names the layer that returns the
            feature map, (N, D, h, w), or tokens.
        head: features to embeddings (N, C).
        dense_head: features of cells (N, P, D) to embeddings (N, P, C).
        grid: G, to which the feature map is pooled; 0: no pooling.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, dense_head: nn.Module, grid: int = 0) -> None:
        super().__init__()
        self.backbone, self.head, self.dense_head, self.grid = backbone, head, dense_head, grid
        self._kept: Tensor | None = None
        # A forward hook gets the map, because a backbone of any kind can only be called as a whole.
        backbone.get_submodule(map_layer(backbone)).register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._kept = output

    def forward(self, images: Tensor, dense: bool = False) -> Tensor | DenseOutput:
        """Return the embeddings (N, C) of images (N, channels, S, S); with `dense`, a `DenseOutput`."""
        embedding: Tensor = self.head(self.backbone(images))  # (N, C)
        found, self._kept = self._kept, None
        if not dense:
            return embedding
        assert found is not None
        features = pooled(as_map(found, self.backbone), self.grid).flatten(2).transpose(1, 2)  # (N, P, D)
        return DenseOutput(embedding, self.dense_head(features), features)


def map_layer(backbone: nn.Module) -> str:
    """Return the name of the layer that returns the feature map; raise ConfigError if the backbone names none."""
    name: Any = getattr(backbone, "map_layer", "")
    fix = "choose another backbone, or set its attribute map_layer to the name of the layer that returns the map"
    require(bool(name), f"model.backbone: the feature map of {type(backbone).__name__} is unknown: {fix}")
    return str(name)


def as_map(output: Tensor, backbone: nn.Module) -> Tensor:
    """Return the output of the map's layer as (N, D, h, w); `output` may be tokens (N, T, D), or have channels last."""
    if output.dim() == 3:
        prefix: Any = getattr(backbone, "num_prefix_tokens", 0)
        patches = output[:, prefix:].transpose(1, 2)  # (N, D, P)
        side = math.isqrt(patches.shape[2])
        return patches.reshape(*patches.shape[:2], side, -1)
    return output.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else output


def pooled(feature_map: Tensor, grid: int) -> Tensor:
    """Average a map (N, D, h, w) to G x G cells, (N, D, G, G); `grid` is G, or 0 to keep the map."""
    return F.adaptive_avg_pool2d(feature_map, grid) if grid else feature_map


def map_shape(backbone: nn.Module, size: int, channels: int) -> tuple[int, ...]:
    """Return D, h, w of the feature map for images of `size` pixels; only shapes are computed, where possible."""
    seen: list[Tensor] = []
    handle = backbone.get_submodule(map_layer(backbone)).register_forward_hook(lambda *of: seen.append(of[2]))
    try:
        error = output_error(backbone, size, channels)
    finally:
        handle.remove()
    require(not error, f"model.backbone: {error}")
    return tuple(as_map(seen[-1], backbone).shape[1:])


def build_dense_encoder(
    encoder: Encoder, layers: int, hidden: int, dim: int, size: int, channels: int, grid: int
) -> DenseEncoder:
    """Return an encoder with a new dense head beside its own head.

    Args:
        encoder: its backbone and head are used, not copied.
        layers, hidden, dim: the sizes of the dense head, as in `projection_head`.
        size, channels: the side in pixels and the channels of the images.
        grid: G, or 0 for no pooling.

    Raises:
        ConfigError: if the feature map has fewer than 2 x 2 cells, or fewer than G x G.
    """
    width, *sides = map_shape(encoder.backbone, size, channels)
    shape = " x ".join(map(str, sides))
    require(
        min(sides) > 1 and grid <= min(sides),
        f"method.grid={grid} and augment.size={size}: the feature map of the backbone has {shape} cells, and needs at "
        "least 2 x 2 and as many as the grid; lower method.grid or raise augment.size",
    )
    return DenseEncoder(encoder.backbone, encoder.head, projection_head(width, hidden, dim, layers), grid)
