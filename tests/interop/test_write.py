"""Written files are read as their own project does, with the same features."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.models
from safetensors.torch import load_file
from torch import nn

from moco.config.convert import ENDINGS
from moco.interop.detectron2 import from_detectron2, load_detectron2, to_detectron2
from moco.interop.encoder_file import EncoderFile, build, read_encoder
from moco.interop.write import FORMATS, official_v3_name, timm_name, torchvision_name
from moco.models.encoder import projection_head
from tests.interop.networks import IMAGES, LOOK, VIT, source, trained

TINY_VIT = "timm/vit_tiny_patch16_224"


def written(folder: Path, to: str, file: EncoderFile, network: nn.Module) -> Path:
    path = folder / f"x{ENDINGS[to][0]}"
    assert FORMATS[to].fits(file)
    FORMATS[to].write(path, file, network)
    again = FORMATS[to].read(path, file)
    assert torch.equal(again.network(IMAGES), network(IMAGES))
    return path


def test_every_format_has_file_name_extensions() -> None:
    assert FORMATS.keys() == ENDINGS.keys()


# ---- ResNets ----


def test_torchvision(tmp_path: Path) -> None:
    network = trained()
    path = written(tmp_path, "torchvision", source(network), network)
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.fc = nn.Identity()
    assert torch.equal(theirs.eval()(IMAGES), network(IMAGES))


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_timm_resnet(tmp_path: Path, ending: str) -> None:
    network = trained()
    path = tmp_path / f"x{ending}"
    FORMATS["timm"].write(path, source(network), network)
    theirs = timm.create_model("resnet18", num_classes=0)
    theirs.load_state_dict(load_file(path) if ending == ".safetensors" else torch.load(path, weights_only=True))
    assert torch.equal(theirs.eval()(IMAGES), network(IMAGES))
    assert torch.equal(FORMATS["timm"].read(path, source(network)).network(IMAGES), network(IMAGES))


def test_timms_resnets_equal_torchvisions() -> None:
    network = trained("timm/resnet18")
    assert torchvision_name(source(network, "timm/resnet18")) == "resnet18"
    assert timm_name(source(network, "timm/resnet18")) == ("resnet18", {})
    assert torchvision_name(source(network, "resnet18", {"stem": "imagenet"})) == "resnet18"
    assert torchvision_name(source(network, "resnet18", {"stem": "cifar"})) is None
    assert torchvision_name(source(network, "resnet50", {"width_per_group": 128})) is None


def test_detectron2_names_equal_those_of_the_official_conversion(tmp_path: Path) -> None:
    network = trained()
    path = written(tmp_path, "detectron2", source(network), network)
    content = pickle.loads(path.read_bytes())  # as Detectron2 does
    assert content["matching_heuristics"] is True
    model = content["model"]
    state = network.state_dict()
    for theirs, ours in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res2.1.conv2.norm.weight": "layer1.1.bn2.weight",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res5.0.shortcut.norm.bias": "layer4.0.downsample.1.bias",
    }.items():
        assert isinstance(model[theirs], np.ndarray)
        assert np.array_equal(model[theirs], state[ours].numpy())
    assert len(model) == sum(not name.endswith("num_batches_tracked") for name in state)
    assert b"numpy._core" not in path.read_bytes()  # which NumPy before 1.26 lacks


def test_detectron2_names_can_be_inverted() -> None:
    names = list(trained("resnet50").state_dict())
    assert [from_detectron2(to_detectron2(name)) for name in names] == names
    assert len({to_detectron2(name) for name in names}) == len(names)
    assert to_detectron2("layer3.5.bn3.weight") == "res4.5.conv3.norm.weight"


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch EVIL",)


@pytest.mark.parametrize("content", [Evil(), {"model": Evil()}, {"model": np.array([Evil()], dtype=object)}])
def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(pickle.UnpicklingError, match="is not part of an array"):
        load_detectron2(tmp_path / "evil.pkl")
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_official_moco_v1_and_v2_with_their_heads(tmp_path: Path, layers: int) -> None:
    network, file = trained(), source(trained())
    head = projection_head(512, 0, 16, layers) if layers else nn.Identity()
    file = replace(file, head_weights=head.state_dict(), config={"epochs": 200})
    path = written(tmp_path, "moco_v2", file, network)
    content = torch.load(path, weights_only=True)
    assert (content["arch"], content["epoch"]) == ("resnet18", 200)
    assert torch.equal(content["state_dict"]["module.encoder_q.conv1.weight"], network.state_dict()["conv1.weight"])
    fc = {name for name in content["state_dict"] if ".fc." in name}
    names: list[list[str]] = [[], ["weight", "bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]]
    assert fc == {f"module.encoder_q.fc.{name}" for name in names[layers]}
    assert torch.equal(build(read_encoder(path))(IMAGES), head(network(IMAGES)))


def test_official_moco_v3_resnet_with_its_projector(tmp_path: Path) -> None:
    network = trained()
    head = projection_head(512, 8, 16, 2, norm=True).eval()
    file = replace(source(network), head_weights=head.state_dict())
    path = written(tmp_path, "moco_v3", file, network)
    content = torch.load(path, weights_only=True)
    assert content["arch"] == "resnet18"
    assert "module.base_encoder.fc.1.running_mean" in content["state_dict"]
    assert "module.base_encoder.layer4.1.bn2.weight" in content["state_dict"]
    assert torch.equal(build(read_encoder(path))(IMAGES), head(network(IMAGES)))


def test_a_head_of_another_version_is_left_out(tmp_path: Path) -> None:
    network = trained()
    v2 = replace(source(network), head_weights=projection_head(512, 0, 16, 2).state_dict())
    v3 = replace(source(network), head_weights=projection_head(512, 8, 16, 2, norm=True).state_dict())
    for to, file in (("moco_v2", v3), ("moco_v3", v2)):
        assert read_encoder(written(tmp_path, to, file, network)).head_weights == {}


# ---- ViTs ----


@pytest.mark.parametrize(("to", "ending"), [("timm", ".safetensors"), ("timm", ".pth"), ("deit", ".pth")])
def test_a_vit(tmp_path: Path, to: str, ending: str) -> None:
    network = trained(TINY_VIT, VIT)
    file = source(network, TINY_VIT, VIT)
    path = tmp_path / f"x{ending}"
    FORMATS[to].write(path, file, network)
    assert torch.equal(FORMATS[to].read(path, file).network(IMAGES), network(IMAGES))
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    state: Any = load_file(path) if ending == ".safetensors" else torch.load(path, weights_only=True)
    theirs.load_state_dict(state["model"] if to == "deit" else state)
    assert torch.equal(theirs.eval()(IMAGES), network(IMAGES))
    assert "timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32, depth=2)" in FORMATS[to].loading(file)


def test_the_vit_of_moco_v3_keeps_its_heads(tmp_path: Path) -> None:
    """The number of heads, 12, is not in the weights."""
    options: dict[str, Any] = {"img_size": 32, "patch_size": 16}
    network = trained("vit_small", options)
    file = source(network, "vit_small", options | {"freeze_patches": True})
    assert timm_name(file) == ("vit_small_patch16_224", {"num_heads": 12} | options)
    assert official_v3_name(file) is None  # the official code has 224 px
    written(tmp_path, "deit", file, network)
    six_heads = timm.create_model("vit_small_patch16_224", num_classes=0, **options).eval()
    six_heads.load_state_dict(network.state_dict())
    assert not torch.allclose(six_heads(IMAGES), network(IMAGES), atol=1e-3)


def test_official_moco_v3_vit(tmp_path: Path) -> None:
    network = trained("vit_small")
    file = source(network, "vit_small", {"img_size": 224})
    path = tmp_path / "x.pth.tar"
    FORMATS["moco_v3"].write(path, file, network)
    content = torch.load(path, weights_only=True)
    assert content["arch"] == "vit_small"
    assert "module.base_encoder.blocks.11.attn.qkv.weight" in content["state_dict"]
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(FORMATS["moco_v3"].read(path, file).network(images), network(images))


def test_deit_supports_only_plain_vits() -> None:
    assert not FORMATS["deit"].fits(source(trained()))
    registers = VIT | {"reg_tokens": 2}
    assert not FORMATS["deit"].fits(source(trained(TINY_VIT, registers), TINY_VIT, registers))
    pooled = VIT | {"global_pool": "avg"}  # the last norm follows the pooling
    assert not FORMATS["deit"].fits(source(trained(TINY_VIT, pooled), TINY_VIT, pooled))


# ---- every network ----


@pytest.mark.parametrize("config", [{}, {"seed": 3, "model": {"dim": 128}, "augment": {"flip_p": 0.5, "size": 8}}])
def test_safetensors_metadata_has_network_and_image_settings(tmp_path: Path, config: dict[str, Any]) -> None:
    options = {"width": 2, "pool": 2}
    network = trained("convnet", options)
    file = replace(source(network, "convnet", options), step=7, config=config)
    again = read_encoder(written(tmp_path, "safetensors", file, network))
    assert (again.backbone, again.options, again.images, again.step) == ("convnet", options, LOOK, 7)
    assert again.config.get("seed") == config.get("seed")
    assert [name for name, each in FORMATS.items() if each.fits(file)] == ["safetensors", "onnx", "torch_export", "hub"]
