"""The images of a tar stream that can be read only once; damage to it is an error.

tarfile treats an unreadable header, or a stream that ends between two files, as the regular end of the archive: the
rest is silently lost. Here the end must follow the format (a block of zeros, then only zeros), and the checksum of a
compressed stream is verified. Memory is bounded: an image has at most `MAX_BYTES`, and sparse files are refused.
"""

import bz2
import gzip
import itertools
import lzma
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

from moco.data.walk import IMAGE_ENDINGS, is_system_name

# Reasons to skip samples and images. Hidden files (.NAME), those of operating systems (see
# `moco.data.walk.SYSTEM_NAMES`) and WebDataset's own (__NAME__) belong to no sample and are not counted.
WITHOUT, FURTHER = "samples without an image", "further images of samples that have one"
MAX_BYTES = 2**28  # the largest image in a shard: without a limit, a few compressed kB could fill the memory
_MAX_HEADER = 2**20  # bytes of the largest extended header, such as a long name
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_PART = 64  # images of one sample in memory at once: if names contain dots, a complete shard can look like one sample
# The names of WebDataset's own files, and how to open a stream, by its first bytes.
_OWN = re.compile(r"__[^/]*__(/|$)")
_OPENERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


class File(NamedTuple):
    """One file of the archive."""

    name: str
    content: bytes | None  # None for a link, or a file that is not an image

    @property
    def sample(self) -> str:
        """WebDataset's name of the sample: the file's name up to the first dot after the last folder."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.split(".")[0]

    @property
    def plain(self) -> bool:
        """Whether only an ending follows the sample's name, as in 0001.jpg but not in 0001.depth.png."""
        return self.name.rpartition("/")[2].count(".") == 1


def images_of(
    stream: Any, skipped: Counter[str], endings: tuple[str, ...] = IMAGE_ENDINGS
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each image, in the archive's order.

    A WebDataset sample is a sequence of files with the same name up to the first dot. If one of its images has just
    that name and an ending, only this image is used; others, such as a mask, are skipped. (A sample is read in parts of
    `_PART` images; if this image is in a later part, the images of earlier parts are used, too.) If no image has such a
    name, the dots are part of the names (IMG_2020.01.02.jpg), and each image file is an image of its own.

    Args:
        stream: a file, pipe or connection with the archive, uncompressed or compressed by gzip, bzip2 or xz; it is
            read to its end.
        skipped: counts what is skipped, by reason: samples (`WITHOUT`) and single images (`FURTHER`).
        endings: of the files that are images.

    Raises:
        tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error: if the archive is invalid, damaged or cut off,
            or an image has more than `MAX_BYTES`.
        ValueError: if the same name occurs more than once in a sample.
    """
    for _, files in itertools.groupby(_files(stream, endings), key=lambda file: file.sample):
        found = (file for file in files if file.content is not None)
        part = list(itertools.islice(found, _PART))
        skipped[WITHOUT] += not part
        plain = False  # whether an earlier part had the plain image
        while part:
            used = [] if plain else _used(part, endings)
            plain = plain or (len(used) == 1 and used[0].plain)
            yield from ((file.name, file.content or b"") for file in used)
            skipped[FURTHER] += len(part) - len(used)
            part = list(itertools.islice(found, _PART))


def _used(files: list[File], endings: tuple[str, ...]) -> list[File]:
    """Return a sample's plain image (of several, the first in the order of endings), or all if none is plain."""
    count = Counter(file.name.lower() for file in files)
    if repeated := [file.name for file in files if count[file.name.lower()] > 1]:
        raise ValueError(f"it contains {repeated[0]} more than once, so its samples are ambiguous")
    plain = ([file] for end in endings for file in files if file.plain and file.name.lower().endswith(end))
    return next(plain, files)


def _files(stream: Any, endings: tuple[str, ...]) -> Iterator[File]:
    """Yield all files and links except hidden ones, those of operating systems and WebDataset's own."""
    with tarfile.open(fileobj=_Stream(stream).unpacked(), mode="r|", tarinfo=_Header) as tar:
        while (info := tar.next()) is not None:
            parts = (part for part in info.name.split("/") if part not in (".", ".."))
            hidden = _OWN.match(info.name) or any(map(is_system_name, parts))
            if not info.isdir() and not hidden:
                is_image = info.isreg() and info.name.lower().endswith(endings)
                if info.issparse():
                    raise _SPARSE
                if is_image and not 0 <= info.size <= MAX_BYTES:
                    raise tarfile.ReadError(f"{info.name} has {info.size:,} bytes; the limit is {MAX_BYTES:,}")
                content = tar.extractfile(info) if is_image else None
                yield File(info.name, None if content is None else content.read())
            tar.members.clear()  # type: ignore[attr-defined] # tarfile would keep all headers in memory
        rest: Any = tar.fileobj
        while data := rest.read(2**16):
            if data.strip(b"\0"):
                raise tarfile.ReadError("data follow its end-of-archive mark: two archives in one, or damage")


_SPARSE = tarfile.ReadError("it contains a sparse file, which can declare any size: write it without tar --sparse")


class _Header(tarfile.TarInfo):
    """tarfile's hook for reading headers: only here the end-of-archive mark and damage can be distinguished."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _SPARSE
        if header.type in _EXTENDED and not 0 <= header.size <= _MAX_HEADER:  # tarfile would read it into memory
            raise tarfile.ReadError(f"an extended header has {header.size:,} bytes, more than {_MAX_HEADER:,}")
        return header

    def _proc_gnusparse_10(self, *_: Any) -> None:  # overrides tarfile's, which would read a map of any length
        raise _SPARSE

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # a block of zeros
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(
                f"after byte {tarfile_.offset:,} there is neither a header nor the end-of-archive mark: {error}"
            ) from error


class _Stream:
    """A stream whose first bytes were read to detect its compression."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._first = stream, b""
        while len(self._first) < max(map(len, _OPENERS)) and (data := stream.read(1)):
            self._first += data

    def unpacked(self) -> Any:
        """Return the uncompressed archive."""
        return next((open_(self) for magic, open_ in _OPENERS.items() if self._first.startswith(magic)), self)

    def read(self, size: int) -> bytes:
        ready, self._first = self._first[:size], self._first[size:]
        return ready or self._stream.read(size)
