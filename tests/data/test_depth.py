"""Images of 10, 12 or 14 bits in files of 16: one scale for a data set, the same in every command."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from moco.config import DataConfig, RunWarning
from moco.config.check_data import CheckDataConfig
from moco.config.pack import PackConfig
from moco.data.check import check_data
from moco.data.decode import ImageError, decode, decode_bytes
from moco.data.depth import DEPTHS
from moco.data.pack import pack
from moco.data.pixel_format import PixelFormat
from moco.data.sources import load_source
from tests.data.test_decode import encoded, png
from tests.data.unreadable_files import tiff

H, W = 12, 17


def ramp(top: int) -> NDArray[np.uint16]:
    return np.linspace(0, top, H * W).astype(np.uint16).reshape(H, W)


def gray_png(values: NDArray[np.uint16]) -> bytes:
    return encoded(Image.fromarray(values), "PNG")


def color_png(values: NDArray[np.uint16], alpha: int | None = None) -> bytes:
    """Return values (H, W) in three channels, and with `alpha` a fourth one."""
    channels = [values] * 3 + ([] if alpha is None else [np.full_like(values, alpha)])
    rows = np.stack(channels, axis=-1).astype(">u2")
    return png(W, H, 16, 2 if alpha is None else 6, b"".join(b"\0" + row.tobytes() for row in rows))


def write(root: Path, tops: list[int]) -> Path:
    root.mkdir(parents=True)
    for i, top in enumerate(tops):
        (root / f"{i:02}.png").write_bytes(gray_png(ramp(top)))
    return root


def test_twelve_bits_keep_their_levels_and_the_differences_between_images(tmp_path: Path) -> None:
    root = write(tmp_path / "images", [4000, 900, 2500])
    with pytest.warns(RunWarning, match=r"data\.root=.* up to 4,000.*data\.bits=12"):
        train = load_source(DataConfig("folder", str(root))).train
    assert train.pixel_format.bits == 12
    for i, top in enumerate([4000, 900, 2500]):
        assert (train.image(i)[0].numpy() == ramp(top) >> 4).all()
    assert len(train.image(0).unique()) > 150  # the upper byte alone has 16
    assert train.image(1).max() == 56  # dark images stay dark


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_field_decides_and_an_image_beyond_it_is_an_error(bits: int, tmp_path: Path) -> None:
    root = write(tmp_path / "images", [255])
    train = load_source(DataConfig("folder", str(root), bits=bits)).train
    assert (train.image(0)[0].numpy() == ramp(255) >> (bits - 8)).all()
    if bits < 16:
        beyond = gray_png(ramp(2**bits))
        with pytest.raises(ImageError, match=rf"0 \.\.\. {2**bits - 1} is supported.*data\.bits=16"):
            decode_bytes("x.png", beyond, PixelFormat(bits=bits))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 65535), st.sampled_from(["gray", "color", "alpha", "tiff", "tiff big", "tiff 32"]))
def test_every_file_of_a_depth_has_the_upper_bits(top: int, kind: str) -> None:
    bits = next(depth for depth in DEPTHS if top < 2**depth)
    values = ramp(top)
    data = {
        "gray": lambda: gray_png(values),
        "color": lambda: color_png(values),
        "alpha": lambda: color_png(values, alpha=65535),
        "tiff": lambda: encoded(Image.fromarray(values), "TIFF"),
        "tiff big": lambda: encoded(Image.fromarray(values.astype(">u2")), "TIFF"),
        "tiff 32": lambda: encoded(Image.fromarray(values.astype(np.int32)), "TIFF"),
    }[kind]()
    image = decode_bytes("x", data, PixelFormat(bits=bits))
    assert image.dtype == torch.uint8
    assert (image.numpy() == (values >> (bits - 8))[None]).all()


@pytest.mark.parametrize("data", [color_png(ramp(4095)), encoded(Image.fromarray(ramp(4095)), "TIFF")])
def test_color_and_tiffs_are_found_too(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(data)
    with pytest.warns(RunWarning, match=r"data\.bits=12"):
        assert load_source(DataConfig("folder", str(tmp_path))).train.image(0).max() == 255


def test_other_images_do_not_change(tmp_path: Path) -> None:
    Image.fromarray((ramp(255)).astype(np.uint8)).save(tmp_path / "8.png")
    (tmp_path / "16.png").write_bytes(gray_png(ramp(40_000)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = load_source(DataConfig("folder", str(tmp_path))).train
    assert train.pixel_format.bits == 16
    assert [train.image(i).max().item() for i in range(2)] == [40_000 >> 8, 255]


def test_a_tiff_of_twelve_bits_per_sample_has_its_own_scale(tmp_path: Path) -> None:
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x07, 0xFF])  # 4095, 0, 2048, 2047
    (tmp_path / "12.tif").write_bytes(tiff(2, 2, 1, bits=12, content=packed))
    assert decode(tmp_path / "12.tif")[0].tolist() == [[255, 0], [128, 127]]


def test_deep_color_in_a_tiff_is_refused(tmp_path: Path) -> None:
    content = np.arange(9 * 9 * 3, dtype="<u2").tobytes()
    (tmp_path / "color.tif").write_bytes(tiff(9, 9, 3, bits=16, content=content))
    with pytest.warns(RunWarning, match=r"data\.bits=8"):
        train = load_source(DataConfig("folder", str(tmp_path))).train
    with pytest.raises(ImageError, match=r"TIFF with 16 bits per color.*data\.bits=8"):
        train.image(0)
    assert load_source(DataConfig("folder", str(tmp_path), bits=16)).train.image(0).max() == 0


def test_check_and_pack_agree_with_training(tmp_path: Path) -> None:
    root = write(tmp_path / "images", [4000, 900, 2500, 3000])
    config = DataConfig("folder", str(root), workers=0)
    with pytest.warns(RunWarning, match=r"data\.bits=12"):
        expected = load_source(config).train
    report = tmp_path / "report.json"
    with pytest.warns(RunWarning, match=r"data\.bits=12"):
        check_data(CheckDataConfig(config, str(report)))
    assert '"bits": 12' in report.read_text()
    for short_side in (0, 6):
        output = tmp_path / f"packed_{short_side}"
        with pytest.warns(RunWarning, match=r"data\.bits=12"):
            pack(PackConfig(config, str(output), short_side=short_side))
    with pytest.warns(RunWarning, match=r"data\.bits=12"):
        packed = load_source(DataConfig("shards", str(tmp_path / "packed_0"))).train
    assert all(torch.equal(packed.image(i), expected.image(i)) for i in range(4))
    small = load_source(DataConfig("shards", str(tmp_path / "packed_6"))).train
    assert [int(small.image(i).max()) > 40 for i in range(4)] == [True] * 4  # the upper bytes are below 16


def test_the_content_digest_depends_on_the_scale(tmp_path: Path) -> None:
    root = write(tmp_path / "images", [200])
    digests = {load_source(DataConfig("folder", str(root), bits=bits)).train.content_digest() for bits in (8, 12, 16)}
    assert len(digests) == 3
