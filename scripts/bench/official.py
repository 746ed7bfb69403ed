"""The published pipelines for comparison: torchvision's v1 transforms on PIL images, in loader processes.

They follow the settings of MoCo v2's `TwoCropsTransform` (facebookresearch/moco, `--aug-plus`) and of the CIFAR-10
notebook. The blur is Pillow's with a random radius per image, as in the originals.
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
    """Return the transform of one view in the MoCo v2 recipe."""

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
    """Return the transform of one view in the CIFAR-10 notebook."""
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
    """A data set that returns two views per image. The images are files or arrays (H, W, 3)."""

    def __init__(self, images: Sequence[str] | NDArray[np.uint8], transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        stored = self.images[i]
        if isinstance(stored, str):
            with Image.open(stored, formats=IMAGE_FORMATS) as file:
                image = file.convert("RGB")
        else:
            image = Image.fromarray(stored)
        return [self.transform(image), self.transform(image)]


def loader(
    images: Sequence[str] | NDArray[np.uint8], transform: Transform, order: list[int], batch: int, workers: int
) -> DataLoader[Any]:
    """Return a loader of two views per image, in this order, as in the official scripts."""
    return DataLoader(
        TwoViews(images, transform),  # type: ignore[arg-type]
        batch_size=batch,
        sampler=order,
        num_workers=workers,
        worker_init_fn=_one_thread,
        drop_last=True,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
