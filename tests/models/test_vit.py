"""The vision transformers of MoCo v3: their values at the start, what is never trained, and timm's own names."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from moco.config import OptimConfig
from moco.models.backbones import build_backbone
from moco.models.encoder import build_encoder
from moco.models.vit import sin_cos_positions
from moco.optim.optimizers import build_optimizer

SMALL = {"dim": 32, "depth": 2, "heads": 4, "img_size": 16, "patch_size": 4}


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("vit", SMALL | options)


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


# ---- architecture ----


@pytest.mark.parametrize(
    ("name", "dim", "depth", "millions"),
    [
        ("vit_small", 384, 12, 21.67),  # a ViT-S without its classifier
        ("vit_base", 768, 12, 85.80),
        ("vit_conv_small", 384, 11, 20.62),
        ("vit_conv_base", 768, 11, 82.20),
    ],
)
def test_sizes_and_twelve_heads(name: str, dim: int, depth: int, millions: float) -> None:
    with torch.device("meta"):  # no memory, no initialization
        network: Any = build_backbone(name, {})
    tokens = dim + 197 * dim + 2 * dim  # class token, positions, last norm
    block = 12 * dim**2 + 13 * dim
    stem = 3 * 16**2 * dim + dim
    if "conv" in name:
        widths = [3, dim // 8, dim // 4, dim // 2, dim]
        stem = sum(9 * a * b + 2 * b for a, b in pairwise(widths)) + dim**2 + dim
    count = sum(p.numel() for p in network.parameters())
    assert count == tokens + depth * block + stem
    assert count / 1e6 == pytest.approx(millions, abs=0.01)
    assert len(network.blocks) == depth
    assert {block.attn.num_heads for block in network.blocks} == {12}
    assert {layer.eps for layer in network.modules() if isinstance(layer, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("name", ["vit_small", "vit_base"])
def test_weights_have_the_names_of_timm(name: str) -> None:
    with torch.device("meta"):
        ours = build_backbone(name, {}).state_dict()
        theirs = timm.create_model(f"{name}_patch16_224", num_classes=0).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_features_are_the_class_tokens_after_the_last_norm() -> None:
    network: Any = small().eval()
    images = torch.randn(3, 3, 16, 16)
    assert network.num_features == 32
    assert network(images).shape == (3, 32)
    torch.testing.assert_close(network(images), network.forward_features(images)[:, 0])


def test_the_conv_stem_returns_as_many_patches_as_the_projection() -> None:
    network: Any = build_backbone("vit", {"dim": 32, "depth": 1, "heads": 4, "img_size": 48, "stem": "conv"})
    convolutions = [layer for layer in network.patch_embed.proj if isinstance(layer, nn.Conv2d)]
    widths = [3, 4, 8, 16, 32, 32]
    assert [(each.in_channels, each.out_channels) for each in convolutions] == list(pairwise(widths))
    assert [(each.kernel_size, each.stride) for each in convolutions] == [((3, 3), (2, 2))] * 4 + [((1, 1), (1, 1))]
    assert [each.bias is None for each in convolutions] == [True] * 4 + [False]
    assert network.patch_embed(torch.randn(2, 3, 48, 48)).shape == (2, 9, 32)
    assert network.eval()(torch.randn(2, 3, 48, 48)).shape == (2, 32)


# ---- values at the start ----


@pytest.mark.parametrize(("side", "dim"), [(4, 32), (3, 8), (14, 384)])
def test_positions_are_the_sines_and_cosines_of_a_loop(side: int, dim: int) -> None:
    table, quarter = sin_cos_positions(side, dim), dim // 4
    assert table.shape == (1 + side**2, dim)
    assert not table[0].any()  # the class token's
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (row, column):
                angles = [place / 10000 ** (d / quarter) for d in range(quarter)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            torch.testing.assert_close(table[1 + row * side + column], torch.tensor(expected), rtol=0, atol=2e-6)


def test_positions_of_a_network_are_the_table_and_are_not_trained() -> None:
    network = small()
    positions = network.get_parameter("pos_embed")
    assert torch.equal(positions[0], sin_cos_positions(4, 32))
    assert not positions.requires_grad


def uniform(weight: Tensor, bound: float) -> None:
    """Fills -bound ... bound."""
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.98 * bound
    assert weight.mean().abs() < 0.1 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_initialization_is_the_published_one() -> None:
    network = small()
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    assert len(linear) == 2 * 4
    for name, layer in linear.items():
        fan_in, fan_out = layer.in_features, layer.out_features
        if name.endswith("qkv"):
            fan_out //= 3  # three matrices in one
        uniform(layer.weight.detach(), math.sqrt(6 / (fan_in + fan_out)))
        assert layer.bias is not None
        assert not layer.bias.any()
    patches = network.get_submodule("patch_embed.proj")
    assert isinstance(patches, nn.Conv2d)
    uniform(patches.weight.detach(), math.sqrt(6 / (3 * 4 * 4 + 32)))
    assert patches.bias is not None
    assert not patches.bias.any()
    token = network.get_parameter("cls_token").detach()
    assert 0 < token.std() < 3e-6


# ---- frozen weights ----


@pytest.mark.parametrize(("freeze", "moves"), [(None, False), (True, False), (False, True)])
def test_weight_decay_does_not_change_frozen_weights(freeze: bool | None, moves: bool) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("vit", SMALL | {"freeze_patches": freeze}, 3, 16, 8, "sync", 0, head_norm=True)
    before = values(encoder)
    optimizer = build_optimizer(encoder, OptimConfig(name="adamw", weight_decay=0.1), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        encoder(torch.randn(6, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    after = values(encoder)
    assert torch.equal(after["backbone.pos_embed"], before["backbone.pos_embed"])
    for name in ("backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"):
        assert torch.equal(after[name], before[name]) != moves
    for name in ("backbone.cls_token", "backbone.blocks.0.attn.qkv.weight", "backbone.norm.weight", "head.0.weight"):
        assert not torch.equal(after[name], before[name])


def test_a_conv_stem_is_trained() -> None:
    network = build_backbone("vit", SMALL | {"img_size": 32, "patch_size": 16, "stem": "conv"})
    assert all(parameter.requires_grad for parameter in network.get_submodule("patch_embed").parameters())


def test_a_copy_computes_the_same_and_stays_frozen() -> None:
    network = small().eval()
    twin = copy.deepcopy(network)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(twin(images), network(images))
    frozen = {name for name, parameter in twin.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


# ---- errors ----


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 16, 20), (2, 3, 8, 16)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    network = small().eval()
    for each in (network, copy.deepcopy(network)):
        with pytest.raises(AssertionError, match=r"Input (height|width) \(\d+\) doesn't match model \(16\)"):
            each(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dim": 30, "heads": 3}, "dim=30 must be a multiple of 4"),
        ({"heads": 5}, "dim=32 must be a multiple of 4 and of heads=5"),
        ({"heads": 0}, "of heads=0"),
        ({"patch_size": 5}, "patch_size=5 must divide img_size=16"),
        ({"patch_size": 0}, "patch_size=0 must divide"),
        ({"stem": "mlp"}, "stem='mlp' must be 'patch' or 'conv'"),
        ({"stem": "conv"}, "stem='conv'"),
        ({"stem": "conv", "patch_size": 16, "freeze_patches": True}, "freeze_patches=false or null, and"),
        ({"width": 3}, "model.options="),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # the message is compared below
        build_backbone("vit", SMALL | options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
