"""The published pipelines, as the yardstick: torchvision's first transforms on PIL pictures, in loader processes.

MoCo v2's `TwoCropsTransform` (facebookresearch/moco, `--aug-plus`) and the CIFAR-10 notebook's, written down here from
their settings. The blur is Pillow's, of a radius drawn for each picture, as there.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from moco.data.walk import IMAGE_FORMATS

Transform = Callable[[Image.Image], Tensor]


def moco_v2(size: int) -> Transform:
    """One view of the MoCo v2 recipe."""

    def blurred(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    steps = [
        v1.RandomResizedCrop(size, scale=(0.2, 1.0)),
        v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v1.RandomGrayscale(p=0.2),
        v1.RandomApply([blurred], p=0.5),
        v1.RandomHorizontalFlip(),
        v1.ToTensor(),
        v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    transform: Transform = v1.Compose(steps)
    return transform


def cifar_notebook() -> Transform:
    """One view of the CIFAR-10 notebook."""
    steps = [
        v1.RandomResizedCrop(32),
        v1.RandomHorizontalFlip(p=0.5),
        v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v1.RandomGrayscale(p=0.2),
        v1.ToTensor(),
        v1.Normalize([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ]
    transform: Transform = v1.Compose(steps)
    return transform


class TwoViews:
    """A data set of pairs of views of each picture: a file, or an array (H, W, 3) in memory."""

    def __init__(self, pictures: Sequence[str] | NDArray[np.uint8], transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> list[Tensor]:
        picture = self.pictures[i]
        if isinstance(picture, str):
            with Image.open(picture, formats=IMAGE_FORMATS) as file:
                image = file.convert("RGB")
        else:
            image = Image.fromarray(picture)
        return [self.transform(image), self.transform(image)]


def loader(
    pictures: Sequence[str] | NDArray[np.uint8], transform: Transform, order: list[int], batch: int, workers: int
) -> DataLoader[Any]:
    """The pictures in this order, two views each, as the official scripts load them."""
    return DataLoader(
        TwoViews(pictures, transform),  # type: ignore[arg-type]
        batch_size=batch,
        sampler=order,
        num_workers=workers,
        worker_init_fn=_one_thread,
        drop_last=True,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
