"""Data sets by name: unknown names, images decoded into memory, sources in other processes, outputs among images."""

import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import ConfigError, DataConfig
from moco.config.data import OF_MOCO
from moco.data.decode import ImageError
from moco.data.sources import SOURCES, ArraySource, Source, load_source, refuse_output_inside
from tests.data.images import names, write_image


def test_resident_equals_decoding_one_by_one(tmp_path: Path) -> None:
    for i in range(150):
        write_image(tmp_path / f"{i % 3}/{i:03}.png", (i, 255 - i, 3 * i % 256))
    streamed = load_source(DataConfig("folder", str(tmp_path), labels="folder")).train
    calls: list[tuple[int, int]] = []
    sources = load_source(
        DataConfig("folder", str(tmp_path), labels="folder", resident=True),
        progress=lambda done, total: calls.append((done, total)),
    )
    train = sources.train
    assert isinstance(train, ArraySource)
    assert sources.bank is train
    assert train.images.is_contiguous()
    assert (train.images == torch.stack([streamed.image(i) for i in range(150)])).all()
    assert names(train) == names(streamed)
    assert train.labels is not None
    assert train.labels.tolist() == [0] * 50 + [1] * 50 + [2] * 50
    assert calls == [(64, 150), (128, 150), (150, 150)]


def test_resident_refuses_two_sizes_and_broken_files(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", size=(9, 5))
    with pytest.raises(ValueError, match=r"a\.png is 6 x 5 and b\.png is 9 x 5: set data\.resident=false"):
        load_source(DataConfig("folder", str(tmp_path), resident=True))
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"b\.png: the file is empty"):
        load_source(DataConfig("folder", str(tmp_path), resident=True))


def test_a_file_that_is_removed_after_the_scan(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    train = load_source(DataConfig("folder", str(tmp_path))).train
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"a\.png: No such file"):
        train.image(0)


@pytest.mark.parametrize("resident", [False, True])
def test_sources_can_be_pickled_for_worker_processes(resident: bool, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 9)
    train = load_source(DataConfig("folder", str(tmp_path), resident=resident)).train
    copy: Source = pickle.loads(pickle.dumps(train))
    assert names(copy) == ["a.png"]
    assert (copy.image(0) == 9).all()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.name='cifar' must be one of digits, cifar10, cifar100, stl10"):
        load_source(DataConfig("cifar"))


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "digits"])
def test_an_empty_root_is_refused(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root is empty"):
        load_source(DataConfig(name, ""))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("cifar10", "labels", "folder"),
        ("folder", "label_column", "label"),
        ("shards", "subset", "en"),
        ("video", "image_column", "image"),
        ("imagenet", "length", 9),
        ("huggingface", "shuffle_buffer", 9),
        ("stl10", "allow_pipe", True),
    ],
)
def test_a_field_of_other_data_sets_is_refused(name: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{field}={value} works with data\.name=.* only, .*{name}: remove it"):
        load_source(replace(DataConfig(name, "there"), **{field: value}))
    assert set(OF_MOCO) == set(SOURCES)


def test_real_cifar_jpegs(tmp_path: Path) -> None:
    archive = Path(os.environ.get("MOCO_SHARED_DATA", ""), "cifar10_jpeg.tar.xz")
    if not archive.is_file():
        pytest.skip("MOCO_SHARED_DATA does not name a folder that holds cifar10_jpeg.tar.xz")
    wanted = 0
    with tarfile.open(archive, "r|xz") as stream:  # the first part only: unpacking all takes long
        stream.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
        for member in stream:
            if member.isfile() and not member.name.endswith("0.jpg"):
                continue
            stream.extract(member, tmp_path)
            wanted += member.isfile()
            if wanted == 600:
                break
    train = load_source(DataConfig("folder", str(tmp_path), resident=True)).train
    assert train.images is not None
    assert train.images.shape == (600, 3, 32, 32)
    with Image.open(tmp_path / train.name(599)) as opened:
        assert (train.images[599].permute(1, 2, 0).numpy() == np.asarray(opened.convert("RGB"))).all()


@pytest.mark.parametrize("output", ["photos", "photos/runs/a", "photos/../photos/x", "link/a", "held/out"])
def test_an_output_among_the_images_is_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its images join the data: the run cannot resume, and its folder becomes a class."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/cat", "held", "beside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos/cat")
    data = DataConfig(name="folder", root="photos", eval_root="held")
    with pytest.raises(ConfigError, match=rf"run={output} lies in data\.(eval_)?root="):
        refuse_output_inside(data, "run", output)
    for other in ("beside", "photos2", "runs/a"):
        refuse_output_inside(data, "run", other)
    refuse_output_inside(DataConfig(name="digits"), "run", output)
    with pytest.raises(ConfigError, match=r"data\.root=\."):
        refuse_output_inside(DataConfig(name="folder", root="."), "run", "runs/a")
    refuse_output_inside(DataConfig(name="imagenet", root="."), "run", "runs/a")  # only train/ and val/ are searched
