"""Images that a program holds in memory, converted as the commands convert the same images in files.

Legend: C channels, H x W pixels.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from moco.data.bands import bands_of_array
from moco.data.decode import convert, decode, decode_bytes, to_gray
from moco.data.headers import has_deep_color, open_image
from moco.data.pixel_format import RGB, PixelFormat


def to_pixels(image: Any, pixel_format: PixelFormat = RGB) -> Tensor:
    """Convert an image to a tensor (C, H, W) of a format, upright, as `moco.data.decode.decode` converts a file.

    Args:
        image: a PIL image of any mode; an array (H, W, C), (C, H, W) or (H, W); a tensor (C, H, W) or (H, W); or the
            path of an image file. An array or tensor must have the channels and the type of the format, with two
            exceptions: for float32 it may hold any integers or floats, and 8-bit gray and RGB are converted into each
            other.
        pixel_format: the channels and the type of the result.

    Raises:
        ImageError: if a file cannot be read.
        ValueError: if `image` is none of these, or an array or tensor has another shape or type.
    """
    if isinstance(image, str | os.PathLike):
        return decode(os.fspath(image), pixel_format)
    if isinstance(image, Image.Image):
        return _of_pil(image, pixel_format)
    if not isinstance(image, Tensor | np.ndarray):
        raise ValueError(f"an image must be a PIL image, an array, a tensor or a path, not {type(image).__name__}")
    array = _numbers(image)
    channels = next((each for each in _channels(pixel_format) if _has_channels(image, array, each)), 0)
    fits = array.dtype.kind in "uif" if pixel_format.dtype == "float32" else array.dtype.name == pixel_format.dtype
    if not channels or 0 in array.shape or not fits:
        given = f"the image has the shape {tuple(image.shape)} and the type {array.dtype.name}"
        fix = ", without transforms such as ToTensor" * (array.dtype.kind == "f" and pixel_format.dtype != "float32")
        raise ValueError(f"{given}: pass an array (H, W, C) or a tensor (C, H, W), of {pixel_format}{fix}")
    if isinstance(image, Tensor) and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)  # so that the columns of a tensor are never taken for its channels
    pixels = bands_of_array(array, pixel_format._replace(channels=channels))
    if channels == pixel_format.channels:
        return pixels
    return pixels.expand(3, -1, -1) if channels == 1 else to_gray(pixels)


def _numbers(image: Tensor | NDArray[Any]) -> NDArray[Any]:
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        return (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    return image


def _channels(pixel_format: PixelFormat) -> tuple[int, ...]:
    """Return the numbers of channels that an array may have, the preferred one first."""
    if pixel_format.is_8bit_gray_or_rgb:
        return (pixel_format.channels, 4 - pixel_format.channels)  # gray and color
    return (pixel_format.channels,)


def _has_channels(image: Tensor | NDArray[Any], array: NDArray[Any], channels: int) -> bool:
    if array.ndim == 2:
        return channels == 1
    first = array.ndim == 3 and array.shape[0] == channels
    return first or (not isinstance(image, Tensor) and array.ndim == 3 and array.shape[2] == channels)


def _of_pil(image: Image.Image, pixel_format: PixelFormat) -> Tensor:
    """Convert a PIL image. If it is not loaded yet, its file is decoded here, because PIL would lose bits and bands."""
    name = getattr(image, "filename", "") or "in memory"
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: its size is {image.width} x {image.height}")
    if content := _content(image):
        return decode_bytes(name, content, pixel_format)
    image.load()
    if pixel_format.bits < 16 and isinstance(image, ImageFile.ImageFile) and Path(name).is_file():
        with open_image(Path(name).read_bytes()) as stored:
            if has_deep_color(stored):
                raise ValueError(
                    f"PIL has loaded only the upper 8 bits of {name}, and data.bits={pixel_format.bits} needs the "
                    "lower ones: pass its path, or Image.open(path) before its pixels are used"
                )
    return convert(image, pixel_format)


def _content(image: Image.Image) -> bytes:
    """Return the content of the file of an image that is not loaded; b"" for a loaded image, or for a later frame."""
    file = getattr(image, "fp", None)
    if file is None or not getattr(image, "tile", None) or image.tell() != 0:
        return b""
    place = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(place)
    return content
