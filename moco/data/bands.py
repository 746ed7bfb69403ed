"""Decoding of images with any number of channels and any depth: NPY, NPZ, TIFF, and image files with more than 8 bits.

No value is scaled here: a pixel of the result is the number in the file. There are two exceptions. Images with a
palette or with one bit per pixel become RGB in 8 bits. In a TIFF in which zero is white (WhiteIsZero), a number v of
b bits becomes 2**b - 1 - v. The headers of arrays are checked before memory is allocated for them, because a file of
a few bytes can declare any size.

Legend: C channels, H x W pixels.
"""

import io
import zipfile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageMode, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png

from moco.config.base import optional_module
from moco.data.headers import (
    TIFF,
    deep_white_is_zero,
    has_deep_color,
    inverted,
    misreads_bands,
    open_image,
    orientation_of,
    raw_modes,
    stated_bits,
    stated_values,
    tiff_pages,
    upright,
)
from moco.data.pixel_format import PixelFormat

NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"
# The largest image in bytes: as large as an 8-bit RGB image of `moco.data.decode.MAX_PIXELS`. An NPY has no limit,
# because its array is a part of the file.
MAX_BYTES = 3 * 178_956_970
_IMAGE_NAMES = ("image", "arr_0")  # if an NPZ holds several arrays, the first of these names is the image


class WrongFormat(ValueError):
    """An intact image whose number of channels or number type differs from that of the data set."""


class TooLarge(ValueError):
    """An image whose header declares more than `MAX_BYTES` bytes."""


def is_array(data: bytes) -> bool:
    """Return whether the content is that of an NPY or NPZ file."""
    return data.startswith((NPY, NPZ))


def read_bands(data: bytes, pixel_format: PixelFormat) -> Tensor:
    """Decode the content of a file.

    Args:
        data: NPY, NPZ, TIFF, or another image format of `IMAGE_FORMATS`.
        pixel_format: the number of channels and the type of the result.

    Returns:
        Shape (C, H, W), of `pixel_format.dtype`, with the values of the file.

    Raises:
        WrongFormat: if the file has another number of channels, or a type that `dtype` cannot hold.
        TooLarge: if the file is not an NPY and declares more than `MAX_BYTES` bytes.
        ConfigError: if a TIFF needs tifffile, and it is not installed.
        ValueError: if pixels are not finite, or the file is damaged.
        Exception: whatever numpy, PIL and tifffile raise for a damaged file.
    """
    orientation = 1
    if data.startswith(NPY):
        array = _npy(data)
    elif data.startswith(NPZ):
        array = _npz(data)
    else:
        array, orientation = _image(data, pixel_format)
    return torch.from_numpy(_of_type(_bands(array, pixel_format.channels, orientation), pixel_format.dtype))


def bands_of(image: Image.Image, pixel_format: PixelFormat) -> Tensor:
    """Return a PIL image as `read_bands` returns its file, but without the bits and bands that PIL does not load.

    Raises:
        WrongFormat: for another number of channels, or a type that `dtype` cannot hold.
        ValueError: if pixels are not finite, or PIL has changed their values.
    """
    image.load()  # PIL rotates a TIFF upright here
    if image.mode == "RGBA" and getattr(image, "tag_v2", {}).get(TiffImagePlugin.EXTRASAMPLES, (0,))[0] == 1:
        raise ValueError("PIL has divided the image's bands by the last one (associated alpha): pass the image's path")
    orientation = orientation_of(image)
    return torch.from_numpy(_of_type(_bands(_loaded(image), pixel_format.channels, orientation), pixel_format.dtype))


def bands_of_array(array: NDArray[Any], pixel_format: PixelFormat) -> Tensor:
    """Return an array (H, W), (H, W, C) or (C, H, W) in memory as `read_bands` returns that of an NPY file.

    Raises:
        WrongFormat: for another number of channels, or a type that `dtype` cannot hold.
        ValueError: if pixels are not finite.
    """
    return torch.from_numpy(_of_type(_bands(array, pixel_format.channels), pixel_format.dtype))


def encode_bands(image: Tensor) -> bytes:
    """Return an image (C, H, W) as the content of an NPY file."""
    buffer = io.BytesIO()
    np.save(buffer, image.contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _npy(data: bytes) -> NDArray[Any]:
    """Return the array of an NPY file."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise WrongFormat("its array holds Python objects, not numbers")
    count = 1
    for side in shape:  # in Python's integers, which do not overflow
        count *= side
    if count * dtype.itemsize > len(data) - file.tell():
        raise ValueError(f"the file is truncated: its header declares {shape} of {dtype}")
    values = np.frombuffer(data, dtype, count, file.tell())
    return values.reshape(shape, order="F" if fortran_order else "C")


def _npz(data: bytes) -> NDArray[Any]:
    """Return the only array of an NPZ file, or the one with a name of `_IMAGE_NAMES`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
        chosen = [*members] if len(members) == 1 else [name for name in _IMAGE_NAMES if name in members]
        if not chosen:
            raise WrongFormat(f"it holds {len(members)} arrays ({', '.join([*members][:5])}): name one of them 'image'")
        if members[chosen[0]].file_size > MAX_BYTES:
            raise TooLarge(_too_large(members[chosen[0]].file_size))
        return _npy(archive.read(members[chosen[0]]))


def _too_large(size: int) -> str:
    return f"it declares {size:,} bytes, and at most {MAX_BYTES:,} are read: cut the image into tiles"


def _image(data: bytes, pixel_format: PixelFormat) -> tuple[NDArray[Any], int]:
    """Return the pixels of an image file, (H, W), (H, W, C) or (C, H, W), and the orientation still to be applied."""
    try:
        image = open_image(data)
    except UnidentifiedImageError:
        if data.startswith(TIFF):
            return _tiff(data)
        raise
    with image:
        deep = has_deep_color(image)
        bytes_per_value = 2 if deep else np.dtype(ImageMode.getmode(image.mode).typestr).itemsize
        size = image.width * image.height * max(len(image.getbands()), pixel_format.channels) * bytes_per_value
        if size > MAX_BYTES:
            raise TooLarge(_too_large(size))
        if needs_tifffile(image, data, pixel_format.channels):
            return _tiff(data)
        if image.format == "PNG" and deep:
            return deep_png(data), orientation_of(image, data)
        image.load()
        orientation = orientation_of(image)  # PIL has rotated a TIFF upright
        return _loaded(image), orientation


def deep_png(data: bytes) -> NDArray[np.uint16]:
    """Return all bits of a PNG of 16 bits per channel, (C, H, W)."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a bytearray, because torch needs writable memory
    values: NDArray[np.uint16] = decode_png(encoded, ImageReadMode.UNCHANGED).numpy()
    return values


def needs_tifffile(image: Image.Image, data: bytes, channels: int) -> bool:
    """Return whether PIL would lose bits, bands or pages of a TIFF, or change its values; call it before loading.

    PIL divides color by associated alpha ("RGBa"), but a fourth band need not be an opacity.
    """
    if image.format != "TIFF":
        return False
    divided = any("RGBa" in mode for mode in raw_modes(image))
    several_sizes = len({page.size for page in tiff_pages(data)}) > 1
    lost = divided or several_sizes or has_deep_color(image) or misreads_bands(image)
    return lost or len(image.getbands()) != channels


def _loaded(image: Image.Image) -> NDArray[Any]:
    """Return the pixels of a loaded image, (H, W) or (H, W, C), with black as zero, not rotated."""
    if image.mode in ("P", "PA", "1"):
        image = image.convert("RGB")
    values = stated_values(image)
    if deep_white_is_zero(image):
        return inverted(values, stated_bits(image))
    # PIL reads gray of 16 bits as 32 bits from some formats.
    widened = values.dtype == np.int32 and image.format != "TIFF" and values.size
    return values.astype(np.uint16) if widened and values.min() >= 0 and values.max() <= 65535 else values


def _tiff(data: bytes) -> tuple[NDArray[Any], int]:
    """Return the largest image of a TIFF, with any number of bands, and its orientation.

    Pages of equal size are the bands of one image. Smaller pages are previews and overviews.
    """
    tifffile = optional_module("tifffile", "a TIFF with several bands or more than 8 bits per band", "tiff")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = max(file.series, key=lambda each: each.keyframe.imagewidth * each.keyframe.imagelength)
        if series.nbytes > MAX_BYTES:
            raise TooLarge(_too_large(series.nbytes))
        array: NDArray[Any] = series.asarray()
        page = series.keyframe
        if page.photometric == 0:
            if page.samplesperpixel > 1:
                raise ValueError(
                    f"white is zero in it (WhiteIsZero), which is defined for gray only, but it has "
                    f"{page.samplesperpixel} bands: store it with black as zero"
                )
            array = inverted(array, page.bitspersample)
        return array, int(page.tags.valueof(274, 1))


def _bands(array: NDArray[Any], channels: int, orientation: int = 1) -> NDArray[Any]:
    """Return an array as (C, H, W), upright."""
    return upright(_channels_first(array, channels).transpose(1, 2, 0), orientation).transpose(2, 0, 1)


def _channels_first(array: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return an array as (C, H, W). If both the first and the last axis have C entries, the channels are last."""
    if array.ndim > 3:
        array = array.squeeze(tuple(axis for axis in range(array.ndim - 3) if array.shape[axis] == 1))
    found = " x ".join(map(str, array.shape))
    if array.ndim == 2 and channels == 1:
        array = array[None]
    if array.ndim != 3 or channels not in (array.shape[0], array.shape[2]):
        raise WrongFormat(f"its array of {found} needs a first or last axis of length data.channels={channels}")
    array = array.transpose(2, 0, 1) if array.shape[2] == channels else array
    if 0 in array.shape:
        raise WrongFormat(f"its array of {found} has no pixels")
    return array


def _of_type(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return an array in the type of the data set, contiguous and writable; refuse arrays of unsuitable types."""
    fits = array.dtype.kind in "uif" if dtype == "float32" else array.dtype.newbyteorder("=") == np.dtype(dtype)
    if not fits:
        fixes = [each for each in ("uint8", "uint16") if array.dtype.newbyteorder("=") == np.dtype(each)]
        fix = f"set data.dtype={(fixes or ['float32'])[0]}" if array.dtype.kind in "uif" else "store integers or floats"
        raise WrongFormat(f"its pixels are {array.dtype.name}, not data.dtype={dtype}: {fix}")
    return _converted(array, dtype)


def _converted(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return a contiguous and writable copy in another type; refuse numbers that are not finite in that type."""
    with np.errstate(over="ignore"):  # the next check reports it
        converted = np.array(array, dtype, order="C")
    if dtype == "float32" and not np.isfinite(converted).all():
        raise ValueError("it has pixels that are not finite numbers: replace them, for example by the band's mean")
    return converted
