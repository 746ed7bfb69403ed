"""Data sets in memory: digits, CIFAR and STL-10 have the right images in a fixed order; missing ones are named."""

import hashlib
import os
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from moco.config import DataConfig
from moco.data.base import names_digest
from moco.data.sources import load_source
from tests.data.images import names


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
    with pytest.raises(OSError, match="could not be downloaded") as caught:
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
    with pytest.raises(OSError, match=r"CIFAR10 could not be downloaded.*corrupted") as caught:
        load_source(DataConfig("cifar10", str(tmp_path), download=True))
    sentence(caught.value)
