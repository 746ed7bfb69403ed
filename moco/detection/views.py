"""Images as a detector takes them: resized, perhaps flipped, normalized; with their boxes and masks.

The size and the flip of a training image are a function of (seed, epoch, index). Legend: n objects, H x W pixels of the
resized image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from moco.data.decode import ImageError
from moco.data.keyed import BOX_SAMPLES, keyed_uniform
from moco.detection.images import BoxedImage, BoxedImages

DRAWS = 2  # random numbers for a training image: size, flip


@dataclass(frozen=True)
class ViewSettings:
    """How images are prepared; sizes in pixels."""

    sizes: Sequence[int]  # shorter sides for training
    eval_size: int  # shorter side for evaluation
    max_size: int  # limit of the longer side
    flip_p: float
    mean: Sequence[float]
    std: Sequence[float]
    masks: bool  # whether training and evaluation use the masks of the objects


class Example(NamedTuple):
    """An image of a training step."""

    image: Tensor  # (3, H, W)
    target: dict[str, Tensor]  # boxes (n, 4), labels (n,) and perhaps masks (n, H, W), as torchvision takes them
    keys: tuple[int, ...]  # one for each `KeyedSampler`, which draws anchors or proposals


def resized(image: Tensor, short: int, settings: ViewSettings) -> Tensor:
    """Resize and normalize an image: uint8 (3, h, w) to float32 (3, H, W).

    The shorter side becomes `short`, or less if `max_size` limits the longer one.
    """
    height, width = image.shape[1:]
    scale = min(short / min(height, width), settings.max_size / max(height, width))
    size = [max(1, round(each * scale)) for each in (height, width)]
    pixels = transforms.resize(image, size, antialias=True).float() / 255
    normalized: Tensor = transforms.normalize(pixels, list(settings.mean), list(settings.std))
    return normalized


def training_example(
    image: BoxedImage, uniforms: Sequence[float], keys: tuple[int, ...], settings: ViewSettings
) -> Example:
    """Return an image as one step of training sees it.

    Args:
        image: with at least one box.
        uniforms: `DRAWS` numbers in [0, 1).
        keys: see `Example`.
        settings: how to prepare the image.

    Raises:
        ImageError: if the file cannot be read, or has another size than the annotations state.
    """
    pixels = resized(image.pixels(), settings.sizes[int(uniforms[0] * len(settings.sizes))], settings)
    height, width = pixels.shape[1:]
    boxes = torch.from_numpy(image.boxes) * torch.tensor([width / image.width, height / image.height]).repeat(2)
    target = {"boxes": boxes, "labels": torch.from_numpy(image.labels)}
    if settings.masks:
        nearest = transforms.InterpolationMode.NEAREST
        target["masks"] = transforms.resize(image.masks(), [height, width], nearest)
    if uniforms[1] < settings.flip_p:
        pixels = pixels.flip(2)
        target["boxes"] = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        if settings.masks:
            target["masks"] = target["masks"].flip(2)
    return Example(pixels, target, keys)


class TrainingDataset:
    """The data set of the training: each item is the list of examples of one step."""

    def __init__(self, images: BoxedImages, settings: ViewSettings, seed: int) -> None:
        self.images, self.settings, self.seed = images, settings, seed

    def __getitem__(self, step: tuple[int, NDArray[np.int64]]) -> list[Example] | ImageError:
        epoch, index = step
        drawn = keyed_uniform(self.seed, epoch, index, 0, DRAWS)
        keys = (keyed_uniform(self.seed, epoch, index, BOX_SAMPLES, 4) * 2**24).astype(np.int64).reshape(-1, 2, 2)
        try:
            return [
                training_example(self.images.images[row], uniforms, (int(a << 24 | b), int(c << 24 | d)), self.settings)
                for row, uniforms, ((a, b), (c, d)) in zip(index.tolist(), drawn.tolist(), keys.tolist(), strict=True)
            ]
        except ImageError as error:
            return error  # raised by `loaded`, without the worker's traceback


class EvaluationDataset:
    """The data set of the evaluation: whole images (3, H, W)."""

    def __init__(self, images: BoxedImages, settings: ViewSettings) -> None:
        self.images, self.settings = images, settings

    def __getitem__(self, row: int) -> tuple[int, Tensor] | ImageError:
        try:
            return row, resized(self.images.images[row].pixels(), self.settings.eval_size, self.settings)
        except ImageError as error:
            return error
