"""`python -m moco.embed`, then `python -m moco.search` on its output."""

import json
from pathlib import Path

import numpy as np

from tests.cli.conftest import Run
from tests.data.images import encoder, folder


def test_embed_then_search(run: Run, tmp_path: Path) -> None:
    encoder(tmp_path / "encoder.safetensors")
    folder(tmp_path / "images", 5)
    status, output, errors = run(
        "embed", "checkpoint=encoder.safetensors", "data=folder", "data.root=images", "output=out", "threads=1"
    )
    assert (status, errors) == (0, "")
    assert np.load(tmp_path / "out" / "features.npy").shape == (5, 128)
    assert "python -m moco.search threads=1 index=out mode=duplicates" in output
    status, output, errors = run("search", "index=out", "query=[images/02.png,images/04.png]", "k=2")
    assert (status, errors) == (0, "")
    queries = json.loads((tmp_path / "out" / "search" / "nearest.json").read_text())["queries"]
    assert [each["query"] for each in queries] == ["images/02.png", "images/04.png"]
    assert "02.png" not in [each["path"] for each in queries[0]["neighbours"]]
    assert "out/search/nearest.html" in output
