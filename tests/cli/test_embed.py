"""`python -m moco.embed` and `python -m moco.search` in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from moco.config import config_dir
from tests.data.images import encoder, folder

REPOSITORY = Path(config_dir()).parent


def run(where: Path, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", f"moco.{command}", *arguments],
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_embed_then_search(tmp_path: Path) -> None:
    encoder(tmp_path / "encoder.safetensors")
    folder(tmp_path / "pictures", 5)
    done = run(tmp_path, "embed", "checkpoint=encoder.safetensors", "data=folder", "data.root=pictures", "output=out")
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(tmp_path / "out" / "features.npy").shape == (5, 128)
    assert "python -m moco.search index=out mode=duplicates" in done.stdout
    done = run(tmp_path, "search", "index=out", "query=[pictures/02.png,pictures/04.png]", "k=2")
    assert (done.returncode, done.stderr) == (0, "")
    queries = json.loads((tmp_path / "out" / "search" / "nearest.json").read_text())["queries"]
    assert [each["query"] for each in queries] == ["pictures/02.png", "pictures/04.png"]
    assert "02.png" not in [each["path"] for each in queries[0]["neighbours"]]
    assert "out/search/nearest.html" in done.stdout
