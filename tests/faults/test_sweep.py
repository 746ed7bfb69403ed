"""scripts/sweep.py: one training a point of the grid, each in its own directory, and what has ended is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moco.engine import checkpoint
from scripts import sweep
from tests.faults.runs import REPOSITORY, TINY


def test_the_grid_has_a_directory_for_each_point(tmp_path: Path) -> None:
    planned = sweep.trials(tmp_path, ["optim.lr=0.03,0.06", "optim.milestones=[1,2],[3]"])
    assert {path.name: point for path, point in planned.items()} == {
        "optim.lr-0.03__optim.milestones-_1_2_": ["optim.lr=0.03", "optim.milestones=[1,2]"],
        "optim.lr-0.03__optim.milestones-_3_": ["optim.lr=0.03", "optim.milestones=[3]"],
        "optim.lr-0.06__optim.milestones-_1_2_": ["optim.lr=0.06", "optim.milestones=[1,2]"],
        "optim.lr-0.06__optim.milestones-_3_": ["optim.lr=0.06", "optim.milestones=[3]"],
    }


def test_a_value_cannot_leave_the_folder(tmp_path: Path) -> None:
    (path,) = sweep.trials(tmp_path, ["data.root=../../etc/$(touch x);'"])
    assert path.parent == tmp_path
    assert path.name == "data.root-.._.._etc_touch_x_"


@pytest.mark.parametrize(
    ("varied", "sentence"),
    [
        (["seed"], "seed names no values to try"),
        (["seed=1,,2"], "seed=1,,2 names no values to try"),
        (["data.root=a b,a_b"], "would both go to"),
        (["seed=1,1"], "would both go to"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(
    varied: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(tmp_path), *varied, "--", "epochs=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_a_trial_that_fails_does_not_keep_the_others_from_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(run: Path, overrides: list[str]) -> int:
        trained.append(run.name)
        if run.name == "seed-1":
            return 1
        run.mkdir(parents=True)
        (run / sweep.ENDED).touch()
        return 0

    monkeypatch.setattr(sweep, "train", train)
    assert sweep.main([str(tmp_path), "seed=0,1,2", "--", "epochs=1"]) == 1
    assert "seed-1 has not: the same command tries it again" in capsys.readouterr().err
    assert sweep.main([str(tmp_path), "seed=0,1,2", "--", "epochs=1"]) == 1
    assert trained == ["seed-0", "seed-1", "seed-2", "seed-1"]


@pytest.mark.slow
def test_two_trials_really_train_under_torchrun_and_are_not_trained_twice(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"), "sweep", "seed=0,1", "--", *TINY, "epochs=1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GPUS": "1", "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "sweep: 1 of 2: sweep/seed-0 has ended before",
        "sweep: 2 of 2: sweep/seed-1 has ended before",
        "sweep: 2 of 2 trials have ended in sweep",
    ]
    ends = [
        checkpoint.load(tmp_path / "sweep" / name / "checkpoints" / "step_00000020.pt") for name in ("seed-0", "seed-1")
    ]
    assert [each["config"]["seed"] for each in ends] == [0, 1]
    assert checkpoint.digest(ends[0]["method"]) != checkpoint.digest(ends[1]["method"])
