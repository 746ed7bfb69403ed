"""A run on several folders with weights: exact resume, and a refusal of other weights."""

from pathlib import Path

import pytest

from moco.config import ConfigError, TrainConfig
from moco.digest import digest
from moco.runs import checkpoint
from moco.runtime.preemption import Preempted
from moco.training.trainer import pretrain
from tests.data.unreadable_files import folder
from tests.training.test_bad_images import config

# A run keeps its lock open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:method.queue_size")


def weighted(tmp_path: Path, run: str) -> TrainConfig:
    """Return a run of three epochs, of (0.5 x 10 + 2 x 6) // 8 = 2 steps each."""
    made = config(tmp_path / "a", tmp_path / run)
    made.data.more_roots, made.data.weights = [str(tmp_path / "b")], [0.5, 2.0]
    return made


def test_an_interrupted_run_resumes_bit_for_bit_with_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "a", good=10, unreadable=False)
    folder(tmp_path / "b", good=6, unreadable=False)
    pretrain(weighted(tmp_path, "full"))
    text = capsys.readouterr().out
    assert "epochs 3, steps per epoch 2" in text
    assert "an epoch draws 5 of 10 images + 12 of 6 images = 17 samples (data.weights)" in text
    made = weighted(tmp_path, "cut")
    made.stop_after = 1e-6
    with pytest.raises(Preempted):
        pretrain(made)
    made.stop_after = 0.0
    made.data.weights = [0.5, 3.0]
    with pytest.raises(ConfigError, match=r"data\.weights \(there \[0\.5, 2\.0\], now \[0\.5, 3\.0\]\)"):
        pretrain(made)
    made.data.weights = [0.5, 2.0]
    (tmp_path / "b").rename(tmp_path / "moved")
    made.data.more_roots = [str(tmp_path / "moved")]
    pretrain(made)
    one, other = (checkpoint.list_checkpoints(tmp_path / run / "checkpoints")[0] for run in ("full", "cut"))
    first, second = checkpoint.load(one), checkpoint.load(other)
    assert first["step"] == second["step"] == 6
    assert digest(first["method"]) == digest(second["method"])
    assert digest(first["optimizer"]) == digest(second["optimizer"])
