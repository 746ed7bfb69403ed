"""MoCo v3 runs from their configuration: exact resume of a convnet and a ViT, and refused values."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from moco.config import ConfigError, TrainConfig, check
from moco.digest import digest
from moco.methods.build import build_method
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3 import MoCoV3
from moco.methods.moco_v3_config import MoCoV3Config
from moco.models.norm import GroupedBatchNorm
from moco.runs import checkpoint
from moco.training.trainer import pretrain

BACKBONES: dict[str, dict[str, Any]] = {
    "convnet": {"width": 2},
    "vit": {"dim": 16, "depth": 1, "heads": 2, "img_size": 16, "patch_size": 8},
}


def config(run: str = "runs/v3", backbone: str = "convnet") -> TrainConfig:
    made = TrainConfig(
        method=MoCoV3Config(temperature=1.0, momentum_end=1.0),
        run=run,
        epochs=1,
        batch_size=256,
        device="cpu",
        threads=1,
        log_every=1,
    )
    made.augment.size, made.augment.crop_scale = 16, [0.5, 1.0]
    model, optim = made.model, made.optim
    model.backbone, model.options, model.dim, model.head_hidden = backbone, BACKBONES[backbone], 8, 16
    model.head_norm, model.predictor_layers, model.predictor_hidden = True, 2, 16
    model.bn, model.shuffle_keys = "sync", False
    optim.name, optim.exclude = ("adamw", []) if backbone == "vit" else ("lars", ["bias", "norm"])
    made.evaluate.every_epochs = 0
    made.checkpoint.every_steps, made.checkpoint.keep_last = 2, 9
    return made


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run keeps its lock open
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path, backbone: str) -> None:
    full, cut = tmp_path / "full", tmp_path / "cut"
    pretrain(config(str(full), backbone))
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copy(full / "config.yaml", cut)
    shutil.copy(full / "checkpoints" / "step_00000002.pt", cut / "checkpoints")
    pretrain(config(str(cut), backbone))
    one, other = (checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0]) for run in (full, cut))
    assert one["step"] == other["step"] == 5
    assert digest(one["method"]) == digest(other["method"])
    assert digest(one["optimizer"]) == digest(other["optimizer"])
    earlier = checkpoint.load(full / "checkpoints" / "step_00000002.pt")
    assert digest(one["method"]) != digest(earlier["method"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run keeps its lock open
def test_a_run_of_an_earlier_version_resumes_with_timms_lars(tmp_path: Path) -> None:
    """Its optim.name is lars, which was timm's, and its configuration lacks newer fields."""
    full, cut = config(str(tmp_path / "full")), config(str(tmp_path / "cut"))
    full.optim.name, full.optim.weight_decay = "lars_timm", 0.01
    cut.optim.weight_decay = 0.01
    pretrain(full)
    state = checkpoint.load(tmp_path / "full" / "checkpoints" / "step_00000002.pt")
    state["config"]["optim"]["name"] = "lars"
    del state["config"]["optim"]["warmup_from_zero"]
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    checkpoint.save(tmp_path / "cut" / "checkpoints", 2, state, keep_last=9)
    pretrain(cut)
    one, other = (
        checkpoint.load(checkpoint.list_checkpoints(tmp_path / run / "checkpoints")[0]) for run in ("full", "cut")
    )
    assert digest(one["method"]) == digest(other["method"])
    fresh = config(str(tmp_path / "fresh"))  # MoCo v3's LARS, in a new run
    fresh.optim.weight_decay = 0.01
    pretrain(fresh)
    new = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "fresh" / "checkpoints")[0])
    assert digest(new["method"]) != digest(one["method"])


def test_the_method_is_built_with_its_heads() -> None:
    made = config()
    made.model.predictor_last_norm = False
    method = build_method(made)
    assert isinstance(method, MoCoV3)
    assert method.temperature == 1.0
    predictor = [type(layer).__name__ for layer in method.predictor.children()]
    assert predictor == ["Linear", "GroupedBatchNorm", "ReLU", "Linear"]
    head = list(method.encoder.get_submodule("head").children())
    assert [type(layer).__name__ for layer in head] == [*predictor, "GroupedBatchNorm"]
    assert {layer.group_size for layer in method.modules() if isinstance(layer, GroupedBatchNorm)} == {0}


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("", "batch_size", 1, "batch_size=1 leaves moco_v3 no negatives"),
        ("", "accumulate", 2, "accumulate=2 with model.bn=sync"),
        ("model", "predictor_layers", -1, "model.predictor_layers=-1 must be at least 0"),
        ("optim", "trust", 0.0, "optim.trust=0.0 must be above 0"),
    ],
)
def test_invalid_values_are_refused(group: str, field: str, value: float, message: str) -> None:
    made = config()
    check(made)
    setattr(getattr(made, group) if group else made, field, value)
    with pytest.raises(ConfigError) as caught:
        check(made)
    assert message in str(caught.value)


def test_a_predictor_is_refused_for_a_method_without_one() -> None:
    made = config()
    made.method = MoCoConfig(queue_size=64)
    with pytest.raises(ConfigError, match=r"model\.predictor_layers=2: moco "):
        check(made)
