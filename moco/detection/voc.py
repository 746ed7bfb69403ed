"""Boxes in the layout of Pascal VOC: JPEGImages/NAME.jpg, Annotations/NAME.xml, ImageSets/Main/SPLIT.txt."""

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from moco.config import ConfigError, require
from moco.data.file_names import existing_path, listed_names
from moco.data.labels import first_names
from moco.detection.box_check import BoxCheck
from moco.detection.images import BoxedImage, BoxedImages, split_of
from moco.files import cause

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(root: Path, splits: Sequence[str], classes: Sequence[str], drop: bool, training: bool) -> BoxedImages:
    """Read the images and boxes of one or several splits, and return them as one split.

    Args:
        root: VOCdevkit, the folder above VOCdevkit, or a folder that contains JPEGImages.
        splits: names of splits: YEAR/NAME, or NAME if `root` contains JPEGImages.
        classes: names of the classes, in the order of the class numbers.
        drop: leave out boxes that cannot be used (see `BoxCheck.clipped`), instead of refusing them.
        training: whether the splits are for training. In training, difficult objects are used, as in Detectron2; in
            evaluation, difficult objects are marked as ignored.

    Raises:
        ConfigError: for missing or damaged files, an unknown class, or, without `drop`, a box that cannot be used.
    """
    images, check = list[BoxedImage](), BoxCheck()
    for split in splits:
        year, _, name = split.rpartition("/")
        places = [root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"] if year else [root]
        base = next((each for each in places if (each / "JPEGImages").is_dir()), None)
        if base is None:
            fix = "set boxes.root, or name the splits with boxes.split and boxes.eval_split (YEAR/NAME, or NAME)"
            raise ConfigError(f"boxes.root={root}: there is no folder {places[0] / 'JPEGImages'}: {fix}")
        images += [_image(base, each, classes, check, training) for each in _names(base, name)]
    check.finish(f"boxes.root={root}, {first_names(splits)}", drop)
    return split_of(images, classes)


def _names(base: Path, split: str) -> list[str]:
    path = base / "ImageSets" / "Main" / f"{split}.txt"
    require(path.is_file(), f"{split!r} is not a split of this data set: {path} does not exist; choose another one")
    return [line.split()[0] for line in listed_names(path)]


def _image(base: Path, name: str, classes: Sequence[str], check: BoxCheck, training: bool) -> BoxedImage:
    path = Path(existing_path(str(base / "Annotations" / f"{name}.xml")))
    try:
        page = ElementTree.parse(path).getroot()
        width, height = (int(_number(page, f"size/{side}", least=1)) for side in ("width", "height"))
        objects = [
            (each.findtext("name", "").strip(), [_number(each, f"bndbox/{side}") for side in _SIDES], each)
            for each in page.iter("object")
        ]
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist, and the split lists {name}: add it") from error
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not an annotation of Pascal VOC ({cause(error)}): correct it") from error
    boxes, labels, difficult = [], [], []
    for kind, (left, top, right, bottom), entry in objects:
        known = f"and the classes are {first_names(classes)}"
        require(kind in classes, f"{path}: an object has the class {kind!r}, {known}: correct it, or set boxes.classes")
        # VOC counts pixels from 1, and the pixels at xmax and ymax belong to the box.
        box = check.clipped(f"{path}: the box of a {kind}", (left - 1, top - 1, right, bottom), (width, height))
        if box is not None:
            boxes.append(box)
            labels.append(1 + list(classes).index(kind))
            difficult.append(not training and entry.findtext("difficult", "0").strip() == "1")
    return BoxedImage(
        existing_path(str(base / "JPEGImages" / f"{name}.jpg")),
        width,
        height,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(difficult, dtype=bool),
        dropped=len(objects) - len(boxes),
    )


def _number(entry: ElementTree.Element, name: str, least: float = -math.inf) -> float:
    """Return the number that an element states; raise ValueError if it is no number, or a number below `least`."""
    text = entry.findtext(name, "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} is {text!r:.80}, not a number{f' of at least {least}' * math.isfinite(least)}")
    return value
