"""Decoding: the right pixels for every kind of image file, and a one-sentence error for every damaged one."""

import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from moco.data import decode as module
from moco.data.decode import ImageError, decode

H, W = 12, 17


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    """A smooth image (H, W, 3): JPEG changes it by a few levels only."""
    y, x = np.mgrid[0:H, 0:W]
    return np.stack([y * 20, x * 15, 255 - (x + y) * 9], axis=-1).astype(np.uint8)


def hwc(image: Tensor) -> NDArray[np.int64]:
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy().astype(np.int64)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def written(folder: Path, data: bytes, name: str = "image.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """Write a PNG of a kind that PIL cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---- right pixels ----


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_keep_each_pixel(
    kind: str, options: dict[str, object], pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = written(tmp_path, encoded(Image.fromarray(pixels), kind, **options))
    assert (hwc(decode(path)) == pixels).all()
    assert (hwc(decode(str(path))) == pixels).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pil_and_the_original(
    mode: str, progressive: bool, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    original = Image.fromarray(pixels).convert(mode)
    data = encoded(original, "JPEG", quality=98, progressive=progressive, subsampling=0)
    got = hwc(decode(written(tmp_path, data)))
    assert (got == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert abs(got - np.asarray(original.convert("RGB"))).max() <= 8


def test_cmyk_jpeg_is_inverted_with_and_without_the_adobe_marker(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    data = encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=98)
    start = data.index(b"Adobe") - 4  # the marker and its length precede the name
    bare = data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]
    assert b"Adobe" not in bare
    for case in (data, bare):
        assert abs(hwc(decode(written(tmp_path, case))) - pixels).max() <= 8  # otherwise black would become white


def test_pil_decodes_jpegs_that_torchvision_refuses(
    pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Unsupported marker type 0x68")

    exif = Image.Exif()
    exif[0x0112] = 6
    path = written(tmp_path, encoded(Image.fromarray(pixels), "JPEG", quality=98, exif=exif))
    expected = hwc(decode(path))
    monkeypatch.setattr(module, "decode_jpeg", refuse)
    assert (hwc(decode(path)) == expected).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "WEBP":
        options = {"lossless": True}
    got = hwc(decode(written(tmp_path, encoded(Image.fromarray(pixels), kind, exif=exif, **options))))
    # EXIF 2.3, tag 0x0112: the sides to which the stored row 0 and column 0 belong.
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert got.shape == upright.shape
    assert abs(got - upright).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_with_broken_exif_data_is_decoded(kind: str, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    path = written(tmp_path, encoded(Image.fromarray(pixels), kind, exif=b"garbage"))
    assert decode(path).shape == (3, H, W)


def test_the_content_counts_and_not_the_ending(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    image = Image.fromarray(pixels)
    assert (hwc(decode(written(tmp_path, encoded(image, "PNG"), "a.jpg"))) == pixels).all()
    assert (
        abs(hwc(decode(written(tmp_path, encoded(image, "JPEG", quality=98, subsampling=0), "b.png"))) - pixels).max()
        <= 8
    )


def test_gray_and_one_bit_images_become_three_channels(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    gray = pixels[..., 0]
    assert (hwc(decode(written(tmp_path, encoded(Image.fromarray(gray), "PNG")))) == gray[..., None]).all()
    bits = gray > 100
    expected = np.where(bits, 255, 0)[..., None]
    assert (hwc(decode(written(tmp_path, encoded(Image.fromarray(bits), "PNG")))) == expected).all()
    assert (hwc(decode(written(tmp_path, encoded(Image.fromarray(bits), "TIFF")))) == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparent_images_are_put_on_white(kind: str, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    alpha = np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1))
    image = Image.fromarray(np.dstack([pixels, alpha]))
    weight = alpha[..., None] / 255
    got = hwc(decode(written(tmp_path, encoded(image, kind))))
    assert abs(got - (pixels * weight + 255 * (1 - weight))).max() <= 1
    assert (got[:, 0] == 255).all()  # fully transparent
    assert (got[:, -1] == pixels[:, -1]).all()  # fully opaque

    gray = pixels[..., 1]
    got = hwc(decode(written(tmp_path, encoded(Image.fromarray(np.dstack([gray, alpha]), "LA"), kind))))
    assert abs(got - (gray[..., None] * weight + 255 * (1 - weight))).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_and_without_a_transparent_entry(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    indices = np.asarray(image)
    assert (hwc(decode(written(tmp_path, encoded(image, kind)))) == colors[indices]).all()
    colors[1] = 255  # entry 1 is transparent: white
    assert (hwc(decode(written(tmp_path, encoded(image, kind, transparency=1)))) == colors[indices]).all()


def test_the_first_frame_of_a_gif_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (W, H), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    Image.open(io.BytesIO(data)).seek(1)  # there is a second one
    assert (hwc(decode(written(tmp_path, data))) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_saturated(kind: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    got = hwc(decode(written(tmp_path, encoded(Image.fromarray(values), kind))))
    assert (got == (values >> 8)[..., None]).all()
    assert len(np.unique(got)) > 150  # PIL's convert("RGB") leaves 255 nearly everywhere


def test_sixteen_bit_gray_and_color_agree(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, H * W).astype(">u2").reshape(H, W)
    gray = png(W, H, 16, 0, b"".join(b"\0" + row.tobytes() for row in values))
    color = png(W, H, 16, 2, b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in values))
    assert (hwc(decode(written(tmp_path, gray))) == hwc(decode(written(tmp_path, color)))).all()


def test_int32_and_float_tiffs_have_one_scale_or_are_refused(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, H * W).astype(np.int32).reshape(H, W)
    got = hwc(decode(written(tmp_path, encoded(Image.fromarray(values), "TIFF"))))
    assert (got == (values >> 8)[..., None]).all()
    unit = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    got = hwc(decode(written(tmp_path, encoded(Image.fromarray(unit), "TIFF"))))
    assert (got == np.rint(unit * 255)[..., None]).all()
    for invalid in (values * 2, -values, unit * 255, np.full_like(unit, np.nan)):
        with pytest.raises(ImageError, match=r"image\.bin: its (int|float)32 pixels are in .* convert it to 8 bits"):
            decode(written(tmp_path, encoded(Image.fromarray(invalid), "TIFF")))


# ---- errors ----


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("keep", [0.5, 0.9, -1, -2])
def test_truncated_jpegs_are_refused(keep: float, progressive: bool, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", progressive=progressive)
    cut = data[: int(keep) if keep < 0 else int(len(data) * keep)]
    with pytest.raises(ImageError, match=r"image\.bin: the JPEG is truncated"):
        decode(written(tmp_path, cut))


def test_a_jpeg_that_ends_in_zeros_is_refused_though_pil_accepts_it(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    half = data[: len(data) // 2] + bytes(len(data) // 2)
    Image.open(io.BytesIO(half)).load()  # no error: therefore PIL must not decode it
    with pytest.raises(ImageError, match="truncated"):
        decode(written(tmp_path, half))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_files_of_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for length in (40, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ImageError, match=r"cannot read image .*image\.bin: "):
            decode(written(tmp_path, data[:length]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am no image", r"no known image format .*, it begins with b'hello, I am "),
        (b"\xff\xd8\xff\xe0 hello", r"\w+"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), r"\w+"),
    ],
)
def test_other_content_is_refused_in_one_sentence(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=rf"^cannot read image .*photo\.jpg: {reason}") as caught:
        decode(written(tmp_path, data, "photo.jpg"))
    assert "\n" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


def test_missing_and_unreadable_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: No such file or directory"):
        decode(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="Is a directory"):
        decode(tmp_path)

    def denied(self: Path) -> bytes:  # root may read every file, whatever its mode
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ImageError, match=r"secret\.png: Permission denied"):
        decode(tmp_path / "secret.png")


def test_declared_size_is_checked_before_pixels_are_read(
    pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    monkeypatch.setattr(module, "decode_jpeg", never)
    monkeypatch.setattr(module, "MAX_PIXELS", W * H - 1)
    for kind in ("PNG", "JPEG"):
        path = written(tmp_path, encoded(Image.fromarray(pixels), kind))
        monkeypatch.setattr(ImageFile.ImageFile, "load", never)
        with pytest.raises(ImageError, match=rf"image\.bin: .* {W} x {H} = {W * H} pixels, and at most 203 are read"):
            decode(path)
    monkeypatch.undo()
    bomb = png(14_000, 14_000, 8, 0, bytes(1000))  # 196 megapixels in very few bytes
    with pytest.raises(ImageError, match=r"bomb\.png: .*196000000 pixels"):
        decode(written(tmp_path, bomb, "bomb.png"))


def test_the_limit_itself_is_allowed(
    pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", W * H)
    assert decode(written(tmp_path, encoded(Image.fromarray(pixels), "PNG"))).shape == (3, H, W)


def test_the_error_can_be_pickled_in_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(ImageError("cannot read image a.jpg: the file is empty")))
    assert isinstance(error, ImageError)
    assert isinstance(error, ValueError)
    assert str(error) == "cannot read image a.jpg: the file is empty"


def test_real_photographs_equal_pil(tmp_path: Path) -> None:
    archive = Path(os.environ.get("MOCO_SHARED_DATA", ""), "photos_250.tar")
    if not archive.is_file():
        pytest.skip("MOCO_SHARED_DATA does not name a folder that holds photos_250.tar")
    modes = set()
    with tarfile.open(archive) as photos:
        files = [member for member in photos.getmembers() if member.isfile()]
        for member in files[::6] + [member for member in files if "rifle" in member.name]:
            stream = photos.extractfile(member)
            assert stream is not None
            data = stream.read()
            image = Image.open(io.BytesIO(data))
            modes.add(image.mode)
            assert (hwc(decode(written(tmp_path, data))) == np.asarray(image.convert("RGB"))).all(), member.name
    assert modes == {"RGB", "L"}
