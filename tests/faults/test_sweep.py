"""scripts/sweep.py: one run per point of the grid in its own directory; finished runs are skipped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from moco.composition import compose_overrides
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
    ("varied", "message"),
    [
        (["seed"], "seed "),
        (["seed=1,,2"], "seed=1,,2 "),
        (["data.root=a b,a_b"], "data.root-a_b"),
        (["seed=1,1"], "seed-1"),
        (["method.temperature=0.1,0.10"], "method.temperature=0.1 and method.temperature=0.10 are the same settings"),
    ],
)
def test_an_invalid_grid_is_refused_in_one_line(
    varied: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(tmp_path), *varied, "--", "epochs=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_refused_configuration_ends_the_sweep_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("a trial was started"))
    monkeypatch.setenv("GPUS", "1")
    shared = ["--", "experiment=cifar10_cpu", "data.root=."]
    assert sweep.main([str(tmp_path), "method=moco_v3", "seed=0,1", *shared]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "method=moco_v3 seed=0: " in line
    assert "experiment=NAME (moco_v3_cifar10, moco_v3_digits, " in line
    assert sweep.main([str(tmp_path), "batch_size=0", *shared]) == 2
    assert "batch_size=0" in capsys.readouterr().err


def test_a_finished_trial_of_other_settings_ends_the_sweep_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUS", "1")

    def train(run: Path, overrides: list[str]) -> int:
        run.mkdir(parents=True)
        (config,) = compose_overrides([*overrides, f"run={run}"])
        (run / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
        for name in ("metrics.jsonl", "encoder.safetensors"):
            (run / name).write_text("{}\n")
        return 0

    grid = [str(tmp_path / "sw"), "method.temperature=0.1,0.5", "seed=0,1", "--", "epochs=2"]
    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "read_metrics", lambda file: {})
    assert sweep.main(grid) == 0
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("a trial was started"))
    assert sweep.main(grid) == 0
    capsys.readouterr()
    grid = [grid[0], "method.temperature=0.1,0.3", "seed=0", "--", "epochs=1", "method.queue_size=256"]
    assert sweep.main(grid) == 2
    out, error = capsys.readouterr()
    assert "trials are finished" not in out
    (line,) = error.splitlines()
    for each in ("temperature-0.1__seed-0 is finished", "epochs (there 2, now 1)", "method.queue_size (there ", "256)"):
        assert each in line


def test_seeds_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = sweep.trials(tmp_path, ["optim.lr=1,2", "seed=0,1"])
    values = dict(zip((run.name for run in planned), (50.0, 60.0, 56.0, 57.0), strict=True))
    monkeypatch.setattr(sweep, "read_metrics", lambda file: {"accuracy/knn": ([1], [values[file.parent.name]])})
    for run in planned:
        run.mkdir()
        (run / "encoder.safetensors").touch()
    sweep.show(planned)
    lines = capsys.readouterr().out.splitlines()
    # Student's 97.5 % quantile with 1 degree of freedom, 12.706, times the standard error, 0.5 and 5.
    assert lines[5:7] == [
        "sweep: accuracy  56.5 ± 6.4 %, 2 seeds  optim.lr=2",
        "sweep: accuracy  55.0 ± 63.5 %, 2 seeds  optim.lr=1",
    ]
    sweep.show(sweep.trials(tmp_path, ["optim.lr=1,2"]))
    assert "mean over seeds" not in capsys.readouterr().out


def test_other_trials_run_after_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(run: Path, overrides: list[str]) -> int:
        trained.append(run.name)
        if run.name == "seed-1":
            return 1
        run.mkdir(parents=True)
        (run / "encoder.safetensors").touch()
        return 0

    monkeypatch.setattr(sweep, "train", train)
    assert sweep.main([str(tmp_path), "seed=0,1,2", "--", "epochs=1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    for each in ("seed-1 failed with exit status 1", "diverged", "change its settings", "run the same command again"):
        assert each in line
    assert sweep.main([str(tmp_path), "seed=0,1,2", "--", "epochs=1"]) == 1
    assert trained == ["seed-0", "seed-1", "seed-2", "seed-1"]


def test_without_the_two_dashes_the_last_line_states_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["runs/sx", "seed=0-2", "epochs=1"]) == 2
    assert "-- is missing" in capsys.readouterr().err.splitlines()[-1]
    assert sweep.main(["runs/sx", "--", "epochs=1"]) == 2
    assert "fields that vary are missing" in capsys.readouterr().err.splitlines()[-1]


# Replaces torchrun: runs until SIGTERM, then takes a moment to save.
TORCHRUN = """
import pathlib, signal, sys, time
def stop(number, frame):
    with open("received", "a") as file:
        file.write("SIGTERM ")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop if number == signal.SIGTERM else signal.SIG_IGN)
pathlib.Path("began").touch()
while not pathlib.Path("received").exists():
    time.sleep(0.01)
time.sleep(0.3)
pathlib.Path("saved").touch()
sys.exit(1)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_once_and_the_sweep_ends_after_the_trial(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    stand_in = tmp_path / "torch" / "distributed" / "run.py"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(TORCHRUN)
    (tmp_path / "torch" / "__init__.py").touch()
    command = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"), "sweep", "seed=0,1", "--", "epochs=1"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", "GPUS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as process:
        try:
            until(lambda: (tmp_path / "began").exists())
            process.send_signal(number)
            out, error = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == status
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "received").read_text() == "SIGTERM "
    assert out == "sweep: 1 of 2: sweep/seed-0\n"
    assert len(error.splitlines()) == 1


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
    """Both trials run to their end, and are not run again."""
    for _ in range(2):
        with swept(folder) as process:
            out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    lines = out.splitlines()
    assert lines[:3] == [
        "sweep: 1 of 2: sweep/seed-0 is finished",
        "sweep: 2 of 2: sweep/seed-1 is finished",
        "sweep: 2 of 2 trials are finished in sweep",
    ]
    assert {line.split()[-1] for line in lines[3:5]} == {"sweep/seed-0", "sweep/seed-1"}
    assert lines[5].startswith("next: python -m moco.report run=sweep/seed-")
    found = [checkpoint.load(folder / f"sweep/seed-{seed}/checkpoints/step_00000040.pt") for seed in (0, 1)]
    assert [each["config"]["seed"] for each in found] == [0, 1]
    assert digest(found[0]["method"]) != digest(found[1]["method"])


@pytest.mark.long
def test_two_trials_run_under_torchrun_and_are_not_run_again(tmp_path: Path) -> None:
    ends(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="long form: MOCO_FAULTS=long; the test above replaces torchrun")
@pytest.mark.parametrize(("number", "group", "status"), [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)])
def test_a_stopped_sweep_resumes(number: signal.Signals, group: bool, status: int, tmp_path: Path) -> None:
    """SIGTERM to the sweep only, and SIGINT to its process group, as Ctrl-C sends it."""
    checkpoints = tmp_path / "sweep" / "seed-0" / "checkpoints"
    with swept(tmp_path, start_new_session=True) as process:
        try:
            until(lambda: checkpoint.list_checkpoints(checkpoints))
            (os.killpg if group else os.kill)(process.pid, number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status, error
    assert 0 < checkpoint.step_of(checkpoint.list_checkpoints(checkpoints)[0]) < 40
    assert not (tmp_path / "sweep" / "seed-1").exists()
    ends(tmp_path)
