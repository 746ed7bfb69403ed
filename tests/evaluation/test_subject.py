"""The subject of an evaluation, from a run or a file: encoder, data, preparation of images; refusals."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from moco.builder import KeyQueue, MoCo
from moco.config import ConfigError, RunWarning, TrainConfig
from moco.config.subject import SubjectConfig, check_subject
from moco.data.decode import ImageError
from moco.data.sources import Source
from moco.evaluation.subject import data_config, encoders, is_other_data, open_labeled, open_subject
from moco.evaluation.task import Task, describe
from moco.interop.encoder_file import build, save_encoder
from moco.methods.moco_config import MoCoConfig
from moco.models.encoder import build_encoder
from moco.runs import checkpoint

CPU = torch.device("cpu")


def trained(folder: Path, data: str = "digits", step: int = 7, supervised: bool = False, **fields: str) -> Path:
    """Write a run's directory with a checkpoint of a tiny encoder."""
    config = TrainConfig(method=MoCoConfig(), seed=3)
    config.model.backbone, config.model.options, config.model.dim = "convnet", {"width": 2}, 8
    config.augment.size, config.augment.mean, config.augment.std = 16, [0.5] * 3, [0.5] * 3
    config.data.name, config.data.workers = data, 0
    config.method = MoCoConfig(labels=supervised)
    for name, value in fields.items():
        setattr(config.data, name, value)
    torch.manual_seed(config.seed)
    method = MoCo(build_encoder("convnet", {"width": 2}, 2, 0, 8, "grouped", 4), KeyQueue(16, 8))
    if step:
        for parameter in method.encoder.parameters():
            parameter.data.mul_(1.5)
    state = {"config": asdict(config), "step": step, "method": method.state_dict()}
    checkpoint.save(folder / "checkpoints", step, state, keep_last=2)
    return folder


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def configured(**fields: str) -> SubjectConfig:
    return SubjectConfig(**fields)  # type: ignore[arg-type]


def described(config: SubjectConfig, bank: Source, held_out: Source) -> dict[str, Any]:
    return describe(Task(config, open_subject(config), bank, held_out, CPU), "backbone")


def test_a_run_provides_encoder_data_and_image_size(tmp_path: Path) -> None:
    config = configured(run=str(trained(tmp_path / "run")))
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
        "images.mean=[0.485,0.456,0.406] images.std=[0.229,0.224,0.225] (the values of ImageNet)\n"
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
    assert capsys.readouterr().out.endswith("images.std=[0.5,0.5,0.5] (the values of timm for this network)\n")
    config.images.mean = [0.1, 0.2, 0.3]
    assert open_subject(config).transform.mean == (0.1, 0.2, 0.3)


def test_only_a_layout_in_which_timm_publishes_gets_timms_preparation(tmp_path: Path) -> None:
    """DeiT's and MoCo v3's ViT-S have the network of timm's, but ImageNet's mean, for example."""
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "dino.pth")
    config = SubjectConfig(checkpoint=str(tmp_path / "dino.pth"), backbone="timm/test_vit")
    config.images.size = 160
    assert open_subject(config).transform.mean == (0.485, 0.456, 0.406)


def test_data_that_the_run_did_not_have_is_other_data(tmp_path: Path) -> None:
    config = configured(run=str(trained(tmp_path / "run")))
    subject = open_subject(config)
    assert not is_other_data(config, subject)
    config.data.name = "cifar10"
    assert is_other_data(config, subject)


def test_untrained_is_the_encoder_before_the_first_step(tmp_path: Path) -> None:
    start = open_subject(configured(run=str(trained(tmp_path / "start", step=0))))
    end = open_subject(configured(run=str(trained(tmp_path / "end"))))
    images = torch.rand(2, 3, 16, 16)
    first = dict(encoders(start, [], CPU))["pretrained"]
    assert torch.equal(first(images), dict(encoders(end, ["untrained"], CPU))["untrained"].backbone(images)) is False
    assert torch.equal(first.backbone(images), dict(encoders(end, ["untrained"], CPU))["untrained"].backbone(images))


def test_the_output_of_a_file_is_a_directory_of_its_name(tmp_path: Path) -> None:
    path = checkpoint.list_checkpoints(trained(tmp_path / "run") / "checkpoints")[0]
    assert open_subject(configured(checkpoint=str(path))).output == Path("runs/step_00000007")
    assert open_subject(configured(checkpoint=str(path), output="there")).output == Path("there")


def test_the_output_of_an_encoder_of_ours_is_its_own_directory(tmp_path: Path) -> None:
    subject = open_subject(configured(run=str(trained(tmp_path / "run"))))
    (tmp_path / "supervised").mkdir()
    file = tmp_path / "supervised" / "encoder.safetensors"
    save_encoder(file, build(subject.file).backbone, subject.file.config, 7)
    assert open_subject(configured(checkpoint=str(file))).output == tmp_path / "supervised"


def test_the_image_size_can_be_changed(tmp_path: Path) -> None:
    config = configured(run=str(trained(tmp_path / "run")))
    config.images.size, config.images.resize = 12, 14
    transform = open_subject(config).transform
    assert (transform.size, transform.resize, transform.mean) == (12, 14, (0.5, 0.5, 0.5))


def test_for_another_data_set_no_field_of_the_run_applies(tmp_path: Path) -> None:
    config = configured(run=str(trained(tmp_path / "run", "folder", root="theirs", eval_root="held", labels="folder")))
    subject = open_subject(config)
    assert data_config(config, subject).eval_root == "held"
    config.data.workers = 5
    assert (data_config(config, subject).eval_root, data_config(config, subject).workers) == ("held", 5)
    config.data.root = "./theirs"  # the same folder
    assert (data_config(config, subject).eval_root, data_config(config, subject).labels) == ("held", "folder")
    config.data.root = "mine"
    assert (data_config(config, subject).name, data_config(config, subject).eval_root) == ("folder", "")
    config.data.name = "digits"
    assert data_config(config, subject).labels == "none"


def test_a_file_outside_of_a_run_directory_names_no_folder(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "folder", root="theirs", eval_root="held", labels="folder")
    config = configured(checkpoint=str(checkpoint.list_checkpoints(run / "checkpoints")[0]))
    subject = open_subject(config)
    for name in ("config.yaml", "metrics.jsonl"):
        with pytest.raises(ConfigError, match=r"add data\.root=theirs data\.eval_root=held"):
            data_config(config, subject)
        (run / name).touch()
    assert data_config(config, subject).root == "theirs"
    (run / "metrics.jsonl").unlink()
    config.data.root = "theirs"
    assert (data_config(config, subject).eval_root, data_config(config, subject).labels) == ("", "folder")
    config.data.eval_root = "mine"
    assert data_config(config, subject).eval_root == "mine"


def test_hold_out_splits_off_a_part_of_each_class(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 10, "b": 2, "c": 5})
    config = configured(run=str(trained(tmp_path / "run", "folder", root=str(root), labels="folder")))
    config.data.hold_out = 0.4
    with pytest.warns(RunWarning, match=r"hold_out=0\.4 .* trained on, without"):
        bank, held_out = open_labeled(config, open_subject(config))
    assert bank.labels is not None
    assert held_out.labels is not None
    assert np.bincount(held_out.labels).tolist() == [4, 1, 2]
    names = [each.name(i) for each in (bank, held_out) for i in range(len(each))]
    assert sorted(names) == sorted(set(names))
    assert len(names) == 17
    with pytest.warns(RunWarning):
        again = open_labeled(config, open_subject(config))[1]
    assert [again.name(i) for i in range(7)] == [held_out.name(i) for i in range(7)]
    assert described(config, bank, held_out)["data"]["held_out_seen"] is True
    copy = write_images(tmp_path / "copy", {"a": 10, "b": 2, "c": 5})
    config.data.name, config.data.root, config.data.labels = "folder", str(copy), "folder"
    with warnings.catch_warnings(action="error"):  # these it has not seen
        bank, held_out = open_labeled(config, open_subject(config))
    assert described(config, bank, held_out)["data"]["held_out_seen"] is False


@pytest.mark.parametrize("resident", [False, True])
def test_unreadable_images_are_left_out_of_both_splits(
    resident: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained(tmp_path / "run"))
    training = write_images(tmp_path / "train", {"a": 5, "b": 3})
    held = write_images(tmp_path / "test", {"a": 2, "b": 2})
    for file in (training / "a" / "1.png", held / "b" / "0.png"):
        file.write_bytes(file.read_bytes()[:60])
    config = SubjectConfig(run=run, on_bad_image="skip")
    config.data.name, config.data.root, config.data.eval_root = "folder", str(training), str(held)
    config.data.labels, config.data.resident = "folder", resident
    bank, held_out = open_labeled(config, open_subject(config))
    assert [bank.name(i) for i in range(len(bank))] == [f"a/{i}.png" for i in (0, 2, 3, 4)] + [
        f"b/{i}.png" for i in range(3)
    ]
    assert [held_out.name(i) for i in range(len(held_out))] == ["a/0.png", "a/1.png", "b/1.png"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of the 8 training images cannot be read: a/1.png" in printed
    assert "1 of the 4 held-out images cannot be read: b/0.png" in printed
    for file in held.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises((ConfigError, ImageError), match=r"held-out images cannot be read|\.png: the file is empty"):
        open_labeled(config, open_subject(config))


def test_another_split_than_that_of_the_run_is_reported_as_seen(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 4, "b": 4})
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.*"))
    tables = [tmp_path / "own.csv", tmp_path / "other.csv"]
    for held, table in enumerate(tables):
        rows = [f"{path},{path[0]},{'test' if i % 4 == held else 'train'}\n" for i, path in enumerate(paths)]
        table.write_text("path,label,split\n" + "".join(rows))
    run = trained(tmp_path / "run", "folder", root=str(root), label_file=str(tables[0]))
    config = configured(run=str(run))
    with warnings.catch_warnings(action="error"):
        bank, held_out = open_labeled(config, open_subject(config))
    assert (len(bank), len(held_out)) == (6, 2)
    assert described(config, bank, held_out)["data"]["held_out_seen"] is False
    config.data.label_file = str(tables[1])
    with pytest.warns(RunWarning, match=r"data\.label_file=.*other\.csv with another split .* trained on, without"):
        bank, held_out = open_labeled(config, open_subject(config))
    assert described(config, bank, held_out)["data"]["held_out_seen"] is True


def test_the_description_reproduces_a_result_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("train"), {"a": 3, "b": 2})
    write_images(Path("test"), {"a": 1, "b": 1})
    trained(Path("run"), "folder", root="train", eval_root="test", labels="folder")
    config = configured(run="run")
    subject = open_subject(config)
    found = json.loads(json.dumps(described(config, *open_labeled(config, subject))))
    assert found["source"] == str(tmp_path / "run" / "checkpoints" / "step_00000007.pt")
    assert (found["backbone"], found["options"]) == ("convnet", {"width": 2})
    assert (found["weights"], found["step"]) == ("encoder", 7)
    data = {name: found["data"][name] for name in ("root", "eval_root", "labels", "hold_out", "training", "held_out")}
    assert data == {
        "root": str(tmp_path / "train"),
        "eval_root": str(tmp_path / "test"),
        "labels": "folder",
        "hold_out": 0.0,
        "training": 5,
        "held_out": 2,
    }
    assert found["look"] == {"size": 16, "resize": 0, "mean": [0.5] * 3, "std": [0.5] * 3}
    config.run = str(trained(Path("other"), "folder", 0, root="train", eval_root="test", labels="folder"))
    other = described(config, *open_labeled(config, subject))
    assert other["sha256"] != found["sha256"]


# ---- refusals ----


def test_labels_that_trained_the_encoder_are_refused(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 5, "b": 5})
    run = trained(tmp_path / "run", "folder", root=str(root), labels="folder", supervised=True)
    config = configured(run=str(run))
    config.data.hold_out = 0.2
    assert "data.hold_out=0.2 holds out images that the encoder was trained on, with their labels" in sentence(config)
    config.data.root = str(root / ".." / "images")
    config.data.labels = "folder"
    assert "with their labels" in sentence(config)


def test_a_given_label_file_replaces_the_labels_of_the_run(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 4, "b": 4})
    run = str(trained(tmp_path / "run", "folder", root=str(root), labels="folder", eval_root=str(root)))
    lines = ["path,label,split"] + [f"{x}/{i}.png,{x},{'test' if i else 'train'}" for x in "ab" for i in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    config = SubjectConfig(run=run)
    config.data.label_file = str(tmp_path / "labels.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # the split is another one
        bank, held_out = open_labeled(config, open_subject(config))
    assert (len(bank), len(held_out)) == (2, 6)


def test_hold_out_with_a_held_out_split_is_refused(tmp_path: Path) -> None:
    config = configured(run=str(trained(tmp_path / "run")))
    config.data.hold_out = 0.2
    assert "data.hold_out=0.2, but data.name=digits has a held-out split: remove" in sentence(config)


def test_a_backbone_with_a_run_is_refused(tmp_path: Path) -> None:
    config = configured(run="run", backbone="resnet18")
    config.options = {"stem": "cifar"}
    message = sentence(config)
    assert all(part in message for part in ("run=run", "backbone=resnet18", "options={'stem': 'cifar'}"))


def test_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert f"is a folder: set run={tmp_path}" in sentence(configured(checkpoint=str(tmp_path)))


def test_a_crop_larger_than_the_image_is_refused(tmp_path: Path) -> None:
    config = configured(run=str(trained(tmp_path / "run")))
    config.images.size, config.images.resize = 300, 256
    assert sentence(config) == "images.size=300 exceeds images.resize=256: set images.resize=343 too"


def test_weights_that_do_not_fit_are_refused_before_the_data_is_opened(tmp_path: Path) -> None:
    network = build_encoder("convnet", {"width": 2}, 1, 0, 8, "batch", 4).backbone
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    config = configured(checkpoint=str(tmp_path / "plain.pth"), backbone="resnet18")
    config.data.name, config.data.root = "folder", str(tmp_path / "missing")
    assert "has no weight of backbone=resnet18" in sentence(config)


def test_a_relative_data_path_of_a_run_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run", "folder", root="images", labels="folder")
    monkeypatch.chdir(tmp_path)
    message = sentence(configured(run=str(run)))
    assert "(data.root=images, taken from the run, which started in another working directory: set" in message
    config = configured(run=str(run))
    config.data.root = "mine"
    assert "from the run" not in sentence(config)


def sentence(config: SubjectConfig) -> str:
    def attempt() -> None:
        check_subject(config)
        open_labeled(config, open_subject(config))

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_encoder_must_be_named() -> None:
    assert "run=DIR" in sentence(configured())
    assert "run=a and checkpoint=b" in sentence(configured(run="a", checkpoint="b"))


def test_a_run_that_does_not_exist_or_has_no_checkpoint(tmp_path: Path) -> None:
    assert "does not exist" in sentence(configured(run=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    assert "has no checkpoint: train it first" in sentence(configured(run=str(tmp_path / "empty")))


def test_a_damaged_newest_checkpoint_names_the_previous_one(tmp_path: Path) -> None:
    run = trained(trained(tmp_path / "run", step=5), step=9)
    newest, before = checkpoint.list_checkpoints(run / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-50])
    assert f"use an older one, checkpoint={before}" in sentence(configured(run=str(run)))


def test_data_without_labels(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 2, "b": 2})
    run = trained(tmp_path / "run", "folder", root=str(root))
    assert "data.name=folder has no labels for the evaluation: set data.labels=folder" in sentence(
        configured(run=str(run))
    )


def test_data_without_a_held_out_split(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 2, "b": 2})
    run = trained(tmp_path / "run", "folder", root=str(root), labels="folder")
    assert "no held-out split: set data.eval_root=DIR" in sentence(configured(run=str(run)))


def test_a_single_class_and_a_missing_class(tmp_path: Path) -> None:
    held = write_images(tmp_path / "held", {"a": 2, "b": 2})
    one = write_images(tmp_path / "one", {"a": 2})
    run = trained(tmp_path / "run", "folder", root=str(one), labels="folder", eval_root=str(held))
    assert "one class folder only (a)" in sentence(configured(run=str(run)))
    single = configured(run=str(trained(tmp_path / "run1", "folder", root=str(held), labels="folder")))
    single.data.root, single.data.labels, single.data.hold_out = (
        str(write_images(tmp_path / "few", {"a": 1, "b": 1})),
        "folder",
        0.2,
    )
    single.data.name = "folder"
    assert "data.hold_out=0.2: every class has only one image" in sentence(single)
    two = write_images(tmp_path / "two", {"a": 2, "c": 2})
    run = trained(tmp_path / "run2", "folder", root=str(two), labels="folder", eval_root=str(held))
    assert f"data.eval_root={held} has images of b" in sentence(configured(run=str(run)))


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "cycle").symlink_to(tmp_path / "cycle")
    config = SubjectConfig(run=str(trained(tmp_path / "run", "folder", root=str(tmp_path / "images"))))
    config.data.root = str(tmp_path / "cycle")
    with pytest.raises(OSError, match="cycle"):
        open_labeled(config, open_subject(config))


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = trained(tmp_path / "run", "folder", root=str(tmp_path / "empty"), labels="folder")
    assert "no images" in sentence(configured(run=str(run)))


def test_a_file_that_does_not_name_its_data(tmp_path: Path) -> None:
    network = build_encoder("convnet", {"width": 2}, 1, 0, 8, "batch", 4).backbone
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    config = configured(checkpoint=str(tmp_path / "plain.pth"), backbone="convnet")
    config.options = {"width": 2}
    assert "does not name its data: set data=cifar10" in sentence(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "best"), ("device", "tpu"), ("images_at_once", 0), ("threads", -1), ("seed", -1), ("seed", 2**64)],
)
def test_invalid_fields_are_named(name: str, value: object) -> None:
    config = configured(run="x")
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=name):
        check_subject(config)
    for name, value in {"size": 0, "resize": -1, "mean": [], "std": [0.5, 0.0, 0.5]}.items():
        config = configured(run="x")
        setattr(config.images, name, value)
        with pytest.raises(ConfigError, match=rf"images\.{name}="):
            check_subject(config)
    config = configured(run="x")
    config.data.hold_out = 1.0
    with pytest.raises(ConfigError, match=r"data\.hold_out=1\.0"):
        check_subject(config)


def test_one_rule_for_mean_and_std(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    for field, values, part in [
        ("mean", [0.5], r"images\.mean=\[0\.5\] must hold one number for each of the 3 channels of .*check_data"),
        ("std", [0.5] * 4, r"images\.std=.* must hold one number for each of the 3 channels"),
        ("mean", [120.0] * 3, r"images\.mean=.* must be numbers within 0 \.\.\. 1, as pixels are; divide .* by 255"),
    ]:
        config = configured(run=str(run))
        setattr(config.images, field, values)
        with pytest.raises(ConfigError, match=part):
            open_subject(config)
    floats = configured(run=str(trained(tmp_path / "floats", dtype="float32")))
    floats.images.mean = [120.0] * 3  # float32 is not scaled, and the run says that its images are of this type
    assert open_subject(floats).transform.mean == (120.0,) * 3
