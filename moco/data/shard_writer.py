"""Writing tar shards: encoding single images in worker processes, and writing one shard with its rows of the index.

Legend: n images of one shard, C channels, H x W pixels.
"""

import contextlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from moco.data.bands import encode_bands, is_array
from moco.data.base import Source
from moco.data.crop import resized
from moco.data.decode import ImageError, decode_bytes
from moco.data.shard_index import file_digest, row_type
from moco.data.walk import IMAGE_FORMATS
from moco.files import flush

_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # other endings equal the format's name
_LONGEST_JPEG = 65_500  # pixels, PIL's limit


class PackedImage(NamedTuple):
    """An image as it is written to a shard; an unreadable image has only `fault` and `reason`."""

    content: bytes = b""
    ending: str = ""  # of its file name; it states the format of the content, because WebDataset readers rely on it
    source_bytes: int = 0  # size of the image's file in the source; without a file, size of its pixels
    fault: str = ""  # a key of `moco.data.decode.FAULTS`
    reason: str = ""


def encode_image(source: Source, i: int, short_side: int, quality: int) -> PackedImage:
    """Return image i as it is written to a shard. Every image is decoded, to find unreadable images.

    An image is scaled down if its shorter side exceeds `short_side`; with `short_side` 0, no image is scaled down.

    Gray and RGB images of 8 bits: An image that is scaled down is rotated upright, resized (bicubic, antialiased), and
    encoded as JPEG with 4:2:0 color, or as PNG if it is too long for a JPEG. An image that is not scaled down keeps the
    bytes of its file. Without a file of its own (CIFAR, digits, frames of videos) it becomes a PNG; an NPY or NPZ file
    becomes an NPY file.

    Images with other channels or with more than 8 bits: Every image becomes an NPY file. An image that is scaled down
    is resized with an antialiased bilinear filter. An image that is not scaled down keeps its values.
    """
    try:
        content = source.content(i)
        name, form = source.name(i), source.pixel_format
        pixels = source.image(i) if content is None else decode_bytes(name, content, form)  # (C, H, W)
    except ImageError as error:
        return PackedImage(fault=error.kind, reason=error.reason)
    source_bytes = pixels.nbytes if content is None else len(content)
    if not source.pixel_format.is_8bit_gray_or_rgb:
        return _packed_bands(pixels, source_bytes, short_side)
    if content is not None and is_array(content) and not 0 < short_side < min(pixels.shape[1:]):
        return PackedImage(encode_bands(pixels), "npy", source_bytes)
    if 0 < short_side < min(pixels.shape[1:]):
        small = resize(pixels, [short_side], InterpolationMode.BICUBIC, antialias=True)  # (C, h, w)
        if max(small.shape) > _LONGEST_JPEG:
            return PackedImage(_encode_pixels(small, "PNG"), "png", source_bytes)
        return PackedImage(_encode_pixels(small, "JPEG", quality=quality), "jpg", source_bytes)
    if content is None:
        return PackedImage(_encode_pixels(pixels, "PNG"), "png", source_bytes)
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        kind = image.format or "bin"
    return PackedImage(content, _ENDINGS.get(kind, kind.lower()), source_bytes)


def _packed_bands(pixels: Tensor, source_bytes: int, short_side: int) -> PackedImage:
    """Return an image of any channels and depth, (C, H, W), as an NPY file."""
    height, width = pixels.shape[1:]
    shorter = min(height, width)
    if 0 < short_side < shorter:
        pixels = resized(pixels, (short_side * height // shorter, short_side * width // shorter))
    return PackedImage(encode_bands(pixels), "npy", source_bytes)


def _encode_pixels(pixels: Tensor, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    array = pixels.permute(1, 2, 0).numpy()  # (H, W, C)
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, kind, **options)
    return buffer.getvalue()


class ShardWriter:
    """Writes one shard and collects its rows of the index.

    The file names in a shard are WebDataset keys and must differ within a split, so they continue from `key`, the
    number of images in the previous shards. The shard has a temporary name until `close`.
    """

    def __init__(self, path: Path, number: int, key: int) -> None:
        self.path, self.number, self.key = path, number, key
        self.rows: list[tuple[int, int, int, int, int, bytes]] = []
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._tar = tarfile.TarFile(mode="w", fileobj=self._file, format=tarfile.USTAR_FORMAT)

    def size_with(self, content: bytes) -> int:
        """Return the approximate size in bytes of the shard with one more image.

        The padding, of the image to 512 bytes and of the shard to 10,240, is not counted: counting it would
        distribute the images over the shards in another way than earlier versions did.
        """
        return self._file.tell() + 3 * tarfile.BLOCKSIZE + len(content)

    def add(self, image: PackedImage, label: int, name: bytes) -> None:
        """Append an image; label -1 means that the image has no label."""
        key, content = f"{self.key + len(self.rows):09}", image.content
        offset = self._member(f"{key}.{image.ending}", content)
        if label >= 0:
            self._member(f"{key}.cls", str(label).encode())
        self.rows.append((self.number, offset, len(content), zlib.crc32(content), label, name))

    def _member(self, name: str, data: bytes) -> int:
        """Append a file, without time or owner, and return the offset of its content."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        offset = self._file.tell() + tarfile.BLOCKSIZE  # after the header, which is one block in this format
        self._tar.addfile(info, io.BytesIO(data))
        return offset

    def close(self) -> tuple[NDArray[np.void], dict[str, Any]]:
        """Complete the file on disk. Return, for the index, the rows of its images (n,) and the entry of the shard."""
        self._tar.close()
        self._file.close()
        flush(self._temporary)
        size, digest = self._temporary.stat().st_size, file_digest(self._temporary)
        self._temporary.replace(self.path)
        entry = {"file": self.path.name, "bytes": size, "sha256": digest}
        return np.array(self.rows, row_type(max(len(row[-1]) for row in self.rows))), entry

    def discard(self) -> None:
        """Remove the unfinished file."""
        with contextlib.suppress(OSError):  # a full disk, which has been reported
            self._file.close()
        self._temporary.unlink(missing_ok=True)
