"""Files of other projects than official MoCo."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from safetensors.torch import save_file
from torch import Tensor, nn

from moco.interop.encoder_file import ForeignFileError, build, read_encoder
from moco.interop.foreign import torchvision_named
from tests.interop.networks import IMAGES, VIT, prefixed, saved, trained

NO_LAYOUT = r"has no weight of backbone=resnet18 in any known layout \(official MoCo .*\): its names are "
SOLO_LEARN = ("solo-learn or lightly", "SupContrast or solo-learn before 2022")
TINY = "timm/vit_tiny_patch16_224"
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
    assert read_encoder(path, weights, "resnet18").layout == "solo-learn or lightly"
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
    assert read_encoder(path, weights, "resnet18").layout in SOLO_LEARN
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
    with pytest.raises(ForeignFileError, match=NO_LAYOUT + r"state_dict\.backbone\.1\.weight, "):
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


def test_a_state_dict_without_a_known_layout_is_refused(tmp_path: Path) -> None:
    """`encoder.` is a prefix of SupContrast, but also a module of torchvision's transformers."""
    state = {"class_token": torch.zeros(1), "encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(1)}
    with pytest.raises(
        ForeignFileError, match=NO_LAYOUT + r"class_token, encoder\.layers\.encoder_layer_0\.ln_1\.weight"
    ):
        features(saved(tmp_path / "vit.pth", state))
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ForeignFileError, match=NO_LAYOUT):
        features(tmp_path / "vit.safetensors")


def nested(path: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Put a state dict into dicts: nested("a.b", state) is {"a": {"b": state}}."""
    for name in reversed(path.split(".")):
        state = {name: state}  # type: ignore[dict-item]
    return state


@pytest.mark.parametrize(
    ("container", "prefix", "layout"),
    [
        ("state_dict", "model.", "plain state dict"),  # Lightning modules
        ("state_dict", "net.", "plain state dict"),
        ("state_dict", "model.encoder.", "SupContrast or solo-learn before 2022"),
        ("state_dict", "model._orig_mod.backbone.", "solo-learn or lightly"),
        ("model_state_dict", "", "plain state dict"),
        ("model_state_dict", "module.", "plain state dict"),
        ("net", "module.", "plain state dict"),
        ("network", "backbone.", "solo-learn or lightly"),
        ("model", "encoder.module.", "SupContrast or solo-learn before 2022"),
        ("model", "module.backbone.", "solo-learn or lightly"),
        ("model", "module.encoder_q.", "official MoCo v1/v2"),
        ("teacher", "backbone.", "DINO (teacher)"),
        ("teacher", "module.backbone.", "DINO (teacher)"),
        ("student", "module.backbone.", "DINO (student)"),
        ("state_dict", "teacher_backbone.", "lightly's DINO (teacher)"),
        ("state_dict", "student_backbone.", "lightly's DINO (student)"),
        ("state_dict_ema", "", "timm (average of the weights)"),
        ("state_dict_ema", "module.", "timm (average of the weights)"),
        ("model_ema", "module.", "torchvision's references (average of the weights)"),
        ("classy_state_dict.base_model.model.trunk", "_feature_blocks.", "VISSL"),
        ("model_state_dict", "_feature_blocks.", "plain state dict"),  # VISSL's converted files
    ],
)
def test_layouts(tmp_path: Path, container: str, prefix: str, layout: str) -> None:
    classifier = {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    content = nested(container, prefixed(prefix, trained().state_dict() | classifier))
    content |= {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}}
    path = saved(tmp_path / "x.pth", content)
    assert torch.equal(features(path), trained()(IMAGES))
    assert read_encoder(path, "encoder", "resnet18").layout == layout


def test_dino_uses_the_teacher(tmp_path: Path) -> None:
    """A checkpoint of DINO's main_dino.py: the student under DDP, the teacher without it, and argparse's settings."""
    head = {"head.mlp.0.weight": torch.zeros(8, 192), "head.last_layer.weight_g": torch.ones(8, 1)}
    student, teacher = (prefixed("backbone.", trained(TINY, VIT, seed).state_dict()) | head for seed in (0, 1))
    content = {"student": prefixed("module.", student), "teacher": teacher, "dino_loss": {"center": torch.zeros(1, 8)}}
    path = saved(tmp_path / "checkpoint.pth", content | {"args": Namespace(arch="vit_tiny", patch_size=16)})
    for weights in ("encoder", "momentum_encoder"):
        file = read_encoder(path, weights, TINY, VIT)
        assert (file.layout, file.unused) == ("DINO (teacher)", ("dino_loss", "student", "teacher.head"))
        assert torch.equal(build(file).get_submodule("backbone")(IMAGES), trained(TINY, VIT, 1)(IMAGES))
    with pytest.raises(ForeignFileError, match="how many heads its ViT has"):
        read_encoder(path, "encoder", "vit_small")


def test_an_average_of_the_weights_is_preferred(tmp_path: Path) -> None:
    """timm's train.py saves both, torchvision's train.py adds a counter to the average."""
    last, average = trained(seed=1).state_dict(), trained().state_dict()
    contents: dict[str, dict[str, Any]] = {
        "timm": {"state_dict": last, "state_dict_ema": average, "arch": "resnet18", "epoch": 3},
        "torchvision": {"model": last, "model_ema": {"n_averaged": torch.tensor(7)} | prefixed("module.", average)},
    }
    for name, content in contents.items():
        assert torch.equal(features(saved(tmp_path / f"{name}.pth", content)), trained()(IMAGES))


def test_the_layout_with_the_complete_backbone_is_taken(tmp_path: Path) -> None:
    """mmselfsup's MoCo holds the encoder twice, under `encoder_q.0.` too; VOLO has a module `network`."""
    state = prefixed("encoder_q.0.", trained(seed=1).state_dict()) | prefixed("backbone.", trained().state_dict())
    assert torch.equal(features(saved(tmp_path / "m.pth", {"state_dict": state})), trained()(IMAGES))
    partial = {name: value for name, value in trained(seed=1).state_dict().items() if not name.startswith("layer4")}
    content = {"teacher": prefixed("backbone.", partial), "student": prefixed("backbone.", trained().state_dict())}
    assert torch.equal(features(saved(tmp_path / "d.pth", content)), trained()(IMAGES))


def supcontrast(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute features of SupContrast's ResNet-18: a 3x3 stem padded by 1, no max-pooling, "shortcut" in its names."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{each}"] for each in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def conv(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], None, stride, padding)

    x = F.relu(norm(conv(x, "conv1", 1, 1), "bn1"))
    for block in [f"layer{stage}.{number}" for stage in range(1, 5) for number in range(2)]:
        stride = 2 if f"{block}.shortcut.0.weight" in state else 1
        out = F.relu(norm(conv(x, f"{block}.conv1", stride, 1), f"{block}.bn1"))
        out = norm(conv(out, f"{block}.conv2", 1, 1), f"{block}.bn2")
        shortcut = norm(conv(x, f"{block}.shortcut.0", 2, 0), f"{block}.shortcut.1") if stride == 2 else x
        x = F.relu(out + shortcut)
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


@pytest.mark.parametrize(
    ("container", "prefix", "extra"),
    [
        ("model", "encoder.module.", {"head.0.weight": torch.zeros(4, 512)}),  # SupContrast on several GPUs
        ("model", "encoder.", {"head.0.weight": torch.zeros(4, 512)}),  # on one
        ("net", "module.", {"module.linear.weight": torch.zeros(10, 512)}),  # kuangliu/pytorch-cifar
    ],
)
def test_supcontrast_and_pytorch_cifar(tmp_path: Path, container: str, prefix: str, extra: dict[str, Tensor]) -> None:
    named = trained(options={"stem": "cifar"}).state_dict()
    state = {name.replace("downsample", "shortcut"): value for name, value in named.items()}
    path = saved(tmp_path / "last.pth", {"opt": Namespace(), container: prefixed(prefix, state) | extra})
    assert read_encoder(path, backbone="resnet18").options == {"stem": "cifar"}
    torch.testing.assert_close(features(path), supcontrast(state, IMAGES))


def test_only_the_numbered_layers_of_a_resnet_are_renamed() -> None:
    named = trained().state_dict()
    numbered = as_children(trained()).state_dict()
    renamed = torchvision_named(numbered)
    assert renamed.keys() == named.keys()
    assert all(torch.equal(renamed[name], value) for name, value in named.items())
    for other in (named, {"0.weight": torch.zeros(1)}, {}):
        assert torchvision_named(other) == other
