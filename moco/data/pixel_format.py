"""The number of channels and the number type of the images of a data set, from their files to the device.

A source has one `PixelFormat`. All later steps keep the type of the tensors: a crop of a uint16 image is uint16,
and only the device converts it to float32. The default format is red, green and blue in 8 bits.

Legend: N images, C channels, H x W pixels.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.data.walk import ARRAY_ENDINGS, IMAGE_ENDINGS

DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}
# The number by which pixels are divided on the device, so that integers lie in 0 ... 1. Floats keep their values.
_WHITE = {torch.uint8: 255, torch.uint16: 65535}
_STRETCH = (2.0, 98.0)  # percentiles of a channel that a preview shows as black and white; not used for 8 bits


class PixelFormat(NamedTuple):
    """The format of the images of a source: (channels, H, W) of the type `dtype`."""

    channels: int = 3
    dtype: str = "uint8"  # a key of `DTYPES`
    bits: int = 16  # with uint8: the significant bits of files of 16 bits, see `moco.data.depth`
    preview: tuple[int, ...] = ()  # the channels that a preview shows as red, green and blue; empty: the first ones

    @property
    def is_8bit_gray_or_rgb(self) -> bool:
        """Whether the images have one or three channels of 8 bits, as most image files do."""
        return self.dtype == "uint8" and self.channels in (1, 3)

    @property
    def endings(self) -> tuple[str, ...]:
        """The endings of image files. The endings of array files are included, except for RGB in 8 bits."""
        return IMAGE_ENDINGS + ARRAY_ENDINGS * ((self.channels, self.dtype) != (RGB.channels, RGB.dtype))

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.dtype}"


RGB = PixelFormat()


def to_float(images: Tensor) -> Tensor:
    """Convert images (N, C, H, W) to float32: uint8 and uint16 to 0 ... 1, floats keep their values."""
    converted = images.to(torch.float32, copy=True)
    white = _WHITE.get(images.dtype)
    return converted.div_(white) if white else converted


def per_channel(values: object, device: torch.device) -> Tensor:
    """Return one number per channel as a tensor (C, 1, 1), to broadcast over images."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def preview(image: Tensor, channels: tuple[int, ...] = ()) -> Tensor:
    """Return a viewable image, uint8 (3, H, W), of an image (C, H, W) of any format.

    8-bit values are shown as they are. For values of other types, the 2nd percentile of each channel of an image is
    mapped to black and the 98th to white, because a scene often uses a small part of the range of its type.

    Args:
        image: uint8, uint16 or float32.
        channels: the numbers of three channels to show as red, green and blue, or of one channel to show in gray.
            Empty: the first three channels, or the first one if the image has fewer than three.
    """
    count = len(image)
    chosen = list(channels) or ([0, 1, 2] if count >= 3 else [0])
    shown = image if chosen == list(range(count)) else image[chosen]
    if image.dtype != torch.uint8:
        shown = torch.stack([_stretched(channel) for channel in shown])
    return shown if len(shown) == 3 else shown[:1].expand(3, -1, -1)


def _stretched(channel: Tensor) -> Tensor:
    """Map the middle 96 % of the values of a channel (H, W) to 0 ... 255, uint8."""
    values = channel.cpu().numpy().astype(np.float64)
    low, high = np.percentile(values, _STRETCH)
    scaled = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    return torch.from_numpy(np.rint(scaled.clip(0, 1) * 255).astype(np.uint8))
