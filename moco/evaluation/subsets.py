"""Which labeled pictures fine-tuning gets: a part of each class, so many of each class, or those of a list.

Legend: N labeled pictures, L classes.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moco.data.keyed import FEW_LABELS, permutation


class SubsetError(ValueError):
    """Pictures that cannot be picked; its message is one sentence."""


def part_of_each_class(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Rows of a class-balanced part, ascending: of each class the rounded part, and at least one picture.

    With one seed a smaller part lies within a larger one: both are the beginning of one order.

    Args:
        labels: (N,).
        fraction: above 0, at most 1.
        seed: another one picks others.
    """
    return _first_of_each_class(labels, lambda count: max(1, round(fraction * count)), seed)


def per_class(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Rows of `count` pictures of each class that occurs, ascending; fewer lie within more.

    Raises:
        SubsetError: if a class has fewer pictures.
    """
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    if count > smallest:
        raise SubsetError(f"labels_per_class={count} is more than the smallest class has: take {smallest} at most")
    return _first_of_each_class(labels, lambda _: count, seed)


def listed(names: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """Rows of the pictures whose names end in the listed ones, at the beginning of a path's part; ascending.

    SimCLR's 1percent.txt says n01440764_10245.JPEG where the picture is n01440764/n01440764_10245.JPEG.

    Args:
        names: of all pictures, in their order.
        wanted: the list.

    Raises:
        SubsetError: if the list is empty, names a picture twice, none, or one that could be several.
    """
    if not wanted:
        raise SubsetError("the list names no picture: put one file name in a line")
    twice = [name for name, count in Counter(wanted).items() if count > 1]
    _refuse(twice, "stand in the list twice", "strike one of each out")
    endings = {name.rsplit("/", 1)[-1] for name in wanted}
    by_ending: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        ending = name.rsplit("/", 1)[-1]
        if ending in endings:
            by_ending.setdefault(ending, []).append(row)
    found = {
        name: [row for row in by_ending.get(name.rsplit("/", 1)[-1], []) if f"/{names[row]}".endswith(f"/{name}")]
        for name in wanted
    }
    missing = [name for name, rows in found.items() if not rows]
    _refuse(missing, "are not in the training split", "take the list of this data set")
    ambiguous = [name for name, rows in found.items() if len(rows) > 1]
    _refuse(ambiguous, "fit several pictures", "write their folders too, such as CLASS/NAME")
    rows = Counter(row for each in found.values() for row in each)
    same = [names[row] for row, count in rows.items() if count > 1]
    _refuse(same, "are listed under two names", "strike one of each out")
    return np.sort(np.array(list(rows), np.int64))


def _first_of_each_class(labels: NDArray[np.int64], how_many: Callable[[int], int], seed: int) -> NDArray[np.int64]:
    order = permutation(seed, 0, len(labels), FEW_LABELS)
    picked = []
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        picked.append(of_class[: how_many(len(of_class))])
    return np.sort(np.concatenate(picked))


def _refuse(names: Sequence[str], what: str, fix: str) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise SubsetError(f"{len(names)} of the listed pictures {what} ({', '.join(names[:3])}{more}): {fix}")
