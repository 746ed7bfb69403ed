"""The splits of a data set of `moco.transfer`.

The data set is one of the literature, a folder of images, or the data set that the fields data.* describe.
"""

import difflib
import hashlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco.config import ConfigError, DataConfig, RunWarning, require
from moco.config.transfer import TransferConfig
from moco.data.arrays import SPLIT_SEED
from moco.data.base import Source, labeled
from moco.data.depth import with_pixel_format
from moco.data.duplicates import copies_message, count_copies
from moco.data.folder import FolderSource, joined, scan
from moco.data.keyed import HOLD_OUT, VALIDATION
from moco.data.labels import first_names
from moco.data.pixel_format import PixelFormat
from moco.data.sources import load_source, refuse_output_inside
from moco.data.transfer_sets import SETS, Labels, TransferSet, download, missing_message, open_splits
from moco.distributed import is_rank_zero, world_size
from moco.evaluation.subject import Subject, groups_of, open_labeled, readable_rows
from moco.evaluation.subsets import SubsetError, draw_labels, naming_field, split_each_class
from moco.runtime.console import log

OF_FIELDS = "data"  # the entry of `sets` that stands for the fields data.*
MEASURES = {"top1": "top-1", "mean_per_class": "mean per class", "voc_map": "mAP"}
VALIDATION_NAMES, TEST_NAMES = ("val", "valid", "validation"), ("test", "testing")


@dataclass(frozen=True, eq=False)
class Part:
    """Images and their labels."""

    source: Source
    # The class of each image, (M,). If images can have several classes, (M, L): 1 if the image has the class, 0 if it
    # does not, -1 if the image is left out for this class.
    labels: Labels

    def subset(self, rows: NDArray[np.int64]) -> "Part":
        """Return the given rows."""
        return Part(self.source.subset(rows), self.labels[rows])


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits of a data set."""

    train: Part
    validation: Part | None  # None: `train` is to be split
    test: Part
    measure: str  # a key of MEASURES

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.train.source.classes)

    def labeled(self) -> Source:
        """Return the training and the validation images together, with one label each."""
        if self.validation is None:
            return self.train.source
        parts: Any = [self.train.source, self.validation.source]  # only a `FolderSource` has a validation split
        found = joined(parts)
        assert found.classes == self.test.source.classes  # a label is the same class in all splits
        return replace(found, pixel_format=parts[0].pixel_format)

    def digest(self) -> str:
        """Return a digest of the images and labels of all splits."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            if part is not None:
                sha.update(part.source.content_digest().encode() + part.labels.tobytes())
        return sha.hexdigest()

    def with_validation(self, config: TransferConfig) -> tuple[Part, Part]:
        """Return the training and the validation images; see `TransferConfig.validation`. Collective."""
        if self.validation is not None:
            return self.train, self.validation
        with naming_field("validation", config.validation):
            groups = groups_of(self.train.source)
            rest, held = split_each_class(self.train.labels, config.validation, config.seed, VALIDATION, groups)
        return self.train.subset(rest), self.train.subset(held)


def check_names(sets: list[str]) -> None:
    """Refuse an entry of `sets` that is neither the name of a known data set nor an existing folder.

    Raises:
        ConfigError: for an unknown name.
        FileNotFoundError: for a path that does not exist or is not a folder.
    """
    for each in sets:
        if each in SETS or each == OF_FIELDS or Path(each).is_dir():
            continue
        if "/" in each or Path(each).exists():
            state = "is not a folder" if Path(each).exists() else "does not exist"
            raise FileNotFoundError(f"sets={each} {state}: name a folder of images with a folder per class")
        close = difflib.get_close_matches(each, [*SETS, OF_FIELDS], n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        known = ", ".join([*SETS, OF_FIELDS])
        raise ConfigError(f"sets={each} is neither a folder nor a known data set: {hint}use a folder or one of {known}")


def open_set(name: str, config: TransferConfig, subject: Subject) -> Splits:
    """Open a data set, an entry of `sets`. Collective.

    Raises:
        ConfigError, FileNotFoundError, ValueError: if the data set is missing or incomplete, or cannot be evaluated.
    """
    if name == OF_FIELDS:
        found = _open_fields(config, subject)
    else:
        splits = _open_named(name, config, subject) if name in SETS else _open_folder(name, config, subject)
        found = _readable(config, splits)
    if name in SETS:
        return found
    _refuse_missing_classes(name, found)
    copies = count_copies(found.train.source, found.test.source)
    if copies and is_rank_zero():
        warnings.warn(copies_message(copies, len(found.test.source)), RunWarning, stacklevel=2)
    return found


def _readable(config: TransferConfig, splits: Splits) -> Splits:
    """Return the splits without unreadable images if on_bad_image=skip. Collective."""

    def readable(part: Part, split: str) -> Part:
        rows = readable_rows(config, part.source, split)
        return part if rows is None else part.subset(rows)

    validation = None if splits.validation is None else readable(splits.validation, "validation")
    return Splits(readable(splits.train, "training"), validation, readable(splits.test, "test"), splits.measure)


def _open_named(name: str, config: TransferConfig, subject: Subject) -> Splits:
    known, channels = SETS[name], subject.file.channels
    require(
        channels == 3,
        f"sets={name} has images of 3 channels, but {subject.file.source} takes {channels}: remove {name} from sets",
    )
    try:
        parts = _parts(name, known, config.root)
    except FileNotFoundError:
        if not config.download:
            raise
        single = world_size() == 1  # a large download would exceed the time for which the other processes wait
        require(single, f"download=true works with one process: start the command without torchrun to download {name}")
        log(f"{name}: torchvision downloads {known.megabytes:,} MB into {config.root}")
        download(name, config.root)
        parts = _parts(name, known, config.root)
    if any(known.draw):
        with naming_field("sets", name):  # an error if a class has too few images, as in an incomplete copy
            parts = _draw(parts[0], *known.draw)
    validation = parts[1] if len(parts) == 3 else None
    return Splits(parts[0], validation, parts[-1], known.measure)


def _parts(name: str, known: TransferSet, root: str) -> list[Part]:
    if not name.startswith("cifar"):
        return [Part(source, labels) for source, labels in open_splits(name, root)]
    try:
        found = load_source(DataConfig(name=name, root=root))
    except FileNotFoundError as error:
        there = Path(root, known.folder).is_dir()
        raise FileNotFoundError(missing_message(name, root, there)) from error
    assert found.held_out is not None
    return [_part(found.train), _part(found.held_out)]


def _part(source: Source) -> Part:
    if source.multi_labels is not None:
        return Part(source, source.multi_labels.astype(np.int64))
    assert source.labels is not None
    return Part(source, source.labels)


def _draw(everything: Part, training: int, test: int) -> list[Part]:
    """Split the images of a set without published splits, always in the same way."""
    labels = everything.labels
    train = np.sort(draw_labels(labels, training, 0, SPLIT_SEED))
    pool = draw_labels(labels, training + test, 0, SPLIT_SEED) if test else np.arange(len(labels))
    return [everything.subset(train), everything.subset(np.setdiff1d(pool, train))]


def _open_folder(path: str, config: TransferConfig, subject: Subject) -> Splits:
    """Open a folder with train/ and one or both of test/ and val/, or with class folders only.

    In the first case, val/ is the test split if there is no test/. In the second case, hold out a part of each class as
    the test split.
    """
    output = subject.output
    data = DataConfig(name="folder", root=path, labels="folder", channels=subject.file.channels)
    data = replace(data, dtype=config.data.dtype or "uint8")
    refuse_output_inside(data, "output", output, "sets")
    endings = PixelFormat(data.channels, data.dtype).endings

    def open_part(folder: str, min_classes: int = 1) -> FolderSource:
        return scan("sets", folder, "folder", min_classes=min_classes, endings=endings)

    names = {kind: _first_folder(path, kinds) for kind, kinds in (("val", VALIDATION_NAMES), ("test", TEST_NAMES))}
    held_out = names["test"] or names["val"]
    if not (Path(path, "train").is_dir() and held_out):
        part = _part(with_pixel_format(labeled(open_part(path, 2)), data).train)
        try:
            rest, held = split_each_class(part.labels, config.hold_out, config.seed, HOLD_OUT, groups_of(part.source))
        except SubsetError as error:
            raise ConfigError(f"sets={path}: {error}") from error
        return Splits(part.subset(rest), None, part.subset(held), "top1")

    def open_evaluation_part(folder: str, train: FolderSource) -> Part:
        found = with_pixel_format(labeled(train, open_part(folder), f"sets={folder}"), data)
        assert found.held_out is not None
        return _part(found.held_out)

    train = open_part(f"{path}/train", 2)
    validation = open_evaluation_part(names["val"], train) if names["test"] and names["val"] else None
    test = open_evaluation_part(held_out, train)
    return Splits(_part(with_pixel_format(labeled(train), data).train), validation, test, "top1")


def _first_folder(path: str, names: tuple[str, ...]) -> str:
    return next((f"{path}/{name}" for name in names if Path(path, name).is_dir()), "")


def _open_fields(config: TransferConfig, subject: Subject) -> Splits:
    train, test = map(_part, open_labeled(config, subject))
    return Splits(train, None, test, "voc_map" if train.labels.ndim == 2 else "top1")


def _refuse_missing_classes(name: str, splits: Splits) -> None:
    """Refuse a test split that lacks images of a training class: the accuracy would be that of another task."""
    if splits.train.labels.ndim == 2:
        return
    lacking = np.setdiff1d(splits.train.labels, splits.test.labels)
    classes = splits.train.source.classes
    require(
        not len(lacking),
        f"sets={name}: the test split has no image of {first_names([classes[label] for label in lacking])}: add one or "
        "more, or remove the class (where a part of each class is held out as the test split, a class needs at least "
        "two images)",
    )
