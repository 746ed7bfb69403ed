"""Images with the same content, in every kind of source, and how many files are read to find them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import moco.data.folder as folder_module
from moco.config import DataConfig
from moco.data.arrays import ArraySource
from moco.data.base import Source
from moco.data.duplicates import content_groups, copies_in
from moco.data.folder import FolderSource
from moco.data.sources import load_source
from tests.data.packed import packed


def write(path: Path, value: int) -> None:
    """Write a BMP, whose size depends on the image's size only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Training images a, b, c, a; held-out images b, d, b, and files that cannot be read."""
    root = tmp_path / "tree"
    for name, value in {"train/x/0": 1, "train/x/1": 2, "train/y/2": 3, "train/y/3": 1}.items():
        write(root / f"{name}.bmp", value)
    for name, value in {"test/x/0": 2, "test/x/1": 4, "test/y/2": 2}.items():
        write(root / f"{name}.bmp", value)
    return root


def opened(tree: Path, **more: Any) -> list[Source]:
    config = DataConfig("folder", str(tree / "train"), labels="folder", eval_root=str(tree / "test"), **more)
    sources = load_source(config)
    assert sources.held_out is not None
    return [sources.train, sources.held_out]


def as_shards(tree: Path) -> list[Source]:
    output = packed(tree.parent / "shards", tree / "train", data_labels="folder", data_eval_root=str(tree / "test"))
    sources = load_source(DataConfig("shards", str(output)))
    assert sources.held_out is not None
    return [sources.train, sources.held_out]


def as_hub(tree: Path) -> list[Source]:
    datasets = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    splits = {}
    for split in ("train", "test"):
        files = sorted((tree / split).rglob("*.bmp"))
        images: list[Any] = [{"bytes": path.read_bytes(), "path": None} for path in files]
        images[-1] = {"bytes": None, "path": str(files[-1])}
        columns = {"image": images, "label": [0, 1, *[0] * (len(files) - 2)]}
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
        splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    root = tree.parent / "hub"
    datasets.DatasetDict(splits).save_to_disk(str(root))
    sources = load_source(DataConfig("huggingface", str(root)))
    assert sources.held_out is not None
    return [sources.train, sources.held_out]


@pytest.mark.parametrize("kind", ["folder", "resident", "shards", "hub"])
def test_copies_are_found_in_every_kind_of_source(tree: Path, kind: str) -> None:
    makers = {"folder": opened, "resident": lambda tree: opened(tree, resident=True), "shards": as_shards}
    train, held_out = (makers | {"hub": as_hub})[kind](tree)
    assert content_groups(train).tolist() == [0, 1, 2, 0]
    assert content_groups(held_out).tolist() == [0, 1, 0]
    assert copies_in(train, held_out).tolist() == [0, 2]
    rows = np.array([2, 0])
    assert copies_in(train.subset(rows), held_out).tolist() == []
    assert content_groups(train.subset(np.array([3, 1, 0]))).tolist() == [0, 1, 0]


def test_links_are_copies_and_unreadable_files_are_not(tree: Path) -> None:
    (tree / "test/y/link.bmp").symlink_to(tree / "train/y/2.bmp")
    for i in range(2):
        (tree / f"train/x/empty{i}.bmp").touch()
        (tree / f"test/x/lost{i}.bmp").symlink_to("gone.bmp")
        (tree / f"test/y/empty{i}.bmp").touch()
    train, held_out = opened(tree)
    names = [held_out.name(i) for i in copies_in(train, held_out)]
    assert names == ["x/0.bmp", "y/2.bmp", "y/link.bmp"]
    assert content_groups(train).tolist() == [0, 1, 2, 3, 4, 0]


def test_only_files_of_equal_sizes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for i in range(20):
        (root / f"{i:02}.jpg").write_bytes(b"x" * (i + 1))
    shutil.copy(root / "07.jpg", root / "20.jpg")
    (root / "21.jpg").write_bytes(b"y" * 8)  # the same size, another content
    read: list[str] = []

    def count(path: str) -> bytes:
        read.append(Path(path).name)
        return Path(path).read_bytes()

    monkeypatch.setattr(folder_module, "read_bytes", count)
    source = FolderSource(str(root), np.array([f"{i:02}.jpg".encode() for i in range(22)]))
    assert content_groups(source).tolist() == [*range(20), 7, 21]
    assert sorted(read) == ["07.jpg", "20.jpg", "21.jpg"]


def test_images_in_memory_are_compared_by_their_pixels() -> None:
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    pixels[4] = pixels[1]
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    first, second = (ArraySource(each, [str(i) for i in range(5)]) for each in (pixels, strided))
    assert content_groups(first).tolist() == [0, 1, 2, 3, 1]
    assert copies_in(first.subset(np.array([0, 1])), second).tolist() == [0, 1, 4]
