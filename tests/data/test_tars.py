"""Tar streams: all images of an intact one are found, whatever their names; a damaged or cut one is an error."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable

import pytest

from moco.data.tars import FURTHER, MAX_BYTES, WITHOUT, images_of

FILES = {f"some/{i}.{ending}": bytes([i]) * 900 for i in range(3) for ending in ("cls", "jpg")}
BLOCK = tarfile.BLOCKSIZE
MEMBER = 3 * BLOCK  # header and two blocks of content


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class Slow:
    """A connection: it cannot seek, and may return fewer bytes than requested."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int, /) -> bytes:
        ready, self.data = self.data[: min(size, 700)], self.data[min(size, 700) :]
        return ready


def read(data: bytes) -> tuple[dict[str, bytes], dict[str, int]]:
    left: Counter[str] = Counter()
    return dict(images_of(Slow(data), left)), dict(+left)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_all_images_of_an_intact_archive(pack: Callable[[bytes], bytes]) -> None:
    full = {name: data for name, data in FILES.items() if name.endswith(".jpg")}
    assert read(pack(archive(FILES))) == (full, {})
    assert read(pack(archive({}))) == ({}, {})  # no file, only the end-of-archive mark


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: b"no tar",
        lambda data: flipped(data, 2 * MEMBER + 3),  # a name in a header
        lambda data: flipped(data, 2 * MEMBER + 126),  # a size
        lambda data: data[: 2 * MEMBER],  # between two files
        lambda data: data[: 2 * MEMBER + 100],  # inside a header
        lambda data: data[: 2 * MEMBER + BLOCK],  # after a header
        lambda data: data[: 2 * MEMBER + BLOCK + 500],  # inside a content
        lambda data: data[: 6 * MEMBER],  # after the last file, before the mark
        lambda data: data + data,
        lambda data: flipped(data, len(data) - 1),
        lambda data: gzip.compress(data)[:-9],  # in the deflated data
        lambda data: gzip.compress(data)[:-4],  # in the checksums after them
        lambda data: flipped(gzip.compress(data, 0), 2000),  # in a content, stored uncompressed
        lambda data: gzip.compress(data[: 2 * MEMBER]),
        lambda data: bz2.compress(data)[:-3],
        lambda data: lzma.compress(data)[:-3],
    ],
)
def test_damage_is_not_the_end_of_an_archive(harm: Callable[[bytes], bytes]) -> None:
    with pytest.raises((tarfile.TarError, OSError, EOFError, lzma.LZMAError)) as caught:
        read(harm(archive(FILES)))
    assert str(caught.value)


def test_every_cut_before_the_last_zeros_is_an_error() -> None:
    data = archive(FILES)
    for end in range(0, 6 * MEMBER + BLOCK, 128):
        with pytest.raises(tarfile.TarError):
            read(data[:end])
    assert len(read(data[: 6 * MEMBER + BLOCK])[0]) == 3


def test_names_with_dots_and_samples_with_several_images() -> None:
    dots = {"IMG_2020.01.02.jpg": b"a", "IMG_2020.01.03.JPG": b"b", "IMG_2020.01.03.cls": b"1", "v1.0/c.png": b"c"}
    assert read(archive(dots)) == ({name: data for name, data in dots.items() if not name.endswith("cls")}, {})
    # An image of just the sample's name is preferred to masks, in any order; samples without one are counted.
    more = {
        "0.depth.png": b"x",
        "0.jpg": b"0",
        "1.png": b"y",
        "1.jpg": b"1",
        "2.txt": b"2",
        "3.heic": b"3",
        "3.cls": b"1",
    }
    assert read(archive(more)) == ({"0.jpg": b"0", "1.jpg": b"1"}, {FURTHER: 2, WITHOUT: 2})
    # Neither hidden files nor WebDataset's own belong to a sample.
    own = {"__meta__": b"x", "__worker__/a.jpg": b"x", "._0.jpg": b"x", ".DS_Store": b"x", "__a.jpg": b"a"}
    assert read(archive(own)) == ({"__a.jpg": b"a"}, {})
    many = {f"day.{i}.jpg": bytes([i]) for i in range(150)}  # more than are in memory together
    assert read(archive(many)) == (many, {})


def test_further_images_of_a_large_sample_are_skipped() -> None:
    files = {"s.jpg": b"plain"} | {f"s.{i:03}.jpg": b"mask" for i in range(150)}
    assert read(archive(files)) == ({"s.jpg": b"plain"}, {FURTHER: 150})


def test_a_repeated_name_is_refused() -> None:
    twice = archive({"a.jpg": b"1", "b.jpg": b"2"}).replace(b"b.jpg", b"a.jpg")
    info = tarfile.TarInfo.frombuf(archive({"a.jpg": b"2"})[:BLOCK], "utf-8", "surrogateescape")
    second = info.tobuf() + twice[3 * BLOCK :]
    with pytest.raises(ValueError, match=r"it contains a\.jpg more than once"):
        read(twice[: 2 * BLOCK] + second)
    both = archive({"a.jpg": b"1", "a.b.jpg": b"2"})[: 4 * BLOCK]
    with pytest.raises(ValueError, match=r"it contains a\.b\.jpg more than once"):
        read(both + archive({"a.b.jpg": b"3"}))


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE, **pax: str) -> bytes:
    """Return only the header of a member."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, {key.replace("_", "."): value for key, value in pax.items()}
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (member("a.jpg", MAX_BYTES + 1), r"a\.jpg has 268,435,457 bytes; the limit is 268,435,456"),
        (member("a.jpg", 6_000_000_000), r"a\.jpg has 6,000,000,000 bytes"),
        (member("long name", 6_000_000_000, tarfile.GNUTYPE_LONGNAME), "extended header has 6,000,000,000 bytes"),
        (member("pax", 2**30, tarfile.XHDTYPE), "extended header has 1,073,741,824 bytes"),
        (member("pax", 2**30, tarfile.XGLTYPE), "extended header has 1,073,741,824 bytes"),
        (member("a.jpg", 512, tarfile.GNUTYPE_SPARSE), "sparse"),
        (member("a.jpg", 0, GNU_sparse_map="0,1", GNU_sparse_size="9000000000000"), "sparse"),
        (member("a.jpg", 512, GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize="1"), "sparse"),
    ],
)
def test_a_file_of_excessive_size_is_refused_before_it_is_read(head: bytes, words: str) -> None:
    class Endless:
        taken = 0

        def read(self, size: int, /) -> bytes:
            self.taken += size
            assert self.taken < 10**6, "the content was read"
            return (head + b"1\n" * 256 * 20)[self.taken - size : self.taken].ljust(size, b"\0")

    with pytest.raises(tarfile.ReadError, match=words):
        list(images_of(Endless(), Counter()))


def test_files_that_are_no_images_may_have_any_size() -> None:
    big = gzip.compress(member("movie.mp4", 51_200_000) + bytes(51_200_000) + archive(FILES), 1)
    assert len(read(big)[0]) == 3
