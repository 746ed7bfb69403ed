"""`python -m moco.convert` in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

from moco.config import config_dir
from moco.interop.encoder_file import read_encoder
from tests.interop.networks import saved, trained


def test_a_file_is_converted_from_any_directory(tmp_path: Path) -> None:
    saved(tmp_path / "x.pth", trained("convnet", {"width": 2}).state_dict())
    environment = os.environ | {"PYTHONPATH": str(Path(config_dir()).parent), "COLUMNS": "120"}
    network = ["checkpoint=x.pth", "backbone=convnet", "+options.width=2", "images.size=16", "images.resize=0"]
    command = [sys.executable, "-m", "moco.convert", *network, "to=safetensors", "output=y.safetensors", "data=digits"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "features of 16 images (digits) differ by 0 at most" in result.stdout
    assert read_encoder(tmp_path / "y.safetensors").options == {"width": 2}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.pth", "y.safetensors"]
