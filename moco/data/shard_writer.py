"""Writing tar shards: encoding single images in worker processes, and writing one shard with its rows of the index.

Legend: N images, n images of one shard.
"""

import contextlib
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from moco.data.base import Source
from moco.data.decode import ImageError, decode_bytes
from moco.data.shard_index import row_type
from moco.data.walk import IMAGE_FORMATS
from moco.data.workers import in_order

_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # other endings equal the format's name

_LONGEST_JPEG = 65_500  # pixels, PIL's limit


class Encoded(NamedTuple):
    """An image as it is written to a shard; of an unreadable image only its fault."""

    content: bytes = b""
    ending: str = ""  # by the content, because WebDataset readers rely on it
    before: int = 0  # its size before, in bytes
    fault: str = ""  # a key of `moco.data.decode.FAULTS`
    reason: str = ""


def encode(source: Source, i: int, short_side: int, quality: int) -> Encoded:
    """Return image i as it is written to a shard; it is decoded once to verify that it can be.

    The file's bytes are kept, unless its shorter side exceeds `short_side`: then the image is scaled down to that,
    upright, bicubic and antialiased, and encoded as JPEG with 4:2:0 color, or as PNG if it is too long for a JPEG. An
    image without a file (CIFAR, digits) becomes a lossless PNG.
    """
    try:
        content = source.content(i)
        if content is None:
            pixels = source.image(i)  # (3, H, W)
            content, before = _encode_pixels(pixels, "PNG"), pixels.numel()
        else:
            pixels, before = decode_bytes(source.name(i), content, bits=source.bits), len(content)
    except ImageError as error:
        return Encoded(fault=error.kind, reason=error.reason)
    if 0 < short_side < min(pixels.shape[1:]):
        small = resize(pixels, [short_side], InterpolationMode.BICUBIC, antialias=True)  # (3, h, w)
        if max(small.shape) > _LONGEST_JPEG:
            return Encoded(_encode_pixels(small, "PNG"), "png", before)
        return Encoded(_encode_pixels(small, "JPEG", quality=quality), "jpg", before)
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        kind = image.format or "bin"
    return Encoded(content, _ENDINGS.get(kind, kind.lower()), before)


def _encode_pixels(pixels: Tensor, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, kind, **options)
    return buffer.getvalue()


def encoded(source: Source, start: int, workers: int, short_side: int, quality: int) -> Generator[Encoded, None, None]:
    """Yield the images from `start` on in order, encoded by worker processes; see `moco.data.workers.in_order`."""
    return in_order(lambda i: encode(source, i, short_side, quality), range(start, len(source)), workers, "workers")


class ShardWriter:
    """Writes one shard and collects its rows of the index.

    `key` is the number of images in the previous shards, because WebDataset needs unique keys in a split. The file has
    a temporary name until `close`.
    """

    def __init__(self, path: Path, number: int, key: int) -> None:
        self.path, self.number, self.key = path, number, key
        self.rows: list[tuple[int, int, int, int, int, bytes]] = []
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._file = self._temporary.open("wb+")
        self._tar = tarfile.TarFile(mode="w", fileobj=self._file, format=tarfile.USTAR_FORMAT)

    def size_with(self, content: bytes) -> int:
        """Return the shard's size in bytes with one more image, without the zeros at its end."""
        return self._file.tell() + 3 * tarfile.BLOCKSIZE + len(content)

    def add(self, image: Encoded, label: int, name: bytes) -> None:
        """Append an image; label -1: none."""
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
        """Complete the file on disk, and return its rows (n,) and its entry of the index."""
        self._tar.close()
        entry = {"file": self.path.name, "bytes": self._file.tell()}
        self._file.seek(0)  # also flushes it
        with self._file as file:
            os.fsync(file.fileno())
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        self._temporary.replace(self.path)
        return np.array(self.rows, row_type(max(len(row[-1]) for row in self.rows))), entry

    def discard(self) -> None:
        """Remove the unfinished file."""
        with contextlib.suppress(OSError):  # a full disk, which has been reported
            self._file.close()
        self._temporary.unlink(missing_ok=True)
