"""Images with a mask each, in the layouts of Pascal VOC and Cityscapes or in two plain folders.

A mask is an image file of one channel; the value of a pixel is the number of its class.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from moco.config import ConfigError, RunWarning, require
from moco.config.segment import MasksConfig
from moco.data.decode import ImageError, decode_bytes, pil_reason, read_bytes
from moco.data.file_names import existing_path, listed_names, other_forms
from moco.data.labels import first_names
from moco.data.walk import IMAGE_ENDINGS, IMAGE_FORMATS, walk
from moco.data.workers import in_order
from moco.evaluation.subsets import split_copies
from moco.runtime.console import progress_bar

WORKERS = "masks.workers"  # the field for the number of loader processes, named in errors
IGNORED = 255  # the value of a pixel without a class, in every mask that `MaskedImages` returns

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CITYSCAPES_CLASSES = (  # the 19 of the benchmark
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
# The numbers of these classes in the files *_labelIds.png, from the authors' labels.py.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True, eq=False)
class MaskedImages:
    """The images of one split, and their masks.

    Attributes:
        pairs: Paths of the image and of the mask, for each image.
        classes: Names of the classes 0, 1, ... If neither the layout nor the configuration names them, empty until all
            masks are read.
        table: The class of each value in a mask file, (256,): a number, `IGNORED`, or -1 for a value that is refused.
    """

    pairs: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]
    table: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.pairs)

    def subset(self, rows: Sequence[int]) -> "MaskedImages":
        return replace(self, pairs=tuple(self.pairs[row] for row in rows))

    def read(self, row: int) -> tuple[Tensor, NDArray[np.uint8]]:
        """Return the image, uint8 (3, H, W), and the class of each pixel, (H, W); `IGNORED` for no class.

        Raises:
            ImageError: if a file cannot be read, image and mask differ in size, the mask has an unknown class, or the
                EXIF tag of the image states a rotation.
        """
        path, _ = self.pairs[row]
        mask = self.mask(row)
        return decode_bytes(path, read_bytes(path)), mask

    def mask(self, row: int) -> NDArray[np.uint8]:
        """Return the class of each pixel of an image, (H, W), without decoding the image. Errors: see `read`."""
        path, mask_path = self.pairs[row]
        values = _read_mask(mask_path)
        classes: NDArray[np.int16] = self.table[values]
        if classes.min() < 0:
            wrong, last = int(values[classes < 0][0]), (len(self.classes) or IGNORED) - 1
            fix = (
                "correct the mask, set masks.classes to all names, or set masks.ignore to the value that means no class"
            )
            raise ImageError(
                f"the mask {mask_path} has a pixel of value {wrong}, and the classes are 0 ... {last}: {fix}"
            )
        size, orientation = _header(path)
        if size != values.shape[::-1]:
            sizes = [" x ".join(map(str, each)) for each in (size, values.shape[::-1])]
            raise ImageError(
                f"the image {path} has {sizes[0]} pixels and its mask {mask_path} {sizes[1]}: correct one of them"
            )
        if orientation in range(2, 9):  # other values, such as 0, mean upright
            fix = "rotate the pixels of the image, and remove its EXIF tag"
            raise ImageError(f"{path} is stored rotated, and its mask may not be: {fix}")
        return classes.astype(np.uint8)


def open_masked(config: MasksConfig) -> tuple[MaskedImages, MaskedImages]:
    """Find the images and masks of the training and the held-out split. No mask is read.

    Raises:
        ConfigError: if a folder or file of the layout is missing, an image has no mask, or a split is empty.
        ImageError: see `split_copies`.
    """
    root = Path(config.root)
    require(root.is_dir(), f"masks.root={root} is not a folder: set it to the folder of the data set")
    if config.layout != "folder":
        find, table, classes = (
            (_voc, _table(len(VOC_CLASSES), config.ignore), VOC_CLASSES)
            if config.layout == "voc"
            else (_cityscapes, _cityscapes_table(), CITYSCAPES_CLASSES)
        )
        splits = [MaskedImages(tuple(find(root, name)), classes, table) for name in (config.split, config.eval_split)]
        return splits[0], splits[1]
    names = tuple(config.classes)
    known = MaskedImages((), names, _table(len(names) or IGNORED, config.ignore))
    train = replace(known, pairs=tuple(_folder(root, "masks.root")))
    if config.eval_root:
        return train, replace(known, pairs=tuple(_folder(Path(config.eval_root), "masks.eval_root")))
    rest, held = split_copies([path for path, _ in train.pairs], config.hold_out)
    require(
        bool(rest and held),
        f"masks.hold_out={config.hold_out} of {len(train)} images leaves a split empty: change it, or name held-out "
        "images with masks.eval_root",
    )
    return train.subset(rest), train.subset(held)


def count_classes(
    images: MaskedImages, workers: int | None, heartbeat: Callable[[], None] = lambda: None
) -> NDArray[np.int64]:
    """Read all masks and return the number of pixels of each class, (256,); at `IGNORED` those without a class.

    Raises:
        ImageError: for the first mask that cannot be used, so that no such mask ends the training later.
    """
    total = np.zeros(256, dtype=np.int64)
    counted = closing(in_order(_Counted(images), range(len(images)), workers, WORKERS))
    with progress_bar("reading masks", heartbeat) as progress, counted as counts:
        for done, each in enumerate(counts, start=1):
            if isinstance(each, ImageError):
                raise each
            total += each
            progress(done, len(images))
    return total


@dataclass(frozen=True)
class _Counted:
    """Counts the pixels of each class in the mask of an image, (256,), in a loader process."""

    images: MaskedImages

    def __call__(self, row: int) -> NDArray[np.int64] | ImageError:
        try:
            return np.bincount(self.images.mask(row).ravel(), minlength=256)
        except ImageError as error:
            return error


def _table(classes: int, ignore: int) -> NDArray[np.int16]:
    """Return `MaskedImages.table` for the classes 0 ... classes - 1; the value `ignore` means no class."""
    table = np.full(256, -1, dtype=np.int16)
    table[:classes] = np.arange(classes)
    table[ignore] = IGNORED
    return table


def _cityscapes_table() -> NDArray[np.int16]:
    table = np.full(256, IGNORED, dtype=np.int16)  # the other classes are not part of the benchmark
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return table


def _folder(root: Path, field: str) -> list[tuple[str, str]]:
    """Return the paths of each image, ROOT/images/NAME.*, and its mask, ROOT/masks/NAME.*, sorted by name."""
    found: dict[str, dict[str, str]] = {}
    for kind in ("images", "masks"):
        folder = root / kind
        require(folder.is_dir(), f"{field}={root} must contain the folders images and masks: there is no {folder}")
        found[kind] = {}
        for path in walk(str(folder), IMAGE_ENDINGS).images:
            name = str(Path(path).with_suffix(""))
            same = found[kind].get(name)
            require(same is None, f"{folder}: {path} and {Path(str(same)).name} have the same name: remove one")
            found[kind][name] = path
    image_of = other_forms(found["masks"], found["images"])
    images, masks = found["images"], {image_of.get(name, name): path for name, path in found["masks"].items()}
    require(bool(images), f"{field}={root}: there are no images below {root / 'images'}")
    lacking = [name for name in images if name not in masks]
    require(
        not lacking,
        f"{field}={root}: {len(lacking)} of {len(images)} images have no mask (masks/{first_names(lacking)}): add "
        "masks of the same names, or move the images away",
    )
    if unused := [masks[name] for name in masks if name not in images]:
        problem = f"{len(unused)} masks have no image and are not used: {first_names(unused)}"
        warnings.warn(f"{field}={root}: {problem}", RunWarning, stacklevel=2)
    return [(str(root / "images" / path), str(root / "masks" / masks[name])) for name, path in images.items()]


def _voc(root: Path, split: str) -> list[tuple[str, str]]:
    """Return the paths of image and mask for each name in ImageSets/Segmentation/SPLIT.txt.

    This file is in `root`, or else in VOC2012 or VOCdevkit/VOC2012 below `root`.
    """
    places = [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
    base = next((each for each in places if (each / "ImageSets" / "Segmentation").is_dir()), None)
    if base is None:
        problem = "there is no ImageSets/Segmentation in it, in its VOC2012 or in its VOCdevkit/VOC2012"
        raise ConfigError(f"masks.root={root}: {problem}: set masks.root to the folder VOCdevkit")
    names = _lines(base / "ImageSets" / "Segmentation" / f"{split}.txt", split)
    larger = base / "SegmentationClassAug"  # of Hariharan et al. (2011), for trainaug
    masks = larger if larger.is_dir() else base / "SegmentationClass"
    pairs = [(str(base / "JPEGImages" / f"{name}.jpg"), str(masks / f"{name}.png")) for name in names]
    return _existing(pairs, split)


def _cityscapes(root: Path, split: str) -> list[tuple[str, str]]:
    folder, end = root / "leftImg8bit" / split, "_leftImg8bit.png"
    require(folder.is_dir(), f"masks.root={root}: there is no folder {folder}")
    names = [name.removesuffix(end) for name in walk(str(folder)).images if name.endswith(end)]
    require(bool(names), f"masks.root={root}: no file *{end} below {folder}")
    masks = root / "gtFine" / split
    return _existing([(f"{folder}/{name}{end}", f"{masks}/{name}_gtFine_labelIds.png") for name in names], split)


def _lines(path: Path, split: str) -> list[str]:
    lists = ", ".join(sorted(each.stem for each in path.parent.glob("*.txt")))
    require(path.is_file(), f"{split!r} is not a split of this data set: {path} does not exist (there are {lists})")
    return listed_names(path)


def _existing(pairs: list[tuple[str, str]], split: str) -> list[tuple[str, str]]:
    pairs = [(existing_path(image), existing_path(mask)) for image, mask in pairs]
    missing = [path for pair in pairs for path in pair if not Path(path).is_file()]
    problem = f"the split {split!r} lacks {len(missing)} files, such as {first_names(missing[:3])}"
    require(not missing, f"{problem}: add them below masks.root, or choose another split")
    return pairs


def _read_mask(path: str) -> NDArray[np.uint8]:
    """Return the values of a mask file, (H, W); of an image with a palette, the indices of its colors."""
    fix = "save it as a PNG with a palette or gray values, in which the value of a pixel is the number of its class"
    try:
        content = read_bytes(path)
    except ImageError as error:
        raise ImageError(f"cannot read the mask {path}: {error.reason}") from error
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if image.format == "JPEG":
                raise ImageError(f"the mask {path} is a JPEG, which changes the values of pixels: {fix}")
            if image.mode not in ("P", "L", "1", "I", "I;16"):
                kind = {"F": "fractions", "LA": "transparency"}.get(image.mode, "colors")
                raise ImageError(f"the mask {path} holds {kind} (mode {image.mode}): {fix}")
            values = np.array(image)
    except ImageError:
        raise
    except Exception as error:  # PIL raises many types
        raise ImageError(f"cannot read the mask {path}: {pil_reason(error, content)}") from error
    if values.min() < 0 or values.max() > 255:
        raise ImageError(f"the mask {path} has values {values.min()} ... {values.max()}; classes are 0 ... 255")
    return values.astype(np.uint8)


def _header(path: str) -> tuple[tuple[int, int], int]:
    """Return width and height of an image as stored, and its EXIF orientation (1: upright)."""
    content = read_bytes(path)
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            return image.size, int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # PIL raises many types
        raise ImageError(f"cannot read the image {path}: {pil_reason(error, content)}") from error
