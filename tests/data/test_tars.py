"""A stream that is damaged or cut anywhere is an error; of a whole one all pictures come out, whatever their names."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable

import pytest

from moco.data.tars import FURTHER, WITHOUT, images_of

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
    """A connection: it cannot be sought in, and gives less than it is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int, /) -> bytes:
        ready, self.data = self.data[: min(size, 700)], self.data[min(size, 700) :]
        return ready


def read(data: bytes) -> tuple[dict[str, bytes], dict[str, int]]:
    left: Counter[str] = Counter()
    return dict(images_of(Slow(data), left)), dict(+left)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_all_pictures_of_a_whole_archive(pack: Callable[[bytes], bytes]) -> None:
    whole = {name: data for name, data in FILES.items() if name.endswith(".jpg")}
    assert read(pack(archive(FILES))) == (whole, {})
    assert read(pack(archive({}))) == ({}, {})  # no file, but the mark of the end


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: b"no tar",
        lambda data: flipped(data, 2 * MEMBER + 3),  # a name in a header
        lambda data: flipped(data, 2 * MEMBER + 126),  # a size
        lambda data: data[: 2 * MEMBER],  # at the border of two files
        lambda data: data[: 2 * MEMBER + 100],  # inside a header
        lambda data: data[: 2 * MEMBER + BLOCK],  # behind a header
        lambda data: data[: 2 * MEMBER + BLOCK + 500],  # inside a content
        lambda data: data[: 6 * MEMBER],  # behind the last file, before the mark
        lambda data: data + data,
        lambda data: flipped(data, len(data) - 1),
        lambda data: gzip.compress(data)[:-9],  # in the deflated data
        lambda data: gzip.compress(data)[:-4],  # in the checksums behind it
        lambda data: flipped(gzip.compress(data, 0), 2000),  # in a content, stored as it is
        lambda data: gzip.compress(data[: 2 * MEMBER]),
        lambda data: bz2.compress(data)[:-3],
        lambda data: lzma.compress(data)[:-3],
    ],
)
def test_no_damage_passes_for_an_end(harm: Callable[[bytes], bytes]) -> None:
    with pytest.raises((tarfile.TarError, OSError, EOFError, lzma.LZMAError)) as caught:
        read(harm(archive(FILES)))
    assert str(caught.value)


def test_every_cut_but_in_the_last_zeros_is_noticed() -> None:
    data = archive(FILES)
    for end in range(0, 6 * MEMBER + BLOCK, 128):
        with pytest.raises(tarfile.TarError):
            read(data[:end])
    assert len(read(data[: 6 * MEMBER + BLOCK])[0]) == 3


def test_names_with_dots_and_samples_with_more_than_a_picture() -> None:
    dots = {"IMG_2020.01.02.jpg": b"a", "IMG_2020.01.03.JPG": b"b", "IMG_2020.01.03.cls": b"1", "v1.0/c.png": b"c"}
    assert read(archive(dots)) == ({name: data for name, data in dots.items() if not name.endswith("cls")}, {})
    # A picture of just the sample's name goes before masks, wherever it stands; what has none is counted.
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
    many = {f"day.{i}.jpg": bytes([i]) for i in range(150)}  # more than are held at a time
    assert read(archive(many)) == (many, {})


def test_one_name_twice_cannot_be_told_apart() -> None:
    twice = archive({"a.jpg": b"1", "b.jpg": b"2"}).replace(b"b.jpg", b"a.jpg")
    info = tarfile.TarInfo.frombuf(archive({"a.jpg": b"2"})[:BLOCK], "utf-8", "surrogateescape")
    second = info.tobuf() + twice[3 * BLOCK :]
    with pytest.raises(ValueError, match=r"it contains a\.jpg more than once"):
        read(twice[: 2 * BLOCK] + second)
