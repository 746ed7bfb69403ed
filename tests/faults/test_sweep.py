"""scripts/sweep.py: one training a point of the grid, each in its own directory, and what has ended is left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moco.digest import digest
from moco.runs import checkpoint
from scripts import sweep
from tests.faults.runs import LONG, REPOSITORY, TINY


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


# In place of torchrun: trains until it is told to stop, then takes a moment to save.
TORCHRUN = """
import pathlib, signal, sys, time
def stop(number, frame):
    with open("heard", "a") as file:
        file.write("SIGTERM ")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop if number == signal.SIGTERM else signal.SIG_IGN)
pathlib.Path("began").touch()
while not pathlib.Path("heard").exists():
    time.sleep(0.01)
time.sleep(0.3)
pathlib.Path("saved").touch()
sys.exit(1)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_trial_once_which_saves_and_then_the_sweep(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    stand_in = tmp_path / "torch" / "distributed" / "run.py"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(TORCHRUN)
    (tmp_path / "torch" / "__init__.py").touch()
    command = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"), "sweep", "seed=0,1", "--", "epochs=1"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GPUS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as process:
        try:
            until(lambda: (tmp_path / "began").exists())
            process.send_signal(number)
            out, error = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == status
    assert (tmp_path / "saved").exists()  # it was waited for
    assert (tmp_path / "heard").read_text() == "SIGTERM "
    assert out == "sweep: 1 of 2: sweep/seed-0 trains\n"
    assert error == "sweep: stopped; the same command goes on\n"


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def swept(folder: Path, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"), "sweep", "seed=0,1", "--", *TINY]
    command += ["epochs=2", "checkpoint.every_steps=5"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GPUS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True, **how)


def ends(folder: Path) -> None:
    """Both trials train to their end, and not a second time."""
    for _ in range(2):
        with swept(folder) as process:
            out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert out.splitlines() == [
        "sweep: 1 of 2: sweep/seed-0 has ended before",
        "sweep: 2 of 2: sweep/seed-1 has ended before",
        "sweep: 2 of 2 trials have ended in sweep",
    ]
    found = [checkpoint.load(folder / f"sweep/seed-{seed}/checkpoints/step_00000040.pt") for seed in (0, 1)]
    assert [each["config"]["seed"] for each in found] == [0, 1]
    assert digest(found[0]["method"]) != digest(found[1]["method"])


@pytest.mark.slow
def test_two_trials_really_train_under_torchrun_and_are_not_trained_twice(tmp_path: Path) -> None:
    ends(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="the long form: MOCO_FAULTS=long; in the short one a stand-in plays torchrun")
@pytest.mark.parametrize(("number", "group", "status"), [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)])
def test_a_sweep_that_is_told_to_stop_goes_on_where_it_was(
    number: signal.Signals, group: bool, status: int, tmp_path: Path
) -> None:
    """SIGTERM to the sweep alone, and SIGINT to all of its group, as Ctrl-C sends it."""
    checkpoints = tmp_path / "sweep" / "seed-0" / "checkpoints"
    with swept(tmp_path, start_new_session=True) as process:
        try:
            until(lambda: checkpoint.list_checkpoints(checkpoints))
            (os.killpg if group else os.kill)(process.pid, number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status, error
    assert "which is saved; the same command goes on from there" in error
    assert 0 < checkpoint.step_of(checkpoint.list_checkpoints(checkpoints)[0]) < 40
    assert not (tmp_path / "sweep" / "seed-1").exists()
    ends(tmp_path)
