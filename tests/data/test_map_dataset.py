"""A data set of torch as a source: the kinds of images and labels that it reads, and the ones that it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco.api import load_encoder
from moco.config import ConfigError, DataConfig
from moco.config.pack import PackConfig
from moco.data.decode import ImageError
from moco.data.in_memory import to_pixels
from moco.data.map_dataset import open_datasets
from moco.data.pixel_format import DTYPES, PixelFormat
from moco.data.sources import SOURCES, from_dataset, load_source
from moco.pack import pack
from moco.training.trainer import pretrain
from tests.training.test_bad_images import config

# A run keeps its lock open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:method.queue_size")

GRAY = np.arange(6, dtype=np.uint8).reshape(2, 3)
COLOR = np.stack([GRAY, GRAY + 10, GRAY + 20], axis=2)  # (2, 3, 3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(COLOR), COLOR),
        (Image.fromarray(GRAY), np.stack([GRAY] * 3, axis=2)),
        (COLOR, COLOR),
        (GRAY, np.stack([GRAY] * 3, axis=2)),
        (torch.from_numpy(COLOR).permute(2, 0, 1), COLOR),
        (torch.from_numpy(GRAY)[None], np.stack([GRAY] * 3, axis=2)),
    ],
)
def test_images_of_each_kind_become_the_same_pixels(image: Any, expected: Any) -> None:
    assert np.array_equal(to_pixels(image).permute(1, 2, 0).numpy(), expected)


def test_color_becomes_gray_for_one_channel() -> None:
    gray = np.asarray(Image.fromarray(COLOR).convert("L"))
    for image in (Image.fromarray(COLOR), COLOR, torch.from_numpy(COLOR).permute(2, 0, 1), Image.fromarray(gray), gray):
        assert np.array_equal(to_pixels(image, PixelFormat(1))[0].numpy(), gray)


@pytest.mark.parametrize(
    ("channels", "dtype", "given"),
    [
        (1, "uint16", "uint16"),
        (4, "uint8", "uint8"),
        (13, "uint16", "uint16"),
        (3, "uint16", "uint16"),
        (2, "float32", "float32"),
        (2, "float32", "int32"),
        (2, "float32", "float64"),
    ],
)
def test_any_channels_and_type_keep_their_values(channels: int, dtype: str, given: str, tmp_path: Path) -> None:
    values = (
        np.random.default_rng(0).integers(0, 2**8 if given == "uint8" else 2**15, (9, 5, 7, channels)).astype(given)
    )
    values[0, 0, 0, 0] += 1
    items = [each[..., 0] if channels == 1 and i % 2 else each for i, each in enumerate(values)]
    items = [
        torch.from_numpy(each.T.copy().swapaxes(1, 2)) if i == 4 and channels > 1 else each
        for i, each in enumerate(items)
    ]
    form = DataConfig("mine", channels=channels, dtype=dtype, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "mine", from_dataset(lambda _: items))
        sources = load_source(form)
        assert sources.train.pixel_format == PixelFormat(channels, dtype)
        for i, value in enumerate(values):
            pixels = sources.train.image(i)
            assert pixels.dtype == DTYPES[dtype]
            assert np.array_equal(pixels.permute(1, 2, 0).numpy().astype(given), value)
        resident = load_source(replace(form, resident=True)).train
        assert resident.images is not None
        assert torch.equal(resident.images[3], sources.train.image(3))
        pack(PackConfig(form, str(tmp_path / "packed")))
    packed = load_source(DataConfig("shards", str(tmp_path / "packed"), channels=channels, dtype=dtype)).train
    assert all(torch.equal(packed.image(i), sources.train.image(i)) for i in range(9))


@pytest.mark.parametrize(
    ("image", "form", "part"),
    [
        (COLOR, PixelFormat(4), r"shape \(2, 3, 3\) and the type uint8: pass an array .* of 4 channels of uint8"),
        (np.zeros((2, 2, 4)), PixelFormat(4, "uint16"), "the type float64"),
        (np.full((2, 2, 4), np.nan), PixelFormat(4, "float32"), "not finite"),
        (np.zeros((2, 2, 4), bool), PixelFormat(4, "float32"), "the type bool"),
        (np.zeros((0, 2, 4), np.uint16), PixelFormat(4, "uint16"), r"shape \(0, 2, 4\)"),
    ],
)
def test_other_channels_and_types_are_refused(image: Any, form: PixelFormat, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        to_pixels(image, form)


def test_a_run_on_four_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = [(rng.integers(0, 2**16, (20, 20, 4), dtype=np.uint16), i % 2) for i in range(16)]
    made = config(tmp_path, tmp_path / "run")
    made.data.name, made.data.channels, made.data.dtype, made.epochs = "mine", 4, "uint16", 1
    made.augment.mean, made.augment.std, made.evaluate.every_epochs = [0.5] * 4, [0.29] * 4, 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "mine", from_dataset(lambda _: (items[:12], items[12:])))
        pretrain(made)
    assert load_encoder(tmp_path / "run")(torch.zeros(2, 4, 16, 16)).shape[0] == 2


@pytest.mark.parametrize(
    "image", [torch.rand(3, 2, 2), np.zeros((2, 2, 4), np.uint8), "a.jpg", np.zeros((0, 2), np.uint8)]
)
def test_other_images_are_refused_with_their_name(image: Any) -> None:
    source = open_datasets(lambda _: [image], DataConfig("mine")).train
    with pytest.raises(ImageError, match=r"cannot read image mine/train/0: "):
        source.image(0)


def test_labels_subsets_and_a_held_out_part() -> None:
    pairs = [(GRAY + i, i % 3) for i in range(9)]
    found = open_datasets(lambda _: (pairs, pairs[:4]), DataConfig("mine"))
    assert found.bank is found.train
    assert found.held_out is not None
    assert found.train.classes == ("0", "1", "2")
    part = found.train.subset(np.array([4, 2]))
    assert (part.name(0), part.labels is not None and part.labels.tolist()) == ("mine/train/4", [1, 2])
    assert torch.equal(part.image(1), to_pixels(GRAY + 2))
    assert part.content_digest() != found.train.subset(np.array([2, 4])).content_digest()
    assert open_datasets(lambda _: [GRAY], DataConfig("mine")).bank is None


@pytest.mark.parametrize("row", [lambda row: row, np.array, torch.tensor, lambda row: torch.tensor(row).float()])
def test_a_row_of_zeros_and_ones_means_several_labels(row: Any) -> None:
    rows = [[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]]
    items = [(GRAY, row(each)) for each in rows]
    found = open_datasets(lambda _: (items, items[:2]), DataConfig("mine"))
    assert found.train.labels is None
    assert found.train.multi_labels is not None
    assert found.train.multi_labels.tolist() == np.array(rows, bool).tolist()
    assert found.train.classes == ("0", "1", "2")
    assert found.bank is None
    part = found.train.subset(np.array([2]))
    assert part.multi_labels is not None
    assert part.multi_labels.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ([], "has no images"),
        (iter([]), "__len__"),
        ([(GRAY, "cat")], "whole number"),
        ([(GRAY, 0), (GRAY, -1)], "whole numbers.*the smallest is -1"),
        ([(GRAY, [0, 0])], r"0 or 1 for each.*, with a 1 in at least one list; the first is \[0, 0\]"),
        ([(GRAY, [0, 2])], "0 or 1 for each"),
        ([(GRAY, [0]), (GRAY, [0, 1])], "0 or 1"),
    ],
)
def test_other_data_sets_are_refused(dataset: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.name=mine: .*{part}"):
        open_datasets(lambda _: dataset, DataConfig("mine"))
