"""Images of any channels and depth, from the file to the device: no value changes on the way."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from moco.api import pretrain
from moco.config import ConfigError, DataConfig
from moco.config.check_data import CheckDataConfig
from moco.config.pack import PackConfig
from moco.data import bands
from moco.data.bands import encode_bands
from moco.data.check import check_data
from moco.data.decode import ImageError, decode, decode_bytes
from moco.data.duplicates import content_groups
from moco.data.folder import FolderSource
from moco.data.image_facts import image_facts
from moco.data.loader import crops
from moco.data.pack import pack
from moco.data.pixel_format import PixelFormat, preview, to_float
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.data.view import View
from scripts.scenes import write_scenes
from tests.data.test_decode import png

H, W = 5, 7
CPU = torch.device("cpu")


def values(channels: int, dtype: str) -> NDArray[Any]:
    """Return random values over the whole range of a type, (H, W, channels)."""
    rng = np.random.default_rng(channels)
    if dtype == "float32":
        return rng.normal(0, 1e4, (H, W, channels)).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max, (H, W, channels), dtype=dtype, endpoint=True)


def npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] # numpy's stub
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13, 200])
def test_arrays_keep_every_bit(channels: int, dtype: str) -> None:
    array, form = values(channels, dtype), PixelFormat(channels, dtype)
    expected = array.transpose(2, 0, 1)
    fortran = np.asfortranarray(array)
    swapped = array.astype(array.dtype.newbyteorder(">"))
    for content in (npy(array), npy(expected), npy(fortran), npy(swapped), npz(a=array), npz(image=array, mask=array)):
        image = decode_bytes("x", content, form)
        assert image.dtype == getattr(torch, dtype)
        assert np.array_equal(image.numpy(), expected)
    assert torch.equal(decode_bytes("x", encode_bands(image), form), image)


def test_gray_of_16_bits_in_png_and_tiff_keeps_every_bit() -> None:
    gray = values(1, "uint16")[..., 0]
    for kind in ("PNG", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(gray).save(buffer, kind)
        assert np.array_equal(decode_bytes("x", buffer.getvalue(), PixelFormat(1, "uint16"))[0].numpy(), gray)
    color = values(3, "uint16")
    content = png(W, H, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in color))
    assert np.array_equal(decode_bytes("x", content, PixelFormat(3, "uint16")).numpy(), color.transpose(2, 0, 1))
    buffer = io.BytesIO()
    Image.fromarray(gray.astype(np.float32)).save(buffer, "TIFF")
    assert np.array_equal(decode_bytes("x", buffer.getvalue(), PixelFormat(1, "float32"))[0].numpy(), gray)


def test_gray_of_8_bits_is_the_luma_of_color() -> None:
    color, form = values(3, "uint8"), PixelFormat(1)
    buffer = io.BytesIO()
    Image.fromarray(color).save(buffer, "PNG")
    assert np.array_equal(
        decode_bytes("x", buffer.getvalue(), form)[0].numpy(), np.asarray(Image.fromarray(color).convert("L"))
    )
    buffer = io.BytesIO()
    Image.fromarray(color[..., 0]).save(buffer, "PNG")
    assert np.array_equal(decode_bytes("x", buffer.getvalue(), form)[0].numpy(), color[..., 0])
    buffer = io.BytesIO()
    four = values(4, "uint8")
    Image.fromarray(four).save(buffer, "PNG")  # RGBA: the fourth band is no opacity here
    assert np.array_equal(decode_bytes("x", buffer.getvalue(), PixelFormat(4)).numpy(), four.transpose(2, 0, 1))


@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint16"), (13, "uint16"), (3, "uint16"), (5, "float32")])
def test_tiffs_with_bands_keep_every_bit(channels: int, dtype: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = values(channels, dtype)
    for planes, options in ((array, {"planarconfig": "contig"}), (array.transpose(2, 0, 1), {})):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, planes, photometric="minisblack", **options)
        found = decode_bytes("x.tif", buffer.getvalue(), PixelFormat(channels, dtype))
        assert np.array_equal(found.numpy(), array.transpose(2, 0, 1))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("channels", "dtype", "photometric", "reads_rgb"),
    [
        *((channels, dtype, "minisblack", False) for channels in (2, 3, 4) for dtype in ("uint8", "uint16", "float32")),
        *((channels, "uint8", "rgb", True) for channels in (3, 4)),
        (3, "uint16", "rgb", None),  # PIL reads the compressed one only
    ],
)
def test_tiffs_stored_band_by_band_are_read_or_name_their_fields(
    channels: int, dtype: str, photometric: str, reads_rgb: bool | None, compression: str | None
) -> None:
    tifffile = pytest.importorskip("tifffile")
    planes = values(channels, dtype).transpose(2, 0, 1)
    buffer = io.BytesIO()
    options = {"photometric": photometric, "planarconfig": "separate", "compression": compression}
    tifffile.imwrite(buffer, planes, **options)
    if (channels, dtype) != (3, "uint8"):
        kept = decode_bytes("x.tif", buffer.getvalue(), PixelFormat(channels, dtype)).numpy()
        assert np.array_equal(kept, planes)
    if reads_rgb or (reads_rgb is None and compression):
        color = decode_bytes("x.tif", buffer.getvalue()).numpy()
        assert channels == 4 or np.array_equal(color, planes >> (8 * (dtype == "uint16")))
        return
    with pytest.raises(ImageError) as caught:
        decode_bytes("x.tif", buffer.getvalue())
    assert caught.value.kind == "unsupported"
    assert f"{channels} bands of {np.dtype(dtype).itemsize * 8} bits, stored band by band" in caught.value.reason
    named = f"data.channels={channels} data.dtype={dtype}" in caught.value.reason
    assert named == ((channels, dtype) != (3, "uint8"))  # which would change nothing
    with pytest.raises(ImageError, match=r"data\.channels=1"):  # the first band alone is not read as gray
        decode_bytes("x.tif", buffer.getvalue(), PixelFormat(1, "float32"))


def test_a_tiff_with_bands_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: str) -> None:
        raise ConfigError(" needs ".join(arguments))

    monkeypatch.setattr(bands, "optional_module", missing)
    buffer = io.BytesIO()
    Image.fromarray(values(3, "uint8")).save(buffer, "TIFF")
    with pytest.raises(ImageError, match="tifffile needs a TIFF with several bands") as caught:
        decode_bytes("x.tif", buffer.getvalue(), PixelFormat(4, "uint16"))
    assert caught.value.kind == "unsupported"


LARGE = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<u2', 'fortran_order': False, 'shape': (90000, 90000, 4), }".ljust(117)


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        (npy(values(4, "uint8")), "unsupported", "pixels are uint8, not data.dtype=uint16: set data.dtype=uint8"),
        (npy(values(4, "float32")), "unsupported", "set data.dtype=float32"),
        (npy(values(4, "uint16").astype(np.int16)), "unsupported", "int16, not .*: set data.dtype=float32"),
        (npy(values(3, "uint16")), "unsupported", "5 x 7 x 3 needs a first or last axis of length data.channels=4"),
        (npy(values(1, "uint16")[..., 0]), "unsupported", "5 x 7 needs a first or last axis"),
        (npy(np.zeros((0, 4, 4), np.uint16)), "unsupported", "no pixels"),
        (npy(np.array(["a"])), "unsupported", "first or last axis"),
        (npz(a=values(4, "uint16"), b=values(4, "uint16")), "unsupported", "2 arrays .a, b.: name one of them 'image'"),
        (npy(values(4, "uint16"))[:-1], "truncated", "truncated"),
        (LARGE + b"\n", "truncated", "90000"),
        (b"PK\x03\x04 nothing else", "damaged", "zip"),
        (b"neither", "no image", "NPY"),
    ],
)
def test_every_unfit_file_is_reported_in_one_sentence(content: bytes, kind: str, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence) as caught:
        decode_bytes("x.npy", content, PixelFormat(4, "uint16"))
    assert caught.value.kind == kind


def test_objects_and_bombs_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="Python objects"):
        decode_bytes("x.npy", buffer.getvalue(), PixelFormat(4, "uint16"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        for _ in range(bands.MAX_BYTES // 2**20 + 1):
            file.write(bytes(2**20))
    with pytest.raises(ImageError, match="at most 536,870,910 are read"):
        decode_bytes("x.npz", buffer.getvalue(), PixelFormat(4, "uint16"))
    with pytest.raises(ImageError, match="not finite"):
        decode_bytes("x.npy", npy(np.full((H, W, 4), np.nan, np.float32)), PixelFormat(4, "float32"))


def test_the_limit_counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "MAX_BYTES", H * W)
    for dtype, form in ((np.uint8, PixelFormat(1, "float32")), (np.uint16, PixelFormat(1, "uint16"))):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((H, W), dtype)).save(buffer, "PNG")
        if dtype == np.uint8:
            assert decode_bytes("x.png", buffer.getvalue(), form).shape == (1, H, W)
        else:
            with pytest.raises(ImageError, match="declares 70 bytes, and at most 35 are read"):
                decode_bytes("x.png", buffer.getvalue(), form)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["npy", "npz", "tiff"]))
def test_damaged_content_is_an_image_error(tail: bytes, kind: str) -> None:
    whole = {"npy": npy(values(4, "uint16")), "npz": npz(a=values(4, "uint16")), "tiff": b"II*\0"}[kind]
    for content in (whole[: len(whole) // 2] + tail, whole[:8] + tail):
        with pytest.raises(ImageError):
            decode_bytes("x", content, PixelFormat(4, "uint16"))


def test_arrays_count_as_images_only_where_they_are_asked_for(tmp_path: Path) -> None:
    root = write_scenes(tmp_path, 4, {"train": 1})
    assert len(load_source(DataConfig("folder", str(root), channels=4, dtype="uint16")).train) == 4
    with pytest.raises(FileNotFoundError, match=r"4 \.npy.*are used unless data.channels=3 and data.dtype=uint8"):
        load_source(DataConfig("folder", str(root)))
    with pytest.raises(ValueError, match=r"do not fit data\.name=digits"):
        load_source(DataConfig("digits", channels=4))
    with pytest.raises(ConfigError, match=r"data\.preview=\[4\] must be one or three channels in 0 \.\.\. 3"):
        load_source(DataConfig("folder", str(root), channels=4, dtype="uint16", preview=[4]))
    with pytest.raises(ConfigError, match=r"data\.bits=12 converts images to 8 bits"):
        load_source(DataConfig("folder", str(root), channels=4, dtype="uint16", bits=12))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_every_bit_reaches_the_device(channels: int, resident: bool, tmp_path: Path) -> None:
    root = write_scenes(tmp_path, channels, {"train": 2})
    config = DataConfig("folder", str(root), channels=channels, dtype="uint16", resident=resident)
    train = load_source(config).train
    whole = View(16, crop_ratio=(1.0, 1.0), mean=(0.0,) * channels, std=(1.0,) * channels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _, index, _, (images,), _ in crops(train, Plan(len(train), 4, 1, seed=0), [whole], device, workers=0):
        for i, image in zip(index.tolist(), images.cpu(), strict=True):
            stored = np.load(tmp_path / train.name(i))  # (H, W, C)
            assert image.dtype == torch.uint16
            assert np.array_equal(image.numpy(), stored.transpose(2, 0, 1))
    assert torch.equal(to_float(image) * 65535, image.to(torch.float32))


def test_packed_scenes_are_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_scenes(tmp_path / "scenes", 13, {"train": 2})
    config = DataConfig("folder", str(root), channels=13, dtype="uint16", workers=0)
    expected = load_source(config).train
    for short_side in (0, 12):
        output = str(tmp_path / f"packed_{short_side}")
        pack(PackConfig(config, output, short_side=short_side))
        assert f"moco.check_data data.root={root} data.channels=13" in " ".join(capsys.readouterr().out.split())
        packed = load_source(DataConfig("shards", output, channels=13, dtype="uint16")).train
        for i in range(len(expected)):
            if short_side == 0:
                assert torch.equal(packed.image(i), expected.image(i))
            else:
                mean = expected.image(i).double().mean(dim=(1, 2))
                assert packed.image(i).shape == (13, 12, 12)
                assert torch.allclose(packed.image(i).double().mean(dim=(1, 2)), mean, rtol=0.01)


@pytest.mark.parametrize("form", ["array", "tiff"])
def test_hugging_face_columns_of_arrays_and_of_tiffs(form: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows: list[Any]
    stored = [values(2, "uint16").astype(np.uint16) + i for i in (0, 1, 0)]  # the last is a copy
    if form == "array":
        kind = datasets.Array3D((H, W, 2), "uint16")
        channels, rows, expected = 2, stored, [each.transpose(2, 0, 1) for each in stored]
    else:
        kind, channels, rows = datasets.Image(), 1, []
        for each in stored:
            buffer = io.BytesIO()
            Image.fromarray(each[..., 0]).save(buffer, "TIFF")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        expected = [each[None, ..., 0] for each in stored]
    features = datasets.Features({"image": kind, "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0]}, features).save_to_disk(str(tmp_path))
    train = load_source(DataConfig("huggingface", str(tmp_path), channels=channels, dtype="uint16")).train
    assert len(set(train.content_fingerprints().tolist())) == 1
    assert content_groups(train).tolist() == [0, 1, 0]
    for i in range(3):
        assert np.array_equal(train.image(i).numpy(), expected[i])


def test_stats_are_those_of_all_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_scenes(tmp_path / "scenes", 4, {"train": 8, "test": 2})
    config = DataConfig(
        *("folder", str(root / "train")), labels="folder", eval_root=str(root / "test"), channels=4, dtype="uint16"
    )
    config.workers = 0
    report = tmp_path / "report.json"
    check_data(CheckDataConfig(config, str(report), stats=True))
    pixels = np.stack([np.load(path) for path in sorted((root / "train").rglob("*.npy"))]).reshape(-1, 4) / 65535
    stats = json.loads(report.read_text())["stats"]
    assert np.allclose(stats["mean"], pixels.mean(axis=0), rtol=1e-5)
    assert np.allclose(stats["std"], pixels.std(axis=0), rtol=1e-5)
    printed = "".join(capsys.readouterr().out.split())
    assert "experiment=moco_v2_multispectral" in printed
    assert f"augment.std=[{','.join(map(str, stats['std']))}]" in printed
    check_data(CheckDataConfig(config, str(report)))
    assert "add stats=true" in " ".join(capsys.readouterr().out.split())


def test_the_format_of_tiffs_states_their_bands(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    for channels, dtype in ((4, "uint16"), (5, "uint8"), (1, "float32"), (3, "uint16")):
        file = tmp_path / f"{channels}.tif"
        tifffile.imwrite(file, np.ones((9, 9, channels)[: 2 + (channels > 1)], dtype), photometric="minisblack")
        assert image_facts(str(file), PixelFormat(channels, dtype)).format == f"TIFF {PixelFormat(channels, dtype)}"


def test_previews_show_the_chosen_bands() -> None:
    image = torch.from_numpy(values(4, "uint16").transpose(2, 0, 1).copy())
    shown = preview(image, (3, 0, 1))
    assert shown.shape == (3, H, W)
    assert shown.dtype == torch.uint8
    for channel, band in enumerate((3, 0, 1)):
        order = image[band].flatten().to(torch.int32).argsort()
        assert (shown[channel].flatten()[order].int().diff() >= 0).all()  # brighter pixels stay brighter
    assert torch.equal(preview(image, (2,))[0], preview(image, (2,))[2])
    rgb = torch.randint(256, (3, H, W), dtype=torch.uint8)
    assert preview(rgb) is rgb
    assert torch.equal(preview(rgb, (2, 1, 0)), rgb.flip(0))
    flat = torch.full((2, H, W), 7, dtype=torch.uint16)
    assert (preview(flat) == 128).all()


def test_the_digest_of_a_data_set_depends_on_the_format(tmp_path: Path) -> None:
    root = write_scenes(tmp_path, 4, {"train": 1})
    train = load_source(DataConfig("folder", str(root), channels=4, dtype="uint16")).train
    assert isinstance(train, FolderSource)
    other = load_source(DataConfig("folder", str(root), channels=4, dtype="float32")).train
    assert train.content_digest() != other.content_digest()
    assert decode(train.path(0), PixelFormat(4, "float32")).max() > 255  # the values stay


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, pytest.param(13, marks=pytest.mark.long)])
def test_pretraining_separates_scenes_better_than_random_weights(channels: int, tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", channels, {"train": 60, "test": 20})
    pixels = np.stack([np.load(path) for path in (root / "train").rglob("*.npy")]).reshape(-1, channels) / 65535
    data = [f"data.root={root}/train", "data.labels=folder", f"data.eval_root={root}/test", "data.resident=true"]
    normalization = [f"augment.mean={pixels.mean(axis=0).tolist()}", f"augment.std={pixels.std(axis=0).tolist()}"]
    views = ["augment.size=16", "augment.jitter_p=1", "augment.brightness=0.8", "augment.contrast=0"]
    views += ["augment.channel_dropout_p=0", "augment.noise=[0,0]"]  # the ratios of the bands are the classes
    network = ["model.backbone=convnet", "+model.options.width=16", "method.momentum=0.99"]
    recipe = ["experiment=moco_v2_multispectral", f"data.channels={channels}", f"run={tmp_path}/run", "epochs=80"]
    run = pretrain([*recipe, *data, *normalization, *views, *network])
    (last,) = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "accuracy/knn" in line][-1:]
    accuracy = json.loads(last)
    assert accuracy["accuracy/untrained"] < 80
    assert accuracy["accuracy/knn"] > accuracy["accuracy/untrained"] + 15
