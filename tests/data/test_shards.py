"""Images in shards equal those in the folder: bytes, order, labels and views; damage is an error."""

import json
import multiprocessing
import multiprocessing.connection
import os
import tarfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from moco.config import DataConfig
from moco.data import shard_index, shards
from moco.data.decode import ImageError
from moco.data.loader import Batch, batches
from moco.data.plan import Plan
from moco.data.shards import OPEN_FILES, ShardSource
from moco.data.sources import Source, load_source
from moco.data.view import View
from tests.data.images import names
from tests.data.packed import class_folders, packed
from tests.data.unreadable_files import encoded, noise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train/ and test/, and both packed."""
    root = tmp_path_factory.mktemp("tree")
    class_folders(root / "train")
    class_folders(root / "test", count=5, first=50)
    packed(root / "packed", root / "train", data_labels="folder", data_eval_root=str(root / "test"))
    return root


def test_the_splits_equal_the_folders(tree: Path) -> None:
    folder = load_source(DataConfig("folder", str(tree / "train"), labels="folder", eval_root=str(tree / "test")))
    packed_set = load_source(DataConfig("shards", str(tree / "packed")))
    assert packed_set.bank is packed_set.train
    for one, other in ((folder.train, packed_set.train), (folder.held_out, packed_set.held_out)):
        assert one is not None
        assert other is not None
        assert names(one) == names(other)
        assert one.classes == other.classes == ("cat", "dog")
        assert one.labels is not None
        assert other.labels is not None
        assert one.labels.tolist() == other.labels.tolist()
        assert other.images is None
        for i in range(len(one)):
            assert torch.equal(one.image(i), other.image(i))
    assert isinstance(packed_set.train, ShardSource)
    assert len(packed_set.train.shards) > 2  # several, to test that the right one is found


def drawn(source: Source, workers: int, start: int) -> list[Batch]:
    plan = Plan(len(source), 4, 2, seed=3)
    views = [View(size=8, crop_scale=(0.2, 1.0), flip_p=0.5, jitter_p=0.8, brightness=0.4)] * 2
    return list(batches(source, plan, views, CPU, workers, start))


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (2, 0), (1, 4)])
def test_the_views_are_bit_equal_to_those_of_the_folder(tree: Path, workers: int, start: int) -> None:
    folder = drawn(load_source(DataConfig("folder", str(tree / "train"))).train, 0, 0)[start:]
    packed_set = drawn(load_source(DataConfig("shards", str(tree / "packed"))).train, workers, start)
    assert len(folder) == len(packed_set) == 6 - start
    for one, other in zip(folder, packed_set, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


def test_two_ranks_equal_one_and_use_each_image_once_per_epoch(tree: Path) -> None:
    source = load_source(DataConfig("shards", str(tree / "packed"))).train
    views = [View(size=8, flip_p=0.5)] * 2
    full, *ranks = (
        list(batches(source, Plan(12, 4, 2, seed=3, rank=rank, processes=of), views, CPU, of - 1))
        for rank, of in ((0, 1), (0, 2), (1, 2))
    )
    for one, first, second in zip(full, *ranks, strict=True):
        assert torch.equal(one.index, torch.cat([first.index, second.index]))
        for a, b, c in zip(one.views, first.views, second.views, strict=True):
            assert torch.equal(a, torch.cat([b, c]))
    assert sorted(torch.cat([batch.index for batch in full[:3]]).tolist()) == list(range(12))


def test_subsets_and_resident_shards(tree: Path) -> None:
    train = load_source(DataConfig("shards", str(tree / "packed"))).train
    part = train.subset(np.array([7, 2]))
    assert names(part) == [train.name(7), train.name(2)]
    assert part.labels is not None
    assert train.labels is not None
    assert part.labels.tolist() == train.labels[[7, 2]].tolist()
    assert torch.equal(part.image(0), train.image(7))
    with pytest.raises(ValueError, match=r"data\.resident=true needs images of one size, but in .*packed cat/00\.jpg"):
        load_source(DataConfig("shards", str(tree / "packed"), resident=True))


def test_the_shards_are_plain_webdataset(tree: Path) -> None:
    """Read with tarfile only: keys, endings by content, labels; the index locates the same bytes."""
    train = load_source(DataConfig("shards", str(tree / "packed"))).train
    assert isinstance(train, ShardSource)
    found: dict[str, bytes] = {}
    for shard, _ in train.shards:
        with tarfile.open(tree / "packed" / shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    images = {name: data for name, data in found.items() if not name.endswith(".cls")}
    # 03.png is the third of dog/, whose six follow cat/'s six; 04.jpg, the third of cat/, is a PNG inside.
    assert sorted(images) == [f"{i:09}.{'png' if i in (2, 7) else 'jpg'}" for i in range(12)]
    assert train.labels is not None
    assert [int(found[f"{i:09}.cls"]) for i in range(12)] == train.labels.tolist()
    for i, (_, data) in enumerate(sorted(images.items())):
        assert data == train.content(i) == (tree / "train" / train.name(i)).read_bytes()


def test_forks_and_more_shards_than_open_files(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file opened before a fork can be shared, and the number of open files is limited."""
    packed(tmp_path / "many", tree / "train", shard_mb=0.001)
    source = load_source(DataConfig("shards", str(tmp_path / "many"))).train
    assert isinstance(source, ShardSource)
    assert len(source.shards) == 12
    monkeypatch.setattr(shards, "_open", lru_cache(3)(shards._open.__wrapped__))
    before = len(os.listdir("/proc/self/fd"))
    expected = [source.content(i) for i in range(12)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    child = os.fork()
    if child == 0:
        os._exit(0 if [source.content(i) for i in reversed(range(12))] == expected[::-1] else 1)
    assert [source.content(i) for i in range(12)] == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert OPEN_FILES >= 16


def copy(tree: Path, to: Path) -> Path:
    to.mkdir()
    for file in (tree / "packed").iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    return to


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_of_an_image_is_an_error_when_it_is_read(tree: Path, tmp_path: Path) -> None:
    root = copy(tree, tmp_path / "copy")
    first = load_source(DataConfig("shards", str(root))).train
    assert isinstance(first, ShardSource)
    flip(root / "train-000000.tar", int(first.rows[0]["offset"]) + int(first.rows[0]["size"]) // 2)
    with pytest.raises(ImageError, match=r"cat/00\.jpg in .*train-000000\.tar: its checksum") as caught:
        first.image(0)
    assert caught.value.kind == "damaged"
    assert first.image(1).shape[0] == 3
    # on_bad_image=replace replaces and reports it
    found: dict[int, str] = {}
    plan = Plan(12, 12, 1, seed=0)
    batch = next(batches(first, plan, [View(size=8)], CPU, 0, on_unreadable=found.update))
    assert list(found) == [0]
    assert 0 not in batch.index.tolist()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other(**fields: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("index.json", Path.unlink, r"contains tar files but no index\.json: stream them with data=webdataset"),
        ("index.json", cut, r"index\.json is damaged"),
        ("index.json", lambda path: path.write_text("[]"), r"index\.json is damaged: .*remove"),
        ("index.json", lambda path: path.write_text(path.read_text().replace('"rows"', '"rowt"')), r"is damaged"),
        ("index.json", other(classes=["dog", "cat"]), r"index\.json is damaged"),
        ("index.json", other(splits={}), r"index\.json is damaged"),
        ("index.json", other(version=99), r"has version 99, and this moco reads version 2: install a newer moco"),
        ("index.json", other(version=1), r"has version 1, and this moco reads version 2: pack the images again"),
        ("train.npy", Path.unlink, r"train\.npy is missing: copy the complete"),
        ("train.npy", lambda path: flip(path, 300), r"train\.npy is damaged \(SHA-256\)"),
        ("train-000001.tar", Path.unlink, r"train-000001\.tar is missing"),
        ("held_out-000000.tar", cut, r"held_out-000000\.tar has [\d,]+ bytes instead of [\d,]+"),
    ],
)
def test_missing_or_damaged_files_are_reported_in_one_sentence(
    file: str, damage: Callable[[Path], None], words: str, tree: Path, tmp_path: Path
) -> None:
    root = copy(tree, tmp_path / "copy")
    damage(root / file)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_source(DataConfig("shards", str(root)))
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_of_the_index_is_detected(tree: Path, tmp_path: Path) -> None:
    root = copy(tree, tmp_path / "copy")
    file = root / "index.json"
    full, about = file.read_bytes(), shard_index.read_index(root, "here")
    for at in range(0, len(full), 11):
        for bit in (1, 4):
            file.write_bytes(full[:at] + bytes([full[at] ^ bit]) + full[at + 1 :])
            if _index_or_none(root) is not None:
                assert shard_index.read_index(root, "here") == about  # only white space has changed


def _index_or_none(root: Path) -> object:
    try:
        return shard_index.read_index(root, "here")
    except ValueError:
        return None


def test_folders_without_shards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*gone .* does not exist"):
        load_source(DataConfig("shards", str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"contains no index\.json: make shards with python -m moco\.pack"):
        load_source(DataConfig("shards", str(tmp_path)))
    (tmp_path / "parts").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is not completely packed: run the same moco\.pack command again"):
        load_source(DataConfig("shards", str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.eval_root=x works with data\.name=folder or video only"):
        load_source(DataConfig("shards", str(tmp_path), eval_root="x"))


def synthetic(root: Path, count: int) -> Path:
    """Write an index of `count` rows of the same image, as moco.pack does."""
    root.mkdir()
    content = encoded(noise(), "JPEG")
    (root / "train-000000.tar").write_bytes(content)
    rows = np.zeros(count, shard_index.row_type(40))
    rows["size"], rows["crc"] = len(content), zlib.crc32(content)
    rows["name"] = np.arange(count).astype("S40")
    np.save(root / "train.npy", rows)
    shard = {
        "file": "train-000000.tar",
        "bytes": len(content),
        "sha256": shard_index.file_digest(root / "train-000000.tar"),
    }
    split = {
        "rows": "train.npy",
        "sha256": shard_index.file_digest(root / "train.npy"),
        "pictures": count,
        "labelled": True,
        "shards": [shard],
        "parts": [],
    }
    index = {"version": shard_index.VERSION, "classes": ["a", "b"], "splits": {"train": split}}
    index |= {"settings": {}, "skipped": ""}
    (root / "index.json").write_text(json.dumps(shard_index.sealed(index)))
    return root


def anonymous() -> int:
    """Return this process's memory in bytes without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def _measure(root: Path, count: int, answer: "multiprocessing.connection.Connection") -> None:
    before = anonymous()
    source = load_source(DataConfig("shards", str(root))).train
    opened = anonymous() - before
    assert isinstance(source, ShardSource)
    after_first = 0
    for epoch in range(2):
        for i in np.random.default_rng(epoch).permutation(count)[:5000]:
            assert source.name(int(i)) == str(i)
            assert source.content(int(i))
        after_first = after_first or anonymous()
    answer.send((opened, anonymous() - after_first))


def test_the_index_stays_on_disk(tmp_path: Path) -> None:
    """A process holds its labels, 8 bytes per image, but not the index; a second epoch needs no more memory."""
    count = 300_000
    root = synthetic(tmp_path / "many", count)
    assert (root / "train.npy").stat().st_size > 68 * count
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(root, count, there))
    process.start()
    there.close()
    opened, later = here.recv()
    process.join()
    assert opened < 12 * count  # the labels, and some overhead of opening
    assert later < 2**20
