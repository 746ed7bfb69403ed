"""A stream of shards: every image once per pass, reproducible, and no shell command without permission."""

import io
import itertools
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moco.config import DataConfig, RunWarning
from moco.data.augment import augment, crop_one
from moco.data.bands import encode_bands
from moco.data.decode import ImageError, decode_bytes
from moco.data.loader import Batch, batches
from moco.data.plan import Plan
from moco.data.remote import RemoteSource, StreamError, endless, open_remote, samples_of
from moco.data.sources import load_source
from moco.data.view import View, draw, draw_crop
from tests.data.unreadable_files import encoded, noise

pytest.importorskip("webdataset", reason="data=webdataset needs the extra `webdataset`")
CPU = torch.device("cpu")
VIEWS = [View(size=8, crop_scale=(0.2, 1.0), flip_p=0.5)] * 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of three images, as other tools write them: with labels, and folders in the names."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(4):
        members: dict[str, bytes] = {}
        for i in range(3 * number, 3 * number + 3):
            members |= {f"some/{i}.cls": b"1", f"some/{i}.jpg": encoded(noise(i, height=20 + i), "JPEG")}
        tar(root / f"train-{number:06}.tar", members)
    return root


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def opened(root: str, length: int, buffer: int = 1) -> RemoteSource:
    stream = open_remote(DataConfig("webdataset", root, length=length, shuffle_buffer=buffer)).train
    assert isinstance(stream, RemoteSource)
    return stream


def source(shards: Path, length: int = 12, buffer: int = 4) -> RemoteSource:
    return opened(f"{shards}/train-{{000000..000003}}.tar", length, buffer)


def drawn(stream: RemoteSource, plan: Plan, workers: int = 0, start: int = 0) -> list[Batch]:
    return list(batches(stream, plan, VIEWS, CPU, workers, start))


def test_each_image_of_a_pass_belongs_to_one_worker(shards: Path) -> None:
    addresses = source(shards).addresses
    everything = [sample.name for address in addresses for sample in samples_of(address)]
    assert len(set(everything)) == 12
    read: list[str] = []
    for slot in range(2):  # two of the four shards in each pass
        read += [sample.name for sample in itertools.islice(endless(addresses, 7, 0, slot, 2), 6)]
    assert sorted(read) == sorted(everything)
    orders = [[s.name for s in itertools.islice(endless(addresses, seed, 0, 0, 1), 24)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order[:12]) == sorted(order[12:]) == sorted(everything)  # each pass contains every image once


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_reproducible_and_views_depend_on_the_position(shards: Path, workers: int) -> None:
    plan = Plan(12, 4, 2, seed=5)
    one, two = drawn(source(shards), plan, workers), drawn(source(shards), plan, workers)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.index, b.index)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    seen = torch.cat([batch.index for batch in one])
    assert len(set(seen.tolist())) == 12  # identities: an image has the same one in every pass
    assert int(seen.min()) >= 0
    # The views equal those of the same images with the positions as keys.
    known = {s.identity: s for a in source(shards).addresses for s in samples_of(a)}
    batch, numbers = one[4], np.arange(4, 8)  # step 4 is the second of epoch 1
    for stream, view in enumerate(VIEWS):
        params, uniforms = draw(view, 5, 1, numbers, stream), draw_crop(5, 1, numbers, stream)
        images = [decode_bytes(known[int(i)].name, known[int(i)].content) for i in batch.index]
        crops = torch.stack([crop_one(image, uniforms[row], view) for row, image in enumerate(images)])
        assert torch.equal(batch.views[stream], augment(crops, params, view))


def test_ranks_read_separate_shards(shards: Path) -> None:
    seen = []
    for rank in range(2):
        plan = Plan(12, 4, 1, seed=5, rank=rank, processes=2)
        first = drawn(source(shards, buffer=1), plan)[:2]
        seen.append({int(i) for batch in first for i in batch.index})
    assert not seen[0] & seen[1]
    with pytest.raises(ValueError, match=r"data\.root names 4 shards for 5 processes"):
        drawn(source(shards), Plan(12, 10, 1, seed=5, rank=0, processes=5))


def test_two_ranks_of_two_workers_use_each_image_once_per_epoch(tmp_path: Path) -> None:
    for number in range(8):  # two per worker, and two batches of four
        tar(tmp_path / f"{number}.tar", {f"{number}.{i}.jpg": encoded(noise(4 * number + i), "JPEG") for i in range(4)})
    stream = opened(f"{tmp_path}/{{0..7}}.tar", 32)
    plans = [Plan(32, 8, 1, seed=5, rank=rank, processes=2) for rank in range(2)]
    seen = [int(i) for plan in plans for batch in drawn(stream, plan, 2) for i in batch.index]
    assert len(seen) == len(set(seen)) == 32


def test_a_resumed_run_warns_and_starts_another_pass(shards: Path) -> None:
    plan = Plan(12, 4, 4, seed=5)
    full = drawn(source(shards), plan)
    with pytest.warns(RunWarning, match="cannot resume in the middle: .* at step 6"):
        rest = drawn(source(shards), plan, start=6)
    assert len(rest) == 6
    assert [b.index.tolist() for b in rest] != [b.index.tolist() for b in full[6:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunWarning)
        drawn(source(shards), plan)


def test_scenes_of_4_bands_are_streamed_from_npy_files(tmp_path: Path) -> None:
    scenes = np.random.default_rng(0).integers(0, 65535, (6, 8, 8, 4), np.uint16)
    tar(tmp_path / "a.tar", {f"{i}.npy": encode_bands(torch.from_numpy(scenes[i])) for i in range(6)})
    config = DataConfig("webdataset", str(tmp_path / "a.tar"), length=6, channels=4, dtype="uint16", shuffle_buffer=1)
    view = View(8, crop_ratio=(1.0, 1.0), mean=(0.0,) * 4, std=(1.0,) * 4)
    (batch,) = batches(load_source(config).train, Plan(6, 6, 1, seed=0), [view], CPU, 0)
    found = (batch.views[0].double() * 65535).round().numpy()  # (6, 4, 8, 8)
    assert np.array_equal(found, scenes.transpose(0, 3, 1, 2))
    with pytest.raises(StreamError, match=r"no image in .*\.jpg"):
        next(batches(load_source(replace(config, channels=3, dtype="uint8")).train, Plan(6, 6, 1, 0), VIEWS, CPU, 0))


def test_an_unreadable_image(tmp_path: Path) -> None:
    members = {"0.png": encoded(noise(), "PNG"), "1.jpg": b"nothing", "2.png": encoded(noise(2), "PNG")}
    tar(tmp_path / "a.tar", members)
    stream = opened(str(tmp_path / "a.tar"), 2)
    plan = Plan(2, 2, 2, seed=0)
    with pytest.raises(ImageError, match=r"cannot read image 1\.jpg of .*a\.tar: no known image format"):
        drawn(stream, plan)
    found: dict[int, str] = {}
    got = list(batches(stream, plan, VIEWS, CPU, 0, on_unreadable=found.update))
    assert len(got) == 2
    assert [reason.split(":")[0] for reason in found.values()] == [f"1.jpg of {tmp_path / 'a.tar'}"]


def test_a_command_runs_only_if_it_is_allowed(shards: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pipe = f"pipe:touch {mark}; cat {shards}/train-000000.tar"
    for root in (pipe, pipe.replace("pipe:", "PIPE:"), f"{shards}/train-000000.tar::{pipe}", f"{{{pipe},x}}"):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_source(DataConfig("webdataset", root, length=12))
        assert "would run a shell command here: set data.allow_pipe=true" in str(caught.value)
    assert not mark.exists()
    stream = load_source(DataConfig("webdataset", pipe, length=3, allow_pipe=True)).train
    assert isinstance(stream, RemoteSource)
    assert not mark.exists()  # opening the source runs nothing
    with pytest.raises(ValueError, match=r"data\.name=webdataset is a stream"):
        stream.image(0)
    assert len(drawn(stream, Plan(3, 3, 1, seed=0))) == 1
    assert mark.exists()


@pytest.mark.parametrize(
    ("root", "length", "words"),
    [
        ("HERE/train-{000000..000009}.tar", 12, r"the shard .*train-000004\.tar does not exist"),
        ("HERE/train-000000.tar", 0, r"data\.length=0"),
        ("javascript:alert(1)", 12, r"javascript: is not supported"),
        ("HERE/train-{000000..000003.tar", 12, r"data\.root=.*: Unbalanced braces.*; the syntax is train-"),
        ("HERE/${NOT_SET}.tar", 12, r"data\.root=.*\$\{NOT_SET\}.*WDS_NAME"),
    ],
)
def test_invalid_addresses_are_refused(root: str, length: int, words: str, shards: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_source(DataConfig("webdataset", root.replace("HERE", str(shards)), length=length))


def test_skipped_files_are_reported_once_and_an_empty_shard_is_no_error(tmp_path: Path) -> None:
    members = {
        "IMG.2020.01.jpg": encoded(noise(1), "JPEG"),
        "1.jpg": encoded(noise(2), "JPEG"),
        "1.mask.png": b"",
        "2.txt": b"",
    }
    tar(tmp_path / "0.tar", members)
    for number in (1, 2, 3):
        tar(tmp_path / f"{number}.tar", {})
    stream = opened(f"{tmp_path}/{{0..3}}.tar", 4)
    for slot in range(4):  # three of four workers have no image of their own
        with pytest.warns(
            RunWarning, match=r"skipped in .*0\.tar.*: samples without .* \(1\), further images .* \(1\)"
        ) as caught:
            got = list(itertools.islice(endless(stream.addresses, 1, 0, slot, 4), 8))
        assert len(caught) == 1
        assert {sample.name.split(" of ")[0] for sample in got} == {"IMG.2020.01.jpg", "1.jpg"}


def test_file_addresses_are_unquoted(shards: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a b%.tar"
    odd.write_bytes((shards / "train-000000.tar").read_bytes())
    stream = opened(odd.as_uri(), 3)
    assert "%20" in stream.addresses[0]
    assert len(list(samples_of(stream.addresses[0]))) == 3


def test_shards_that_cannot_be_read(shards: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    full = (shards / "train-000000.tar").read_bytes()
    cut.write_bytes(full[:2200])
    (tmp_path / "text.tar").write_text("no tar")
    border, flipped = tmp_path / "border.tar", tmp_path / "flipped.tar"
    with tarfile.open(shards / "train-000000.tar") as file:
        second = file.getmembers()[2].offset
    border.write_bytes(full[:second])
    flipped.write_bytes(full[:second] + bytes([full[second] ^ 1]) + full[second + 1 :])
    for address in (
        str(cut),
        str(border),
        str(flipped),
        str(tmp_path / "text.tar"),
        f"pipe:cat {shards}/train-000000.tar; exit 3",
    ):
        with pytest.raises(StreamError, match=r"the shard .* cannot be read \(") as caught:
            list(samples_of(address))
        assert "\n" not in str(caught.value)
    plan = Plan(4, 2, 1, seed=0)
    with pytest.raises(ValueError, match=r"the shard .*text\.tar cannot be read"):  # from a worker, in one sentence
        drawn(opened(str(tmp_path / "text.tar"), 4), plan, workers=1)
    with pytest.raises(ValueError, match=r"the shard http://127\.0\.0\.1:9/a\.tar cannot be read"):
        drawn(opened("http://127.0.0.1:9/a.tar", 4), plan)
    tar(tmp_path / "words.tar", {"a.txt": b"words"})
    with pytest.raises(ValueError, match=r"no image in .*words\.tar"):
        drawn(opened(str(tmp_path / "words.tar"), 4), plan)
