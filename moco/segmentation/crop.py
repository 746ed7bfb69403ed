"""Training crops of an image and its mask: resized at random, cropped, flipped; a function of (seed, epoch, index)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from moco.data.decode import ImageError
from moco.data.keyed import keyed_uniform
from moco.segmentation.masks import IGNORED, MaskedImages

DRAWS = 4  # random numbers for a crop: scale, top, left, flip


@dataclass(frozen=True)
class CropSettings:
    """The crops of training, and the normalization of all images."""

    size: int  # S
    scale: Sequence[float]  # range of the factor by which an image is resized
    flip_p: float
    mean: Sequence[float]
    std: Sequence[float]

    def normalized(self, image: Tensor) -> Tensor:
        return normalized(image, self.mean, self.std)


def normalized(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return an image (3, H, W) of uint8 as normalized float32."""
    found: Tensor = transforms.normalize(image.float() / 255, list(mean), list(std))
    return found


def training_crop(
    image: Tensor, mask: NDArray[np.uint8], uniforms: Sequence[float], settings: CropSettings
) -> tuple[Tensor, Tensor]:
    """Return a crop of the image, normalized (3, S, S), and of its mask, uint8 (S, S).

    Where the resized image is smaller than the crop, the crop is padded at the right and the bottom, with the
    mean color and `IGNORED`. The flip comes last: it moves the padding from the right to the left.

    Args:
        image: uint8 (3, H, W).
        mask: (H, W).
        uniforms: `DRAWS` numbers in [0, 1).
    """
    low, high = settings.scale
    factor, size = low * (high / low) ** uniforms[0], settings.size
    height, width = (max(1, round(each * factor)) for each in mask.shape)
    pixels = transforms.resize(image, [height, width], antialias=True)
    labels = transforms.resize(torch.from_numpy(mask)[None], [height, width], transforms.InterpolationMode.NEAREST)[0]
    top, left = (int(u * max(0, each - size + 1)) for u, each in zip(uniforms[1:3], (height, width), strict=True))
    pixels, labels = (each[..., top : top + size, left : left + size] for each in (pixels, labels))
    missing = (0, size - pixels.shape[2], 0, size - pixels.shape[1])
    crop = F.pad(settings.normalized(pixels), missing)
    labels = F.pad(labels, missing, value=IGNORED)
    return (crop.flip(2), labels.flip(1)) if uniforms[3] < settings.flip_p else (crop, labels)


class CropDataset:
    """The data set of the loader: the crops of one step, (n, 3, S, S) and (n, S, S), for the n images of this rank."""

    def __init__(self, images: MaskedImages, settings: CropSettings, seed: int) -> None:
        self.images, self.settings, self.seed = images, settings, seed

    def __getitem__(self, step: tuple[int, NDArray[np.int64]]) -> tuple[Tensor, Tensor] | ImageError:
        epoch, index = step
        drawn = keyed_uniform(self.seed, epoch, index, 0, DRAWS)
        try:
            crops = [
                training_crop(*self.images.read(row), uniforms, self.settings)
                for row, uniforms in zip(index.tolist(), drawn.tolist(), strict=True)
            ]
        except ImageError as error:
            return error  # raised by `loaded`, without the worker's traceback
        return torch.stack([image for image, _ in crops]), torch.stack([mask for _, mask in crops])
