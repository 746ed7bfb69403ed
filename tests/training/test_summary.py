"""The image of the views, views.png: its size, and a failure to write it."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from moco.config import DataConfig, RunWarning
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.data.view import View
from moco.runs.metrics import MetricsLogger
from moco.training.summary import show_views


def show(path: Path) -> None:
    sources = load_source(DataConfig("digits"))
    metrics_log = MetricsLogger(path, 0)
    show_views(metrics_log, path, sources.train, Plan(len(sources.train), 8, 1, 0), [View(8)] * 2, torch.device("cpu"))
    metrics_log.close()


@pytest.mark.usefixtures("fixed_temporary_names")
def test_a_failure_to_write_views_is_a_warning_and_the_next_attempt_writes_them(tmp_path: Path) -> None:
    (tmp_path / "views.png.tmp").symlink_to("/dev/full")
    with pytest.warns(RunWarning, match=r"views\.png .*No space left on device"):
        show(tmp_path)
    assert not list(tmp_path.glob("views.*"))
    (tmp_path / "views.png.tmp").write_bytes(b"partial")
    show(tmp_path)
    assert [each.name for each in tmp_path.glob("views.*")] == ["views.png"]
    with Image.open(tmp_path / "views.png", formats=["PNG"]) as image:
        assert image.size == (8 * 66 + 2, 2 * 66 + 2)  # two rows of eight, enlarged to 64, in frames of 2
