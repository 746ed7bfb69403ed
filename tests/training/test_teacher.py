"""The teacher of a distillation: our files, other projects' files and timm; its normalization and its dimension."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moco.config import ConfigError, TrainConfig
from moco.interop.encoder_file import ForeignFileError, save_encoder
from moco.methods.distill_config import DistillConfig
from moco.models.backbones import build_backbone
from moco.training.teacher import Renormalize, load_teacher
from tests.interop.networks import IMAGES, saved, trained

SIZE = IMAGES.shape[-1]
VIT: dict[str, Any] = {"img_size": SIZE, "depth": 1}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def config(teacher: Path | str, dim: int, **method: Any) -> TrainConfig:
    made = TrainConfig(method=DistillConfig(teacher=str(teacher), **method))
    made.augment.size, made.model.dim = SIZE, dim
    return made


def test_a_file_of_ours_is_read_with_its_own_normalization(tmp_path: Path) -> None:
    network = trained("convnet", {"width": 2})
    about = {
        "model": {"backbone": "convnet", "options": {"width": 2}},
        "augment": {"size": SIZE, "eval_resize": 0, **HALF},
    }
    save_encoder(tmp_path / "encoder.safetensors", network, about, 1)
    teacher = load_teacher(config(tmp_path / "encoder.safetensors", 16))
    made = TrainConfig()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (made.augment.mean, made.augment.std))
    torch.testing.assert_close(teacher((IMAGES - mean) / std), network((IMAGES - 0.5) / 0.5))
    assert not teacher.training
    assert not any(each.requires_grad for each in teacher.parameters())


def test_a_plain_file_of_a_timm_model_needs_its_name(tmp_path: Path) -> None:
    network = trained("timm/vit_tiny_patch16_224", VIT)
    file = saved(tmp_path / "x.pth", network.state_dict())
    with pytest.raises(ForeignFileError, match="does not name its network"):
        load_teacher(config(file, 192))
    named = {"teacher_backbone": "timm/vit_tiny_patch16_224", "teacher_options": VIT}
    teacher = load_teacher(config(file, 192, **named))
    renormalize = next(each for each in teacher.modules() if isinstance(each, Renormalize))
    torch.testing.assert_close(teacher(IMAGES), network(renormalize(IMAGES)))


def test_a_model_of_timm_has_its_published_weights_and_normalization(tmp_path: Path) -> None:
    network = trained("timm/vit_tiny_patch16_224", VIT)
    file = saved(tmp_path / "x.pth", network.state_dict())
    offline = {"pretrained_cfg_overlay": {"file": str(file), "num_classes": 0, **HALF}, **VIT}
    teacher = load_teacher(config("timm/vit_tiny_patch16_224", 192, teacher_options=offline))
    renormalize = next(each for each in teacher.modules() if isinstance(each, Renormalize))
    torch.testing.assert_close(teacher(IMAGES), network(renormalize(IMAGES)))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (TrainConfig().augment.mean, TrainConfig().augment.std))
    torch.testing.assert_close(renormalize(IMAGES), (IMAGES * std + mean - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("teacher", "dim", "method", "message"),
    [
        ("missing.pth", 512, {}, r"method\.teacher=.*missing\.pth does not exist"),
        ("", 512, {}, r"method\.teacher=.* is a folder: name a file$"),
        ("x.pth", 100, {"teacher_backbone": "resnet18"}, r"model\.dim=100 is not the dimension .* set model\.dim=512"),
        ("x.pth", 512, {"teacher_backbone": "resnet18", "teacher_features": "projection"}, "holds no projection head"),
    ],
)
def test_what_does_not_fit_is_refused(
    teacher: str, dim: int, method: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "x.pth", trained("resnet18").state_dict())
    with pytest.raises(ConfigError, match=message):
        load_teacher(config(tmp_path / teacher, dim, **method))


def test_a_name_of_a_network_without_timm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resnet18 is the name of a network: write method\.teacher=timm/resnet18"):
        load_teacher(config("resnet18", 512))


def of_four_channels() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("convnet", {"width": 2, "channels": 4}).eval()


def bands(folder: Path) -> Path:
    """Write an encoder of moco for images of four channels."""
    about = {
        "model": {"backbone": "convnet", "options": {"width": 2}},
        "augment": {"size": SIZE, "eval_resize": 0, "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]},
        "data": {"channels": 4, "dtype": "uint16"},
    }
    save_encoder(folder / "bands.safetensors", of_four_channels(), about, 1)
    return folder / "bands.safetensors"


def test_another_backbone_than_that_of_the_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has backbone=convnet: remove method\.teacher_backbone=resnet18$"):
        load_teacher(config(bands(tmp_path), 16, teacher_backbone="resnet18"))


def test_a_teacher_of_four_channels_has_its_own_normalization(tmp_path: Path) -> None:
    made = config(bands(tmp_path), 16)
    made.data.channels, made.data.dtype = 4, "uint8"  # uint8 and uint16 come into the same range
    made.augment.mean, made.augment.std = [0.5] * 4, [0.25] * 4
    images = torch.rand(3, 4, SIZE, SIZE)
    mean, std = (torch.tensor(each).view(4, 1, 1) for each in ([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]))
    network = of_four_channels()
    torch.testing.assert_close(load_teacher(made)((images - 0.5) / 0.25), network((images - mean) / std))


def test_a_teacher_of_other_channels_or_another_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes images of 4 channels, and data\.channels=3: name a teacher"):
        load_teacher(config(bands(tmp_path), 16))
    made = config("timm/vit_tiny_patch16_224", 192, teacher_options=VIT)
    made.data.channels = 4
    with pytest.raises(ConfigError, match=r"takes images of 3 channels, and data\.channels=4"):
        load_teacher(made)
    made = config(bands(tmp_path), 16)
    made.data.channels, made.data.dtype = 4, "float32"
    with pytest.raises(ConfigError, match=r"trained on images of uint16, and data\.dtype=float32 has another range"):
        load_teacher(made)
