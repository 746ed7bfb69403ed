"""A data set of torch as a source: the kinds of images and labels that it reads, and the ones that it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import ConfigError, DataConfig
from moco.data.decode import ImageError
from moco.data.map_dataset import open_datasets, to_pixels

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


@pytest.mark.parametrize(
    ("dataset", "part"),
    [([], "has no images"), (iter([]), "__len__"), ([(GRAY, "cat")], "whole number"), ([(GRAY, -1)], "whole number")],
)
def test_other_data_sets_are_refused(dataset: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.name=mine: .*{part}"):
        open_datasets(lambda _: dataset, DataConfig("mine"))
