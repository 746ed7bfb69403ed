"""Unreadable images: their substitutes in training, and the list of the unreadable images of a run.

Legend: N images.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from moco.config import ConfigError
from moco.data.base import Progress, Source, in_threads
from moco.data.decode import ImageError
from moco.data.keyed import SUBSTITUTE, philox
from moco.distributed import all_gather_object, on_rank_zero, rank, world_size
from moco.files import write_csv, write_errors

# The largest number of substitutes to try. If 1 % of the images are unreadable, the first three fail in one case of a
# million. So all of them fail only if the disk is gone, or nearly everything is damaged.
TRIES = 64

OnUnreadable = Callable[[Mapping[int, str]], None]  # gets the indices of unreadable images and the reasons


def substitutes(i: int, length: int) -> list[int]:
    """Return the substitutes of image i in the order to try them: a function of i and N only.

    Substitutes are drawn from the complete data set. The next images are not used instead, because damaged files often
    come in a row (an interrupted copy): the image after the row would replace all of them.
    """
    words = philox((0, 0), (np.arange(TRIES), SUBSTITUTE, i, 0))  # (TRIES, 4)
    return [int(each) for each in (words[:, 0] << np.uint64(32) | words[:, 1]) % np.uint64(length)]


def image_or_substitute(source: Source, i: int, unreadable: dict[int, str]) -> tuple[int, Tensor]:
    """Return index and pixels (C, H, W) of image i or, if it is unreadable, of its first readable substitute.

    Every unreadable image that was tried is added to `unreadable`, with the reason.

    Raises:
        ImageError: if no substitute can be read either.
    """
    try:
        return i, source.image(i)
    except ImageError as error:
        unreadable[i] = error.reason
        first = error
    for each in substitutes(i, len(source)):
        try:
            return each, source.image(each)
        except ImageError as error:
            unreadable[each] = error.reason
    raise ImageError(f"{first}; {TRIES} substitutes cannot be read either: check the disk that holds them") from first


def find_unreadable(source: Source, rows: Sequence[int], progress: Progress | None = None) -> dict[int, ImageError]:
    """Decode the images `rows` and return the errors of the unreadable ones by image index.

    `progress` is called with (images done, images in `rows`).
    """

    def error_of(i: int) -> ImageError | None:
        try:
            source.image(i)
        except ImageError as error:
            return error
        return None

    errors = dict(zip(rows, in_threads(error_of, rows, progress), strict=True))
    return {i: error for i, error in sorted(errors.items()) if error is not None}


def without_unreadable(
    source: Source, name: str, max_fraction: float, progress: Progress | None = None
) -> tuple[Source, dict[int, str]]:
    """Return the source without its unreadable images, and the reasons by image index. Each rank decodes a part.

    This is for measuring accuracy, where a substitute would be counted twice. Raises an ImageError if more than
    `max_fraction` of the images are unreadable.
    """
    rows = range(rank(), len(source), world_size())
    found = reasons_of_all_ranks(lambda: find_unreadable(source, rows, progress))
    if not found:
        return source, found
    first = min(found)
    refuse_many(len(found), len(source), name, max_fraction, f"the first: {source.name(first)} ({found[first]})")
    return source.subset(np.setdiff1d(np.arange(len(source)), np.array(list(found), np.int64))), found


class UnreadableImages:
    """The images that a run could not read: one list for all ranks, which rank 0 writes to a file.

    Each rank notes the unreadable images that it finds; `synchronize` merges the notes. Call `synchronize` before a
    checkpoint is written: if the run is killed later, the resumed run repeats the steps after the checkpoint and finds
    their unreadable images again. A resumed run checks the images of the existing file and removes the readable ones
    from the list.

    Args:
        source: the images.
        file: the list, with the columns index, path and reason. It is removed if nothing is unreadable.
        max_fraction: the largest fraction of the images that may be unreadable.
    """

    def __init__(self, source: Source, file: Path, max_fraction: float) -> None:
        self._source, self._max_fraction = source, max_fraction
        self.file = file
        self._noted: dict[int, str] = {}  # by this rank since the last `synchronize`
        self.found = on_rank_zero(self._still_unreadable)  # the same on every rank

    def note(self, unreadable: Mapping[int, str]) -> None:
        """Remember the unreadable images that this rank found: indices and reasons."""
        self._noted |= {i: reason for i, reason in unreadable.items() if i not in self.found}

    def synchronize(self) -> int:
        """Merge all ranks' notes, write the file and return the number of new unreadable images. Collective.

        Raises:
            ImageError: on every rank, if more than `max_fraction` of the images are unreadable.
            WriteError: on every rank, if the file cannot be written.
        """
        new = _of_all_ranks(lambda: self._noted)
        self._noted = {}
        if new:
            self.found |= new
            on_rank_zero(self._write)
            first = min(self.found)
            example = f"the first: {self._source.name(first)} ({self.found[first]}); {self.file} lists them"
            refuse_many(len(self.found), len(self._source), "training images", self._max_fraction, example)
        return len(new)

    def _still_unreadable(self) -> dict[int, str]:
        if not self.file.exists():
            return {}
        try:
            with self.file.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                listed = [(int(row["index"]), row["path"]) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ConfigError(f"{self.file} is damaged: remove it; its images will be found again") from error
        rows = [i for i, path in listed if 0 <= i < len(self._source) and self._source.name(i) == path]
        self.found = _reasons(find_unreadable(self._source, rows))
        self._write()
        return self.found

    def _write(self) -> None:
        if self.found:
            lines = ((i, self._source.name(i), self.found[i]) for i in sorted(self.found))
            write_csv(self.file, ("index", "path", "reason"), lines)
            return
        with write_errors(self.file):
            self.file.unlink(missing_ok=True)


def reasons_of_all_ranks(find: Callable[[], Mapping[int, ImageError]]) -> dict[int, str]:
    """Join the unreadable images that each rank finds: their reasons by image index. Collective."""
    return _of_all_ranks(lambda: _reasons(find()))


def _reasons(errors: Mapping[int, ImageError]) -> dict[int, str]:
    return {i: error.reason for i, error in errors.items()}


def _of_all_ranks(find: Callable[[], dict[int, str]]) -> dict[int, str]:
    return {i: reason for part in all_gather_object(find) for i, reason in part.items()}


def refuse_many(count: int, length: int, what: str, max_fraction: float, example: str) -> None:
    """Raise ImageError if more than `max_fraction` of a source's images are unreadable."""
    if count > max_fraction * length:
        # data.max_bad must be below 1.
        alternative = ", or set the data.max_bad that moco.check_data names" if count < length else ""
        raise ImageError(
            f"{count} of the {length:,} {what} cannot be read, more than data.max_bad={max_fraction:g} allows, "
            f"{example}; python -m moco.check_data with the same fields data.* finds all: repair or remove them"
            f"{alternative}"
        )
