"""The encoder of an evaluation, from a run or a file, and how its images are prepared; refusals."""

import functools
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from moco.config import ConfigError, RunWarning, TrainConfig
from moco.config.subject import SubjectConfig, check_subject
from moco.evaluation.subject import encoders, open_encoder, open_labeled, open_subject
from moco.evaluation.task import Task
from moco.interop.encoder_file import build, save_encoder
from moco.models.encoder import build_encoder
from moco.runs import checkpoint
from tests.evaluation.runs import sentence, trained

CPU = torch.device("cpu")


def test_a_run_provides_encoder_data_and_image_size(tmp_path: Path) -> None:
    config = SubjectConfig(run=str(trained(tmp_path / "run")))
    subject = open_subject(config)
    assert (subject.file.step, subject.output) == (7, tmp_path / "run")
    assert (subject.transform.size, subject.transform.resize, subject.transform.mean) == (16, 0, (0.5, 0.5, 0.5))
    bank, held_out = open_labeled(config, subject)
    assert (len(bank), len(held_out)) == (1297, 500)
    found = dict(encoders(subject, ["untrained"], CPU))
    assert list(found) == ["pretrained", "untrained"]
    task = Task(config, subject, bank, held_out, CPU)
    features = {name: task.features(each.backbone, held_out) for name, each in found.items()}
    assert features["pretrained"].shape == (500, 16)
    assert not torch.equal(features["pretrained"], features["untrained"])


def test_the_layout_and_the_unused_parts_of_a_foreign_file_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = build_encoder("convnet", {"width": 2}, 1, 0, 8, "batch", 0).get_submodule("backbone").state_dict()
    content = {name: {f"backbone.{key}": value for key, value in backbone.items()} for name in ("student", "teacher")}
    torch.save(content, tmp_path / "dino.pth")
    config = SubjectConfig(checkpoint=str(tmp_path / "dino.pth"), backbone="convnet", options={"width": 2})
    open_subject(config)
    assert capsys.readouterr().out.endswith(
        "dino.pth (DINO (teacher): convnet); not used: student; prepared as images.size=224 images.resize=256 "
        "images.mean=[0.485,0.456,0.406] images.std=[0.229,0.224,0.225] (defaults: the values of ImageNet)\n"
    )


@pytest.mark.parametrize("container", ["", "state_dict_ema"])
def test_images_for_a_file_of_timm_are_prepared_as_in_its_training(
    container: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Any] = timm.create_model("test_vit").state_dict()
    torch.save({container: state} if container else state, tmp_path / "vit.pth")
    config = SubjectConfig(checkpoint=str(tmp_path / "vit.pth"), backbone="timm/test_vit")
    transform = open_subject(config).transform
    assert (transform.size, transform.resize) == (160, 168)  # 160 / 0.95
    assert transform.mean == transform.std == (0.5, 0.5, 0.5)
    assert capsys.readouterr().out.endswith("std=[0.5,0.5,0.5] (defaults: the values of timm for this network)\n")
    config.images.mean = [0.1, 0.2, 0.3]
    assert open_subject(config).transform.mean == (0.1, 0.2, 0.3)


def test_only_a_layout_in_which_timm_publishes_gets_timms_preparation(tmp_path: Path) -> None:
    """DeiT's and MoCo v3's ViT-S have the network of timm's, but ImageNet's mean, for example."""
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "dino.pth")
    config = SubjectConfig(checkpoint=str(tmp_path / "dino.pth"), backbone="timm/test_vit")
    config.images.size = 160
    assert open_subject(config).transform.mean == (0.485, 0.456, 0.406)


def test_untrained_is_the_encoder_before_the_first_step(tmp_path: Path) -> None:
    start = open_subject(SubjectConfig(run=str(trained(tmp_path / "start", step=0))))
    end = open_subject(SubjectConfig(run=str(trained(tmp_path / "end"))))
    images = torch.rand(2, 3, 16, 16)
    first = dict(encoders(start, [], CPU))["pretrained"]
    assert torch.equal(first(images), dict(encoders(end, ["untrained"], CPU))["untrained"].backbone(images)) is False
    assert torch.equal(first.backbone(images), dict(encoders(end, ["untrained"], CPU))["untrained"].backbone(images))


def test_the_output_of_a_file_is_a_directory_of_its_name(tmp_path: Path) -> None:
    path = checkpoint.list_checkpoints(trained(tmp_path / "run") / "checkpoints")[0]
    assert open_subject(SubjectConfig(checkpoint=str(path))).output == Path("runs/step_00000007")
    assert open_subject(SubjectConfig(checkpoint=str(path), output="there")).output == Path("there")


@pytest.mark.parametrize("given", [{"backbone": "resnet50"}, {"options": {"width": 9}}])
def test_another_network_than_that_of_a_checkpoint_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    (path,) = (run / "checkpoints").glob("step_*.pt")
    sources: list[dict[str, Any]] = [{"checkpoint": str(path)}, {"run": str(run)}]
    for named in sources:
        right = open_subject(SubjectConfig(**named)).file
        open_subject(SubjectConfig(**named, backbone=right.backbone, options=right.options))
        with pytest.raises(ConfigError, match=r"\(checkpoint of moco\.train\) has backbone=convnet .*: remove \w+="):
            open_subject(SubjectConfig(**named, **given))


def test_another_backbone_than_that_of_encoder_safetensors_is_refused(tmp_path: Path) -> None:
    network = build_encoder("convnet", {"width": 2}, 1, 0, 8, "batch", 4).backbone
    about = {"model": {"backbone": "convnet", "options": {"width": 2}}, "augment": asdict(TrainConfig().augment)}
    save_encoder(tmp_path / "encoder.safetensors", network, about, step=1)
    file = str(tmp_path / "encoder.safetensors")
    with pytest.raises(ConfigError, match=r"\(safetensors\) has backbone=convnet .*: remove backbone=resnet18$"):
        open_encoder(SubjectConfig(checkpoint=file, backbone="resnet18"))
    assert open_encoder(SubjectConfig(checkpoint=file, backbone="convnet")).options == {"width": 2}


def test_the_output_of_an_encoder_of_ours_is_its_own_directory(tmp_path: Path) -> None:
    subject = open_subject(SubjectConfig(run=str(trained(tmp_path / "run"))))
    (tmp_path / "supervised").mkdir()
    file = tmp_path / "supervised" / "encoder.safetensors"
    save_encoder(file, build(subject.file).backbone, subject.file.config, 7)
    assert open_subject(SubjectConfig(checkpoint=str(file))).output == tmp_path / "supervised"


def test_the_image_size_can_be_changed(tmp_path: Path) -> None:
    config = SubjectConfig(run=str(trained(tmp_path / "run")))
    config.images.size, config.images.resize = 12, 14
    transform = open_subject(config).transform
    assert (transform.size, transform.resize, transform.mean) == (12, 14, (0.5, 0.5, 0.5))


def test_one_rule_for_mean_and_std(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    for field, values, part in [
        ("mean", [0.5], r"images\.mean=\[0\.5\] must hold one number for each of the 3 channels of .*check_data"),
        ("std", [0.5] * 4, r"images\.std=.* must hold one number for each of the 3 channels"),
        ("mean", [120.0] * 3, r"images\.mean=.* must be numbers within 0 \.\.\. 1, as pixels are; divide .* by 255"),
    ]:
        config = SubjectConfig(run=str(run))
        setattr(config.images, field, values)
        with pytest.raises(ConfigError, match=part):
            open_subject(config)
    config = SubjectConfig(run=str(run))
    config.images.mean, config.data.name, config.data.root, config.data.hold_out = [0.5], "folder", "mine", 0.2
    with pytest.raises(ConfigError, match=r": python -m moco\.check_data data\.root=mine stats=true computes them$"):
        open_subject(config)
    floats = SubjectConfig(run=str(trained(tmp_path / "floats", dtype="float32")))
    floats.images.mean = [120.0] * 3  # float32 is not scaled, and the run says that its images are of this type
    assert open_subject(floats).transform.mean == (120.0,) * 3


# ---- refusals ----


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "set run=DIR"),
        ({"run": "a", "checkpoint": "b"}, "run=a and checkpoint=b"),
        ({"run": "none"}, "does not exist"),
        ({"run": "empty"}, "has no checkpoint: train it first"),
        ({"checkpoint": "empty"}, "checkpoint=empty is a folder: name a file"),
        ({"checkpoint": "."}, "checkpoint=. is a folder: name a run in it, run=a"),
        ({"checkpoint": "a/checkpoints/"}, "checkpoint=a/checkpoints is a folder: set run=a, or name a file"),
        ({"checkpoint": "a"}, "checkpoint=a is a folder: set run=a"),
        ({"checkpoint": "begun"}, "checkpoint=begun is a folder, and run=begun has no checkpoint yet: run its command"),
        (
            {"run": "a/checkpoints/step_1.pt"},
            "is a file: set run=a, or checkpoint=a/checkpoints/step_1.pt",
        ),
        ({"run": "file"}, "run=file is a file: name the directory of a run, or checkpoint=file"),
    ],
)
def test_one_encoder_must_be_named(
    fields: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "a/checkpoints", "begun/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/checkpoints/step_1.pt", "file", "begun/config.yaml"):
        (tmp_path / name).touch()
    assert words in sentence(SubjectConfig(**fields))


def test_weights_that_do_not_fit_are_refused_before_the_data_is_opened(tmp_path: Path) -> None:
    network = build_encoder("convnet", {"width": 2}, 1, 0, 8, "batch", 4).backbone
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    config = SubjectConfig(checkpoint=str(tmp_path / "plain.pth"), backbone="resnet18")
    config.data.name, config.data.root = "folder", str(tmp_path / "missing")
    assert "has no weight of backbone=resnet18" in sentence(config)


def test_a_damaged_newest_checkpoint_names_the_previous_one(tmp_path: Path) -> None:
    run = trained(trained(tmp_path / "run", step=5), step=9)
    newest, before = checkpoint.list_checkpoints(run / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-50])
    assert f"use an older one, checkpoint={before} in place of run" in sentence(SubjectConfig(run=str(run)))
    before.write_bytes(before.read_bytes()[:-50])
    assert sentence(SubjectConfig(run=str(run))).endswith("the run has no readable older one")


def test_a_crop_larger_than_the_image_is_refused(tmp_path: Path) -> None:
    config = SubjectConfig(run=str(trained(tmp_path / "run")))
    config.images.size, config.images.resize = 300, 256
    assert sentence(config) == "images.size=300 exceeds images.resize=256: set images.resize=342 too"


def test_a_crop_of_a_small_part_warns(tmp_path: Path) -> None:
    config = SubjectConfig(run=str(trained(tmp_path / "run")))
    config.images.size, config.images.resize = 8, 17
    with pytest.warns(RunWarning, match=r"images\.resize=17 .* images\.size=8: .* 22 % .* set images\.resize=9$"):
        open_subject(config)
    config.images.resize = 16
    open_subject(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "best"),
        ("device", "tpu"),
        ("images_at_once", 0),
        ("threads", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("images.size", 0),
        ("images.resize", -1),
        ("images.mean", []),
        ("images.std", [0.5, 0.0, 0.5]),
        ("data.hold_out", 1.0),
    ],
)
def test_invalid_fields_are_named(name: str, value: object) -> None:
    config = SubjectConfig(run="x")
    *group, field = name.split(".")
    setattr(functools.reduce(getattr, group, config), field, value)
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)}="):
        check_subject(config)
