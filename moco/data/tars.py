"""The pictures of a tar file that comes as a stream and cannot be read twice, in which damage is an error.

To tarfile, a header that it cannot read and a stream that stops between two files are the end of the archive like any
other: what lies behind is lost without a word. Here the end is what the format says, a block of zeros with nothing but
zeros behind it, and the checksum of a compressed stream is looked at.
"""

import bz2
import gzip
import itertools
import lzma
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple, Protocol, Self

from moco.data.walk import IMAGE_ENDINGS

# What is left out of a shard, by reason. Hidden files (.NAME) and WebDataset's own (__NAME__) are none of a sample.
WITHOUT, FURTHER = "samples without a picture", "further pictures of samples that have one"
_AT_A_TIME = 64  # pictures of one sample in memory: names with dots can make a whole shard look like one
_OWN = re.compile(r"__[^/]*__(/|$)")
_PACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


class Readable(Protocol):
    """A file, a pipe, a connection."""

    def read(self, size: int, /) -> bytes: ...


class File(NamedTuple):
    """One file of the archive."""

    name: str
    content: bytes | None  # None of what is no picture, or a link to one

    @property
    def sample(self) -> str:
        """What WebDataset takes for the sample: the name up to the first dot behind the last folder."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.split(".")[0]

    @property
    def plain(self) -> bool:
        """Whether its ending is all that follows the sample's name, as in 0001.jpg, and not 0001.depth.png."""
        return self.name.rpartition("/")[2].count(".") == 1


def pictures(stream: Readable, left: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each picture, in the archive's order.

    A sample of WebDataset (files in a row whose names are the same up to the first dot) that has a picture of just that
    name shows this one; its others, such as a mask, are left out. Where there is none, dots are part of the names
    (IMG_2020.01.02.jpg), and each is a picture of its own.

    Args:
        stream: the archive, as it is or compressed by gzip, bzip2 or xz; it is read to its very end.
        left: gets how many were left out, by reason (`WITHOUT`, `FURTHER`).

    Raises:
        tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error: for what is no archive, a damaged or a cut one.
        ValueError: if a name occurs twice in a row.
    """
    for _, files in itertools.groupby(_files(stream), key=lambda file: file.sample):
        found = (file for file in files if file.content is not None)
        some = list(itertools.islice(found, _AT_A_TIME))
        left[WITHOUT] += not some
        while some:
            shown = _shown(some)
            yield from ((file.name, file.content or b"") for file in shown)
            left[FURTHER] += len(some) - len(shown)
            some = list(itertools.islice(found, _AT_A_TIME))


def _shown(files: list[File]) -> list[File]:
    """Which of a sample's pictures are shown: the plain one whose ending comes first in the list, or all."""
    if len({file.name.lower() for file in files}) < len(files):
        raise ValueError(f"it holds {files[0].name} more than once, so its samples cannot be told apart")
    for ending in IMAGE_ENDINGS:
        for file in files:
            if file.plain and file.name.lower().endswith(ending):
                return [file]
    return files


def _files(stream: Readable) -> Iterator[File]:
    """All files and links but hidden ones and WebDataset's own."""
    with tarfile.open(fileobj=_Stream.unpacked(stream), mode="r|", tarinfo=_Header) as tar:
        while (info := tar.next()) is not None:
            hidden = info.name.rpartition("/")[2].startswith(".") or _OWN.match(info.name)
            if not info.isdir() and not hidden:
                wanted = info.isreg() and info.name.lower().endswith(IMAGE_ENDINGS)
                content = tar.extractfile(info) if wanted else None
                yield File(info.name, None if content is None else content.read())
            tar.members.clear()  # type: ignore[attr-defined] # tarfile would keep every header
        behind: Any = tar.fileobj
        while data := behind.read(2**16):
            if data.strip(b"\0"):
                raise tarfile.ReadError("there is more behind the mark of its end: two archives in one, or damage")


class _Header(tarfile.TarInfo):
    """tarfile's own hook for reading headers: the only place that tells the mark of the end from damage."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # a block of zeros
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(
                f"behind byte {tarfile_.offset:,} there is neither a whole header nor the mark of the end: {error}"
            ) from error


class _Stream:
    """A stream whose first bytes have been looked at."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self.first = stream, b""
        while len(self.first) < max(map(len, _PACKERS)) and (data := stream.read(1)):
            self.first += data

    @classmethod
    def unpacked(cls, stream: Readable) -> IO[bytes]:
        """The archive itself, decompressed if it has to be."""
        this: Any = cls(stream)
        openers: Iterable[Any] = (opener for magic, opener in _PACKERS.items() if this.first.startswith(magic))
        opened: IO[bytes] = next((opener(this) for opener in openers), this)
        return opened

    def read(self, size: int) -> bytes:
        ready, self.first = self.first[:size], self.first[size:]
        return ready or self._stream.read(size)
