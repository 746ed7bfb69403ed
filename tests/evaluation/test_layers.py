"""Features of several layers from one pass equal those of separate passes; invalid layers are refused."""

import pytest
import torch
from torch import Tensor, nn

from moco.evaluation.layers import LayerFeatures
from moco.models.backbones import build_backbone


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("convnet", {"width": 2})


def test_maps_are_averaged_and_concatenated_in_the_given_order(network: nn.Module) -> None:
    images = torch.rand(3, 3, 16, 16)
    layers = LayerFeatures(network, ["output", "layers.5", "layers.8"], 16)
    assert not network.training
    with torch.no_grad():
        got = layers(images)
        stem = network.get_submodule("layers")
        assert isinstance(stem, nn.Sequential)
        expected = [network(images), stem[:6](images).mean((2, 3)), stem[:9](images).mean((2, 3))]
    assert list(layers.columns) == ["output", "layers.5", "layers.8"]
    assert layers.width == got.shape[1] == 16 + 4 + 8
    for columns, one in zip(layers.columns.values(), expected, strict=True):
        torch.testing.assert_close(got[:, columns], one)


class Tokens(nn.Module):
    """A network whose block returns tokens, with or without a class token."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.num_prefix_tokens, self.cls_token = prefix, torch.zeros(1) if prefix else None
        self.block = nn.Linear(16, 4)
        self.attention = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        self.attention((images, images))
        return self.block(images.mean(1)).mean(1)  # type: ignore[no-any-return]  # (N, 16, 4) -> (N, 4)


@pytest.mark.parametrize("prefix", [0, 1])
def test_tokens_are_represented_by_the_class_token_or_their_mean(prefix: int) -> None:
    network, images = Tokens(prefix), torch.rand(2, 3, 16, 16)
    tokens = network.block(images.mean(1))
    got = LayerFeatures(network, ["block"], 16)(images)
    torch.testing.assert_close(got, tokens[:, 0] if prefix else tokens.mean(1))


def test_a_register_is_no_class_token() -> None:
    network = build_backbone("timm/vit_medium_patch16_reg4_gap_256", {"img_size": 32, "depth": 1})
    layers = LayerFeatures(network, ["norm"], 32)
    with torch.no_grad():
        images = torch.rand(2, 3, 32, 32)
        tokens = network.forward_features(images)  # type: ignore[operator]
        assert tokens.shape[1] == 4 + 4  # registers, then patches
        torch.testing.assert_close(layers(images), tokens[:, 4:].mean(1))


def test_maps_with_channels_last_are_averaged_over_their_positions() -> None:
    class Last(nn.Module):
        output_fmt = "NHWC"

        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.stage(images.permute(0, 2, 3, 1)).mean((1, 2))  # type: ignore[no-any-return]

    network, images = Last(), torch.rand(2, 3, 4, 4)
    layers = LayerFeatures(network, ["stage", "output"], 4)
    got = layers(images)
    torch.testing.assert_close(got[:, :5], got[:, 5:])


def test_a_vision_transformer_of_timm_returns_the_class_token() -> None:
    network = build_backbone("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 2})
    layers = LayerFeatures(network, ["blocks.1", "norm", "output"], 32)
    with torch.no_grad():
        got = layers(torch.rand(2, 3, 32, 32))
    assert layers.width == 3 * 192
    torch.testing.assert_close(got[:, layers.columns["norm"]], got[:, layers.columns["output"]])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("layers.88", r"'layers\.88' .*'layers\.8'.* output, layers, "),
        ("", "'' is not in"),
    ],
)
def test_an_unknown_name_is_refused_with_a_list_of_layers(name: str, sentence: str, network: nn.Module) -> None:
    with pytest.raises(ValueError, match=sentence):
        LayerFeatures(network, ["output", name], 16)


def test_a_layer_without_features_is_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="'attention' returns tuple"):
        LayerFeatures(Tokens(0), ["attention"], 16)
    network.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'spare' does not run"):
        LayerFeatures(network, ["spare"], 16)
