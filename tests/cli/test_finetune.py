"""`python -m moco.finetune` in processes of its own."""

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


@pytest.mark.long
@pytest.mark.parametrize(
    "labeled",
    [
        ["fraction=0.1", "epochs=2", "batch_size=50"],  # an odd number, 129 labeled images
        ["labels_per_class=1", "epochs=6", "batch_size=128"],  # lowered to the ten labeled images
    ],
)
def test_two_processes_return_the_results_of_one(tmp_path: Path, labeled: list[str]) -> None:
    import torch

    torch.save(build_backbone("convnet", {"width": 4}).state_dict(), tmp_path / "plain.pt")
    arguments = ["checkpoint=plain.pt", "backbone=convnet", "+options.width=4", "data=digits", "images.size=16"]
    arguments += ["images.resize=0", "threads=1", "min_steps=6", "seeds=1", *labeled]
    for processes in (1, 2):
        result = finetune(tmp_path, *arguments, f"output=out{processes}", "mixup=0.2", processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"out{each}" / "results.json").read_text()) for each in (1, 2))
    assert [each["processes"] for each in one + two] == [1, 1, 2, 2]
    for first, second in zip(one, two, strict=True):
        assert first["encoder"] == second["encoder"]
        assert first["settings"] == second["settings"]
        assert first["settings"]["steps"] == 6
        # float32 sums in another order: at most one image may get another class
        assert abs(first["figures"]["top1"] - second["figures"]["top1"]) < 0.41
