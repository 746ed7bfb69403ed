"""What moco.check_data reports about images with several labels each."""

import json
from pathlib import Path

import pytest

from moco.config import DataConfig
from moco.config.check_data import CheckDataConfig
from moco.data.check import check_data
from tests.data.images import gradient

LABELS = [
    ("a b", "train"),
    ("a", "train"),
    ("", "train"),
    ("a b c", "train"),
    ("c", "test"),
    ("a", "test"),
    ("", "test"),
]


def test_each_label_is_counted_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "images").mkdir()
    rows = ["path,label,split"]
    for i, (labels, split) in enumerate(LABELS):
        gradient(i, 12, 12).save(tmp_path / "images" / f"{i}.png")
        rows.append(f"{i}.png,{labels.replace(' ', '|')},{split}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = DataConfig("folder", str(tmp_path / "images"), workers=0, label_separator="|")
    data.label_file = str(tmp_path / "labels.csv")
    check_data(CheckDataConfig(data, str(tmp_path / "report.json")))
    assert json.loads((tmp_path / "report.json").read_text())["labels"] == {
        "training": {
            "images": {"a": 3, "b": 2, "c": 1},
            "per_image": [1, 1, 1, 1],
            "together": {"a": ["b", 2], "b": ["a", 2], "c": ["a", 1]},
        },
        "held_out": {"images": {"a": 1, "b": 0, "c": 1}, "per_image": [1, 2], "together": {}},
    }
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = lines[lines.index(["label", "training images", "held-out images", "most often with"]) + 2 :]
    assert table[:4] == [
        ["a", "3", "1", "b, 67 %"],
        ["b", "2", "0", "a, 100 %"],
        ["c", "1", "1", "a, 100 %"],
        ["without a label", "1", "1", ""],
    ]


def test_one_class_per_image_has_no_such_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient(i, 12, 12).save(path)
    data = DataConfig("folder", str(tmp_path / "images"), labels="folder", workers=0)
    check_data(CheckDataConfig(data, str(tmp_path / "report.json")))
    assert json.loads((tmp_path / "report.json").read_text())["labels"] == {"training": {}}
    assert "without a label" not in capsys.readouterr().out
