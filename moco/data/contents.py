"""What a data set contains, in the lines that every command prints when it opens one: classes, and files left out."""

import warnings
from collections.abc import Mapping

import numpy as np

from moco.config import RunWarning
from moco.data.base import Source, Sources
from moco.data.labels import first_names

MOST_CLASSES = 10  # how many classes a line lists with their counts
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}


def opening_lines(sources: Sources) -> list[str]:
    """Return the lines about a data set's classes and about the files that are left out.

    Warns:
        RunWarning: if classes have the names of splits.
    """
    parts = [sources.train, *([sources.held_out] if sources.held_out is not None else [])]
    lines = [left_out_line(counts) for part in parts if (counts := part.left_out())]
    labeled = sources.bank if sources.train.labels is None and sources.bank is not None else sources.train
    if labeled.labels is None:
        return lines
    lines.append(class_line(labeled))
    if sources.held_out is not None and (lacking := classes_without_images(sources.held_out)):
        lines.append(f"no held-out image of: {first_names(lacking, MOST_CLASSES)}")
    splits = [name for name in labeled.classes if name.casefold() in SPLIT_NAMES]
    if len(splits) > 1:
        warnings.warn(
            f"the classes {first_names(splits)} have the names of splits: if they are splits, "
            "open one of them as the training images and the other as the held-out images",
            RunWarning,
            stacklevel=2,
        )
    return lines


def class_counts(source: Source) -> dict[str, int]:
    """Return the number of images of each class, by name; empty without labels."""
    if source.labels is None:
        return {}
    counts = np.bincount(source.labels, minlength=len(source.classes))
    return dict(zip(source.classes, counts.tolist(), strict=True))


def classes_without_images(source: Source) -> list[str]:
    """Return the classes that have no image in a labeled source."""
    return [name for name, count in class_counts(source).items() if not count]


def class_line(source: Source) -> str:
    """Return the classes of a labeled source with their numbers of images, as one line."""
    counts = class_counts(source)
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:MOST_CLASSES])
    more = ""
    if len(counts) > MOST_CLASSES:
        smallest, largest = min(counts.values()), max(counts.values())
        more = f" and {len(counts) - MOST_CLASSES:,} more; {smallest:,} to {largest:,} images each"
    return f"{len(counts):,} classes: {shown}{more}"


def left_out_line(counts: Mapping[str, int]) -> str:
    """Return, as one line, how many files are left out because their names are not those of images."""
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    named = [f"{count:,} {kind}" for kind, count in ordered]
    return f"left out, because their names are not those of images: {first_names(named, MOST_CLASSES)}"
