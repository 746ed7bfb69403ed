"""Runs on a folder with unreadable images: they end with an error, or replace and list these images."""

import csv
import shutil
from pathlib import Path

import pytest

from moco.config import ConfigError, TrainConfig, check
from moco.data.decode import ImageError
from moco.digest import digest
from moco.methods.moco_config import MoCoConfig
from moco.runs import checkpoint
from moco.training.trainer import pretrain
from tests.data.unreadable_files import folder, noise

# A run keeps its lock open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:method.queue_size")


def config(root: Path, run: Path) -> TrainConfig:
    """Return a run of three epochs with two steps each."""
    made = TrainConfig(
        method=MoCoConfig(queue_size=16), run=str(run), epochs=3, batch_size=8, device="cpu", threads=1, log_every=1
    )
    made.augment.size, made.augment.eval_resize = 16, 16
    made.model.backbone, made.model.options, made.model.dim = "convnet", {"width": 2}, 8
    made.model.bn_group_size = 4
    made.evaluate.every_epochs, made.evaluate.k = 0, 3
    made.data.name, made.data.root, made.data.workers = "folder", str(root), 0
    made.checkpoint.every_steps, made.checkpoint.keep_last = 1, 9
    return made


def rows(run: Path) -> dict[str, str]:
    with (run / "bad_images.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_a_run_that_failed_on_an_unreadable_image_resumes_with_replace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "images", good=16, unreadable=False)
    (root / "03.png").write_bytes(b"")
    made = config(root, tmp_path / "run")
    with pytest.raises(ImageError, match=r"03\.png: the file is empty"):
        pretrain(made)
    made.data.on_bad_image, made.data.max_bad = "replace", 0.1  # both may change between attempts
    pretrain(made)
    output = capsys.readouterr().out
    assert rows(tmp_path / "run") == {"03.png": "the file is empty"}
    assert "bad_images.csv: 1 so far" in output
    assert "1, replaced by other images and listed in" in " ".join(output.replace("│", " ").split())


def test_too_many_unreadable_images_end_the_run_until_they_are_repaired(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", good=16, unreadable=False)
    for name in ("03.png", "07.png"):
        (root / name).write_bytes(b"")
    made = config(root, tmp_path / "run")
    made.data.on_bad_image, made.data.max_bad = "replace", 0.1
    with pytest.raises(ImageError, match=r"2 of the 16 training images .*data\.max_bad=0\.1.*bad_images\.csv lists"):
        pretrain(made)
    assert set(rows(tmp_path / "run")) == {"03.png", "07.png"}
    noise().save(root / "03.png")
    pretrain(made)
    assert set(rows(tmp_path / "run")) == {"07.png"}


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", good=16)
    full, cut = (config(root, tmp_path / name) for name in ("full", "cut"))
    for each in (full, cut):
        each.data.on_bad_image, each.data.max_bad = "replace", 0.5
    pretrain(full)
    (tmp_path / "cut/checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "bad_images.csv", "checkpoints/step_00000002.pt"):
        shutil.copy(tmp_path / "full" / name, tmp_path / "cut" / name)
    cut.data.workers = 2
    pretrain(cut)
    one, other = (
        checkpoint.load(checkpoint.list_checkpoints(tmp_path / run / "checkpoints")[0]) for run in ("full", "cut")
    )
    assert one["step"] == other["step"] == 6
    assert digest(one["method"]) == digest(other["method"])
    assert rows(tmp_path / "full") == rows(tmp_path / "cut")


@pytest.mark.parametrize("resident", [False, True])
def test_the_live_accuracy_excludes_unreadable_images(
    resident: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train/a", "train/b", "test/a", "test/b"):
        folder(tmp_path / part, good=8, unreadable=False)
    for name in ("train/b/01.png", "test/a/02.png"):
        (tmp_path / name).write_bytes(b"no image")
    made = config(tmp_path / "train", tmp_path / "run")
    made.data.labels, made.data.eval_root, made.data.resident = "folder", str(tmp_path / "test"), resident
    made.evaluate.every_epochs = 3
    with pytest.raises(ImageError, match="no known image format"):
        pretrain(made)
    made.data.on_bad_image, made.data.max_bad = "replace", 0.2
    pretrain(made)
    output = capsys.readouterr().out
    assert (
        "1 of the 16 reference images cannot be read and are excluded from the live accuracy, the first: b/01.png"
        in output
    )
    assert "1 of the 16 held-out images cannot be read" in output
    state = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "run/checkpoints")[0])
    assert [each["step"] for each in state["history"]] == [0, 6]
    correct = state["history"][-1]["knn"][0] / 100 * 15  # 15 readable images
    assert correct == pytest.approx(round(correct), abs=1e-3)


@pytest.mark.parametrize(
    ("field", "value", "words"), [("on_bad_image", "skip", "raise, replace"), ("max_bad", 1.0, "0.01")]
)
def test_invalid_values_are_refused(field: str, value: object, words: str) -> None:
    made = TrainConfig(method=MoCoConfig())
    setattr(made.data, field, value)
    with pytest.raises(ConfigError, match=rf"data\.{field}='?{value}'? must .*{words}"):
        check(made)
