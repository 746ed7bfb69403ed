"""Class labels: one reader for the labels of every source, and one comparison of the classes of two splits.

A label is a whole number, true or false, or a text. A value that is missing, empty, NaN or -1 means "unlabeled". A
split in which every image is unlabeled has no labels; a split with labels for some of its images only is refused.
Images with any number of labels each (multi-label) have a list of such values.

Legend: N images, L classes.
"""

import itertools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN = 5  # how many names a message lists
HELD_OUT = ("test", "validation", "valid", "val")  # names of a held-out split, the preferred one first


def read_labels(
    values: Sequence[Any], where: str, fix: str, classes: Sequence[str] = (), min_classes: int = 2
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Return labels (N,), which are indices into the class names, and these names; (None, ()) if no image has a label.

    Args:
        values: one value per image.
        where: the values' origin, for errors.
        fix: what a user can set instead, for errors.
        classes: the names, if the values are indices into them. Empty: the classes are the values that occur, numbers
            in ascending order and texts in alphabetical order. True and false are two classes even if one is missing.
        min_classes: the smallest number of classes.

    Raises:
        ValueError: if the values are not one class per image, if some images are unlabeled, or for too few classes.
    """
    missing = [is_missing(value) for value in values]
    count = sum(missing)
    if count == len(values):
        return None, ()
    known = [value for value, absent in zip(values, missing, strict=True) if not absent]
    _refuse_kind(known, where, fix)
    if count:
        raise ValueError(
            f"{where}: {count:,} of the {len(values):,} images have no label (missing, empty or -1): label all of "
            f"them, or {fix}"
        )
    if isinstance(known[0], str):
        found: list[Any] = sorted(set(known))
    elif isinstance(known[0], bool | np.bool_):
        found = [False, True]
    else:
        known = [int(value) for value in known]
        found = list(range(len(classes))) if classes else sorted(set(known))
        if outside := sorted(set(known) - set(found)):
            raise ValueError(f"{where}: label {outside[0]} is not an index of its {len(classes)} class names; {fix}")
    if len(found) < min_classes and not classes:
        raise ValueError(f"{where}: the only label is {found[0]!r}, and at least {min_classes} are needed; {fix}")
    index = {value: i for i, value in enumerate(found)}
    labels = np.fromiter((index[value] for value in known), np.int64, len(known))
    return labels, tuple(classes) if classes else tuple(map(str, found))


def read_label_sets(
    values: Sequence[Sequence[Any] | None], where: str, fix: str, classes: Sequence[str] = ()
) -> tuple[NDArray[np.bool_] | None, tuple[str, ...]]:
    """Return which classes each image has, (N, L), and the class names; (None, ()) if no image has a list.

    An image with an empty list has none of the classes. The arguments are those of `read_labels`, but `values` has a
    list per image.

    Raises:
        ValueError: if all lists are empty, if some lists or values in them are missing, or if the values cannot be
            classes.
    """
    missing = sum(value is None for value in values)
    known = [value for value in values if value is not None]
    if not known:
        return None, ()
    if missing:
        raise ValueError(
            f"{where}: {missing:,} of the {len(values):,} images have no list of labels: write an empty list if an "
            f"image has none of the classes, or {fix}"
        )
    each = [label for value in known for label in value]
    empty = sum(map(is_missing, each))
    if empty == len(each):
        raise ValueError(f"{where}: no image has a label; {fix}")
    if empty:
        raise ValueError(
            f"{where}: {empty:,} of the {len(each):,} labels in the lists are missing, empty or -1: remove them, "
            f"or {fix}"
        )
    indices, names = read_labels(each, where, fix, classes, min_classes=1)
    found = np.zeros((len(known), len(names)), np.bool_)
    found[np.repeat(np.arange(len(known)), [len(value) for value in known]), indices] = True
    return found, names


def with_classes(labels: NDArray[np.bool_], classes: Sequence[str], wanted: Sequence[str]) -> NDArray[np.bool_]:
    """Return which of the wanted classes each image has, (N, len(wanted)), from `labels` (N, L) of `classes`."""
    index = {name: i for i, name in enumerate(classes)}
    found = np.zeros((len(labels), len(wanted)), np.bool_)
    for column, name in enumerate(wanted):
        if name in index:
            found[:, column] = labels[:, index[name]]
    return found


def is_missing(value: Any) -> bool:
    """Return whether a value means "unlabeled"."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float | np.floating):
        return math.isnan(value) or value == -1
    return value is None or (isinstance(value, int | np.integer) and not isinstance(value, bool) and value == -1)


def several_labels_error(where: str, fix: str) -> ValueError:
    """Return the error for images with several labels each."""
    return ValueError(
        f"{where}: each image has a list of labels (multi-label), but one class per image is needed; {fix}"
    )


def _refuse_kind(values: Sequence[Any], where: str, fix: str) -> None:
    """Raise ValueError unless all values are texts, all true or false, or all whole numbers."""
    kinds = {_kind(value) for value in values}
    if "list" in kinds:
        raise several_labels_error(where, fix)
    if len(kinds) > 1 or not kinds <= {"text", "true or false", "whole number"}:
        found = ", ".join(sorted(kinds))
        raise ValueError(f"{where}: the values cannot be classes ({found}): use texts or whole numbers, or {fix}")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool | np.bool_):
        return "true or false"
    if isinstance(value, int | np.integer):
        return "whole number"
    if isinstance(value, float | np.floating):
        return "whole number" if float(value).is_integer() else "number with a fraction"
    return "list" if isinstance(value, list | tuple | np.ndarray) else type(value).__name__


def labels_of_split(
    labels: NDArray[np.int64], classes: Sequence[str], training: Sequence[str], where: str
) -> NDArray[np.int64]:
    """Return the labels (N,) of a held-out split as indices into the classes of training.

    The held-out split may lack classes of training. A name in `classes` that no held-out image has is ignored.

    Args:
        labels, classes: of the held-out split.
        training: the class names of training.
        where: the held-out split, for errors.

    Raises:
        ValueError: if held-out images have classes that training lacks.
    """
    index = {name: i for i, name in enumerate(training)}
    present = [classes[label] for label in np.unique(labels)]
    if extra := [name for name in present if name not in index]:
        raise ValueError(
            f"{where} has images of {first_names(extra)}, and training has no such class{_similar(extra, training)}: "
            "add training images of each class, or remove these held-out images"
        )
    place = np.array([index.get(name, -1) for name in classes], np.int64)
    return place[labels]


def _similar(extra: Sequence[str], training: Sequence[str]) -> str:
    """Return a hint if a class differs from a class of training only in its Unicode form or its case."""
    for name, other in itertools.product(extra, training):
        first, second = (unicodedata.normalize("NFC", each) for each in (name, other))
        if first == second:
            return f" ({name!a} and {other!a} look equal but differ in their Unicode form: rename one)"
        if first.casefold() == second.casefold():
            return f" ({name} and {other} differ in upper and lower case: rename one)"
    return ""


def first_names(names: Sequence[str], limit: int = SHOWN) -> str:
    """Return the first names as one text, and how many follow."""
    return (", ".join(names[:limit]) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")
