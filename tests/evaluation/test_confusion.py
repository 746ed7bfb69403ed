"""The image of a confusion matrix grows with the classes; without matplotlib nothing is drawn."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.evaluation.confusion import draw_confusion


def test_the_image_grows_with_the_number_of_classes(tmp_path: Path) -> None:
    widths = []
    for count in (2, 25, 100):
        confusion = np.eye(count, dtype=np.int64) * 7
        assert draw_confusion(confusion, [f"class {i}" for i in range(count)], "title", tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as image:
            widths.append(image.width)
    assert 400 < widths[0] < widths[1] < widths[2]


def test_without_matplotlib_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_confusion(np.eye(2, dtype=np.int64), ["a", "b"], "title", tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []
