"""Unreadable image files, and readable ones with unusual properties."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def noise(seed: int = 0, height: int = 30, width: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """Make a PNG of a few bytes whose header declares 14,000 x 14,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 14_000, 14_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tiff(
    width: int,
    height: int,
    bands: int,
    extra: int | tuple[int, int] | None = None,
    bits: int = 8,
    content: bytes = b"",
    photometric: int | None = None,
) -> bytes:
    """Make an uncompressed TIFF of a kind that PIL cannot write; `extra` is the tag ExtraSamples of its last bands."""
    size = width * height * bands * bits // 8
    color = (2 if bands > 2 else 1) if photometric is None else photometric
    tags: list[tuple[int, int, Any]] = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, color)]
    tags += [(273, 4, 0), (277, 3, bands), (278, 4, height), (279, 4, size), (284, 3, 1)]
    tags += [] if extra is None else [(338, 3, extra)]
    after = 8 + 2 + 12 * len(tags) + 4
    many = struct.pack(f"<{bands}H", *[bits] * bands)  # BitsPerSample, if it does not fit into the directory
    start = after + len(many)
    out = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, kind, value in tags:
        if tag == 258 and bands > 2:
            out += struct.pack("<HHII", tag, kind, bands, after)
        elif tag == 258:
            out += struct.pack("<HHI4s", tag, kind, bands, many.ljust(4, b"\0"))
        elif isinstance(value, tuple):
            out += struct.pack("<HHIHH", tag, kind, 2, *value)
        else:
            out += struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value)
    return out + bytes(4) + many + (content or bytes(i * 7 % 256 for i in range(size)))


def without_palette() -> bytes:
    """Make a palette PNG whose palette is missing."""
    data = encoded(noise().quantize(16), "PNG")
    at = data.index(b"PLTE") - 4
    return data[:at] + data[at + 12 + int.from_bytes(data[at : at + 4]) :]


def unreadable_files() -> dict[str, tuple[bytes, str]]:
    """Return content and kind of fault by name."""
    jpeg, png = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
    broken = bytearray(png)
    broken[len(png) // 2] ^= 0xFF
    return {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"<html>404 not found</html>", "no image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zeros.jpg": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "flipped.png": (bytes(broken), "damaged"),
        "bomb.png": (bomb(), "too large"),
    }


def odd_files() -> dict[str, tuple[bytes, str]]:
    """Return content and kind of oddity by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    palette = noise().quantize(16)
    glass = noise().convert("RGBA")
    glass.putalpha(100)
    return {
        "sixteen.png": (encoded(Image.fromarray(gray), "PNG"), "16 bits"),
        "cmyk.jpg": (encoded(noise().convert("CMYK"), "JPEG"), "CMYK"),
        "palette.png": (encoded(palette, "PNG"), "palette"),
        "turned.jpg": (encoded(noise(), "JPEG", exif=exif), "rotated by EXIF"),
        "glass.png": (encoded(glass, "PNG"), "transparent"),
        "moving.gif": (encoded(noise(), "GIF", save_all=True, append_images=[noise(1)]), "several frames"),
        "negative.tif": (tiff(9, 9, 1, photometric=0), "white is zero"),
        "thumbnail.tif": (encoded(noise(5, 9, 9), "TIFF", save_all=True, append_images=[noise(6)]), "several sizes"),
        "infrared.tif": (tiff(9, 9, 4, extra=2), "transparent"),
        "fourth.tif": (tiff(9, 9, 4, extra=0), "extra band"),
        "fifth.tif": (tiff(9, 9, 5, extra=(0, 0)), "extra band"),
        "dot.png": (encoded(noise(height=1, width=1), "PNG"), "tiny"),
        "ribbon.png": (encoded(Image.new("RGB", (30_000, 20), "red"), "PNG"), "long"),
        "liar.jpg": (encoded(noise(2), "PNG"), "misnamed"),
        "größe 漢字.png": (encoded(noise(3), "PNG"), "name"),
    }


def folder(root: Path, good: int = 6, unreadable: bool = True, odd: bool = False) -> Path:
    """Write readable images 00.png, 01.png, ... of one size, and every unreadable or odd file."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(good):
        noise(100 + i).save(root / f"{i:02}.png")
    for name, (data, _) in ((unreadable_files() if unreadable else {}) | (odd_files() if odd else {})).items():
        (root / name).write_bytes(data)
    return root


def forbid(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Let listing these folders fail. The tests may run as root, who can list any folder."""
    scandir = os.scandir

    def denied(path: str) -> Any:
        if Path(path) in folders:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
