"""Held-out images that an encoder was trained on: refused with their labels, named without them."""

import json
import warnings
from pathlib import Path

import pytest

from moco.config import ConfigError, RunWarning
from moco.config.subject import SubjectConfig
from moco.config.transfer import TransferConfig
from moco.evaluation.subject import open_labeled, open_subject
from moco.evaluation.transfer import evaluate_transfer
from tests.evaluation.runs import trained
from tests.evaluation.test_linear import write_images
from tests.evaluation.test_subject_data import described

COUNTS = {"a": 6, "b": 6, "c": 6}


def test_held_out_files_in_a_folder_of_the_training_are_seen(tmp_path: Path) -> None:
    for part, counts in {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}, "new": {"a": 2, "b": 1}}.items():
        write_images(
            tmp_path / "images" / part if part != "new" else tmp_path / "new", counts, len(part) + sum(counts.values())
        )
    config = SubjectConfig(run=str(trained(tmp_path / "run", "folder", root=str(tmp_path / "images"))))
    config.data.name, config.data.labels = "folder", "folder"
    config.data.root, config.data.eval_root = str(tmp_path / "images/train"), str(tmp_path / "images/test")
    with pytest.warns(RunWarning, match=r"4 of the 4 held-out images are in the folder .* without .* data\.eval_root"):
        bank, held_out = open_labeled(config, open_subject(config))
    assert described(config, bank, held_out)["data"]["held_out_seen"] is True
    config.data.eval_root = str(tmp_path / "new")
    with warnings.catch_warnings(action="error"):
        open_labeled(config, open_subject(config))
    config.run = str(trained(tmp_path / "supervised", "folder", supervised=True, root=str(tmp_path / "images")))
    config.data.eval_root = str(tmp_path / "images/test")
    with pytest.raises(ConfigError, match=r"trained on, with their labels: set data\.eval_root=DIR"):
        open_labeled(config, open_subject(config))


def reported(settings: TransferConfig, problem: str, supervised: bool) -> bool:
    """Evaluate, and check that the images are refused if the encoder saw their labels, else named; False: refused."""
    if supervised:
        with pytest.raises(ConfigError, match=f"{problem} their labels: name"):
            evaluate_transfer(settings)
        return False
    with pytest.warns(RunWarning, match=f"{problem}out their labels"):
        evaluate_transfer(settings)
    return True


@pytest.mark.parametrize("supervised", [False, True])
def test_test_images_of_the_encoders_training_are_refused_or_named(supervised: bool, tmp_path: Path) -> None:
    root = str(write_images(tmp_path / "images/train", COUNTS).parent)
    write_images(tmp_path / "images/test", COUNTS, 1)
    of_run = trained(tmp_path / "run", "folder", supervised=supervised, root=f"{root}/train", labels="folder")
    settings = TransferConfig(run=str(of_run), sets=[root], encoders=["pretrained", "untrained"], device="cpu")
    settings.data.workers = 0
    with warnings.catch_warnings(action="error"):  # the test images are in another folder
        evaluate_transfer(settings)
    settings.sets = [f"{root}/train/"]
    problem = r"sets=\S+train/: 3 of the 3 test images are among the images that \S+run\S+ was trained on, with"
    if not reported(settings, problem, supervised):
        return
    entries = json.loads((of_run / "results.json").read_text())
    assert {entry["data"]["root"][-5:]: entry["data"]["held_out_seen"] for entry in entries} == {
        "mages": False,
        "train": True,
    }


@pytest.mark.parametrize("supervised", [False, True])
def test_another_encoder_that_saw_the_test_images_of_the_entry_data_is_named(supervised: bool, tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test")):
        write_images(tmp_path / "images" / part, COUNTS, number)
    other = trained(tmp_path / "other", "folder", supervised=supervised, root=str(tmp_path / "images/test"))
    run = str(trained(tmp_path / "run"))
    settings = TransferConfig(run=run, sets=["data"], encoders=["pretrained", str(other)], device="cpu")
    settings.data.name, settings.data.labels, settings.data.workers = "folder", "folder", 0
    settings.data.root, settings.data.eval_root = str(tmp_path / "images/train"), str(tmp_path / "images/test")
    problem = r"sets=data: 18 of the 18 test images are among the images that \S+other\S+ was trained on, with"
    if not reported(settings, problem, supervised):
        return
    assert all(entry["data"]["held_out_seen"] for entry in json.loads(Path(run, "results.json").read_text()))
