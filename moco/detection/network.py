"""Detectors of torchvision on a pretrained backbone.

Legend: N images, H x W their size with padding, C channels and h x w size of a feature map, P channels of the pyramid,
L classes.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from moco.config import ConfigError, require
from moco.detection.sampling import SharedStage
from moco.distributed import gather
from moco.interop.encoder_file import EncoderFile, build
from moco.models.backbones import ConvNet
from moco.models.modes import evaluating, set_training
from moco.models.norm import GroupedBatchNorm, convert_batch_norm

RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
DIVISOR = 32  # the padded height and width are multiples of it
SCORE = 0.05  # detections with a lower score are left out
C4_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)  # sides of the anchors of C4 detectors in pixels
C4_POOL = 14  # side to which a box on the map of the third stage is pooled


@dataclass(frozen=True)
class DetectorSettings:
    """The architecture of a detector; see `DetectConfig` for the fields."""

    detector: str
    norm: bool = True
    bn: str = "sync"
    width: int = 256
    anchor_sizes: tuple[float, ...] = ()  # empty: the default of the detector


class Padding(nn.Module):
    """Pads prepared images to one size; takes the place of torchvision's transform, which also resizes.

    In training, all ranks pad to the largest height and width of the global batch: padding affects the results.
    """

    def forward(
        self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        sizes = [(each.shape[1], each.shape[2]) for each in images]
        largest = torch.tensor(sizes, device=images[0].device).amax(0, keepdim=True)  # (1, 2)
        largest = gather(largest) if self.training else largest
        height, width = (-(-each // DIVISOR) * DIVISOR for each in largest.amax(0).tolist())
        batch = images[0].new_zeros(len(images), 3, height, width)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return ImageList(batch, sizes), targets

    def postprocess(self, result: Any, sizes: Any, original: Any) -> Any:
        """Return the detections as they are: in pixels of the prepared images."""
        return result


class Stages(nn.Module):
    """The stages of a backbone, without the layers after them: images (N, 3, H, W) to a feature map for each stage.

    The layers keep the names that they have in the backbone.
    """

    def __init__(self, layers: dict[str, nn.Module], ends: Sequence[str]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.ends = tuple(ends)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        maps, x = OrderedDict[str, Tensor](), images
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.ends:
                maps[str(len(maps))] = x
        return maps


class Pyramid(nn.Module):
    """A feature pyramid on the stages: images (N, 3, H, W) to maps (N, P, h, w), from the finest to the coarsest."""

    def __init__(self, body: Stages, fpn: FeaturePyramidNetwork, width: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, width

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        return cast("OrderedDict[str, Tensor]", self.fpn(self.body(images)))


class ThirdStage(nn.Module):
    """The stages of a ResNet up to the third, whose map (N, C, h, w) is the only output."""

    def __init__(self, body: Stages, channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        return cast("OrderedDict[str, Tensor]", self.body(images))


def split_stages(backbone: nn.Module, source: str) -> Stages:
    """Return the stages of a ResNet or of the small ConvNet, whose feature maps differ in stride.

    Raises:
        ConfigError: for another network.
    """
    if isinstance(backbone, ResNet):
        layers = {name: layer for name, layer in backbone.named_children() if name not in ("avgpool", "fc")}
        return Stages(layers, ("layer1", "layer2", "layer3", "layer4"))
    if isinstance(backbone, ConvNet):
        layers = dict(backbone.layers.named_children())
        strides = [(name, layer.stride[0]) for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
        # A stage ends with the ReLU before a convolution whose stride is above 1.
        ends = [str(int(after) - 1) for (_, _), (after, stride) in pairwise(strides) if stride > 1]
        return Stages(layers, (*ends[max(0, len(ends) - 3) :], next(reversed(layers))))
    raise ConfigError(
        f"{source} is a {type(backbone).__name__}, without the stages of feature maps that a detector needs: "
        "moco.detect takes convnet and torchvision's ResNets, such as resnet50"
    )


@torch.no_grad()
def shapes(body: Stages) -> tuple[list[int], list[int]]:
    """Return channels and stride of each stage."""
    with evaluating(body):
        maps = list(body(torch.zeros(1, 3, 256, 256)).values())
    return [each.shape[1] for each in maps], [256 // each.shape[3] for each in maps]


def build_detector(
    file: EncoderFile, settings: DetectorSettings, classes: int, *, seed: int, untrained: bool
) -> nn.Module:
    """Build a detector of torchvision in training mode.

    The detector takes prepared images, and its boxes are in pixels of these images.

    Args:
        file: the file of the encoder.
        settings: the architecture of the detector.
        classes: L, without the background.
        seed: the seed of the new weights and, if `untrained`, of the encoder's weights.
        untrained: give the encoder random weights instead of the file's.

    Raises:
        ConfigError: for a network without stages of feature maps, or anchor sizes that do not fit the levels of the
            pyramid.
    """
    backbone = build(file, seed if untrained else None).get_submodule("backbone").requires_grad_(True)
    if settings.bn == "sync":
        convert_batch_norm(backbone, "sync", 0)
    body = split_stages(backbone, file.source)
    torch.manual_seed(seed)
    network: nn.Module
    if settings.detector.endswith("c4"):
        network = _c4(body, settings, classes + 1, file.source)
    elif settings.detector == "retinanet":
        network = _retinanet(body, settings, classes + 1)
    else:
        network = _rcnn(body, settings, classes + 1)
    network.transform = Padding()
    old = set(backbone.modules())
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d) and layer not in old:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, convert_batch_norm(layer, "sync", 0))
    for layer in network.modules():
        if isinstance(layer, GroupedBatchNorm):
            layer.uneven = True  # ranks sample different numbers of boxes
    set_training(network, settings.bn == "frozen")
    return network


def _pool(strides: Sequence[int], side: int, sampling: int) -> MultiScaleRoIAlign:
    """Return the pooling of boxes from the maps of these strides, to `side` x `side`.

    torchvision would infer the strides from the first images without their padding, which is wrong for small images.
    """
    pool: Any = MultiScaleRoIAlign([str(number) for number in range(len(strides))], side, sampling)
    pool.scales = [1 / each for each in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return cast(MultiScaleRoIAlign, pool)


def _anchors(sizes: Sequence[float], given: Sequence[float], scales: Sequence[float] = (1.0,)) -> AnchorGenerator:
    """Return the anchors of a pyramid: each level has anchors of its own size times each of `scales`.

    The sizes of the levels are `given` or, if that is empty, `sizes`.
    """
    levels = tuple(given) or tuple(sizes)
    error = f"anchor_sizes={list(given)} must hold a size for each of the {len(sizes)} levels of the pyramid"
    require(len(levels) == len(sizes), f"{error}, or be null")
    return AnchorGenerator(tuple(tuple(size * scale for scale in scales) for size in levels), (RATIOS,) * len(levels))


def _rcnn(body: Stages, settings: DetectorSettings, classes: int) -> nn.Module:
    """Build Faster or Mask R-CNN with a feature pyramid; with `norm`, as Detectron2 configures them for SyncBN."""
    (channels, strides), width = shapes(body), settings.width
    norm = nn.BatchNorm2d if settings.norm else None
    fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), norm)
    anchors = _anchors([8.0 * each for each in (*strides, 2 * strides[-1])], settings.anchor_sizes)
    hidden = 4 * width
    box_head = (
        FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], norm_layer=norm)
        if norm
        else TwoMLPHead(width * 7 * 7, hidden)
    )
    options: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": _pool(strides, 7, 2),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(hidden, classes),
        "box_score_thresh": SCORE,
    }
    backbone = Pyramid(body, fpn, width)
    if not settings.detector.startswith("mask"):
        return cast(nn.Module, FasterRCNN(backbone, **options))
    options |= {
        "mask_roi_pool": _pool(strides, 14, 2),
        "mask_head": MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm),
        "mask_predictor": MaskRCNNPredictor(width, width, classes),
    }
    return cast(nn.Module, MaskRCNN(backbone, **options))


def _c4(body: Stages, settings: DetectorSettings, classes: int, source: str) -> nn.Module:
    """Build Faster or Mask R-CNN-C4, as configured for Detectron2 in facebookresearch/moco/detection.

    With `norm`, a BN layer follows the last stage (Res5ROIHeadsExtraNorm there).
    """
    fix = f"set detector={settings.detector.replace('c4', 'fpn')}"
    error = f"detector={settings.detector} needs the four stages of a ResNet, and {source} is no ResNet: {fix}"
    require(hasattr(body, "layer4"), error)
    channels, strides = shapes(body)
    layers = dict(body.named_children())
    stage = nn.Sequential(OrderedDict(layer4=layers.pop("layer4")))
    if settings.norm:
        stage.add_module("norm", nn.BatchNorm2d(channels[3]))
    sizes = settings.anchor_sizes or C4_SIZES
    anchors = AnchorGenerator((tuple(sizes),), (RATIOS,))
    head = nn.Sequential(OrderedDict(stage=stage, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    options: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(channels[2], anchors.num_anchors_per_location()[0]),
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_pre_nms_top_n_test": 6000,
        "rpn_post_nms_top_n_test": 1000,
        "box_roi_pool": _pool(strides[2:3], C4_POOL, 0),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(channels[3], classes),
        "box_score_thresh": SCORE,
    }
    backbone = ThirdStage(Stages(layers, ("layer3",)), channels[2])
    if not settings.detector.startswith("mask"):
        return cast(nn.Module, FasterRCNN(backbone, **options))
    options |= {
        "mask_roi_pool": _pool(strides[2:3], C4_POOL, 0),
        "mask_head": SharedStage(stage),
        "mask_predictor": MaskRCNNPredictor(channels[3], settings.width, classes),
    }
    return cast(nn.Module, MaskRCNN(backbone, **options))


def _retinanet(body: Stages, settings: DetectorSettings, classes: int) -> nn.Module:
    """Build RetinaNet with two levels that are coarser than the last stage, as torchvision does.

    If the backbone has three or more stages, the finest one is not used.
    """
    channels, strides = shapes(body)
    first = 1 if len(strides) > 2 else 0
    channels, strides, width = channels[first:], strides[first:], settings.width
    body.ends = body.ends[first:]
    fpn = FeaturePyramidNetwork(channels, width, LastLevelP6P7(width, width), nn.BatchNorm2d if settings.norm else None)
    levels = [*strides, 2 * strides[-1], 4 * strides[-1]]
    anchors = _anchors([4.0 * each for each in levels], settings.anchor_sizes, (1, 2 ** (1 / 3), 2 ** (2 / 3)))
    # At least 8 channels per group: 32 groups of the usual 256 channels.
    groups = math.gcd(width, min(32, 2 ** ((width // 8).bit_length() - 1)))
    group_norm = partial(nn.GroupNorm, groups) if settings.norm else None
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm_layer=group_norm)
    return cast(
        nn.Module,
        RetinaNet(
            Pyramid(body, fpn, width),
            classes,
            anchor_generator=anchors,
            head=head,
            score_thresh=SCORE,
            detections_per_img=100,
        ),
    )
