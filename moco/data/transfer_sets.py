"""The data sets of the transfer literature, as torchvision lays them out below a folder.

    Kornblith, Shlens & Le, "Do better ImageNet models transfer better?", CVPR 2019, table 1

Two data sets differ from those of the paper, because torchvision's copies of them differ: Caltech-101 has no background
class, and SUN397 has no splits. SUN397 is split here, always in the same way, into 50 training and 50 test images per
class.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision import datasets

from moco.config.base import ConfigError
from moco.data.folder import FolderSource

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class TransferSet:
    """A data set of torchvision, its splits and its measure."""

    dataset: str  # the class in torchvision.datasets
    splits: tuple[Mapping[str, Any], ...]  # its arguments for (training, test), (training, validation, test) or (all,)
    measure: str  # top1, mean_per_class or voc_map
    images: tuple[int, ...]  # of each split
    classes: int
    megabytes: int  # of the download
    folder: str  # below the root
    files: Callable[[Any], tuple[Sequence[Any], Sequence[Any]]] = lambda found: (found._image_files, found._labels)
    draw: tuple[int, int] = (0, 0)  # for (all,): training and test images per class, drawn at random; 0: all others
    available: bool = True  # whether torchvision can download it

    def names(self, found: Any) -> tuple[str, ...]:
        """Return the names of the classes of an opened data set."""
        classes = VOC_CLASSES if self.measure == "voc_map" else getattr(found, "classes", None) or found.categories
        return tuple(map(str, classes))


def _split(*names: str) -> tuple[Mapping[str, Any], ...]:
    return tuple({"split": name} for name in names)


def _caltech_files(found: Any) -> tuple[list[str], list[int]]:
    folder = Path(found.root, "101_ObjectCategories")
    numbered = zip(found.y, found.index, strict=True)
    return [str(folder / found.categories[label] / f"image_{number:04d}.jpg") for label, number in numbered], found.y


def _voc_files(found: Any) -> tuple[list[str], list[Labels]]:
    """Return the paths of the images, and the labels (20,) of each image.

    A label is 1 if the image has the class, 0 if it does not, and -1 if all its objects of the class are difficult. In
    the challenge's own files, -1 and 0 have the opposite meanings.
    """

    def labels(annotation: str) -> Labels:
        each = np.zeros(len(VOC_CLASSES), np.int64)
        for item in ElementTree.parse(annotation).getroot().iter("object"):
            label = VOC_CLASSES.index(item.findtext("name", ""))
            each[label] = 1 if item.findtext("difficult") != "1" else each[label] or -1
        return each

    return found.images, [labels(path) for path in found.annotations]


_TRAIN_TEST = ({"train": True}, {"train": False})
_VOC07 = tuple({"year": "2007", "image_set": name} for name in ("train", "val", "test"))

SETS = {
    "cifar10": TransferSet("CIFAR10", _TRAIN_TEST, "top1", (50_000, 10_000), 10, 170, "cifar-10-batches-py"),
    "cifar100": TransferSet("CIFAR100", _TRAIN_TEST, "top1", (50_000, 10_000), 100, 169, "cifar-100-python"),
    "flowers": TransferSet(
        *("Flowers102", _split("train", "val", "test"), "mean_per_class", (1_020, 1_020, 6_149), 102, 345),
        "flowers-102",
    ),
    "pets": TransferSet(
        *("OxfordIIITPet", _split("trainval", "test"), "mean_per_class", (3_680, 3_669), 37, 811, "oxford-iiit-pet"),
        files=lambda found: (found._images, found._labels),
    ),
    "dtd": TransferSet("DTD", _split("train", "val", "test"), "top1", (1_880, 1_880, 1_880), 47, 625, "dtd"),
    "food": TransferSet("Food101", _split("train", "test"), "top1", (75_750, 25_250), 101, 4_996, "food-101"),
    "aircraft": TransferSet(
        *("FGVCAircraft", _split("train", "val", "test"), "mean_per_class", (3_334, 3_333, 3_333), 100, 2_753),
        "fgvc-aircraft-2013b",
    ),
    "caltech101": TransferSet(
        *("Caltech101", ({},), "mean_per_class", (8_677,), 101, 137, "caltech101", _caltech_files),
        draw=(30, 0),
    ),
    "sun397": TransferSet("SUN397", ({},), "top1", (108_754,), 397, 39_100, "SUN397", draw=(50, 50)),
    "cars": TransferSet(
        *("StanfordCars", _split("train", "test"), "top1", (8_144, 8_041), 196, 1_950, "stanford_cars"),
        files=lambda found: ([path for path, _ in found._samples], [label for _, label in found._samples]),
        available=False,
    ),
    "voc07": TransferSet("VOCDetection", _VOC07, "voc_map", (2_501, 2_510, 4_952), 20, 911, "VOCdevkit", _voc_files),
}


def download(name: str, root: str) -> None:
    """Let torchvision download a data set into a folder.

    Raises:
        ConfigError: if torchvision cannot download it.
        OSError: if the download fails; the message gives the reason.
    """
    known, folder = SETS[name], _absolute(root)
    if not known.available:
        raise ConfigError(
            f"sets={name} cannot be downloaded, because its publisher has withdrawn it: put a copy into "
            f"{Path(folder, known.folder)}, as torchvision's {known.dataset} documents, or remove {name}"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for split in known.splits:
            getattr(datasets, known.dataset)(folder, download=True, **split)
    except Exception as error:  # whatever torchvision, urllib and tarfile raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"sets={name} ({known.megabytes:,} MB) could not be downloaded to root={root} ({folder}): {reason}; check "
            "the connection and the disk and run the same command again, or copy the data set there"
        ) from error


def open_splits(name: str, root: str) -> list[tuple[FolderSource, Labels]]:
    """Return the images and the labels of each split: classes (N,), or for VOC (N, L) with the labels of `_voc_files`.

    CIFAR, whose images are not in files, is opened by `moco.data.arrays`.

    Raises:
        FileNotFoundError: if the data set is missing, incomplete or damaged; the message says how to get it.
    """
    known, folder = SETS[name], _absolute(root)
    try:
        return [_source(known, getattr(datasets, known.dataset)(folder, **split), folder) for split in known.splits]
    except Exception as error:  # whatever torchvision raises for missing and damaged files
        place = Path(folder, known.folder)
        there = place.is_dir() and any(place.iterdir())
        raise FileNotFoundError(missing_message(name, root, there)) from error


def missing_message(name: str, root: str, there: bool = False) -> str:
    """Return the message for a data set that is not in its folder; with `there`, for one that is incomplete there."""
    known, place = SETS[name], Path(_absolute(root), SETS[name].folder)
    state = f"is incomplete or damaged in {place}" if there else f"was not found in root={root} ({place})"
    fix = f"remove {place}, then set download=true" if there else f"set download=true ({known.megabytes:,} MB)"
    if not known.available:
        fix = f"put a copy there, as torchvision's {known.dataset} documents, because its publisher has withdrawn it"
    return f"sets={name} {state}: {fix}, set another root, or remove {name} from sets"


def _source(known: TransferSet, found: Any, folder: str) -> tuple[FolderSource, Labels]:
    files, labels = known.files(found)
    # Sorted, because torchvision lists some folders in the order of the file system.
    order = sorted(range(len(files)), key=lambda i: str(files[i]))
    paths = np.array([os.fsencode(os.path.relpath(files[i], folder)) for i in order])
    values = np.array([labels[i] for i in order], np.int64)
    kind = {"multi_labels": values == 1} if values.ndim == 2 else {"labels": values}
    return FolderSource(folder, paths, classes=known.names(found), **kind), values


def _absolute(root: str) -> str:
    return str(Path(root).expanduser().absolute())
