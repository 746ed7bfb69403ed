"""The named data sets of `moco.transfer`, in the layout of torchvision; no network is used."""

import urllib.error
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from moco.config import ConfigError
from moco.data.folder import FolderSource
from moco.data.transfer_sets import SETS, VOC_CLASSES, download, open_splits
from moco.evaluation.transfer_data import Part, Splits
from tests.data.images import gradient


def write_voc(root: Path) -> None:
    """Write VOC07 with two images per split: a dog with a difficult cat, and three cats, two of them difficult."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    objects = [[("dog", 0), ("cat", 1)], [("cat", 1), ("cat", 0), ("cat", 1)]]
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{2 * number + i:06}" for i in range(2)]
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name, each in zip(names, objects, strict=True):
            gradient(int(name)).save(base / "JPEGImages" / f"{name}.jpg")
            parts = [
                f"<object><name>{label}</name><difficult>{difficult}</difficult><part><name>head</name></part></object>"
                for label, difficult in each
            ]
            (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(parts)}</annotation>")


def write_caltech(root: Path, each: int = 33) -> None:
    for name in ("BACKGROUND_Google", "ant", "bass"):
        folder = root / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for i in range(1, each + 1):
            gradient(i, 8, 8).save(folder / f"image_{i:04d}.jpg")


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    for split, first in (("trainval", 0), ("test", 50)):
        names = [f"{breed}_{first + i}" for breed in ("Abyssinian", "great_dane") for i in range(3)]
        lines = [f"{name} {1 + (name[0] == 'g')} 1 1" for name in names]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for i, name in enumerate(names):
            gradient(first + i).save(folder / "images" / f"{name}.jpg")


def test_every_set_names_a_class_of_torchvision_and_its_measure() -> None:
    for name, known in SETS.items():
        assert hasattr(datasets, known.dataset), name
        assert known.measure in ("top1", "mean_per_class", "voc_map")
        assert len(known.images) == len(known.splits)
        assert (len(known.splits) == 1) == any(known.draw)
    per_class = {name for name, known in SETS.items() if known.measure == "mean_per_class"}
    assert per_class == {"pets", "flowers", "aircraft", "caltech101"}


@pytest.mark.parametrize("name", SETS)
def test_without_a_network_the_error_names_the_set_its_size_and_the_fix(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", closed)
    if SETS[name].available:
        with pytest.raises(OSError, match=f"sets={name} .*could not be downloaded") as caught:
            download(name, str(tmp_path / "data"))
        assert "Network is unreachable" in str(caught.value)
        assert f"{SETS[name].megabytes:,} MB" in str(caught.value)
    else:
        with pytest.raises(ConfigError, match=f"sets={name} cannot be downloaded"):
            download(name, str(tmp_path / "data"))


@pytest.mark.parametrize("name", [name for name in SETS if not name.startswith("cifar")])
def test_a_missing_set_is_refused_with_its_folder(name: str, tmp_path: Path) -> None:
    fix = "set download=true" if SETS[name].available else "put a copy there"
    with pytest.raises(FileNotFoundError, match=f"sets={name} was not found in root=.*{fix}"):
        open_splits(name, str(tmp_path))
    (tmp_path / SETS[name].folder / "part").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"sets={name} is incomplete or damaged in {tmp_path}"):
        open_splits(name, str(tmp_path))


def test_voc_has_classes_of_each_image_and_difficult_ones(tmp_path: Path) -> None:
    write_voc(tmp_path)
    train, validation, test = open_splits("voc07", str(tmp_path))
    for source, labels in (train, validation, test):
        assert len(source) == 2
        assert source.classes == VOC_CLASSES
        cat, dog = VOC_CLASSES.index("cat"), VOC_CLASSES.index("dog")
        assert labels[:, cat].tolist() == [-1, 1]
        assert labels[:, dog].tolist() == [1, 0]
        assert np.count_nonzero(labels) == 3
        assert source.multi_labels is not None
        assert source.multi_labels.sum() == 2
    assert test[0].name(0) == "VOCdevkit/VOC2007/JPEGImages/000004.jpg"
    assert test[0].image(0).shape == (3, 48, 64)


def test_pets_and_caltech_have_files_and_labels(tmp_path: Path) -> None:
    write_pets(tmp_path)
    write_caltech(tmp_path, 4)
    train, test = open_splits("pets", str(tmp_path))
    assert train[0].classes == ("Abyssinian", "Great Dane")
    assert test[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert test[0].name(3) == "oxford-iiit-pet/images/great_dane_50.jpg"
    ((source, labels),) = open_splits("caltech101", str(tmp_path))
    assert source.classes == ("ant", "bass")
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert source.name(4).endswith("bass/image_0001.jpg")
    assert source.image(7).shape == (3, 8, 8)


@pytest.mark.parametrize("classes", [("pink primrose", "alpine sea holly"), ("a", "b")])
def test_training_and_validation_images_keep_the_class_numbers_of_the_test_images(classes: tuple[str, ...]) -> None:
    def part(labels: list[int]) -> Part:
        paths = np.array([b"%d.png" % number for number in range(len(labels))])
        return Part(FolderSource("", paths, np.array(labels), classes), np.array(labels))

    splits = Splits(part([1, 0, 1]), part([0, 1]), part([0]), "top1")
    joined = splits.labeled()
    assert joined.classes == splits.test.source.classes
    assert joined.labels is not None
    assert joined.labels.tolist() == [1, 0, 1, 0, 1]
