"""`moco.pack` keeps every byte, resumes after a kill with the same result, and lists skipped images."""

import csv
import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moco.config import ConfigError, DataConfig, TrainConfig
from moco.config.pack import PackConfig, check_pack
from moco.data import pack as stage
from moco.data import shard_writer
from moco.data.decode import ImageError, decode, decode_bytes
from moco.data.shards import ShardSource
from moco.data.sources import load_source
from moco.data.workers import in_order
from moco.methods.moco_config import MoCoConfig
from moco.training.trainer import pretrain
from tests.data.packed import class_folders, packed
from tests.data.unreadable_files import encoded, noise, odd_files, unreadable_files


def everything(folder: Path) -> dict[str, bytes]:
    """Return all files except the lock, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def packed_split(root: Path, name: str = "train") -> ShardSource:
    source = getattr(load_source(DataConfig("shards", str(root))), name)
    assert isinstance(source, ShardSource)
    return source


def test_the_number_of_workers_changes_nothing_and_a_finished_folder_is_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = class_folders(tmp_path / "train", count=40)
    one = everything(packed(tmp_path / "one", root))
    printed = capsys.readouterr().out
    assert "40 train; unchanged" in printed
    assert f"data.root={tmp_path / 'one'}" in "".join(printed.replace("│", " ").split("\n")).replace(" ", "")
    assert everything(packed(tmp_path / "two", root, workers=2)) == one
    assert {"index.json", "skipped.csv", "train.npy", "train-000000.tar", "train-000001.tar"} <= set(one)
    assert not (tmp_path / "one" / "parts").exists()
    assert all(len(data) <= 12_000 + 10_240 for name, data in one.items() if name.endswith(".tar"))  # and zeros

    capsys.readouterr()
    packed(tmp_path / "one", root)
    assert "already packed" in capsys.readouterr().out
    assert everything(tmp_path / "one") == one


def test_a_name_with_a_carriage_return_is_one_field(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train")
    names = ["cat/a\rb.jpg", "cat/c\nd.jpg", 'cat/e",f.jpg']
    for name in names:
        (root / name).write_bytes(b"none")
    packed(tmp_path / "out", root, data_max_bad=0.5)
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("digits", 1297, "data.resident=true data=shards"),
        ("cifar10", 50_000, "experiment=moco_v2plus_cifar10 data.resident=true data=shards"),
        (
            "folder",
            1_000_000,
            "experiment=moco_v2_folder method.queue_size=4096 data.root=out run=runs/packed",
        ),
        ("folder", 30_000, "experiment=moco_v2_folder method.queue_size=4096 data=shards"),
        ("folder", 3000, "experiment=moco_v2_small epochs=13 method.queue_size=736 method.momentum=0.994"),
        ("huggingface", 250, "experiment=moco_v2_small epochs=160 method.queue_size=64 method.momentum=0.994"),
        ("folder", 20, "too few images start from published weights, data=shards data.root=out"),
    ],
)
def test_the_next_command_fits_the_images(
    name: str, count: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = stage._next(DataConfig(name), Path("out"), count)
    assert set(words.split()) <= set(line.split())
    assert ("experiment=" in line, "queue_size=" in line) == ("experiment=" in words, "queue_size=" in words)


def test_the_next_command_keeps_the_format_of_the_images() -> None:
    line = stage._next(DataConfig("folder", bits=12), Path("out"), 3000)
    assert {"data=shards", "data.root=out", "data.bits=12"} <= set(line.split())
    line = stage._next(DataConfig("folder", channels=4, dtype="uint16", preview=[2, 1, 0]), Path("out"), 3000)
    assert "data=shards data.root=out data.channels=4 data.dtype=uint16 'data.preview=[2,1,0]'," in line
    assert "augment.mean and augment.std" in line


def test_several_folders_are_packed_with_their_labels_and_weights_are_refused(tmp_path: Path) -> None:
    first = class_folders(tmp_path / "first", 6)
    second = class_folders(tmp_path / "second", 4, ("dog", "owl"), 10)
    more: dict[str, Any] = {"data_more_roots": [str(second)], "data_labels": "folder"}
    there = packed_split(packed(tmp_path / "out", first, **more))
    plain = load_source(DataConfig("folder", str(first), labels="folder", more_roots=[str(second)])).train
    assert [there.name(i) for i in range(10)] == [plain.name(i) for i in range(10)]
    assert (there.classes, there.labels is not None and there.labels.tolist()) == (
        ("cat", "dog", "owl"),
        plain.labels is not None and plain.labels.tolist(),
    )
    assert all(there.content(i) == plain.content(i) for i in range(10))
    data = DataConfig("folder", str(first), more_roots=[str(second)], weights=[1.0, 3.0])
    with pytest.raises(ConfigError, match=r"data\.weights=\[1\.0, 3\.0\] has no effect on shards.*: remove it"):
        check_pack(PackConfig(data, str(tmp_path / "out")))


def test_shards_that_are_larger_than_the_images_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tiny").mkdir()
    sizes = []
    for i in range(5):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "tiny" / f"{i}.png")
        sizes.append((tmp_path / "tiny" / f"{i}.png").stat().st_size)
    packed(tmp_path / "out", tmp_path / "tiny")
    expected = f"a tar adds 0.5 to 2 kB to each image, and these have {sum(sizes) / 5:,.0f} bytes on average"
    assert expected in capsys.readouterr().out
    (tmp_path / "large").mkdir()
    noise(height=100, width=100).save(tmp_path / "large" / "a.png")
    packed(tmp_path / "out_too", tmp_path / "large")
    assert "a tar adds" not in capsys.readouterr().out


def _pack_slowly(output: Path, root: Path) -> None:
    add = stage.Packer.add

    def slow(self: Any, i: int, image: shard_writer.PackedImage) -> None:
        time.sleep(0.02)
        add(self, i, image)

    stage.Packer.add = slow  # type: ignore[method-assign]
    packed(output, root)


def test_a_killed_command_resumes_and_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "train", count=60)
    (root / "cat" / "30bad.jpg").write_bytes(b"not an image")
    complete = everything(packed(tmp_path / "complete", root, data_max_bad=0.1))
    output = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=_pack_slowly, args=(output, root))
    process.start()
    until = time.monotonic() + 60
    while len(list((output / "parts").glob("train-*.npz"))) < 3 and time.monotonic() < until:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    parts = sorted((output / "parts").glob("train-*.npz"))
    assert 3 <= len(parts) < len([name for name in complete if name.endswith(".tar")])
    assert not (output / "index.json").exists()

    # A finished shard that is damaged is written again, and all shards after it; the previous one is kept.
    kept = (output / "train-000000.tar").stat().st_mtime_ns
    os.truncate(output / "train-000001.tar", 100)
    monkeypatch.setattr(stage, "in_order", calls := Noting(in_order))
    with pytest.raises(ConfigError, match=r"contains shards with shard_mb=0\.012 \(now 0\.02\): choose another output"):
        packed(output, root, shard_mb=0.02, data_max_bad=0.1)
    packed(output, root, data_max_bad=0.1)
    assert len(calls.starts) == 1
    assert 0 < calls.starts[0] < 20  # after the first shard
    assert (output / "train-000000.tar").stat().st_mtime_ns == kept
    assert everything(output) == complete


class Noting:
    """Call `in_order` and record the first row of each call."""

    def __init__(self, function: Any) -> None:
        self.function, self.starts = function, list[int]()

    def __call__(self, function: Any, rows: range, *rest: Any) -> Any:
        self.starts.append(rows.start)
        return self.function(function, rows, *rest)


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    for name, (data, _) in (unreadable_files() | odd_files()).items():
        (root / name).write_bytes(data)
    with pytest.raises(ImageError, match=r"1 of the 22 train images cannot be read, more than data\.max_bad=0\.01"):
        packed(tmp_path / "out", root)
    packed(tmp_path / "out", root, data_max_bad=0.5)  # this field may change when the command resumes
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        listed = {row["path"]: (row["split"], row["kind"]) for row in csv.DictReader(file)}
    assert listed == {name: ("train", kind) for name, (_, kind) in unreadable_files().items()}
    source = packed_split(tmp_path / "out")
    assert [source.name(i) for i in range(len(source))] == sorted(odd_files())
    for i in range(len(source)):
        assert source.content(i) == odd_files()[source.name(i)][0]


def test_large_images_are_scaled_and_small_ones_keep_their_bytes(tmp_path: Path) -> None:
    root = tmp_path / "sizes"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: 60 x 90 when upright
    smooth = Image.linear_gradient("L").convert("RGB")
    for name, data in {
        "a.png": encoded(smooth.resize((200, 100)), "PNG"),
        "b.jpg": encoded(smooth.resize((90, 60)), "JPEG", exif=exif),
        "c.jpg": encoded(smooth.resize((32, 300)), "JPEG"),
        "d.png": encoded(noise(height=20, width=50), "PNG"),
    }.items():
        (root / name).write_bytes(data)
    source = packed_split(packed(tmp_path / "out", root, short_side=32))
    assert [tuple(source.image(i).shape[1:]) for i in range(4)] == [(32, 64), (48, 32), (300, 32), (20, 50)]
    for i, name in ((2, "c.jpg"), (3, "d.png")):  # not larger than short_side
        assert source.content(i) == (root / name).read_bytes()
    with Image.open(io.BytesIO(source.content(0))) as image:
        assert image.format == "JPEG"
    # Antialiased and nearly lossless: close to the mean of the pixels that each small pixel covers.
    small, large = source.image(0).float(), decode(root / "a.png").float()
    mean = torch.nn.functional.interpolate(large[None], (32, 64), mode="area")[0]
    assert (small - mean).abs().mean() < 2
    first = len(source.content(0))
    assert len(packed_split(packed(tmp_path / "fine", root, short_side=32, quality=95)).content(0)) > first


def test_an_image_too_long_for_a_jpeg_becomes_a_png(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (140_000, 10), "red").save(tmp_path / "images/long.png")
    source = load_source(DataConfig("folder", str(tmp_path / "images"))).train
    image = shard_writer.encode_image(source, 0, short_side=5, quality=90)
    assert (image.ending, image.fault) == ("png", "")
    assert decode_bytes("long.png", image.content).shape == (3, 5, 70_000)


def test_a_data_set_in_memory_keeps_its_pixels_and_splits(tmp_path: Path) -> None:
    packed(tmp_path / "out", Path("data"), data_name="digits", shard_mb=1)
    digits = load_source(DataConfig("digits"))
    for name in ("train", "held_out"):
        one, other = getattr(digits, name), packed_split(tmp_path / "out", name)
        assert len(one) == len(other)
        assert one.classes == other.classes
        assert one.labels.tolist() == (other.labels.tolist() if other.labels is not None else None)
        assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
        assert all(torch.equal(one.image(i), other.image(i)) for i in range(0, len(one), 50))
    # Shards can be resident.
    resident = load_source(DataConfig("shards", str(tmp_path / "out"), resident=True))
    assert resident.train.images is not None
    assert digits.train.images is not None
    assert torch.equal(resident.train.images, digits.train.images)


def test_other_folders_and_changed_images_are_refused(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"contains no shards, but thesis\.txt"):
        packed(other, root)
    packed(tmp_path / "out", root)
    (root / "cat" / "00.jpg").write_bytes(encoded(noise(77), "JPEG"))
    with pytest.raises(
        ConfigError,
        match=r"other images, or image files whose size or modification time differs \(12 train; now 12 train\)",
    ):
        packed(tmp_path / "out", root)
    with pytest.raises(ConfigError, match=r"data\.labels=none \(now folder\) and data\.name=|data\.labels=none"):
        packed(tmp_path / "out", root, data_labels="folder")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "train")

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "_member", full)
        with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
            packed(tmp_path / "out", root)
    assert not list((tmp_path / "out").glob("*.tmp"))
    packed(tmp_path / "out", root)
    assert len(packed_split(tmp_path / "out")) == 12


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("output", " ", "must not be empty"),
        ("quality", 96, "quality=96 must be at least 1 and at most 95"),
        ("short_side", -1, "short_side=-1 must be at least 0"),
        ("shard_mb", 0.0, "shard_mb=0.0 must be above 0"),
        ("workers", 999, "workers=999 must be at least 0 and at most 256"),
    ],
)
def test_invalid_values_are_named(field: str, value: object, words: str) -> None:
    config = PackConfig(output="out")
    setattr(config, field, value)
    with pytest.raises(ConfigError) as caught:
        check_pack(config)
    assert words in str(caught.value)


def test_a_stream_is_not_packed_again() -> None:
    config = PackConfig(output="out")
    config.data.name = "webdataset"
    with pytest.raises(ConfigError, match=r"data\.name=webdataset is in shards already"):
        check_pack(config)


def test_a_run_trains_on_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = class_folders(tmp_path / "train", count=20)
    test = class_folders(tmp_path / "test", count=6, first=50)
    output = packed(tmp_path / "out", root, data_labels="folder", data_eval_root=str(test))
    assert "20 train, 6 held_out" in capsys.readouterr().out
    assert json.loads((output / "index.json").read_text())["classes"] == ["cat", "dog"]
    config = TrainConfig(method=MoCoConfig(queue_size=8), run=str(tmp_path / "run"), epochs=1, batch_size=8)
    config.device, config.threads = "cpu", 1
    config.augment.size, config.augment.eval_resize = 16, 16
    config.model.backbone, config.model.options, config.model.dim = "convnet", {"width": 2}, 8
    config.model.bn_group_size = 4
    config.data = DataConfig("shards", str(output), workers=0)
    pretrain(config)
    printed = capsys.readouterr().out
    assert "on shards (20 images)" in printed
    assert "held-out kNN" in printed
