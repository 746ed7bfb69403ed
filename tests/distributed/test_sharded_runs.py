"""Sharded runs: a checkpoint resumes exactly, with other numbers of processes, and without sharding."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

import moco
from moco.config import TrainConfig
from moco.distributed import rank
from moco.runs import checkpoint
from moco.training.trainer import Trainer, pretrain
from tests.distributed.launch import run_ranks
from tests.distributed.test_topology import largest_difference
from tests.training.test_trainer_v3 import config as config_of_v3

pytestmark = pytest.mark.slow


def config(run: Path, shard: bool) -> TrainConfig:
    """Configure five steps of MoCo v3 with a ViT; a step of 256 images, a checkpoint every two steps."""
    made = config_of_v3(str(run), "vit")
    made.shard, made.optim.lr, made.optim.clip_grad = shard, 2e-4, 1.0
    made.evaluate.every_epochs, made.evaluate.draws, made.logger = 1, 3, []
    return made


def stopped(full: Path, run: Path) -> Path:
    """Make a run directory with the first checkpoint of another run."""
    if rank() == 0:
        (run / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "checkpoints/step_00000002.pt"):
            shutil.copy(full / name, run / name)
    return run


def on_two(folder: Path) -> None:
    pretrain(config(folder / "ddp", False))
    pretrain(config(folder / "full", True))
    for name, shard in (("resumed", True), ("to ddp", False)):
        pretrain(config(stopped(folder / "full", folder / name), shard))
    pretrain(config(stopped(folder / "ddp", folder / "from ddp"), True))


def resume(full: Path, run: Path) -> None:
    pretrain(config(stopped(full, run), True))


def killed(run: Path) -> None:
    """Kill all processes after three steps; the last checkpoint is of two."""
    finish = Trainer._finish_step

    def kill(trainer: Trainer, done: int) -> None:
        finish(trainer, done)
        if done == 3:
            trainer.saver.join()
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._finish_step = kill  # type: ignore[assignment,method-assign]
    pretrain(config(run, True))


def again(run: Path) -> None:
    pretrain(config(run, True))


def final(run: Path) -> checkpoint.Checkpoint:
    state = checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])
    assert state["step"] == 5
    return state


def difference(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> float:
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    parts: list[Any] = [(each["method"], each["optimizer"]["state"]) for each in (one, other)]
    return max(largest_difference(dict(a), dict(b)) for a, b in zip(*parts, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    run_ranks(2, on_two, path)
    return path


def test_a_sharded_run_equals_ddp(folder: Path) -> None:
    ddp, full = final(folder / "ddp"), final(folder / "full")
    assert difference(ddp, full) < 1e-5
    assert ddp["history"] == full["history"]


@pytest.mark.parametrize("name", ["resumed", "to ddp", "from ddp"])
def test_it_resumes_exactly_with_and_without_sharding(folder: Path, name: str) -> None:
    assert difference(final(folder / "full"), final(folder / name)) == 0


def test_its_encoder_can_be_loaded(folder: Path) -> None:
    images = torch.ones(2, 3, 16, 16)
    sharded, ddp = (moco.load_encoder(folder / name / "encoder.safetensors")(images) for name in ("full", "ddp"))
    assert torch.allclose(sharded, ddp, atol=1e-5)
    weights = final(folder / "full")["method"]
    backbone = moco.load_encoder(folder / "full" / "encoder.safetensors").state_dict()
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in backbone.items())


def test_it_resumes_exactly_after_all_processes_were_killed(folder: Path) -> None:
    run = folder / "killed"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(2, killed, run)
    assert [each.name for each in checkpoint.list_checkpoints(run / "checkpoints")] == ["step_00000002.pt"]
    run_ranks(2, again, run)
    assert difference(final(folder / "full"), final(run)) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run keeps its lock open
@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.long)])
def test_it_resumes_with_another_number_of_processes(folder: Path, world: int) -> None:
    run_ranks(world, resume, folder / "full", folder / f"on {world}")
    assert difference(final(folder / "full"), final(folder / f"on {world}")) < 1e-5
