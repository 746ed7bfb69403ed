"""The teacher of a distillation: our files, other projects' files and timm; its normalization and its dimension."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moco.config import ConfigError, TrainConfig
from moco.interop.encoder_file import ForeignFileError, save_encoder
from moco.methods.distill_config import DistillConfig
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
        ("", 512, {}, r"method\.teacher=.* is a folder: name a file, such as method\.teacher=.*encoder\.safetensors"),
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
