"""The data sets that are small enough to be in memory: digits, CIFAR, STL-10.

Legend: N images.
"""

import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from moco.data.decode import ImageError
from moco.data.keyed import SPLIT, permutation

SPLIT_SEED = 1797  # a constant: the split is part of the data set, not of a run


@dataclass(frozen=True, eq=False)  # eq would compare tensors
class ArraySource:
    """Images of one size in memory."""

    images: Tensor  # uint8 (N, 3, H, W)
    names: Sequence[str]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    bad: Mapping[int, ImageError] = field(default_factory=dict)  # rows without a picture, black here, and why

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        if i in self.bad:
            raise self.bad[i]
        return self.images[i]

    def name(self, i: int) -> str:
        return self.names[i]


Splits = tuple[ArraySource, ArraySource, ArraySource]  # to train on, labeled references, held out


def digits() -> Splits:
    """1,797 real 8x8 scans of handwritten digits at 16x16; 50 of each class are held out, the other 1,297 train."""
    from sklearn.datasets import load_digits  # here: it would add 2 s to every start

    bunch = load_digits()
    targets: NDArray[np.int64] = bunch.target.astype(np.int64)  # (N,)
    scans = torch.from_numpy(bunch.images).float().unsqueeze(1)  # (N, 1, 8, 8), 0 ... 16
    # Bilinear, as bicubic overshoots 0 ... 16. Its weights are sixteenths and 255 comes after: all values are exact in
    # float32, so the images are the same on every machine.
    scans = torch.nn.functional.interpolate(scans, size=(16, 16), mode="bilinear")  # (N, 1, 16, 16)
    images = (scans * 255 / 16).round().to(torch.uint8).repeat(1, 3, 1, 1)  # (N, 3, 16, 16)
    order = permutation(SPLIT_SEED, 0, len(targets), SPLIT)
    held_out = np.sort(np.concatenate([order[targets[order] == digit][:50] for digit in range(10)]))
    train = np.setdiff1d(order, held_out)  # sorted

    def subset(indices: NDArray[np.int64]) -> ArraySource:
        names = [f"digits/{i}" for i in indices]
        return ArraySource(images[torch.from_numpy(indices)], names, targets[indices], tuple("0123456789"))

    train_source = subset(train)
    return train_source, train_source, subset(held_out)


def cifar(dataset: Any, root: str, download: bool) -> Splits:
    """CIFAR-10 or -100: 50,000 training and 10,000 test images of 32x32."""

    def split(train: bool) -> ArraySource:
        data = _open_torchvision(dataset, root, download, train=train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        names = [f"{dataset.__name__.lower()}/{'train' if train else 'test'}/{i}" for i in range(len(images))]
        return ArraySource(images, names, np.asarray(data.targets, np.int64), tuple(data.classes))

    train = split(train=True)
    return train, train, split(train=False)


def stl10(root: str, download: bool) -> Splits:
    """STL-10 at 96x96: 100,000 unlabeled images to train on, 5,000 labeled as bank, 8,000 held out."""

    def split(name: str) -> ArraySource:
        data = _open_torchvision(datasets.STL10, root, download, split=name)
        images = torch.from_numpy(data.data).contiguous()  # (N, 3, 96, 96)
        names = [f"stl10/{name}/{i}" for i in range(len(images))]
        if name == "unlabeled":
            return ArraySource(images, names)
        return ArraySource(images, names, np.asarray(data.labels, np.int64), tuple(data.classes))

    return split("unlabeled"), split("train"), split("test")


def _open_torchvision(dataset: Any, root: str, download: bool, **split: Any) -> Any:
    """Torchvision's data set, its errors put into one sentence: it says neither where it looked nor what to do here."""
    folder = os.path.abspath(os.path.expanduser(root))
    where = f"data.root={root} ({folder})"
    try:
        return dataset(folder, download=download, **split)
    except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        if download:
            raise FileNotFoundError(
                f"{dataset.__name__} could not be downloaded to {where}: {error}; "
                f"check network and disk, or put {dataset.url} there yourself"
            ) from error
        found = "is incomplete or corrupted" if Path(folder, dataset.base_folder).exists() else "was not found"
        raise FileNotFoundError(
            f"{dataset.__name__} {found} in {where}, which should hold the folder {dataset.base_folder}: "
            "set data.download=true to fetch it, or correct data.root"
        ) from error
