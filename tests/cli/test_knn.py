"""`python -m moco.knn` in one process and under torchrun in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moco.config import config_dir
from tests.evaluation.runs import trained, write_images

REPOSITORY = Path(config_dir()).parent


def knn(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "moco.knn", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.long
def test_two_processes_return_the_results_of_one(tmp_path: Path) -> None:
    """The held-out images form three blocks, and no count is divisible by two."""
    trained(tmp_path / "run")
    write_images(tmp_path / "train", {"cat": 70, "dog": 67})
    write_images(tmp_path / "test", {"cat": 71, "dog": 64})
    data = ["data=folder", "data.root=train", "data.eval_root=test", "data.labels=folder", "data.workers=0"]
    arguments = [
        "run=run",
        *data,
        "k=[1,3,20]",
        "temperature=[0.1,0.5]",
        "compare=[untrained,pixels]",
        "queries_at_once=64",
    ]
    one = knn(tmp_path, *arguments, "output=single")
    assert one.returncode == 0, one.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = knn(tmp_path, *arguments, "output=double", launcher=torchrun)
    assert two.returncode == 0, two.stderr
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("single", "double"))
    assert [entry["encoder"] for entry in first] == ["pretrained", "untrained", "pixels"]
    for a, b in zip(first, second, strict=True):
        assert (a["processes"], b["processes"]) == (1, 2)
        assert a["figures"]["count"] == 135
        for same in ("encoder", "protocol", "data", "settings", "figures", "choice"):
            assert a[same] == b[same]
    assert one.stdout.replace("single", "") == two.stdout.replace("double", "")  # rank 0 alone prints
    assert not (tmp_path / "outputs").exists()
