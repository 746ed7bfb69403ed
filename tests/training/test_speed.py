"""Runs with options and failures: speed records, precision, profile, compile, skipped steps, out of memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.config import TrainConfig
from moco.methods.moco_config import MoCoConfig
from moco.runs import checkpoint
from moco.runtime.errors import NonFiniteLoss
from moco.runtime.memory import OutOfMemory
from moco.training import build
from moco.training import trainer as stage
from moco.training.step import train_step
from moco.training.trainer import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run keeps its lock open


def config(run: Path, **changed: Any) -> TrainConfig:
    made = TrainConfig(
        method=MoCoConfig(queue_size=256),
        run=str(run),
        epochs=1,
        batch_size=128,
        device="cpu",
        threads=1,
        log_every=1,
        analyse_every=4,
    )
    made.augment.size, made.model.backbone, made.model.options = 16, "convnet", {"width": 2}
    made.model.dim, made.model.head_hidden, made.model.bn_group_size = 8, 8, 32
    made.evaluate.every_epochs = 0
    for name, value in changed.items():
        setattr(made.optim if name == "skip_nonfinite" else made, name, value)
    return made


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])


def broken_at(step: int, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let step `step`, counted from 1, raise the error."""
    calls = 0

    def train(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == step:
            raise error
        return train_step(*args, **options)

    monkeypatch.setattr(stage, "train_step", train)


def test_records_hold_speed_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(config(tmp_path / "run"))
    found = records(tmp_path / "run")
    assert [each["step"] for each in found] == list(range(1, 11))
    assert all(each["speed/mfu"] > 0 and each["speed/peak_memory_gib"] > 0.05 for each in found)
    measured = [each["step"] for each in found if "analysis/effective_rank" in each]
    assert measured == [4, 8]  # analyse_every=4 records of one step
    assert 1 <= found[3]["analysis/effective_rank"] <= 8
    assert "images/s" in capsys.readouterr().out


def test_a_profile_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(config(tmp_path / "run", profile=True))
    assert "aten::mkldnn_convolution" in (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert (tmp_path / "run" / "profile" / "trace.json.gz").stat().st_size > 1000
    assert "profile of 5 steps" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_precision_that_was_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(build, "pick_precision", lambda *_: ("bf16", "measured"))
    broken_at(6, monkeypatch, NonFiniteLoss("loss nan, gradient norm nan"))
    made = config(run, precision="auto")
    made.checkpoint.every_steps = 5
    with pytest.raises(NonFiniteLoss):
        pretrain(made)
    assert state(run)["precision"] == "bf16"
    monkeypatch.setattr(build, "pick_precision", lambda *_: ("fp32", "another day"))
    monkeypatch.setattr(stage, "train_step", train_step)
    pretrain(made)
    assert (state(run)["step"], state(run)["precision"]) == (10, "bf16")


def test_a_non_finite_step_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_at(3, monkeypatch, NonFiniteLoss("loss nan, gradient norm nan"))
    pretrain(config(tmp_path / "run", skip_nonfinite=1))
    output = capsys.readouterr().out
    assert "step 3 had loss nan" in output
    assert "1 step with a non-finite loss or gradient" in output
    assert [each["step"] for each in records(tmp_path / "run")] == [1, 2, *range(4, 11)]  # it has no record
    end = state(tmp_path / "run")
    assert (end["step"], end["skipped"]) == (10, 1)
    assert int(end["method"]["queue.count"]) == 9 * 128  # no keys of the skipped step
    kept = torch.load(tmp_path / "run" / "nonfinite" / "step_3.pt", weights_only=True)
    assert kept["step"] == 2
    assert "encoder.backbone.layers.0.weight" in kept["method"]


def test_a_non_finite_step_beyond_the_limit_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(3, monkeypatch, NonFiniteLoss("loss nan, gradient norm nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 3 .*optim\.skip_nonfinite=10"):
        pretrain(config(tmp_path / "run"))


def test_out_of_memory_names_the_fields_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(2, monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB ..."))
    with pytest.raises(OutOfMemory, match=r"128 images .* set accumulate=2"):
        pretrain(config(tmp_path / "run"))


@pytest.mark.slow
def test_a_compiled_encoder_trains_like_the_eager_one(tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        made = config(tmp_path / name, compile=compiled, analyse_every=0)
        made.model.bn_group_size = 64  # two groups: less to compile
        pretrain(made)
    eager, compiled_run = (records(tmp_path / name) for name in ("eager", "compiled"))
    losses = [[each["train/loss"] for each in found] for found in (eager, compiled_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert state(tmp_path / "eager")["method"].keys() == state(tmp_path / "compiled")["method"].keys()
