"""The data of an evaluation: from the run or given, its splits and labels; refusals."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.config import ConfigError, RunWarning
from moco.config.subject import SubjectConfig
from moco.data.decode import ImageError
from moco.data.sources import Source
from moco.evaluation.subject import data_config, is_other_data, open_data, open_labeled, open_subject
from moco.evaluation.task import Task, describe, describe_start
from moco.models.encoder import build_encoder
from moco.runs import checkpoint
from tests.evaluation.runs import sentence, trained, write_images

CPU = torch.device("cpu")


def described(config: SubjectConfig, bank: Source, held_out: Source) -> dict[str, Any]:
    return describe(Task(config, open_subject(config), bank, held_out, CPU), "backbone")


def test_data_that_the_run_did_not_have_is_other_data(tmp_path: Path) -> None:
    config = SubjectConfig(run=str(trained(tmp_path / "run")))
    subject = open_subject(config)
    assert not is_other_data(config, subject)
    config.data.name = "cifar10"
    assert is_other_data(config, subject)


def test_for_another_data_set_no_field_of_the_run_applies(tmp_path: Path) -> None:
    config = SubjectConfig(
        run=str(trained(tmp_path / "run", "folder", root="theirs", eval_root="held", labels="folder"))
    )
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


def test_a_folder_for_a_run_on_the_embedded_digits_is_refused(tmp_path: Path) -> None:
    """The digits would be evaluated instead."""
    config = SubjectConfig(run=str(trained(tmp_path / "run", "digits")))
    config.data.root = "mine"
    with pytest.raises(ConfigError, match=r"data\.root=mine has no effect with data.name=digits.*add data=folder"):
        open_data(config, open_subject(config))


def test_a_file_outside_of_a_run_directory_names_no_folder(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "folder", root="theirs", eval_root="held", labels="folder")
    config = SubjectConfig(checkpoint=str(checkpoint.list_checkpoints(run / "checkpoints")[0]))
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
    config = SubjectConfig(run=str(trained(tmp_path / "run", "folder", root=str(root), labels="folder")))
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
    config = SubjectConfig(run=str(run))
    with warnings.catch_warnings(action="error"):
        bank, held_out = open_labeled(config, open_subject(config))
    assert (len(bank), len(held_out)) == (6, 2)
    assert described(config, bank, held_out)["data"]["held_out_seen"] is False
    config.data.label_file = str(tables[1])
    with pytest.warns(RunWarning, match=r"data\.label_file=.*other\.csv, whose split is not .* trained on, without"):
        bank, held_out = open_labeled(config, open_subject(config))
    assert described(config, bank, held_out)["data"]["held_out_seen"] is True


def test_the_description_reproduces_a_result_in_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("train"), {"a": 3, "b": 2})
    write_images(Path("test"), {"a": 1, "b": 1})
    trained(Path("run"), "folder", root="train", eval_root="test", labels="folder")
    config = SubjectConfig(run="run")
    subject = open_subject(config)
    found = json.loads(json.dumps(described(config, *open_labeled(config, subject))))
    assert found["source"] == str(tmp_path / "run" / "checkpoints" / "step_00000007.pt")
    assert (found["backbone"], found["options"]) == ("convnet", {"width": 2})
    assert found["step"] == 7
    assert describe_start(config, "pretrained", 3) == {"encoder": "pretrained", "weights": "encoder"}
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


# ---- refusals ----


def test_labels_that_trained_the_encoder_are_refused(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 5, "b": 5})
    run = trained(tmp_path / "run", "folder", root=str(root), labels="folder", supervised=True)
    config = SubjectConfig(run=str(run))
    config.data.hold_out = 0.2
    assert "data.hold_out=0.2 holds out images that the encoder was trained on, with their labels" in sentence(config)
    config.data.root = str(root / ".." / "images")
    config.data.labels = "folder"
    assert "with their labels" in sentence(config)


def test_hold_out_with_a_held_out_split_is_refused(tmp_path: Path) -> None:
    config = SubjectConfig(run=str(trained(tmp_path / "run")))
    config.data.hold_out = 0.2
    assert "data.hold_out=0.2, but data.name=digits has a held-out split: remove" in sentence(config)


def test_a_relative_data_path_of_a_run_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run", "folder", root="images", labels="folder")
    monkeypatch.chdir(tmp_path)
    message = sentence(SubjectConfig(run=str(run)))
    assert "(data.root=images, taken from the run and relative to the current directory: set" in message
    config = SubjectConfig(run=str(run))
    config.data.root = "mine"
    assert "from the run" not in sentence(config)


def test_a_single_class_and_a_missing_class(tmp_path: Path) -> None:
    held = write_images(tmp_path / "held", {"a": 2, "b": 2})
    one = write_images(tmp_path / "one", {"a": 2})
    run = trained(tmp_path / "run", "folder", root=str(one), labels="folder", eval_root=str(held))
    assert "one class folder only (a)" in sentence(SubjectConfig(run=str(run)))
    single = SubjectConfig(run=str(trained(tmp_path / "run1", "folder", root=str(held), labels="folder")))
    few = write_images(tmp_path / "few", {"a": 1, "b": 1})
    single.data.name, single.data.root, single.data.labels, single.data.hold_out = "folder", str(few), "folder", 0.2
    assert "data.hold_out=0.2: every class has only one image" in sentence(single)
    two = write_images(tmp_path / "two", {"a": 2, "c": 2})
    run = trained(tmp_path / "run2", "folder", root=str(two), labels="folder", eval_root=str(held))
    assert f"data.eval_root={held} has images of b" in sentence(SubjectConfig(run=str(run)))


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "cycle").symlink_to(tmp_path / "cycle")
    config = SubjectConfig(run=str(trained(tmp_path / "run", "folder", root=str(tmp_path / "images"))))
    config.data.root = str(tmp_path / "cycle")
    with pytest.raises(OSError, match="cycle"):
        open_labeled(config, open_subject(config))


def test_a_file_that_does_not_name_its_data(tmp_path: Path) -> None:
    network = build_encoder("convnet", {"width": 2}, 1, 0, 8, "batch", 4).backbone
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    config = SubjectConfig(checkpoint=str(tmp_path / "plain.pth"), backbone="convnet")
    config.options = {"width": 2}
    assert "does not name its data: set data=cifar10" in sentence(config)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (2, "none", "data.name=folder has no labels for the evaluation: set data.labels=folder"),
        (2, "folder", "no held-out split: set data.eval_root=DIR"),
        (0, "folder", "no images"),
    ],
)
def test_data_that_cannot_be_evaluated_is_refused(images: int, labels: str, words: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": images, "b": images})
    run = trained(tmp_path / "run", "folder", root=str(root), labels=labels)
    assert words in sentence(SubjectConfig(run=str(run)))
