"""`python -m moco.knn` as a person runs it, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moco.config import config_dir
from tests.evaluation.test_subject import pictures, trained

REPOSITORY = Path(config_dir()).parent


def knn(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "moco.knn", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Held-out pictures in three parts, and numbers that no two processes share evenly."""
    trained(tmp_path / "run")
    pictures(tmp_path / "train", {"cat": 70, "dog": 67})
    pictures(tmp_path / "test", {"cat": 71, "dog": 64})
    data = ["data=folder", "data.root=train", "data.eval_root=test", "data.labels=folder", "data.workers=0"]
    asked = [
        "run=run",
        *data,
        "k=[1,3,20]",
        "temperature=[0.1,0.5]",
        "compare=[untrained,pixels]",
        "queries_at_once=64",
    ]
    one = knn(tmp_path, *asked, "output=single")
    assert one.returncode == 0, one.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = knn(tmp_path, *asked, "output=double", launcher=torchrun)
    assert two.returncode == 0, two.stderr
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("single", "double"))
    assert [entry["encoder"] for entry in first] == ["pretrained", "untrained", "pixels"]
    for a, b in zip(first, second, strict=True):
        assert (a["processes"], b["processes"]) == (1, 2)
        assert a["figures"]["count"] == 135
        for same in ("encoder", "protocol", "data", "settings", "figures", "choice"):
            assert a[same] == b[same]
    assert one.stdout.replace("single", "") == two.stdout.replace("double", "")  # said once, by rank 0
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["k=[0]", "run=nowhere"], "moco: k=[0]: 0 must be at least 1"),
        (["k=5", "run=nowhere"], "moco: k=5 must be a list: k=[5]"),
        (["run=nowhere", "data=cifar10"], "moco: run=nowhere does not exist"),
        (
            ["run=nowhere", "data.root=Bücher"],
            "moco: data.root=Bücher cannot be read: quote its value, 'data.root=\"Bü",
        ),
    ],
)
def test_what_cannot_run_ends_with_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    result = knn(tmp_path, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_jobs_that_read_one_run_and_write_to_one_place(tmp_path: Path) -> None:
    result = knn(tmp_path, "--multirun", "run=nowhere", "seed=1,2")
    assert result.returncode == 2
    assert result.stderr.startswith("moco: --multirun has 2 jobs with run=nowhere: ")
    assert result.stderr.endswith("'output=runs/seed_${seed}'\n")


@pytest.mark.parametrize(("name", "goes_on"), [("knn", False), ("train", True)])
def test_ctrl_c_promises_only_what_will_be(tmp_path: Path, name: str, goes_on: bool) -> None:
    lines = [
        "from moco.cli import run_command",
        "from moco.config.knn import KnnConfig",
        "from moco.config import TrainConfig",
        "def stopped(config): raise KeyboardInterrupt",
        f"run_command({name!r}, {'KnnConfig' if name == 'knn' else 'TrainConfig'}, stopped)",
    ]
    (tmp_path / "command.py").write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "command.py"), "run=x"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert result.stderr.startswith("moco: interrupted")
    assert ("last checkpoint" in result.stderr) == goes_on


def test_the_notebooks_preset_and_another_data_set_compose(tmp_path: Path) -> None:
    result = knn(tmp_path, "run=r", "preset=notebook", "data=cifar10", "data.root=there", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    assert (printed["k"], printed["temperature"], printed["features"]) == ([200], [0.1], "projection")
    assert (printed["data"]["name"], printed["data"]["root"], printed["data"]["labels"]) == ("cifar10", "there", None)
