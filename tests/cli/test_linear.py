"""`python -m moco.linear` in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moco.config import config_dir
from moco.interop.encoder_file import save_encoder
from moco.models.backbones import build_backbone

REPOSITORY = Path(config_dir()).parent


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "moco.linear", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.slow
def test_the_digits_protocol_on_an_encoder_file_without_a_run(tmp_path: Path) -> None:
    """The protocol is an option of its group, the data is data=digits, and the table is printed."""
    torch.manual_seed(0)
    config = {
        "model": {"backbone": "convnet", "options": {"width": 2, "pool": 2}},
        "augment": {"size": 16, "eval_resize": 0, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    save_encoder(tmp_path / "tiny.safetensors", build_backbone("convnet", {"width": 2, "pool": 2}), config, 5)
    done = call(
        f"checkpoint={tmp_path / 'tiny.safetensors'}",
        "data=digits",
        "protocol=moco_v2_digits",
        "epochs=1",
        "official.milestones=[]",
        "+augment.blur_p=0.1",
        f"output={tmp_path / 'out'}",
        "threads=1",
    )
    assert done.returncode == 0, done.stderr
    assert "Linear probe, moco_v2_digits" in done.stdout
    entry = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert entry["settings"]["official"]["lr"] == 30
    assert entry["settings"]["augment"]["flip_p"] == 0
    assert entry["settings"]["augment"]["blur_p"] == 0.1
    assert entry["data"]["name"] == "digits"
