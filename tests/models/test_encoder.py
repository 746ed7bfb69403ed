"""Backbones by name, heads by number, and a sentence for what does not exist."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from moco.models.backbones import BACKBONES, build_backbone
from moco.models.encoder import build_encoder, build_predictor, projection_head
from moco.models.norm import BatchNormKind, GroupedBatchNorm


def attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


# ---- backbones ----


@pytest.mark.parametrize(
    ("name", "options", "size", "features"),
    [
        ("convnet", {}, 16, 256),
        ("convnet", {"width": 4, "strides": (1, 1, 2, 1, 2)}, 9, 32),
        ("resnet18", {}, 32, 512),
        ("resnet18", {"stem": "cifar"}, 8, 512),
        ("resnet50", {"zero_init_residual": True}, 32, 2048),
        ("timm/resnet10t", {}, 32, 512),
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32, 192),
        ("timm/mobilenetv3_small_050", {}, 32, 1024),  # its last layer is wider than timm's `num_features`
    ],
)
def test_a_backbone_returns_num_features_features(name: str, options: dict[str, Any], size: int, features: int) -> None:
    network = build_backbone(name, options)
    out = network.eval()(torch.randn(2, 3, size, size))
    assert out.shape == (2, features)
    assert network.num_features == features


@pytest.mark.parametrize("name", sorted(name for name in BACKBONES if name.startswith("resnet")))
def test_each_resnet_has_its_depth_and_no_classifier(name: str) -> None:
    with torch.device("meta"):  # no memory, no initialization
        network = build_backbone(name, {})
    layers = [path for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    counted = [path for path in layers if "downsample" not in path]
    assert len(counted) == int(name.removeprefix("resnet")) - 1
    assert network.num_features == (512 if name in ("resnet18", "resnet34") else 2048)


def test_cifar_stem_keeps_the_resolution() -> None:
    network = build_backbone("resnet18", {"stem": "cifar"})
    stem, pool = attribute(network, "conv1"), attribute(network, "maxpool")
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(pool, nn.Identity)
    x = torch.randn(1, 3, 32, 32)
    assert attribute(network, "layer1")(pool(stem(x))).shape == (1, 64, 32, 32)


def test_imagenet_stem_divides_the_resolution_by_four() -> None:
    network = build_backbone("resnet18", {})
    stem, pool = attribute(network, "conv1"), attribute(network, "maxpool")
    assert (stem.kernel_size, stem.stride) == ((7, 7), (2, 2))
    assert pool(stem(torch.randn(1, 3, 32, 32))).shape == (1, 64, 8, 8)


# ---- heads ----


@pytest.mark.parametrize(
    ("layers", "hidden", "expected"),
    [
        (1, 0, [(512, 128)]),  # v1
        (1, 99, [(512, 128)]),
        (2, 0, [(512, 512), (512, 128)]),  # v2
        (2, 2048, [(512, 2048), (2048, 128)]),
        (3, 256, [(512, 256), (256, 256), (256, 128)]),
    ],
)
def test_head_has_its_layers_with_relu_between(layers: int, hidden: int, expected: list[tuple[int, int]]) -> None:
    head = list(projection_head(512, hidden, 128, layers).children())
    assert [(each.in_features, each.out_features) for each in head[::2] if isinstance(each, nn.Linear)] == expected
    assert all(isinstance(each, nn.ReLU) for each in head[1::2])
    assert len(head) == 2 * layers - 1
    assert all(each.bias is not None for each in head[::2])


@pytest.mark.parametrize("last_norm", [True, False])
@pytest.mark.parametrize(("layers", "hidden"), [(1, 9), (2, 0), (2, 9), (3, 9)])
def test_head_with_norm_is_moco_v3s(layers: int, hidden: int, last_norm: bool) -> None:
    """Linear without bias, BN, ReLU; the last BN without weight and bias, if there is one."""
    head = list(projection_head(6, hidden, 4, layers, norm=True, last_norm=last_norm).children())
    kinds: list[type] = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * layers
    assert [type(each) for each in head] == kinds[: -1 if last_norm else -2]
    linear = [each for each in head if isinstance(each, nn.Linear)]
    widths = [6, *[hidden or 6] * (layers - 1), 4]
    assert [(each.in_features, each.out_features) for each in linear] == list(pairwise(widths))
    assert all(each.bias is None for each in linear)
    norms = [each for each in head if isinstance(each, nn.BatchNorm1d)]
    assert [each.num_features for each in norms] == widths[1 : len(norms) + 1]
    assert [each.affine for each in norms] == [True] * (layers - 1) + [False] * last_norm


def test_the_head_without_norm_has_the_initial_weights_of_version_0_1() -> None:
    torch.manual_seed(0)
    head = projection_head(6, 5, 4, 2)
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(5, 4)
    expected = [first.weight, first.bias, second.weight, second.bias]
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), expected, strict=True))


@pytest.mark.parametrize(("kind", "group"), [("sync", 0), ("grouped", 2)])
def test_the_predictor_has_the_configured_norm(kind: BatchNormKind, group: int) -> None:
    predictor = build_predictor(4, 9, 2, True, kind, 2)
    norms = [each for each in predictor.modules() if isinstance(each, GroupedBatchNorm)]
    assert [(each.group_size, each.weight is None) for each in norms] == [(group, False), (group, True)]
    assert predictor(torch.randn(6, 4)).shape == (6, 4)
    x = torch.randn(6, 4)
    assert torch.equal(build_predictor(4, 9, 0, True, kind, 2)(x), x)


def test_encoder_is_head_after_backbone() -> None:
    encoder = build_encoder("convnet", {"width": 2}, 2, 0, 7, "grouped", 2).eval()
    x = torch.randn(4, 3, 8, 8)
    assert encoder(x).shape == (4, 7)
    torch.testing.assert_close(encoder(x), encoder.head(encoder.backbone(x)))
    assert encoder.backbone(x).shape == (4, 16)


def test_the_head_fits_a_timm_model_whose_last_layer_is_wider() -> None:
    encoder = build_encoder("timm/mobilenetv3_small_050", {}, 2, 0, 8, "grouped", 2).eval()
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 8)


@pytest.mark.parametrize(("kind", "groups"), [("grouped", {4}), ("sync", {0}), ("batch", set())])
def test_the_encoder_has_the_configured_norm(kind: BatchNormKind, groups: set[int]) -> None:
    encoder = build_encoder("convnet", {"width": 2}, 1, 0, 7, kind, 4)
    layers = [layer for layer in encoder.modules() if isinstance(layer, GroupedBatchNorm)]
    assert {layer.group_size for layer in layers} == groups
    assert len(layers) == (0 if kind == "batch" else 5)


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet19", {}, "model.backbone='resnet19' must be one of convnet, resnet18"),
        ("timm/resnet19", {}, "model.backbone='timm/resnet19': timm has no such model; similar names: "),
        ("timm/zzzzzz", {}, "similar names: none"),
        ("resnet10t", {}, "model.backbone='resnet10t' is a model of timm: set model.backbone=timm/resnet10t"),
        ("resnet18", {"stem": "small"}, "model.options.stem='small' must be 'imagenet' or 'cifar'"),
        ("resnet18", {"wide": 3}, "model.options={'wide': 3} is invalid for model.backbone='resnet18': "),
        ("convnet", {"depth": 3}, "model.options={'depth': 3} is invalid for model.backbone='convnet': "),
        ("timm/resnet10t", {"stem": "cifar"}, "model.options={'stem': 'cifar'} is invalid for model.backbone="),
    ],
)
def test_unknown_names_and_options_are_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # the message is compared below
        build_encoder(name, options, 2, 0, 8, "grouped", 2)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.head_layers=0 must be at least 1"):
        build_encoder("convnet", {"width": 2}, 0, 0, 8, "grouped", 2)
