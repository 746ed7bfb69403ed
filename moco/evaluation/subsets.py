"""Class-balanced selections of labeled images: subsets, splits, repeated draws; and selections by a list of names.

Legend: N labeled images, L classes.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from moco.config import ConfigError
from moco.data.decode import read_bytes
from moco.data.file_names import normal_form
from moco.data.keyed import DRAW_LABELS, FEW_LABELS, HOLD_OUT, permutation

Rows = NDArray[np.int64]


class SubsetError(ValueError):
    """A selection that the data does not allow."""


@contextmanager
def naming_field(name: str, value: object) -> Iterator[None]:
    """Convert a SubsetError into a ConfigError that names the caller's field and its value."""
    try:
        yield
    except SubsetError as error:
        raise ConfigError(f"{name}={value}: {error}") from error


def part_of_each_class(labels: Rows, fraction: float, seed: int) -> Rows:
    """Select the same fraction of each class, rounded, at least one image; rows in ascending order.

    With the same seed, the images of a smaller fraction are among those of a larger one.
    """
    by_class = _by_class(labels, seed, FEW_LABELS)
    return np.sort(np.concatenate([rows[: max(1, round(fraction * len(rows)))] for rows in by_class]))


def per_class(labels: Rows, count: int, seed: int) -> Rows:
    """Select `count` images of each class; rows in ascending order.

    With the same seed, the images of a smaller count are among those of a larger one.

    Raises:
        SubsetError: if a class has fewer images.
    """
    return np.sort(_first_of_each(labels, count, seed, FEW_LABELS))


def draw_labels(labels: Rows, count: int, draw: int, seed: int = 0) -> Rows:
    """Select `count` images of each class for repeat number `draw`.

    The rows are ordered by class, and in random order within a class. The selection does not depend on the encoder.

    Raises:
        SubsetError: if a class has fewer images.
    """
    return _first_of_each(labels, count, seed, DRAW_LABELS + draw)


def split_each_class(
    labels: Rows | NDArray[np.bool_], part: float, seed: int, stream: int, groups: Rows | None = None
) -> tuple[Rows, Rows]:
    """Split rows into the rest and a part of each class. Every class keeps at least one image in the rest.

    Without groups, the part has at least one image of each class that has two or more. With groups of several images,
    the part may be smaller or larger than its fraction. A group is taken only if every class keeps an image in the
    rest. So the part can lack a class, for example a class whose images are all in one group.

    Args:
        labels: (N,), or (N, L) if images have several labels; such images are split as if they were one class.
        part: a fraction.
        seed, stream: key of the random order, see `moco.data.keyed`.
        groups: (N,); rows with the same number stay on one side, whatever their class. None: each row is a group.

    Returns:
        The rest and the part, each in ascending order.

    Raises:
        SubsetError: if no class can be split.
    """
    labels = np.zeros(len(labels), np.int64) if labels.ndim == 2 else labels.astype(np.int64, copy=False)
    by_class = _by_class(labels, seed, stream)
    wanted = [min(len(rows) - 1, max(1, round(part * len(rows)))) for rows in by_class]
    if groups is None or len(np.unique(groups)) == len(groups):
        held = np.sort(np.concatenate([rows[:count] for rows, count in zip(by_class, wanted, strict=True)]))
    else:
        held = _whole_groups(labels, groups, by_class, wanted)
    if not len(held):
        raise SubsetError(
            "every class has only one image, copies of one image, or frames of one video, so none can be split: add "
            "images, or videos"
        )
    return np.setdiff1d(np.arange(len(labels)), held), held


def _whole_groups(labels: Rows, groups: Rows, by_class: Sequence[Rows], wanted: Sequence[int]) -> Rows:
    """Return the rows of the part in ascending order: about `wanted` rows of each class, in whole groups.

    Args:
        labels, groups: (N,).
        by_class: the rows of each class that occurs, in their random order.
        wanted: the number of rows of each of these classes.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order[0]] - 1))
    members = {int(groups[rows[0]]): rows for rows in np.split(order, starts[1:])}
    left = Counter(labels.tolist())  # rows of each class in the rest
    held = set[int]()  # groups of the part
    taken = Counter[int]()  # rows of each class in the part

    def take(group: int, most: float, label: int) -> None:
        counts = Counter(labels[members[group]].tolist())
        if group not in held and taken[label] + counts[label] <= most and all(left[c] > counts[c] for c in counts):
            held.add(group)
            taken.update(counts)
            left.subtract(counts)

    for rows, count in zip(by_class, wanted, strict=True):
        label = int(labels[rows[0]])
        found = list(dict.fromkeys(groups[rows].tolist()))  # in their random order
        for group in found:
            take(group, count, label)
        for group in sorted(found, key=lambda group: len(members[group])):  # if no group was taken, a small group
            if taken[label] == 0 and count:
                take(group, math.inf, label)
    return np.sort(np.concatenate([members[group] for group in held])) if held else np.zeros(0, np.int64)


def listed(names: Sequence[str], wanted: Sequence[str]) -> Rows:
    """Select the images whose paths end with the listed names; rows in ascending order.

    SimCLR's 1percent.txt lists n01440764_10245.JPEG for the image n01440764/n01440764_10245.JPEG.

    Raises:
        SubsetError: if the list is empty, or if a name occurs twice, matches no image or matches several.
    """
    if not wanted:
        raise SubsetError("the list is empty: write one file name per line")
    _refuse([name for name, count in Counter(wanted).items() if count > 1], "are listed twice", "remove one of each")
    found = _rows_by_ending(names, wanted)
    forms = {normal_form(name): name for name, rows in found.items() if not (rows or name.isascii())}
    if forms:  # names with letters such as ü, which Unicode can write in several forms
        in_normal_form = _rows_by_ending([normal_form(name) for name in names], forms)
        found |= {forms[form]: rows for form, rows in in_normal_form.items()}
    missing = [name for name, rows in found.items() if not rows]
    fix = "use the list of this data set"
    if any("\\" in name for name in missing):
        fix = "write / between folders"
    elif any(line.rpartition(" ")[0].endswith(tuple(names)) for line in missing):
        fix = "write only the path on each line, without a label"
    _refuse(missing, "are not in the training split", fix)
    ambiguous = [name for name, rows in found.items() if len(rows) > 1]
    _refuse(ambiguous, "match several images", "write their folders too, such as CLASS/NAME")
    rows = Counter(row for each in found.values() for row in each)
    same = [names[row] for row, count in rows.items() if count > 1]
    _refuse(same, "are listed under two names", "remove one of each")
    return np.sort(np.array(list(rows), np.int64))


def _rows_by_ending(names: Sequence[str], endings: Iterable[str]) -> dict[str, list[int]]:
    """Return, for each ending, the rows of the paths that are equal to it or end with it after a slash."""
    found: dict[str, list[int]] = {ending: [] for ending in endings}
    for row, name in enumerate(names):
        parts = name.split("/")
        for ending in ("/".join(parts[start:]) for start in range(len(parts))):
            if ending in found:
                found[ending].append(row)
    return found


def _by_class(labels: Rows, seed: int, stream: int) -> list[Rows]:
    """Return the rows of each class that occurs, in a random order that depends on the key (`seed`, `stream`)."""
    order = permutation(seed, 0, len(labels), stream)
    counts = np.unique(labels, return_counts=True)[1]
    return np.split(order[np.argsort(labels[order], kind="stable")], np.cumsum(counts)[:-1])


def _first_of_each(labels: Rows, count: int, seed: int, stream: int) -> Rows:
    """Return the first `count` rows of each class, class by class."""
    by_class = _by_class(labels, seed, stream)
    smallest = min(map(len, by_class))
    if count > smallest:
        raise SubsetError(f"the smallest class has {smallest} images, fewer than {count}: use at most {smallest}")
    return np.concatenate([rows[:count] for rows in by_class])


def _refuse(names: Sequence[str], problem: str, fix: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        raise SubsetError(f"{len(names)} of the listed images {problem} ({shown}): {fix}")


def split_copies(paths: Sequence[str], part: float) -> tuple[list[int], list[int]]:
    """Divide the rows of image files at random into a rest and a held-out part; copies of an image stay together.

    Raises:
        ImageError: if a file cannot be read.
    """
    copies: dict[bytes, list[int]] = {}
    for row, path in enumerate(paths):
        copies.setdefault(hashlib.sha256(read_bytes(path)).digest(), []).append(row)
    groups, held = list(copies.values()), list[int]()
    for each in permutation(0, 0, len(groups), HOLD_OUT).tolist():
        if len(held) + len(groups[each]) <= round(part * len(paths)):
            held += groups[each]
    return sorted(set(range(len(paths))) - set(held)), sorted(held)
