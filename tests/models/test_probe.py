"""A network that does not take the images, or does not return features, is found before training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.models.backbones import BACKBONES, build_backbone
from moco.models.probe import output_error

VIT: dict[str, Any] = {"dim": 8, "depth": 1, "heads": 2, "img_size": 32, "patch_size": 16}
TIMM_VIT = {"img_size": 32, "embed_dim": 12, "depth": 1}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet", {"width": 2}),
        ("resnet18", {"stem": "cifar"}),
        ("vit", VIT),
        ("timm/resnet10t", {}),
        ("timm/vit_tiny_patch16_224", TIMM_VIT),
    ],
)
def test_a_network_that_fits_is_not_changed(name: str, options: dict[str, Any]) -> None:
    network = build_backbone(name, options).train()
    next(network.children()).eval()
    modes = [module.training for module in network.modules()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert output_error(network, 32) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "size", "words"),
    [
        ("vit", VIT, 48, "48x48 pixels .*doesn't match model \\(32\\)"),
        ("timm/vit_tiny_patch16_224", TIMM_VIT, 48, "48x48 pixels .*Input height"),
        ("timm/vit_tiny_patch16_224", TIMM_VIT | {"global_pool": ""}, 32, r"\(2, 5, 12\), not .* \(2, 12\)"),
        ("timm/resnet10t", {"global_pool": ""}, 32, r"\(2, 512, 1, 1\), not .* \(2, 512\)"),
        ("timm/resnet10t", {"in_chans": 1}, 32, "32x32 pixels .*channels"),
        ("resnet18", {}, 0, "0x0 pixels"),
    ],
)
def test_a_network_that_does_not_fit_is_reported_in_one_sentence(
    name: str, options: dict[str, Any], size: int, words: str
) -> None:
    network = build_backbone(name, options)
    with pytest.raises(AssertionError, match=words):
        assert output_error(network, size, 3) == ""
    assert "\n" not in output_error(network, size, 3)


def test_tensors_that_are_no_buffers_are_used_on_their_device() -> None:
    class Scaled(nn.Module):
        num_features = 3

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.factor = nn.Linear(3, 3), torch.tensor(2.0)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.layer(images.mean((2, 3))) * self.factor
            return out

    assert output_error(Scaled(), 4) == ""


def test_options_that_make_the_constructor_fail_are_reported_in_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"model\.options=.* is invalid for model\.backbone='timm/resnet10t'"
    ) as caught:
        build_backbone("timm/resnet10t", {"features_only": True})
    assert "\n" not in str(caught.value)


def test_every_backbone_by_name_fits_its_own_size() -> None:
    for name in BACKBONES:
        options = VIT if name == "vit" else {}
        with torch.device("meta"):
            network = build_backbone(name, options)
        assert output_error(network, 32 if name == "vit" else 224) == "", name
