"""Files of lightly, solo-learn, torchvision and timm."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
from torch import nn

from moco.interop.encoder_file import ForeignFileError, build, read_encoder
from moco.interop.foreign import PLAIN, layout_of, torchvision_named
from tests.interop.networks import IMAGES, VIT, prefixed, saved, trained

PROJECTOR = {"projector.0.weight": torch.zeros(4, 512), "classifier.weight": torch.zeros(10, 512)}


def features(path: Path, weights: str = "encoder", backbone: str = "resnet18", **options: Any) -> torch.Tensor:
    return build(read_encoder(path, weights, backbone, options)).get_submodule("backbone")(IMAGES)  # type: ignore[no-any-return]


def as_children(network: nn.Module) -> nn.Module:
    """Remove the classifier as lightly's examples do."""
    return nn.Sequential(*list(network.children())[:-1])


@pytest.mark.parametrize(("weights", "seed"), [("encoder", 0), ("momentum_encoder", 1)])
def test_lightly(tmp_path: Path, weights: str, seed: int) -> None:
    query, key = trained(seed=0), trained(seed=1)
    state = prefixed("backbone.", as_children(query).state_dict())
    state |= prefixed("backbone_momentum.", as_children(key).state_dict())
    assert "backbone.4.0.conv1.weight" in state
    state |= {"projection_head.layers.0.weight": torch.zeros(512, 512)}
    path = saved(tmp_path / "epoch=99.ckpt", {"epoch": 99, "pytorch-lightning_version": "2.5", "state_dict": state})
    assert torch.equal(features(path, weights), trained(seed=seed)(IMAGES))
    assert read_encoder(path, weights, "resnet18").layout == "lightly"
    with pytest.raises(ForeignFileError, match="does not name its network: set backbone=NAME"):
        read_encoder(path)


@pytest.mark.parametrize(
    ("prefix", "momentum"), [("backbone.", "momentum_backbone."), ("encoder.", "momentum_encoder.")]
)
@pytest.mark.parametrize(("weights", "seed"), [("encoder", 0), ("momentum_encoder", 1)])
def test_solo_learn_current_and_before_2022(
    tmp_path: Path, prefix: str, momentum: str, weights: str, seed: int
) -> None:
    state = prefixed(prefix, trained(seed=0).state_dict()) | prefixed(momentum, trained(seed=1).state_dict())
    path = saved(tmp_path / "mocov2plus.ckpt", {"state_dict": state | PROJECTOR})
    assert torch.equal(features(path, weights), trained(seed=seed)(IMAGES))
    assert read_encoder(path, weights, "resnet18").layout.startswith("solo-learn")
    assert read_encoder(path, weights, "resnet18").head_weights == {}


def test_solo_learn_with_a_vit(tmp_path: Path) -> None:
    network = trained("timm/vit_tiny_patch16_224", VIT)
    path = saved(tmp_path / "v.ckpt", {"state_dict": prefixed("backbone.", network.state_dict())})
    assert torch.equal(features(path, backbone="timm/vit_tiny_patch16_224", **VIT), network(IMAGES))


def test_a_file_without_momentum_encoder(tmp_path: Path) -> None:
    path = saved(tmp_path / "simclr.ckpt", {"state_dict": prefixed("backbone.", trained().state_dict()) | PROJECTOR})
    assert torch.equal(features(path), trained()(IMAGES))
    with pytest.raises(ForeignFileError, match="holds no momentum encoder: set weights=encoder"):
        read_encoder(path, "momentum_encoder", "resnet18")


@pytest.mark.parametrize("options", [{}, {"stem": "cifar"}])
def test_a_small_stem_of_unknown_padding_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    """solo-learn's CIFAR stem pads by 2: the weights would load, but give other features."""
    state = prefixed("backbone.", trained(options={"stem": "cifar"}).state_dict())
    with pytest.raises(ForeignFileError, match="of unknown padding"):
        read_encoder(saved(tmp_path / "c.ckpt", {"state_dict": state}), "encoder", "resnet18", options)


def test_another_numbering_is_refused(tmp_path: Path) -> None:
    shifted = nn.Sequential(nn.Identity(), *trained().children())  # as in lightly's own ResNet
    path = saved(tmp_path / "l.ckpt", {"state_dict": prefixed("backbone.", shifted.state_dict())})
    with pytest.raises(ForeignFileError, match="no weight matches: 100 of 100 weights are missing"):
        features(path)


def test_a_larger_numbered_network_is_refused(tmp_path: Path) -> None:
    state = prefixed("backbone.", as_children(trained("resnet34")).state_dict())
    path = saved(tmp_path / "l.ckpt", {"state_dict": state})
    with pytest.raises(ForeignFileError, match=r"weights in the file are unknown \(layer1\.2\.bn1\.bias"):
        features(path)


def test_torchvision_and_timm_with_their_classifiers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().eval()
    path = saved(tmp_path / "r.pth", resnet.state_dict())
    expected = as_children(resnet)(IMAGES).flatten(1)
    assert torch.equal(features(path), expected)
    assert torch.equal(features(path, backbone="timm/resnet18"), expected)
    vit: Any = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    path = saved(tmp_path / "v.pth", vit.state_dict())
    assert torch.equal(
        features(path, backbone="timm/vit_tiny_patch16_224", **VIT),
        vit.forward_head(vit.forward_features(IMAGES), pre_logits=True),
    )


def test_a_norm_after_the_pooling_belongs_to_the_backbone(tmp_path: Path) -> None:
    """ConvNeXt's head has a norm and the classifier."""
    convnext: Any = timm.create_model("convnext_atto", depths=(1, 1, 1, 1)).eval()
    convnext.head.norm.weight.data.uniform_()
    path = saved(tmp_path / "c.pth", convnext.state_dict())
    expected = convnext.forward_head(convnext.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(features(path, backbone="timm/convnext_atto", depths=(1, 1, 1, 1)), expected)


def test_torchvisions_vit_is_not_taken_for_an_old_solo_learn_file() -> None:
    assert layout_of({"class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"}) == PLAIN


def test_only_the_numbered_layers_of_a_resnet_are_renamed() -> None:
    named = trained().state_dict()
    numbered = as_children(trained()).state_dict()
    renamed = torchvision_named(numbered)
    assert renamed.keys() == named.keys()
    assert all(torch.equal(renamed[name], value) for name, value in named.items())
    for other in (named, {"0.weight": torch.zeros(1)}, {}):
        assert torchvision_named(other) == other
