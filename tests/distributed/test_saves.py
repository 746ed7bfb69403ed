"""The steps at which two processes save do not change their results."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_train import TINY, environment, finished

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moco.train")


@pytest.mark.parametrize("launcher", [(sys.executable, "-m", "moco.train"), TORCHRUN])
@pytest.mark.slow
def test_ranks_save_together_when_the_last_checkpoint_is_old(launcher: tuple[str, ...], tmp_path: Path) -> None:
    """Rank 0 decides by its clock; the ranks know it one step later, and save once for each decision."""
    call = [*launcher, *TINY, "run=timed", "checkpoint.every_minutes=0.00001", "checkpoint.every_epochs=0"]
    call += ["checkpoint.keep_last=100", "evaluate.every_epochs=0"]
    result = subprocess.run(
        call, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    steps = sorted(int(path.stem.removeprefix("step_")) for path in (tmp_path / "timed/checkpoints").glob("step_*.pt"))
    assert len(steps) >= 4
    assert all(later - earlier >= 2 for earlier, later in pairwise(steps[:-1])), steps


@pytest.mark.long
def test_saving_and_resuming_in_an_epoch_gives_the_same_encoder_bit_for_bit(tmp_path: Path) -> None:
    """BN's running statistics differ between the ranks: averaged in place at each save, they would round differently.

    The third run is stopped after 7 of 15 steps, in its second epoch, and resumed.
    """

    def run(name: str, *arguments: str, status: int = 0) -> None:
        call = [*TORCHRUN, *TINY, f"run={name}", *arguments]
        result = subprocess.run(
            call, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == status, result.stderr[-2000:]

    run("plain")
    run("often", "checkpoint.every_steps=2", "evaluate.every_epochs=1")
    run("stopped", "checkpoint.every_steps=7", "epochs=3", "checkpoint.keep_last=20")
    for path in (tmp_path / "stopped/checkpoints").iterdir():
        if "00000007" not in path.name:
            path.unlink()
    run("stopped", "checkpoint.every_steps=7", "epochs=3", "checkpoint.keep_last=20")
    encoders = [load_file(tmp_path / name / "encoder.safetensors") for name in ("plain", "often", "stopped")]
    for name, value in encoders[0].items():
        assert all(torch.equal(value, other[name]) for other in encoders[1:]), name
    of_ranks = finished(tmp_path / "plain")["statistics"]
    assert not torch.equal(of_ranks[0], of_ranks[1])
