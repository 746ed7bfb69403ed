"""Hugging Face data sets, saved here and read without network: columns, splits, labels, errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.config import DataConfig
from moco.data.decode import ImageError, decode_bytes
from moco.data.hub import HubSource
from moco.data.sources import Source, load_source
from tests.data.unreadable_files import encoded, noise

datasets: Any = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def content(i: int) -> bytes:
    return encoded(noise(i, height=20 + i), "JPEG" if i % 2 else "PNG")


def table(count: int, first: int = 0, **columns: Any) -> Any:
    """Make a table of images first, first + 1, ...; other columns as (values, feature)."""
    values = {"image": [{"bytes": content(first + i), "path": None} for i in range(count)]}
    features = {"image": datasets.Image()}
    for name, (each, feature) in columns.items():
        values[name], features[name] = each, feature
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


CLASSES = datasets.ClassLabel(names=["cat", "dog"])


def saved(root: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(root))
    return str(root)


def same(source: Source | None, first: int, count: int) -> None:
    assert isinstance(source, HubSource)
    assert len(source) == count
    for i in range(count):
        assert source.content(i) == content(first + i)
        assert torch.equal(source.image(i), decode_bytes("", content(first + i)))


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    train = table(5, label=([0, 1, 0, 1, 1], CLASSES))
    test = table(3, 10, label=([1, 0, 1], CLASSES))
    unknown = table(2, 20, label=([-1, -1], CLASSES))
    sources = load_source(
        DataConfig("huggingface", saved(tmp_path / "data", train=train, test=unknown, validation=test))
    )
    same(sources.train, 0, 5)
    same(sources.held_out, 10, 3)  # the labels of the test split are secret, so accuracy is not measured on it
    assert sources.bank is sources.train
    assert sources.train.classes == ("cat", "dog")
    assert sources.train.labels is not None
    assert sources.train.labels.tolist() == [0, 1, 0, 1, 1]
    assert sources.train.name(2) == "train/2"
    part = sources.train.subset(torch.tensor([4, 1]).numpy())
    assert [part.name(0), part.name(1)] == ["train/4", "train/1"]
    assert torch.equal(part.image(0), sources.train.image(4))
    assert part.labels is not None
    assert part.labels.tolist() == [1, 1]


def test_folders_of_parquet_files_and_of_a_single_split(tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    table(4).to_parquet(str(folder / "train-00000.parquet"))
    sources = load_source(DataConfig("huggingface", str(folder)))
    same(sources.train, 0, 4)
    assert (sources.bank, sources.held_out, sources.train.labels) == (None, None, None)
    table(4).save_to_disk(str(tmp_path / "single"))
    same(load_source(DataConfig("huggingface", str(tmp_path / "single"))).train, 0, 4)


def test_columns_and_splits_by_name(tmp_path: Path) -> None:
    fine = (["x", "y", "x"], datasets.Value("string"))
    both: Any = {"fine": fine, "coarse": ([0, 1, 1], CLASSES), "second": ([0, 0, 1], CLASSES)}
    root = saved(tmp_path / "data", first=table(3, **both), other=table(3, 5, **both))
    sources = load_source(DataConfig("huggingface", root, split="first", eval_split="other", label_column="fine"))
    same(sources.held_out, 5, 3)
    assert sources.train.classes == ("x", "y")
    assert sources.train.labels is not None
    assert sources.train.labels.tolist() == [0, 1, 0]
    assert load_source(DataConfig("huggingface", root, split="first", label_column="none")).train.labels is None
    for fields, words in (
        ({}, "data.split=train: "),
        ({"split": "first"}, "has 2 columns with class labels (coarse, second): set data.label_column"),
        ({"split": "first", "label_column": "color"}, "data.label_column=color: "),
        (
            {"split": "first", "label_column": "coarse", "eval_split": "first"},
            "data.eval_split=first equals data.split",
        ),
        ({"split": "first", "image_column": "fine", "label_column": "none"}, "data.image_column=fine: this column"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            load_source(DataConfig("huggingface", root, **fields))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_rows_without_an_image_or_a_label(tmp_path: Path) -> None:
    rows = table(2)
    empty = rows.map(lambda row, i: {"image": None if i == 1 else row["image"]}, with_indices=True)
    empty.save_to_disk(str(tmp_path / "empty"))
    train = load_source(DataConfig("huggingface", str(tmp_path / "empty"))).train
    with pytest.raises(ImageError, match=r"cannot read image train/1: the row has no image"):
        train.image(1)
    table(3, label=([0, -1, 1], CLASSES)).save_to_disk(str(tmp_path / "gaps"))
    with pytest.raises(ValueError, match=r"data\.label_column=label of .*: 1 of the 3 images .*set data\.label_column"):
        load_source(DataConfig("huggingface", str(tmp_path / "gaps")))
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"has no column with images: its columns are text"):
        load_source(DataConfig("huggingface", str(tmp_path / "text")))


def test_no_network_and_no_code(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data\.root=nobody/nothing could not be opened as a Hugging"
    ) as caught:
        load_source(DataConfig("huggingface", "nobody/nothing"))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"could not be opened"):
        load_source(DataConfig("huggingface", str(tmp_path / "gone")))
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (script / "data.json").write_text(json.dumps({"a": 1}))
    with pytest.raises((FileNotFoundError, ValueError)):
        load_source(DataConfig("huggingface", str(script)))
    assert not (tmp_path / "ran").exists()
