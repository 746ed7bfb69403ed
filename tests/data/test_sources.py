"""Every data set has the right images in a fixed order, and missing data is a one-sentence error."""

import errno
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from moco.config import ConfigError, DataConfig, RunWarning, config_dir
from moco.data.base import names_digest
from moco.data.decode import ImageError
from moco.data.sources import SOURCES, ArraySource, FolderSource, Source, load_source, refuse_output_inside
from moco.data.unreadable import find_unreadable
from tests.data.unreadable_files import forbid


def image(path: Path, color: int | tuple[int, int, int] = 0, size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(path.suffix.lower())
    Image.new("RGB", size, (color,) * 3 if isinstance(color, int) else color).save(path, kind)


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def sentence(error: BaseException) -> str:
    """Return the message, which must be one line."""
    text = str(error)
    assert "\n" not in text
    return text


# ---- digits ----


def test_digits_split_is_fixed_balanced_and_disjoint() -> None:
    first, second = load_source(DataConfig("digits")), load_source(DataConfig("digits"))
    train, held_out = first.train, first.held_out
    assert held_out is not None
    assert first.bank is train
    assert (len(train), len(held_out)) == (1297, 500)
    assert held_out.labels is not None
    assert np.bincount(held_out.labels).tolist() == [50] * 10
    assert sorted(names(train) + names(held_out), key=lambda name: int(name.split("/")[1])) == [
        f"digits/{i}" for i in range(1797)
    ]
    assert names(second.train) == names(train)
    assert train.classes == tuple("0123456789")
    # Another split, or other pixels, would make results incomparable with published ones.
    digest = hashlib.sha256(",".join(names(held_out)).encode())
    assert train.images is not None
    digest.update(train.images.numpy().tobytes())
    assert digest.hexdigest() == "24516a9ac42e80162914915744bd95324afc196d42222fa5beecdf0a31dce270"


def test_digests_keep_the_values_that_are_stored_in_runs_and_caches() -> None:
    train = load_source(DataConfig("digits")).train
    assert names_digest(train) == "e3d7fde3e92509457cb192745f33484923ff914c60c5269116cec7517f2ec9c5"
    assert names_digest(train, with_size=True) == "85266121a361464d7a0d020b1fa7452fa8ffd3ebfc9abead5261fd3b79572aa0"
    assert train.content_digest() == "c40d86bd9f1f3355136801ab13ca8ab871c9e5c95106f68189f186f2a73953a4"


def test_digits_are_the_scans_at_double_size() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for source in (load_source(DataConfig("digits")).train, load_source(DataConfig("digits")).held_out):
        assert source is not None
        assert source.images is not None
        assert source.labels is not None
        assert source.images.dtype == torch.uint8
        assert source.images.shape == (len(source), 3, 16, 16)
        for i in (0, 17, len(source) - 1):
            original = int(source.name(i).split("/")[1])
            assert source.labels[i] == bunch.target[original]
            pixels = source.image(i)
            assert (pixels == source.images[i]).all()
            assert (pixels[0] == pixels[1]).all()
            assert (pixels[0] == pixels[2]).all()
            # Bilinear weights at half pixels are 1/4 and 3/4, with repeated borders.
            padded = np.pad(bunch.images[original], 1, mode="edge")
            rows = np.empty((16, 10))
            rows[0::2] = padded[:-2] * 0.25 + padded[1:-1] * 0.75
            rows[1::2] = padded[1:-1] * 0.75 + padded[2:] * 0.25
            columns = np.empty((16, 16))
            columns[:, 0::2] = rows[:, :-2] * 0.25 + rows[:, 1:-1] * 0.75
            columns[:, 1::2] = rows[:, 1:-1] * 0.75 + rows[:, 2:] * 0.25
            assert (pixels[0].numpy() == np.rint(columns * 255 / 16)).all()


# ---- CIFAR and STL-10, in torchvision's layout ----


def fake_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, fine: bool) -> np.ndarray:
    """Write two training images per batch file and four test images; return the training images (N, 3, 32, 32)."""
    dataset = datasets.CIFAR100 if fine else datasets.CIFAR10
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, _: os.path.isfile(path))
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    key, parts = "fine_labels" if fine else "labels", []
    for file, _ in dataset.train_list + dataset.test_list:
        data = rng.integers(0, 256, (4 if "test" in file else 2, 3072), dtype=np.uint8)
        if "test" not in file:
            parts.append(data)
        (folder / file).write_bytes(pickle.dumps({"data": data, key: [i % 10 for i in range(len(data))]}))
    meta = {dataset.meta["key"]: [f"class{i}" for i in range(100 if fine else 10)]}
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps(meta))
    return np.concatenate(parts).reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_one_tensor_in_file_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fake_cifar(tmp_path, monkeypatch, fine=name == "cifar100")
    sources = load_source(DataConfig(name, str(tmp_path)))
    assert sources.bank is sources.train
    assert sources.held_out is not None
    assert sources.train.images is not None
    assert sources.train.images.is_contiguous()
    assert (sources.train.images.numpy() == expected).all()
    assert sources.train.labels is not None
    assert sources.train.labels.dtype == np.int64
    assert sources.train.labels.tolist() == [0, 1] * (len(expected) // 2)
    assert sources.held_out.labels is not None
    assert sources.held_out.labels.tolist() == [0, 1, 2, 3]
    assert len(sources.train.classes) == int(name.removeprefix("cifar"))
    assert (sources.train.name(1), sources.held_out.name(3)) == (f"{name}/train/1", f"{name}/test/3")


def test_stl10_trains_on_unlabeled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, _: os.path.isfile(path))
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    stored = {}
    for split, count in (("unlabeled", 4), ("train", 3), ("test", 2)):
        stored[split] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        stored[split].transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")  # the files are column by column
    np.array([1, 10, 5], np.uint8).tofile(folder / "train_y.bin")  # 1-based
    np.array([2, 2], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    sources = load_source(DataConfig("stl10", str(tmp_path)))
    assert sources.bank is not None
    assert sources.held_out is not None
    for split, source in (("unlabeled", sources.train), ("train", sources.bank), ("test", sources.held_out)):
        assert source.images is not None
        assert (source.images.numpy() == stored[split]).all()
    assert sources.train.labels is None
    assert sources.train.classes == ()
    assert sources.bank.labels is not None
    assert sources.bank.labels.tolist() == [0, 9, 4]
    assert sources.held_out.classes == tuple("abcdefghij")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_missing_and_corrupted_sets_name_root_and_fix(name: str, tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as caught:
        load_source(DataConfig(name, str(root)))
    text = sentence(caught.value)
    assert f"data.root={root} ({root})" in text
    assert "was not found" in text
    assert "data.download=true" in text
    base = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "stl10": "stl10_binary"}[name]
    (root / base).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"is incomplete or corrupted.*should contain the folder {base}"):
        load_source(DataConfig(name, str(root)))


def test_a_relative_root_is_shown_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_source(DataConfig("cifar10", "data"))
    assert f"data.root=data ({tmp_path / 'data'})" in sentence(caught.value)


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("Name or service not known"), TimeoutError("timed out"), ConnectionResetError("reset")],
)
@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_failed_download_is_reported_in_one_sentence(
    name: str, failure: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", closed)
    with pytest.raises(FileNotFoundError, match="could not be downloaded") as caught:
        load_source(DataConfig(name, str(tmp_path / "data"), download=True))
    text = sentence(caught.value)
    assert str(tmp_path / "data") in text
    assert str(failure) in text
    assert "http" in text  # the address for a manual download
    assert caught.value.__cause__ is failure


def test_a_damaged_download_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve", lambda _, path: Path(path).write_bytes(b"a login page")
    )
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 could not be downloaded.*corrupted") as caught:
        load_source(DataConfig("cifar10", str(tmp_path), download=True))
    sentence(caught.value)


# ---- folders ----


def test_folder_finds_all_images_in_sorted_order(tmp_path: Path) -> None:
    wanted = ["B/Z.PNG", "a.jpg", "a/deep/er/x.webp", "b.Jpeg", "b/ü 漢字.png", "c.bmp", "d.tif", "e.TIFF", "f.gif"]
    lost = "broken-link.jpg"  # has an image's name: keeps its position and is unreadable
    for i, name in enumerate(reversed(wanted)):
        image(tmp_path / name, i * 20)
    for name in (".hidden.jpg", ".cache/x.jpg", "notes.txt", "a/list.csv", "Makefile", lost, "b/notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name in (lost, "b/notes"):
            (tmp_path / name).symlink_to("gone.jpg")
        else:
            (tmp_path / name).write_text("x")
    with pytest.warns(RunWarning, match=r"data\.root=.*: 1 broken links are ignored: b/notes -> gone\.jpg"):
        sources = load_source(DataConfig("folder", str(tmp_path)))
    train = sources.train
    assert isinstance(train, FolderSource)
    assert names(train) == sorted([*wanted, lost])
    with pytest.raises(ImageError, match=r"broken-link\.jpg: a link to gone\.jpg: No such file or directory") as caught:
        train.image(names(train).index(lost))
    assert caught.value.kind == "broken link"
    wanted = names(train)
    assert train.ignored == {"hidden": 2, ".txt": 1, ".csv": 1, "without ending": 1}
    assert (train.unlistable, train.broken) == ({}, {"b/notes": "gone.jpg"})
    assert (train.labels, train.classes, train.images, sources.bank, sources.held_out) == (None, (), None, None, None)
    assert train.image(wanted.index("b/ü 漢字.png")).shape == (3, 5, 6)
    assert train.image(wanted.index("f.gif")).flatten().tolist() == [0] * 90


def test_a_link_that_cannot_be_followed_is_one_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(tmp_path / "good.png")
    (tmp_path / "cycle.jpg").symlink_to("cycle.jpg")
    (tmp_path / "one.png").symlink_to("two.png")
    (tmp_path / "two.png").symlink_to("one.png")
    (tmp_path / "in_a_file.gif").symlink_to("good.png/x.gif")
    (tmp_path / "denied.jpg").symlink_to("forbidden/x.jpg")
    stat = os.stat

    def denied(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if str(path).endswith("denied.jpg") and named.get("follow_symlinks", True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", denied)
    train = load_source(DataConfig("folder", str(tmp_path))).train
    assert names(train) == ["cycle.jpg", "denied.jpg", "good.png", "in_a_file.gif", "one.png", "two.png"]
    digest = train.content_digest()
    unreadable = find_unreadable(train, range(len(train)))
    assert {train.name(i): error.kind for i, error in unreadable.items()} == {
        name: "broken link" for name in names(train) if name != "good.png"
    }
    image(tmp_path / "forbidden/x.jpg")
    monkeypatch.undo()
    train = load_source(DataConfig("folder", str(tmp_path))).train
    assert names(train)[1] == "denied.jpg"
    assert train.image(1).shape == (3, 5, 6)
    assert train.content_digest() != digest


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for name in ("b/1.png", "a/2.png", "a/c/3.png", "4.png"):
        image(root / name)
    (root / "a/to_b").symlink_to(root / "b")
    image(tmp_path / "outside/5.png")
    (root / "link2").symlink_to(tmp_path)  # contains this tree, and the target of link3
    (root / "link3").symlink_to(tmp_path / "outside")
    (root / "link1").symlink_to(root / "a")
    expected = names(load_source(DataConfig("folder", str(root))).train)
    assert expected == ["4.png", "a/2.png", "a/c/3.png", "b/1.png", "link2/outside/5.png"]
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self) -> Sequence[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names(load_source(DataConfig("folder", str(root))).train) == expected


def test_links_are_followed_once_and_cycles_are_harmless(tmp_path: Path) -> None:
    image(tmp_path / "outside/x.png")
    image(tmp_path / "root/real/y.png")
    (tmp_path / "root/a_link").symlink_to(tmp_path / "root/real")  # sorts first, but the real folder keeps its name
    (tmp_path / "root/real/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/elsewhere").symlink_to(tmp_path / "outside")
    (tmp_path / "root/zz").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/back").symlink_to(tmp_path / "root")
    assert names(load_source(DataConfig("folder", str(tmp_path / "root"))).train) == ["elsewhere/x.png", "real/y.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png", "c/deep/3.png"):
        image(tmp_path / name)
    forbid(monkeypatch, tmp_path / "b", tmp_path / "c/deep")
    for labels in ("none", "folder"):
        with pytest.raises(
            ValueError,
            match=r"^data\.root=\S+ \(\S+\) contains 2 folders that cannot be listed: b \(Permission denied\), c/deep "
            r"\(Permission denied\); give this user permission",
        ):
            load_source(DataConfig("folder", str(tmp_path), labels=labels))
    train = load_source(DataConfig("folder", str(tmp_path)), keep_unlistable=True).train
    assert isinstance(train, FolderSource)
    assert (names(train), set(train.unlistable)) == (["a/1.png"], {"b", "c/deep"})
    with pytest.raises(ValueError, match="2 folders that cannot be listed"):  # only one class is left
        load_source(DataConfig("folder", str(tmp_path), labels="folder"), keep_unlistable=True)
    forbid(monkeypatch, tmp_path)
    for keep in (False, True):
        with pytest.raises(ValueError, match=r"data\.root=.* cannot be listed: \. \(Permission denied\)"):
            load_source(DataConfig("folder", str(tmp_path)), keep_unlistable=keep)


def test_a_forbidden_link_is_not_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "1.png")
    (tmp_path / "more").symlink_to(tmp_path / "elsewhere")
    stat = os.stat

    def denied(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(ValueError, match=r"1 folder that cannot be listed: more \(Permission denied\)"):
        load_source(DataConfig("folder", str(tmp_path)))


_setpriv = shutil.which("setpriv")
_UNPRIVILEGED = ["--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search"]


@pytest.mark.skipif(os.geteuid() == 0 and _setpriv is None, reason="root needs setpriv to be refused")
def test_a_folder_that_cannot_be_listed_in_a_separate_process(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        image(tmp_path / name)
    (tmp_path / "b").chmod(0)
    try:
        script = "import sys; from moco.data.walk import walk; t = walk(sys.argv[1]); print(t.images, t.unlistable)"
        command = [sys.executable, "-c", script, str(tmp_path)]
        if os.geteuid() == 0:
            command = [str(_setpriv), *_UNPRIVILEGED, *command]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(Path(config_dir()).parent)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        (tmp_path / "b").chmod(0o755)
    assert done.stdout == "['a/1.png'] {'b': 'Permission denied'}\n", done.stderr


def test_files_with_names_that_are_not_utf8_can_be_opened(tmp_path: Path) -> None:
    image(tmp_path / "x.png", 7)
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")
    train = load_source(DataConfig("folder", str(tmp_path))).train
    assert os.fsencode(train.name(0)) == b"\xff\xfe.png"
    assert (train.image(0) == 7).all()


def test_labels_are_first_level_folders(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/1.png", "cat/x/2.png", "cat/3.png", "cat-like/4.png")):
        image(tmp_path / name, i)
    (tmp_path / "empty").mkdir()
    sources = load_source(DataConfig("folder", str(tmp_path), labels="folder"))
    train = sources.train
    assert train.classes == ("cat", "cat-like", "dog")
    assert train.labels is not None
    assert train.labels.dtype == np.int64
    assert {name: train.classes[label] for name, label in zip(names(train), train.labels, strict=True)} == {
        "cat/3.png": "cat",
        "cat/x/2.png": "cat",
        "cat-like/4.png": "cat-like",
        "dog/1.png": "dog",
    }
    assert sources.bank is train
    assert sources.held_out is None


def test_invalid_class_folders_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "only/1.png")
    with pytest.raises(ValueError, match=r"one class folder only \(only\)"):
        load_source(DataConfig("folder", str(tmp_path), labels="folder"))
    image(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"1 images outside class folders \(stray\.png\).*data\.labels=none"):
        load_source(DataConfig("folder", str(tmp_path), labels="folder"))
    with pytest.raises(ValueError, match=r"data\.labels='class' must be one of none, folder"):
        load_source(DataConfig("folder", str(tmp_path), labels="class"))


def test_eval_root_is_held_out(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png", "test/a/4.png"):
        image(tmp_path / name)
    sources = load_source(
        DataConfig("folder", str(tmp_path / "train"), labels="folder", eval_root=str(tmp_path / "test"))
    )
    assert sources.bank is sources.train
    assert sources.held_out is not None
    assert names(sources.held_out) == ["a/4.png", "b/3.png"]
    assert sources.held_out.classes == sources.train.classes


def test_an_invalid_eval_root_is_refused(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png", "test/c/4.png"):
        image(tmp_path / name)
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    with pytest.raises(ValueError, match=r"data\.eval_root=\S*test has images of c, "):
        load_source(DataConfig("folder", train, labels="folder", eval_root=test))
    with pytest.raises(ValueError, match=r"data\.labels=none: set data\.labels=folder"):
        load_source(DataConfig("folder", train, eval_root=test))
    with pytest.raises(FileNotFoundError, match=r"data\.eval_root=.*gone.* does not exist"):
        load_source(DataConfig("folder", train, labels="folder", eval_root=str(tmp_path / "gone")))
    for inside in (train, str(tmp_path), os.path.join(train, "b")):
        with pytest.raises(ValueError, match="accuracy would be measured on training images"):
            load_source(DataConfig("folder", train, labels="folder", eval_root=inside))
    with pytest.raises(ValueError, match=r"data\.eval_root=.* data\.name=folder or video only"):
        load_source(DataConfig("digits", eval_root=test))


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root=\S*gone \(\S*gone\) does not exist: check the path"):
        load_source(DataConfig("folder", str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"found nothing; images are files that end in \.jpg \.jpeg"):
        load_source(DataConfig("folder", str(tmp_path)))
    for name in ("a.txt", "b.TXT", "c.zip", "README", ".x.jpg"):
        (tmp_path / name).write_text("x")
    with pytest.raises(FileNotFoundError, match=r"found 2 \.txt, 1 \.zip, 1 hidden, 1 without ending;"):
        load_source(DataConfig("folder", str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        load_source(DataConfig("folder", str(tmp_path / "a.txt")))


def test_resident_equals_decoding_one_by_one(tmp_path: Path) -> None:
    for i in range(150):
        image(tmp_path / f"{i % 3}/{i:03}.png", (i, 255 - i, 3 * i % 256))
    streamed = load_source(DataConfig("folder", str(tmp_path), labels="folder")).train
    calls: list[tuple[int, int]] = []
    sources = load_source(
        DataConfig("folder", str(tmp_path), labels="folder", resident=True),
        progress=lambda done, total: calls.append((done, total)),
    )
    train = sources.train
    assert isinstance(train, ArraySource)
    assert sources.bank is train
    assert train.images.is_contiguous()
    assert (train.images == torch.stack([streamed.image(i) for i in range(150)])).all()
    assert names(train) == names(streamed)
    assert train.labels is not None
    assert train.labels.tolist() == [0] * 50 + [1] * 50 + [2] * 50
    assert calls == [(64, 150), (128, 150), (150, 150)]


def test_resident_refuses_two_sizes_and_broken_files(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", size=(9, 5))
    with pytest.raises(ValueError, match=r"a\.png is 6 x 5 and b\.png is 9 x 5: set data\.resident=false"):
        load_source(DataConfig("folder", str(tmp_path), resident=True))
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"b\.png: the file is empty"):
        load_source(DataConfig("folder", str(tmp_path), resident=True))


def test_a_file_that_is_removed_after_the_scan(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    train = load_source(DataConfig("folder", str(tmp_path))).train
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"a\.png: No such file"):
        train.image(0)


@pytest.mark.parametrize("resident", [False, True])
def test_sources_can_be_pickled_for_worker_processes(resident: bool, tmp_path: Path) -> None:
    image(tmp_path / "a.png", 9)
    train = load_source(DataConfig("folder", str(tmp_path), resident=resident)).train
    copy: Source = pickle.loads(pickle.dumps(train))
    assert names(copy) == ["a.png"]
    assert (copy.image(0) == 9).all()


# ---- ImageNet ----


def test_imagenet_tree(tmp_path: Path) -> None:
    for name in ("train/n02/1.JPEG", "train/n01/2.JPEG", "val/n01/3.JPEG", "val/n02/4.JPEG"):
        image(tmp_path / name)
    sources = load_source(DataConfig("imagenet", str(tmp_path)))
    assert sources.bank is sources.train
    assert sources.held_out is not None
    assert names(sources.train) == ["n01/2.JPEG", "n02/1.JPEG"]
    assert names(sources.held_out) == ["n01/3.JPEG", "n02/4.JPEG"]
    assert sources.held_out.labels is not None
    assert sources.held_out.labels.tolist() == [0, 1]
    (tmp_path / "val/n02").rename(tmp_path / "val/n03")
    with pytest.raises(ValueError, match=r"data\.root=\S*val has images of n03, "):
        load_source(DataConfig("imagenet", str(tmp_path)))


def test_an_incomplete_imagenet_is_refused(tmp_path: Path) -> None:
    def message(root: Path) -> str:
        with pytest.raises(FileNotFoundError) as caught:
            load_source(DataConfig("imagenet", str(root)))
        assert "image-net.org" in str(caught.value)
        assert "train/CLASS" in str(caught.value)
        return sentence(caught.value)

    assert "does not exist" in message(tmp_path / "gone")
    assert "contains nothing" in message(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"x")
    assert "contains ILSVRC2012_img_train.tar" in message(tmp_path)
    image(tmp_path / "train/n01/1.JPEG")
    image(tmp_path / "train/n02/1.JPEG")
    image(tmp_path / "val/ILSVRC2012_val_00000001.JPEG")  # the validation archive contains no class folders
    with pytest.raises(ValueError, match=r"val \(.*1 images outside class folders \(ILSVRC2012_val_00000001\.JPEG\)"):
        load_source(DataConfig("imagenet", str(tmp_path)))


# ---- all ----


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.name='cifar' must be one of digits, cifar10, cifar100, stl10"):
        load_source(DataConfig("cifar"))


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "digits"])
def test_an_empty_root_is_refused(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root is empty"):
        load_source(DataConfig(name, ""))


def test_real_cifar_jpegs(tmp_path: Path) -> None:
    archive = Path(os.environ.get("MOCO_SHARED_DATA", ""), "cifar10_jpeg.tar.xz")
    if not archive.is_file():
        pytest.skip("MOCO_SHARED_DATA does not name a folder that holds cifar10_jpeg.tar.xz")
    wanted = 0
    with tarfile.open(archive, "r|xz") as stream:  # the first part only: unpacking all takes long
        for member in stream:
            if member.isfile() and not member.name.endswith("0.jpg"):
                continue
            stream.extract(member, tmp_path, filter="data")
            wanted += member.isfile()
            if wanted == 600:
                break
    train = load_source(DataConfig("folder", str(tmp_path), resident=True)).train
    assert train.images is not None
    assert train.images.shape == (600, 3, 32, 32)
    with Image.open(tmp_path / train.name(599)) as opened:
        assert (train.images[599].permute(1, 2, 0).numpy() == np.asarray(opened.convert("RGB"))).all()


@pytest.mark.parametrize("output", ["photos", "photos/runs/a", "photos/../photos/x", "link/a", "held/out"])
def test_an_output_among_the_images_is_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its images join the data: the run cannot resume, and its folder becomes a class."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/cat", "held", "beside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos/cat")
    data = DataConfig(name="folder", root="photos", eval_root="held")
    with pytest.raises(ConfigError, match=rf"run={output} lies in data\.(eval_)?root="):
        refuse_output_inside(data, "run", output)
    for other in ("beside", "photos2", "runs/a"):
        refuse_output_inside(data, "run", other)
    refuse_output_inside(DataConfig(name="digits"), "run", output)
    with pytest.raises(ConfigError, match=r"data\.root=\."):
        refuse_output_inside(DataConfig(name="folder", root="."), "run", "runs/a")
    refuse_output_inside(DataConfig(name="imagenet", root="."), "run", "runs/a")  # only train/ and val/ are searched
