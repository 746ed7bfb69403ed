"""Large JPEGs decoded at a fraction of their size: the crops keep their position and nearly their pixels."""

import io
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moco.config import DataConfig
from moco.data import decode as module
from moco.data.augment import crop_batch, crop_one, largest_shrink
from moco.data.crop import crop_boxes, shrunk_box
from moco.data.decode import ImageError, decode_bytes, decode_scaled
from moco.data.loader import crops
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.data.view import View, draw_crop

FACTORS = [2, 4, 8]
VIEW = View(16, (0.2, 1.0))


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply scaled decoding to small images too, which are faster to test."""
    monkeypatch.setattr(module, "SCALED_FROM", 100 * 80)


def jpeg(width: int = 200, height: int = 160, mode: str = "RGB", **options: object) -> bytes:
    """A smooth image with some grain."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 19), np.cos(y / 13), np.sin((x + 2 * y) / 31)]
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    pixels = np.clip(128 + 90 * np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=95, subsampling=0, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def means(pixels: Tensor, factor: int) -> Tensor:
    """The mean of each factor x factor pixels."""
    return torch.nn.functional.avg_pool2d(pixels.float(), factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_pixel_is_the_mean_of_the_pixels_that_it_stands_for(factor: int, mode: str) -> None:
    data = jpeg(mode=mode, progressive=factor == 4)
    got = decode_scaled("a.jpg", data, lambda height, width: factor)
    full = decode_bytes("a.jpg", data)
    assert (got.size, got.factor) == ((160, 200), factor)
    error = (got.pixels - means(full, factor)).abs()
    assert got.pixels.shape[1:] == (160 // factor, 200 // factor)
    assert error.mean() < 1.5
    assert error.max() < 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_applies_to_the_size_and_the_pixels(orientation: int) -> None:
    data, asked = jpeg(exif=turned(orientation)), []

    def shrink(height: int, width: int) -> int:
        asked.append((height, width))
        return 4

    got, full = decode_scaled("a.jpg", data, shrink), decode_bytes("a.jpg", data)
    assert asked == [tuple(full.shape[1:])] == [got.size]
    assert (got.pixels - means(full, 4)).abs().mean() < 1.5
    # If the factor does not divide the sides, a rotated image is decoded in full size.
    odd = decode_scaled("a.jpg", jpeg(203, 161, exif=turned(orientation)), shrink)
    assert odd.factor == (4 if orientation == 1 else 1)
    assert odd.pixels.shape[1:] == tuple(-(-side // odd.factor) for side in odd.size)


def never(height: int, width: int) -> int:
    raise AssertionError("asked")


def test_only_large_jpegs_are_decoded_at_a_fraction() -> None:
    assert decode_scaled("a.jpg", jpeg(99, 80), never).factor == 1
    file = io.BytesIO()
    Image.new("RGB", (300, 300)).save(file, "PNG")
    assert decode_scaled("a.png", file.getvalue(), never).pixels.shape == (3, 300, 300)
    full = decode_scaled("a.jpg", jpeg(), lambda height, width: 1)
    assert torch.equal(full.pixels, decode_bytes("a.jpg", jpeg()))


@pytest.mark.parametrize("appended", [b"\0", b"\0" * 9_000, b"the camera's own"])
def test_a_jpeg_without_end_marker_is_decoded_in_full_size(appended: bytes) -> None:
    data = jpeg()
    assert torch.equal(decode_scaled("a.jpg", data + appended, never).pixels, decode_bytes("a.jpg", data))
    with pytest.raises(ImageError, match="truncated"):
        decode_scaled("a.jpg", data[: len(data) // 2] + appended, never)


def test_xmp_orientation_and_broken_exif_data_are_ignored() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    got = decode_scaled("a.jpg", jpeg(xmp=xmp), lambda height, width: 2)
    assert (got.size, got.factor) == (tuple(decode_bytes("a.jpg", jpeg(xmp=xmp)).shape[1:]), 2)
    broken = jpeg(exif=b"garbage")
    assert decode_scaled("a.jpg", broken, lambda height, width: 2).size == (160, 200)


@pytest.mark.parametrize("factor", [1, *FACTORS])
def test_a_shrunk_box_moves_by_at_most_half_a_pixel(factor: int) -> None:
    uniforms = np.stack([draw_crop(0, 0, [i], 0)[0] for i in range(100)])
    height, width = 16 * factor * 2 + 3, 16 * factor * 3 + 1
    for box in crop_boxes(uniforms, height, width, (0.3, 1.0), VIEW.crop_ratio):
        got = shrunk_box(box, factor)
        for edge in (0, 1):
            start, stop = got[edge], got[edge] + got[edge + 2]
            assert abs(start * factor - box[edge]) <= factor / 2
            assert abs(stop * factor - box[edge] - box[edge + 2]) <= factor / 2
            assert 0 <= start < stop <= -(-(height, width)[edge] // factor)
            assert stop - start >= box[edge + 2] // factor


def test_no_crop_is_enlarged_because_of_scaled_decoding() -> None:
    views = [VIEW, View(24, (0.3, 1.0))]
    chosen = set()
    for i in range(100):
        uniforms = [draw_crop(0, 0, [i], stream)[0] for stream in (0, 1)]
        factor = largest_shrink(views, uniforms, 160, 200)
        chosen.add(factor)
        room = []
        for view, each in zip(views, uniforms, strict=True):
            (box,) = crop_boxes(each[None], 160, 200, view.crop_scale, view.crop_ratio)
            room.append(min(box[2:]) / view.size)
            if factor > 1:
                assert min(shrunk_box(box, factor)[2:]) >= view.size
        assert factor == 8 or min(room) < 2 * factor  # the next larger factor would be too large
    assert chosen == {2, 4}
    assert largest_shrink(views, uniforms, 10, 10) == 1


@pytest.mark.parametrize("factor", FACTORS)
def test_crops_keep_their_position(factor: int) -> None:
    # Pixel values encode the position, so a shifted crop has other values.
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    full = torch.stack([y, x, (x + y) // 2]).to(torch.uint8)
    smaller = means(full, factor).round().to(torch.uint8)
    for i in range(50):
        uniforms = draw_crop(0, 0, [i], 0)[0]
        view = View(16, (0.3, 1.0))
        moved = crop_one(smaller, uniforms, view, (256, 256), factor).int() - crop_one(full, uniforms, view).int()
        assert moved.abs().max() <= factor / 2 + 1


def test_the_loader_decodes_large_images_at_a_fraction_and_returns_similar_views(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(exif=turned(1 + 5 * (i % 2))))
    source = load_source(DataConfig("folder", str(tmp_path))).train
    ((epoch, index, shown, cut, _),) = crops(source, Plan(6, 6, 1, 0), [VIEW, VIEW], torch.device("cpu"), workers=0)
    assert np.array_equal(index, shown)
    for stream, got in enumerate(cut):
        uniforms = draw_crop(0, epoch, index, stream)
        full = [crop_batch(source.image(int(i))[None], uniforms[row : row + 1], VIEW) for row, i in enumerate(index)]
        error = (got.int() - torch.cat(full)).abs().float()
        assert 0 < error.mean() < 3
        assert error.amax(dim=(1, 2, 3)).median() < 30


def test_crops_of_enlarged_photographs_are_within_a_few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Path(os.environ.get("MOCO_SHARED_DATA", ""), "photos_250.tar")
    if not archive.is_file():
        pytest.skip("MOCO_SHARED_DATA does not name a folder that holds photos_250.tar")
    monkeypatch.undo()  # the real threshold
    view = View(224, (0.2, 1.0))
    with tarfile.open(archive) as photos:
        files = [member for member in photos.getmembers() if member.isfile()][::60]
        for i, member in enumerate(files):
            stream = photos.extractfile(member)
            assert stream is not None
            with Image.open(stream) as image:
                factor = 2_000 / max(image.size)
                large = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)))
            data = io.BytesIO()
            large.save(data, "JPEG", quality=90)
            uniforms = draw_crop(0, 0, [i], 0)[0]
            got = decode_scaled(member.name, data.getvalue(), partial(largest_shrink, [view], [uniforms]))
            assert got.factor > 1
            ours = crop_one(got.pixels, uniforms, view, got.size, got.factor)
            full = crop_one(decode_bytes(member.name, data.getvalue()), uniforms, view)
            assert (ours.int() - full.int()).abs().float().mean() < 4
