"""`python -m moco.finetune` as a person runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moco.config import config_dir
from moco.models.backbones import build_backbone

REPOSITORY = Path(config_dir()).parent


def finetune(folder: Path, *arguments: str, processes: int = 1) -> "subprocess.CompletedProcess[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "moco.finetune", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=runs/none"], "moco: run=runs/none does not exist"),
        (["run=x", "fraction=2"], "moco: fraction=2.0 must be above 0 and at most 1"),
        (["run=x", "learning_rate=2"], "moco: there is no field 'learning_rate'"),
        (["run=x", "+view.flip_p=2", "lr=0"], "moco: lr=0.0 must be above 0"),
        (["run=x", "data=cifar"], "moco: there is no 'data/cifar'; did you mean 'cifar10'?"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    result = finetune(tmp_path, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert sentence in line


def test_a_group_of_data_can_be_chosen(tmp_path: Path) -> None:
    result = finetune(tmp_path, "run=x", "data=cifar10", "data.root=elsewhere", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "name: cifar10\n  root: elsewhere" in result.stdout
    plain = finetune(tmp_path, "run=x", "--cfg", "job")
    assert "data:\n  name: null\n" in plain.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "labeled",
    [
        ["fraction=0.1", "epochs=2", "batch_size=50"],  # odd numbers on purpose: 129 labeled pictures
        ["labels_per_class=1", "epochs=6", "batch_size=128"],  # lowered to the ten that there are
    ],
)
def test_two_processes_give_the_figures_of_one(tmp_path: Path, labeled: list[str]) -> None:
    import torch

    torch.save(build_backbone("convnet", {"width": 4}).state_dict(), tmp_path / "plain.pt")
    told = ["checkpoint=plain.pt", "backbone=convnet", "+options.width=4", "data=digits", "images.size=16"]
    told += ["images.resize=0", "threads=1", "min_steps=6", "seeds=1", *labeled]
    for processes in (1, 2):
        result = finetune(tmp_path, *told, f"output=out{processes}", "mixup=0.2", processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"out{each}" / "results.json").read_text()) for each in (1, 2))
    assert [each["processes"] for each in one + two] == [1, 1, 2, 2]
    for first, second in zip(one, two, strict=True):
        assert first["encoder"] == second["encoder"]
        assert first["settings"] == second["settings"]
        assert first["settings"]["steps"] == 6
        # float32 sums in another order: at most a picture on the fence may change sides
        assert abs(first["figures"]["top1"] - second["figures"]["top1"]) < 0.41
