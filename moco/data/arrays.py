"""Images in memory, and the data sets that are small enough to be held in memory: digits, CIFAR, STL-10.

Legend: N images.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from moco.config import DataConfig
from moco.data.base import Sources, entries_digest, labels_at
from moco.data.decode import ImageError
from moco.data.keyed import SPLIT, permutation
from moco.data.pixel_format import RGB, PixelFormat
from moco.digest import digest

SPLIT_SEED = 1797  # a constant: the split is part of the data set, not of a run


@dataclass(frozen=True, eq=False)  # eq would compare tensors
class ArraySource:
    """Images of one size in memory."""

    images: Tensor  # (N, C, H, W), of the type of `pixel_format`
    names: Sequence[str]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    unreadable: Mapping[int, ImageError] = field(default_factory=dict)  # by row; such an image is black in `images`
    ignored: Mapping[str, int] = field(default_factory=dict)  # files that are not images, see `Source.left_out`
    pixel_format: PixelFormat = RGB
    multi_labels: NDArray[np.bool_] | None = None  # see `Source`
    draws: tuple[tuple[int, int], ...] = ()  # see `Source`
    stream: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        if i in self.unreadable:
            raise self.unreadable[i]
        return self.images[i]

    def name(self, i: int) -> str:
        return self.names[i]

    def path(self, i: int) -> None:
        return None

    def file_of(self, i: int) -> None:
        return None

    def content(self, i: int) -> None:
        return None

    def content_fingerprints(self) -> NDArray[np.int64]:
        def fingerprint(i: int) -> int:
            pixels = self.images[i].contiguous().numpy()
            return int.from_bytes(hashlib.blake2b(pixels.data, digest_size=8).digest()) >> 1

        fingerprints = (-1 - i if i in self.unreadable else fingerprint(i) for i in range(len(self)))
        return np.fromiter(fingerprints, np.int64, len(self))

    def left_out(self) -> Mapping[str, int]:
        return self.ignored

    def subset(self, rows: NDArray[np.int64]) -> "ArraySource":
        labels, several = labels_at(self.labels, rows), labels_at(self.multi_labels, rows)
        names = [self.names[row] for row in rows]
        unreadable = {new: self.unreadable[row] for new, row in enumerate(rows.tolist()) if row in self.unreadable}
        images = self.images[torch.from_numpy(rows)]
        known = names, labels, self.classes, unreadable
        return ArraySource(images, *known, pixel_format=self.pixel_format, multi_labels=several)

    def encoded_names(self) -> Iterable[bytes]:
        return map(os.fsencode, self.names)

    def content_digest(self) -> str:
        return entries_digest(([name] for name in self.names), digest(self.images))


def open_digits(config: DataConfig) -> Sources:
    """Open 1,797 scans of handwritten digits, 8x8 enlarged to 16x16: 1,297 for training, 50 per class held out."""
    from sklearn.datasets import load_digits  # imported here: it takes 2 s

    bunch = load_digits()
    targets: NDArray[np.int64] = bunch.target.astype(np.int64)  # (N,)
    scans = torch.from_numpy(bunch.images).float().unsqueeze(1)  # (N, 1, 8, 8), 0 ... 16
    # Bicubic interpolation would overshoot 0 ... 16. The weights of bilinear interpolation are multiples of 1/16, and
    # the factor 255 comes last. So all values are exact in float32, and the images are the same on every machine.
    scans = torch.nn.functional.interpolate(scans, size=(16, 16), mode="bilinear")  # (N, 1, 16, 16)
    images = (scans * 255 / 16).round().to(torch.uint8).repeat(1, 3, 1, 1)  # (N, 3, 16, 16)
    order = permutation(SPLIT_SEED, 0, len(targets), SPLIT)
    held_out = np.sort(np.concatenate([order[targets[order] == digit][:50] for digit in range(10)]))
    digits = ArraySource(images, [f"digits/{i}" for i in range(len(targets))], targets, tuple("0123456789"))
    train = digits.subset(np.setdiff1d(order, held_out))  # sorted
    return Sources(train, train, digits.subset(held_out))


def open_cifar(name: str, config: DataConfig) -> Sources:
    """Open CIFAR10 or CIFAR100: 50,000 training and 10,000 test images of 32x32."""

    def split(train: bool) -> ArraySource:
        data = _open_torchvision(getattr(datasets, name), config, train=train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        names = [f"{name.lower()}/{'train' if train else 'test'}/{i}" for i in range(len(images))]
        return ArraySource(images, names, np.asarray(data.targets, np.int64), tuple(data.classes))

    train = split(train=True)
    return Sources(train, train, split(train=False))


def open_stl10(config: DataConfig) -> Sources:
    """Open STL-10 at 96x96: 100,000 unlabeled training images, 5,000 labeled images as bank, 8,000 held-out images."""

    def split(name: str) -> ArraySource:
        data = _open_torchvision(datasets.STL10, config, split=name)
        images = torch.from_numpy(data.data).contiguous()  # (N, 3, 96, 96)
        names = [f"stl10/{name}/{i}" for i in range(len(images))]
        if name == "unlabeled":
            return ArraySource(images, names)
        return ArraySource(images, names, np.asarray(data.labels, np.int64), tuple(data.classes))

    return Sources(split("unlabeled"), split("train"), split("test"))


def _open_torchvision(dataset: Any, config: DataConfig, **split: Any) -> Any:
    """Open a data set of torchvision; raise errors that name its folder and the field to change."""
    folder = os.path.abspath(os.path.expanduser(config.root))
    where = f"data.root={config.root} ({folder})"
    try:
        return dataset(folder, download=config.download, **split)
    except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        if config.download:
            raise OSError(
                f"{dataset.__name__} could not be downloaded to {where}: {error}; check the connection and the disk, "
                f"or download {dataset.url} yourself and unpack it, so that the folder contains {dataset.base_folder}"
            ) from error
        found = "is incomplete or corrupted" if Path(folder, dataset.base_folder).exists() else "was not found"
        raise FileNotFoundError(
            f"{dataset.__name__} {found} in {where}, which should contain the folder {dataset.base_folder}: "
            "set data.download=true to download it, or correct data.root"
        ) from error
