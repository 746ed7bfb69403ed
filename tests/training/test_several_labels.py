"""A run on images with several labels each: what it measures, what it refuses, what comes next."""

from pathlib import Path

import pytest

from moco.config import ConfigError, TrainConfig
from moco.training.trainer import pretrain
from tests.data.unreadable_files import folder
from tests.training.test_bad_images import config

# A run keeps its lock open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:method.queue_size")


def labeled(tmp_path: Path, run: str) -> TrainConfig:
    root = folder(tmp_path / "images", good=16, unreadable=False)
    lines = [
        f"{each.name},{('a', 'b', 'a|b', '')[i % 4]},{'train' if i < 12 else 'test'}"
        for i, each in enumerate(sorted(root.iterdir()))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    made = config(root, tmp_path / run)
    made.data.label_file, made.data.label_separator = str(tmp_path / "labels.csv"), "|"
    made.epochs, made.evaluate.every_epochs = 1, 1
    return made


def test_a_run_measures_retrieval_and_names_the_linear_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(labeled(tmp_path, "run"))
    text = capsys.readouterr().out
    assert "images with several labels each: evaluating how often two crops of an image find each other" in text
    assert f"python -m moco.linear device=cpu threads=1 run={tmp_path / 'run'}" in text


@pytest.mark.parametrize("name", ["method.labels", "evaluate.online_probe", "checkpoint.keep_best"])
def test_what_needs_one_class_per_image_is_refused(tmp_path: Path, name: str) -> None:
    made = labeled(tmp_path, "run")
    group, _, field = name.partition(".")
    setattr(getattr(made, group), field, True)
    with pytest.raises(ConfigError, match=rf"{name}=true needs one class per image.*: set {name}=false"):
        pretrain(made)
