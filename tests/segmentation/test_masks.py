"""Images with masks: the three layouts, the values of masks, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import ConfigError, RunWarning
from moco.config.segment import MasksConfig
from moco.data.decode import ImageError
from moco.segmentation.masks import CITYSCAPES_CLASSES, IGNORED, VOC_CLASSES, count_classes, open_masked

RNG = np.random.default_rng(0)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image = Image.fromarray(array).convert("L")
        image.putpalette(list(range(255, -1, -1)) * 3)  # not the identity: indices must be read, not colors
    image.save(path)


def folder(root: Path, count: int = 5, classes: int = 3, mode: str | None = None) -> Path:
    """Write images and masks of different sizes; the mask of image i is full of class i % classes."""
    for i in range(count):
        save(root / "images" / "a" / f"{i}.jpg", RNG.integers(0, 256, (6 + i, 8, 3), dtype=np.uint8))
        save(root / "masks" / "a" / f"{i}.png", np.full((6 + i, 8), i % classes, dtype=np.uint8), mode)
    return root


@pytest.mark.parametrize("mode", [None, "P"])
def test_a_folder_gives_images_and_the_numbers_in_their_masks(tmp_path: Path, mode: str | None) -> None:
    folder(tmp_path / "train", mode=mode)
    folder(tmp_path / "test", count=2, mode=mode)
    train, test = open_masked(MasksConfig(root=str(tmp_path / "train"), eval_root=str(tmp_path / "test")))
    assert (len(train), len(test)) == (5, 2)
    image, mask = train.read(4)
    assert image.shape == (3, 10, 8)
    assert image.dtype == torch.uint8
    assert mask.dtype == np.uint8
    assert (mask == 4 % 3).all()
    assert count_classes(train, 0)[:4].tolist() == [8 * (6 + 9), 8 * (7 + 10), 8 * 8, 0]


def test_held_out_images_are_no_training_images_and_copies_stay_together(tmp_path: Path) -> None:
    folder(tmp_path, count=20)
    content = (tmp_path / "images/a/3.jpg").read_bytes()
    for i in (7, 11):
        (tmp_path / f"images/a/{i}.jpg").write_bytes(content)
    for part in (0.1, 0.25, 0.5):
        train, held = open_masked(MasksConfig(root=str(tmp_path), hold_out=part))
        names = [{int(Path(image).stem) for image, _ in each.pairs} for each in (train, held)]
        assert names[0] | names[1] == set(range(20))
        assert not names[0] & names[1]
        assert abs(len(held) - 20 * part) <= 2
        assert {3, 7, 11} <= names[0] or {3, 7, 11} <= names[1]


def test_an_image_and_its_mask_can_have_names_in_two_forms_of_unicode(tmp_path: Path) -> None:
    folder(tmp_path, count=2)
    for kind, name in (("images", "\u00fc.jpg"), ("masks", "u\u0308.png")):
        (tmp_path / kind / "a" / f"1{Path(name).suffix}").rename(tmp_path / kind / "a" / name)
    train, _ = open_masked(MasksConfig(root=str(tmp_path), eval_root=str(tmp_path)))
    assert [Path(mask).name for _, mask in train.pairs] == ["0.png", "u\u0308.png"]


def test_voc_lists_name_the_images_and_the_larger_masks_are_used_if_they_exist(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for name, classes in (("2007_1", "SegmentationClass"), ("2007_2", "SegmentationClass")):
        save(base / "JPEGImages" / f"{name}.jpg", np.zeros((4, 5, 3), np.uint8))
        save(base / classes / f"{name}.png", np.array([[0, 15, 20, 255, 255]] * 4, dtype=np.uint8), "P")
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    (lists / "val.txt").write_text("2007_2\n\n")
    train, val = open_masked(MasksConfig(layout="voc", root=str(tmp_path)))
    assert [Path(each.pairs[0][0]).stem for each in (train, val)] == ["2007_1", "2007_2"]
    assert train.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    assert train.classes[train.read(0)[1][0, 1]] == "person"
    assert count_classes(train, 0)[[0, 15, 20, IGNORED]].tolist() == [4, 4, 4, 8]
    with pytest.raises(ConfigError, match=r"'trainaug' is not a split .*there are train, val"):
        open_masked(MasksConfig(layout="voc", root=str(tmp_path), split="trainaug"))
    save(base / "JPEGImages" / "u\u0308.jpg", np.zeros((4, 5, 3), np.uint8))
    save(base / "SegmentationClass" / "u\u0308.png", np.zeros((4, 5), np.uint8), "P")
    (lists / "umlaut.txt").write_text("\u00fc\n", encoding="utf-8")
    assert open_masked(MasksConfig(layout="voc", root=str(tmp_path), split="umlaut"))[0].read(0)[1].shape == (4, 5)
    (lists / "umlaut.txt").unlink()
    (lists / "val.txt").write_text("2007_3\n")
    with pytest.raises(ConfigError, match=r"the split 'val' lacks 2 files, such as .*2007_3\.jpg"):
        open_masked(MasksConfig(layout="voc", root=str(tmp_path)))


def test_cityscapes_has_the_19_classes_of_its_benchmark(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_1_leftImg8bit.png", np.zeros((2, 4, 3), np.uint8))
        labels = np.array([[7, 26, 33, 0], [4, 29, 30, 11]], dtype=np.uint8)
        save(tmp_path / "gtFine" / split / "ulm" / "ulm_1_gtFine_labelIds.png", labels)
    train, _ = open_masked(MasksConfig(layout="cityscapes", root=str(tmp_path)))
    mask = train.read(0)[1]
    assert [CITYSCAPES_CLASSES[each] for each in mask[0, :3]] == ["road", "car", "bicycle"]
    assert mask[:, 3].tolist() == [IGNORED, CITYSCAPES_CLASSES.index("building")]
    assert (mask[1, :3] == IGNORED).all()
    assert len(CITYSCAPES_CLASSES) == 19


def _rotate(root: Path, orientation: int = 3) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(root / "images/a/0.jpg") as image:
        image.save(root / "images/a/0.jpg", exif=exif)


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "a mask of another size": (
        lambda root: save(root / "masks/a/0.png", np.zeros((8, 6), np.uint8)),
        r"the image .*0\.jpg has 8 x 6 pixels and its mask .*0\.png 6 x 8",
    ),
    "a mask in color": (
        lambda root: save(root / "masks/a/0.png", np.zeros((6, 8, 3), np.uint8)),
        r"the mask .*0\.png holds colors \(mode RGB\)",
    ),
    "an unknown class": (
        lambda root: save(root / "masks/a/0.png", np.full((6, 8), 9, np.uint8)),
        r"the mask .*0\.png has a pixel of value 9, and the classes are 0 \.\.\. 2: .*masks\.classes",
    ),
    "the value 255 if it is not ignored": (
        lambda root: save(root / "masks/a/0.png", np.full((6, 8), 255, np.uint8)),
        r"the mask .*0\.png has a pixel of value 255, and the classes are 0 \.\.\. (2|254): ",
    ),
    "fractions": (
        lambda root: save((root / "masks/a/0.png").rename(root / "masks/a/0.tif"), np.zeros((6, 8), np.float32)),
        r"the mask .*0\.tif holds fractions \(mode F\)",
    ),
    "an image that is none": (
        lambda root: (root / "images/a/0.jpg").write_text("text"),
        r"cannot read the image .*0\.jpg: no known image format, it begins with b'text'",
    ),
    "16 bits": (
        lambda root: save(root / "masks/a/0.png", np.full((6, 8), 300, np.uint16)),
        r"the mask .*0\.png has values 300 \.\.\. 300; classes are 0 \.\.\. 255",
    ),
    "no image file": (
        lambda root: (root / "masks/a/0.png").write_text("text"),
        r"cannot read the mask .*0\.png: no known image",
    ),
    "an empty mask": (lambda root: (root / "masks/a/0.png").write_bytes(b""), r"the mask .*0\.png: the file is empty"),
    "a rotated image": (_rotate, r"0\.jpg is stored rotated"),
}


@pytest.mark.parametrize("name", BREAK)
def test_a_mask_that_cannot_be_used_is_one_sentence(tmp_path: Path, name: str) -> None:
    change, message = BREAK[name]
    folder(tmp_path)
    change(tmp_path)
    ignore = 7 if "255" in name else 255
    classes = [] if name == "the value 255 if it is not ignored" else ["sky", "sea", "sand"]
    train, _ = open_masked(MasksConfig(root=str(tmp_path), eval_root=str(tmp_path), classes=classes, ignore=ignore))
    with pytest.raises(ImageError, match=message):
        train.read(0)
    for workers in (0, 1):
        with pytest.raises(ImageError, match=message):
            count_classes(train, workers)


def test_an_image_whose_orientation_is_not_specified_is_upright(tmp_path: Path) -> None:
    folder(tmp_path)
    _rotate(tmp_path, orientation=0)
    train, _ = open_masked(MasksConfig(root=str(tmp_path), eval_root=str(tmp_path)))
    assert train.read(0)[1].shape == (6, 8)


def test_folders_that_do_not_match_are_one_sentence(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            open_masked(MasksConfig(root=str(tmp_path), hold_out=0.4))

    refused("must contain the folders images and masks: there is no .*images")
    folder(tmp_path)
    (tmp_path / "masks/a/1.png").unlink()
    refused(r"1 of 5 images have no mask \(masks/a/1\)")
    save(tmp_path / "masks/a/1.png", np.zeros((7, 8), np.uint8))
    (tmp_path / "images/a/1.png").write_bytes((tmp_path / "images/a/1.jpg").read_bytes())
    refused(r"a/1\.png and 1\.jpg have the same name")
    (tmp_path / "images/a/1.png").unlink()
    save(tmp_path / "masks/a/lonely.png", np.zeros((7, 8), np.uint8))
    with pytest.warns(RunWarning, match=r"1 masks have no image and are not used: a/lonely\.png"):
        open_masked(MasksConfig(root=str(tmp_path), hold_out=0.4))
    with pytest.raises(ConfigError, match="leaves a split empty"), pytest.warns(RunWarning):
        open_masked(MasksConfig(root=str(tmp_path), hold_out=0.01))
