"""Writing pictures into tar shards: what becomes of one picture, and one shard with its part of the index.

Legend: N images, n images of one shard.
"""

import hashlib
import io
import json
import os
import tarfile
import warnings
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from moco.data.decode import ImageError, decode_bytes
from moco.data.shards import PARTS, row_type
from moco.data.sources import ArraySource, FileSource, Source
from moco.data.walk import IMAGE_FORMATS
from moco.data.workers import delivered, identity_collate, leave_signals_to_the_parent
from moco.files import atomic_write

AT_ONCE = 16  # pictures in one errand of a worker
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # the others are the format's name


class Picture(NamedTuple):
    """What goes into a shard of one picture; of one that cannot be read nothing but its fault."""

    content: bytes = b""
    ending: str = ""  # by the content, for readers of WebDataset go by it
    before: int = 0  # bytes that it had
    fault: str = ""  # of `moco.data.decode.FAULTS`
    reason: str = ""


def picture(source: Source, i: int, short_side: int, quality: int) -> Picture:
    """Picture i as it goes into a shard, decoded once to know that it can be.

    Its file's own bytes, untouched, unless its shorter side exceeds `short_side`: then it is scaled down to that,
    upright, bicubic and antialiased, and encoded as JPEG with 4:2:0 color. A picture that has no file (CIFAR, digits)
    becomes a PNG, without loss.
    """
    try:
        if isinstance(source, ArraySource):
            pixels = source.image(i)  # (3, H, W)
            content, before = _encoded(pixels, "PNG"), pixels.numel()
        else:
            assert isinstance(source, FileSource)
            content = source.content(i)
            pixels, before = decode_bytes(source.name(i), content), len(content)
    except ImageError as error:
        return Picture(fault=error.kind, reason=error.reason)
    if 0 < short_side < min(pixels.shape[1:]):
        small = resize(pixels, [short_side], InterpolationMode.BICUBIC, antialias=True)  # (3, h, w)
        return Picture(_encoded(small, "JPEG", quality=quality), "jpg", before)
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        kind = image.format or "bin"
    return Picture(content, _ENDINGS.get(kind, kind.lower()), before)


def _encoded(pixels: Tensor, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, kind, **options)
    return buffer.getvalue()


class _Errands:
    """The data set of packing: a worker prepares some pictures at a time."""

    def __init__(self, source: Source, short_side: int, quality: int) -> None:
        self.source, self.short_side, self.quality = source, short_side, quality

    def __getitem__(self, rows: range) -> list[Picture]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, on headers of pictures that it reads all the same
            return [picture(self.source, i, self.short_side, self.quality) for i in rows]


def prepared(source: Source, start: int, workers: int, short_side: int, quality: int) -> Generator[Picture, None, None]:
    """The pictures from `start` on, in the source's order, by worker processes; few are under way at a time.

    `close` ends the processes.

    Raises:
        LoaderError: if a worker process dies.
    """
    # PyTorch's loader for its order, its bound on what is under way, and workers that end when their parent is killed.
    loader: DataLoader[Any] = DataLoader(
        _Errands(source, short_side, quality),  # type: ignore[arg-type]
        sampler=(range(at, min(at + AT_ONCE, len(source))) for at in range(start, len(source), AT_ONCE)),
        batch_size=None,
        num_workers=workers,
        collate_fn=identity_collate,
        worker_init_fn=leave_signals_to_the_parent,
    )
    for pictures in delivered(loader, "workers"):
        yield from pictures


class Shard:
    """One shard that is being written, and its part of the index.

    Args:
        path: the tar file; it has another name until `close`.
        number: which shard of its split.
        key: how many pictures the shards before it hold: keys are unique in a split, as WebDataset wants it.
    """

    def __init__(self, path: Path, number: int, key: int) -> None:
        self.path, self.number, self.key = path, number, key
        self.rows: list[tuple[int, int, int, int, int, bytes]] = []
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._sink = _Sink(self._temporary)
        self._tar = tarfile.TarFile(mode="w", fileobj=self._sink, format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]

    def size_with(self, content: bytes) -> int:
        """Bytes of the shard with one more picture, but for the zeros at its end."""
        return self._sink.tell() + 3 * tarfile.BLOCKSIZE + len(content)

    def add(self, picture: Picture, label: int, name: bytes) -> None:
        """Appends a picture; label -1: none."""
        key = f"{self.key + len(self.rows):09}"
        offset = self._member(f"{key}.{picture.ending}", picture.content)
        if label >= 0:
            self._member(f"{key}.cls", str(label).encode())
        content = picture.content
        self.rows.append((self.number, offset, len(content), zlib.crc32(content), label, name))

    def _member(self, name: str, data: bytes) -> int:
        """Writes a file into the tar, the same bytes whoever packs when, and gives where its content begins."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        offset = self._sink.tell() + tarfile.BLOCKSIZE  # behind the header, which is one block in this format
        self._tar.addfile(info, io.BytesIO(data))
        return offset

    def close(self) -> tuple[NDArray[np.void], dict[str, Any]]:
        """Ends the file, safely on disk, and gives its rows (n,) and what the index says of it."""
        self._tar.close()
        about = {"file": self.path.name, "bytes": self._sink.tell(), "sha256": self._sink.close()}
        self._temporary.replace(self.path)
        width = max(len(row[-1]) for row in self.rows)
        return np.array(self.rows, row_type(width)), about

    def discard(self) -> None:
        """Leaves nothing of it, after an error."""
        self._sink.close(durable=False)
        self._temporary.unlink(missing_ok=True)


class _Sink:
    """A new file that knows its SHA-256 as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha, self._length = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        self._length += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._length

    def close(self, durable: bool = True) -> str:
        if durable and not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return self._sha.hexdigest()


class Part(NamedTuple):
    """A finished shard's part of the index, with which an interrupted command goes on."""

    rows: NDArray[np.void]  # (n,); none where all pictures up to `end` were skipped
    shard: dict[str, Any]  # file, bytes, sha256; {} where there is none
    end: int  # the source's row behind its last one
    before: int  # bytes of its pictures before packing
    skipped: list[list[str]]  # name, kind and reason of each that cannot be read


def part_path(output: Path, split: str, number: int) -> Path:
    """The file of a split's part in an unfinished folder."""
    return output / PARTS / f"{split}-{number:06}.npz"


def write_part(path: Path, part: Part) -> None:
    """Puts a part into a file, whole or not at all."""
    about = json.dumps([part.shard, part.end, part.before, part.skipped])
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, rows=part.rows, about=np.array(about))


def read_part(path: Path) -> Part:
    """What `write_part` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Part(file["rows"], *json.loads(str(file["about"])))


def write_rows(path: Path, parts: Sequence[Path]) -> int:
    """Joins the rows of all parts into one .npy file, a part in memory at a time; gives their number N."""
    shapes = [(len(rows), rows.dtype["name"].itemsize) for rows in (read_part(part).rows for part in parts)]
    count, width = sum(length for length, _ in shapes), max(bytes_ for _, bytes_ in shapes)

    dtype = row_type(width)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for part in parts:
            file.write(read_part(part).rows.astype(dtype).tobytes())
    return count


def no_rows() -> NDArray[np.void]:
    """Of a part that holds no shard."""
    return np.empty(0, row_type(1))
