"""Images in memory become the same pixels as their files in the commands: every mode, depth, orientation and format."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from moco.data.decode import ImageError, decode, decode_bytes
from moco.data.headers import upright
from moco.data.image_facts import image_facts
from moco.data.in_memory import to_pixels
from moco.data.pixel_format import PixelFormat
from tests.data.test_decode import png

H, W = 5, 7
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
FOUR = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (H, W), dtype=np.uint16)
DEEP[0, 0] = 4095
DEEP_COLOR = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=2)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deep_png(orientation: int = 1) -> bytes:
    content = png(W, H, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP_COLOR))
    exif = turned(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    return content[:33] + chunk + content[33:]  # after the header


def tif(array: NDArray[Any], **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "minisblack"} | options)
    return buffer.getvalue()


def contents() -> dict[str, bytes]:
    rgba = Image.fromarray(FOUR)
    gray, color, alpha = Image.fromarray(GRAY), rgba.convert("RGB"), Image.fromarray(FOUR[..., [0, 3]].copy(), "LA")
    return {
        "l.png": encoded(gray, "PNG"),
        "la.png": encoded(alpha, "PNG"),
        "rgb.png": encoded(color, "PNG"),
        "rgba.png": encoded(rgba, "PNG"),
        "p.png": encoded(color.quantize(16), "PNG"),
        "1.png": encoded(gray.convert("1"), "PNG"),
        "deep.png": encoded(Image.fromarray(DEEP), "PNG"),
        "deep_color.png": deep_png(6),
        "l.jpg": encoded(gray, "JPEG", exif=turned(8)),
        "rgb.jpg": encoded(color, "JPEG", exif=turned(6)),
        "cmyk.jpg": encoded(color.convert("CMYK"), "JPEG", exif=turned(3)),
        "deep.pgm": encoded(Image.fromarray(DEEP), "PPM"),
        "rgb.webp": encoded(rgba, "WEBP", lossless=True),
        "p.gif": encoded(color, "GIF"),
        "negative.tif": tif(GRAY, photometric="miniswhite"),
        "negative16.tif": tif(DEEP, photometric="miniswhite"),
        "turned16.tif": tif(DEEP, extratags=[(274, "H", 1, 6, True)]),
        "turned_bands.tif": tif(
            FOUR, photometric="rgb", extrasamples=["unspecified"], extratags=[(274, "H", 1, 5, True)]
        ),
        "signed.tif": tif(DEEP.astype(np.int16) - 100),
        "signed8.tif": tif(GRAY.view(np.int8)),
        "u32.tif": tif(DEEP.astype(np.uint32) << 20),
        "float.tif": tif(GRAY.astype(np.float32) / 255),
        "divided.tif": tif(FOUR, photometric="rgb", extrasamples=["assocalpha"]),
        "deep_color.tif": tif(DEEP_COLOR, photometric="rgb"),
    }


FORMATS = [
    *(PixelFormat(channels, "uint8", bits) for channels in (1, 3) for bits in (12, 16)),
    *(PixelFormat(4), PixelFormat(1, "uint16"), PixelFormat(3, "uint16"), PixelFormat(1, "float32")),
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_an_image_in_memory_is_its_file(form: PixelFormat, tmp_path: Path) -> None:
    compared = 0
    for name, content in contents().items():
        path = tmp_path / name
        path.write_bytes(content)
        expected = pixels_or_none(lambda: decode_bytes(name, content, form))  # noqa: B023 # called at once
        for loaded in (False, True):
            image = Image.open(path)
            if loaded:
                image.load()
            if loaded and name == "turned16.tif":  # PIL forgets the orientation of a TIFF that it maps into memory
                continue
            found = pixels_or_none(lambda: to_pixels(image, form))  # noqa: B023 # called at once
            if (loaded and lost_once_loaded(name, form)) or expected is None:
                assert found is None, name
            else:
                assert found is not None, (name, loaded)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected), (name, loaded)
                compared += 1
        if expected is not None:
            assert torch.equal(to_pixels(str(path), form), expected)
            assert torch.equal(to_pixels(path, form), expected)
    assert compared >= {1: 7, 3: 2, 4: 3}[form.channels]


def pixels_or_none(read: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Return the pixels; None if the image does not fit the format."""
    try:
        return read()
    except ValueError:  # ImageError is one
        return None


def lost_once_loaded(name: str, form: PixelFormat) -> bool:
    """Return whether PIL has lost what the format needs of a file."""
    lower_bits = name.startswith("deep_color") and (form.bits < 16 or form.dtype != "uint8")
    return lower_bits or (form.channels == 4 and name in ("turned_bands.tif", "divided.tif"))


def test_the_values_are_right(tmp_path: Path) -> None:
    stored = contents()

    def pixels(name: str, *form: Any) -> NDArray[Any]:
        (tmp_path / name).write_bytes(stored[name])
        found: NDArray[Any] = to_pixels(Image.open(tmp_path / name), PixelFormat(*form)).numpy()
        return found

    assert (pixels("deep.png", 3, "uint8", 12) == DEEP >> 4).all()
    assert (pixels("deep.png", 1, "uint8", 16)[0] == DEEP >> 8).all()
    assert (pixels("deep_color.png", 3, "uint16") == np.rot90(DEEP_COLOR, -1).transpose(2, 0, 1)).all()
    assert (pixels("deep_color.png", 3, "uint8", 12) == np.rot90(DEEP_COLOR, -1).transpose(2, 0, 1) >> 4).all()
    for channels in (1, 3):
        assert (pixels("negative.tif", channels) == 255 - GRAY).all()
        assert (pixels("negative16.tif", channels, "uint8", 12) == (4095 - DEEP) >> 4).all()
        assert (pixels("negative16.tif", channels) == (65535 - DEEP) >> 8).all()
    assert (pixels("negative16.tif", 1, "uint16")[0] == 65535 - DEEP).all()
    assert (pixels("negative.tif", 1, "float32")[0] == 255 - GRAY).all()
    assert (pixels("turned16.tif", 1, "uint16")[0] == np.rot90(DEEP, -1)).all()
    assert (pixels("turned_bands.tif", 4) == FOUR.transpose(2, 1, 0)).all()
    assert (pixels("divided.tif", 4) == FOUR.transpose(2, 0, 1)).all()
    assert (pixels("signed.tif", 1, "float32")[0] == DEEP.astype(int) - 100).all()
    assert (pixels("signed8.tif", 1, "float32")[0] == GRAY.view(np.int8)).all()
    assert (pixels("u32.tif", 1, "float32")[0] == (DEEP.astype(np.uint32) << 20).astype(np.float32)).all()
    white = FOUR[..., :3] * (FOUR[..., 3:] / 255) + 255 - FOUR[..., 3:]
    assert np.abs(pixels("rgba.png", 3).transpose(1, 2, 0) - white).max() < 1.5


def test_arrays_and_tensors_of_each_layout() -> None:
    bands = RNG.integers(0, 2**16, (H, W, 4), dtype=np.uint16)
    form = PixelFormat(4, "uint16")
    for image in (bands, bands.transpose(2, 0, 1), torch.from_numpy(bands.transpose(2, 0, 1).copy())):
        assert np.array_equal(to_pixels(image, form).numpy(), bands.transpose(2, 0, 1))
    square = torch.from_numpy(RNG.integers(0, 2**16, (4, 4, 4), dtype=np.uint16))
    assert torch.equal(to_pixels(square, form), square)  # of a tensor the first axis holds the channels
    assert torch.equal(to_pixels(square.numpy(), form), square.permute(2, 0, 1))
    for gray in (GRAY, GRAY[None], GRAY[..., None], torch.from_numpy(GRAY), torch.from_numpy(GRAY)[None]):
        assert (to_pixels(gray).numpy() == GRAY).all()
        assert (to_pixels(gray, PixelFormat(1)).numpy() == GRAY).all()


@pytest.mark.parametrize(
    ("image", "form", "part"),
    [
        (np.zeros((0, 7, 3), np.uint8), PixelFormat(), r"shape \(0, 7, 3\)"),
        (
            np.zeros((5, 7, 3), np.float32),
            PixelFormat(),
            "type float32: .* 3 channels of uint8, without transforms",
        ),
        (np.zeros((5, 7, 3), np.uint16), PixelFormat(), "type uint16"),
        (np.zeros((2, 5, 7, 4), np.uint16), PixelFormat(4, "uint16"), r"shape \(2, 5, 7, 4\)"),
        (torch.zeros(5, 7, 4, dtype=torch.uint8), PixelFormat(4), r"shape \(5, 7, 4\)"),
        (Image.new("RGB", (0, 5)), PixelFormat(), "no pixels: its size is 0 x 5"),
        ([[1, 2]], PixelFormat(), "not list"),
        ("no.png", PixelFormat(), "cannot read image no.png: No such file"),
    ],
)
def test_other_images_are_one_sentence(image: Any, form: PixelFormat, part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        to_pixels(image, form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_pil_does(orientation: int) -> None:
    image = Image.fromarray(FOUR)
    image.getexif()[0x0112] = orientation
    assert np.array_equal(upright(FOUR, orientation), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("first", [True, False])
def test_the_largest_page_of_a_tiff_is_used_and_reported(first: bool, dtype: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    bands = RNG.integers(0, 255, (H, W, 4)).astype(dtype)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for page in (bands[:2, :3], bands) if first else (bands, bands[:2, :3]):
            file.write(page, photometric="minisblack", planarconfig="contig")
    form = PixelFormat(4, dtype)
    assert np.array_equal(decode(path, form).numpy(), bands.transpose(2, 0, 1))
    assert image_facts(str(path), form).odd == ("tiny", "several sizes")[::-1]
    pages = [Image.fromarray(each) for each in (FOUR[:2, :3, :3], FOUR[..., :3])]
    one, other = pages if first else pages[::-1]
    path.write_bytes(encoded(one, "TIFF", save_all=True, append_images=[other]))
    assert np.array_equal(decode(path).numpy(), FOUR[..., :3].transpose(2, 0, 1))
    assert "several sizes" in image_facts(str(path)).odd
    assert "several frames" not in image_facts(str(path)).odd


def test_pages_of_one_size_are_bands_or_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tif(FOUR.transpose(2, 0, 1), metadata=None))
    assert np.array_equal(decode(path, PixelFormat(4)).numpy(), FOUR.transpose(2, 0, 1))
    assert "several frames" not in image_facts(str(path), PixelFormat(4)).odd
    assert (decode(path).numpy() == FOUR[..., 0]).all()
    assert "several frames" in image_facts(str(path)).odd


def test_white_as_zero_without_a_known_black_is_refused(tmp_path: Path) -> None:
    for array, form in ((GRAY / np.float32(255), PixelFormat(1, "float32")), (FOUR, PixelFormat(4))):
        content = tif(array, photometric="miniswhite", planarconfig="contig" if array.ndim == 3 else None)
        with pytest.raises(ImageError, match=r"white is zero in it .*: store it with black as zero"):
            decode_bytes("a.tif", content, form)
    (tmp_path / "a.tif").write_bytes(tif(DEEP, photometric="miniswhite"))
    assert "white is zero" in image_facts(str(tmp_path / "a.tif"), PixelFormat(1, "uint16")).odd


@pytest.mark.parametrize("form", [PixelFormat(), PixelFormat(1, "uint16")])
def test_an_unfit_type_names_itself_and_the_field(form: PixelFormat) -> None:
    for array, name in ((DEEP.astype(np.int16) - 4000, "int16"), (DEEP.astype(np.uint32) << 20, "uint32")):
        with pytest.raises(ImageError, match=rf"its pixels are {name}|its {name} pixels .*data\.dtype=float32"):
            decode_bytes("a.tif", tif(array), form)
