"""Segmentation networks: a head computes scores from the feature map of a backbone; the scores are upsampled to H x W.

Legend: N images, H x W their size, C channels of the feature map, h x w its size, L classes.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from moco.config import ConfigError, require
from moco.interop.encoder_file import EncoderFile, build
from moco.interop.image_size import POSITIONS
from moco.models.dense import as_map, map_layer
from moco.models.modes import set_training
from moco.models.norm import convert_batch_norm

_CONVOLUTIONAL = "moco.segment needs a convolutional network, such as a ResNet"


class SegmentationNetwork(nn.Module):
    """Images (N, 3, H, W) to scores of the classes (N, L, H, W), upsampled from the head's (N, L, h, w).

    Args:
        backbone: a convolutional network; its attribute `map_layer` names the layer that returns the feature map.
        head: the feature map (N, C, h, w) to scores (N, L, h, w).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self._map: Tensor | None = None
        # A hook, so that the backbone runs as a whole, as in pretraining.
        backbone.get_submodule(map_layer(backbone)).register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output

    def feature_map(self, images: Tensor) -> Tensor:
        """Return the backbone's feature map, (N, C, h, w).

        Raises:
            ConfigError: for a network with tokens instead, such as a vision transformer.
        """
        self.backbone(images)
        found, self._map = self._map, None
        if found is None or found.dim() != 4:
            kind = type(self.backbone).__name__
            raise ConfigError(f"{kind} has no feature map: {_CONVOLUTIONAL}")
        return as_map(found, self.backbone)

    def forward(self, images: Tensor) -> Tensor:
        scores = self.head(self.feature_map(images))  # (N, L, h, w)
        return F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)


def with_output_stride(file: EncoderFile, stride: int | None) -> EncoderFile:
    """Return the file with options that replace the last strides of a ResNet by dilation, so that h = H / stride.

    With `stride` None, or 32 for a ResNet with the ImageNet stem, the file is returned unchanged.

    Raises:
        ConfigError: for a network that is not a ResNet-50 or deeper ResNet with the ImageNet stem.
    """
    imagenet_stem = file.options.get("stem") != "cifar"
    if stride is None or (stride == 32 and imagenet_stem and file.backbone.startswith("resnet")):
        return file
    require(
        imagenet_stem and file.backbone in ("resnet50", "resnet101", "resnet152"),
        f"output_stride={stride} needs ResNet-50 or a deeper one with the ImageNet stem, not {file.backbone} with "
        f"options={dict(file.options)}: remove it",
    )
    dilated = [False, stride < 16, stride < 32]
    return replace(file, options=file.options | {"replace_stride_with_dilation": dilated})


def build_network(
    file: EncoderFile, head: str, classes: int, *, seed: int, untrained: bool, frozen: bool, bn: str
) -> SegmentationNetwork:
    """Build the network. It is in training mode, except its frozen layers, which are in eval mode.

    Args:
        seed: of the head's weights and, if `untrained`, of the encoder's.
        frozen: the encoder keeps its weights and BN statistics.
        bn: of the encoder; "sync" normalizes over the global batch, "frozen" by the running statistics.

    Raises:
        ConfigError: for a network without a feature map.
    """
    require(POSITIONS not in file.weights, f"{file.backbone} takes images of one size: {_CONVOLUTIONAL}")
    backbone = build(file, seed if untrained else None).get_submodule("backbone")
    network = SegmentationNetwork(backbone.requires_grad_(not frozen), nn.Identity())
    with torch.no_grad():
        channels = network.feature_map(torch.zeros(1, 3, 64, 64)).shape[1]
    torch.manual_seed(seed)
    network.head = convert_batch_norm(HEADS[head](channels, classes), "sync", 0)
    if not frozen and bn == "sync":
        convert_batch_norm(backbone, "sync", 0)
    set_training(network, bn == "frozen")
    if frozen:
        network.backbone.eval()
    return network


def _fcn_moco(channels: int, classes: int) -> nn.Module:
    """Build the head of MoCo's Section 4.2.

    It has two 3x3 convolutions of 256 channels with dilation 6, BN and ReLU, and then a 1x1 convolution.
    """
    layers: list[tuple[str, nn.Module]] = []
    for number, fan_in in ((1, channels), (2, 256)):
        layers += [
            (f"conv{number}", nn.Conv2d(fan_in, 256, 3, padding=6, dilation=6, bias=False)),
            (f"bn{number}", nn.BatchNorm2d(256)),
            (f"relu{number}", nn.ReLU(inplace=True)),
        ]
    return nn.Sequential(OrderedDict([*layers, ("classifier", nn.Conv2d(256, classes, 1))]))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda channels, classes: nn.Conv2d(channels, classes, 1),
    "fcn_moco": _fcn_moco,
    "fcn": lambda channels, classes: cast(nn.Module, FCNHead(channels, classes)),
    "deeplabv3": lambda channels, classes: cast(nn.Module, DeepLabHead(channels, classes)),
}
