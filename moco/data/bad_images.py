"""Pictures that cannot be read: what stands in for one while training, and how a run keeps count of them.

Legend: N pictures, W processes.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor

from moco.config import ConfigError
from moco.data.decode import ImageError
from moco.data.keyed import SUBSTITUTE, philox
from moco.data.sources import Progress, Source, subset
from moco.distributed import on_rank_zero, rank, world_size
from moco.files import write_csv, write_errors

# Substitutes in a row that may be unreadable too. With a hundredth of the pictures bad, three in a row are one in a
# million: only where the disk is gone, or nearly all is broken, are these not enough.
TRIES = 64


def substitutes(i: int, length: int) -> list[int]:
    """Which pictures may stand in for picture i, in this order: a function of i and N alone.

    They are drawn from all over the data set, not the next ones of the list: bad files come in rows (a folder whose
    copy was interrupted), and the picture behind such a row would stand in for all of it.
    """
    words = philox((0, 0), (np.arange(TRIES), SUBSTITUTE, i, 0))  # (TRIES, 4)
    drawn = (words[:, 0] << np.uint64(32) | words[:, 1]) % np.uint64(length)
    return [int(each) for each in drawn]


def readable(source: Source, i: int, bad: dict[int, str]) -> tuple[int, Tensor]:
    """Picture i, or the first of its substitutes that can be read: its index and its pixels (3, H, W).

    Args:
        source: the pictures.
        i: which one is wanted.
        bad: gets each picture that could not be read on the way, and why.

    Raises:
        ImageError: if none of the substitutes can be read either.
    """
    try:
        return i, source.image(i)
    except ImageError as error:
        bad[i] = error.reason
        first = error
    for each in substitutes(i, len(source)):
        try:
            return each, source.image(each)
        except ImageError as error:
            bad[each] = error.reason
    raise ImageError(
        f"{first}; nor can {TRIES} others that were tried in its place: look whether the disk that holds them is there"
    ) from first


def unreadable(source: Source, rows: Sequence[int], progress: Progress | None = None) -> dict[int, ImageError]:
    """Which of these pictures cannot be decoded, and why; `progress` is called with (done, total)."""

    def errors(part: Sequence[int]) -> dict[int, ImageError]:
        bad: dict[int, ImageError] = {}
        for i in part:
            try:
                source.image(i)
            except ImageError as error:
                bad[i] = error
        return bad

    parts = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    found: dict[int, ImageError] = {}
    with ThreadPoolExecutor() as pool:  # the decoders release the interpreter lock
        for number, bad in enumerate(pool.map(errors, parts)):
            found |= bad
            if progress is not None:
                progress(min(64 * (number + 1), len(rows)), len(rows))
    return found


def without_bad(
    source: Source, name: str, max_bad: float, progress: Progress | None = None
) -> tuple[Source, dict[int, str]]:
    """The source without the pictures that cannot be read, and those; each rank decodes a part and all get the same.

    For what accuracy is measured with. A substitute there would vote, or be counted, twice.

    Raises:
        ImageError: if more than the fraction `max_bad` cannot be read.
    """
    bad = _of_all_ranks(_reasons(unreadable(source, range(rank(), len(source), world_size()), progress)))
    if not bad:
        return source, bad
    _refuse_many(bad, source, name, max_bad, "")
    return subset(source, np.setdiff1d(np.arange(len(source)), np.array(list(bad), np.int64))), bad


class BadImages:
    """The pictures that a run could not read: one list for all ranks, which rank 0 keeps in a file.

    A rank notes what it finds as it goes; `settle` brings the notes together. Call that before a checkpoint is written:
    a run that is killed then goes on from the checkpoint, and finds again what it had found since.

    A list that is there already (a resumed run's) is checked: what has been mended since is taken off.

    Args:
        source: the pictures.
        file: the list, with the columns index, path and reason. Gone when nothing is bad.
        max_bad: the largest fraction of the pictures that may be bad.
    """

    def __init__(self, source: Source, file: Path, max_bad: float) -> None:
        self._source, self._max_bad = source, max_bad
        self.file = file
        self._noted: dict[int, str] = {}  # by this rank since they were last brought together
        self.found = on_rank_zero(self._still_bad)  # the same on every rank

    def note(self, bad: Mapping[int, str]) -> None:
        """Remembers what this rank found: indices and reasons."""
        self._noted |= {i: why for i, why in bad.items() if i not in self.found}

    def settle(self) -> int:
        """Brings all ranks' notes together and into the file: every rank calls it. Gives how many are new.

        Raises:
            ImageError: on every rank, if more than `max_bad` of the pictures are bad.
            WriteError: on every rank, if the file cannot be written.
        """
        new = _of_all_ranks(self._noted)
        self._noted = {}
        if new:
            self.found |= new
            on_rank_zero(self._write)
            _refuse_many(self.found, self._source, "training pictures", self._max_bad, f"; {self.file} lists them")
        return len(new)

    def _still_bad(self) -> dict[int, str]:
        if not self.file.exists():
            return {}
        try:
            with self.file.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                listed = [(int(row["index"]), row["path"]) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ConfigError(f"{self.file} is damaged: remove it, what is in it will be found again") from error
        there = [i for i, path in listed if 0 <= i < len(self._source) and self._source.name(i) == path]
        self.found = _reasons(unreadable(self._source, there))
        self._write()
        return self.found

    def _write(self) -> None:
        if not self.found:
            with write_errors(self.file):
                self.file.unlink(missing_ok=True)
            return
        lines = ((i, self._source.name(i), self.found[i]) for i in sorted(self.found))
        write_csv(self.file, ("index", "path", "reason"), lines)


def _reasons(errors: Mapping[int, ImageError]) -> dict[int, str]:
    return {i: error.reason for i, error in errors.items()}


def _of_all_ranks(bad: dict[int, str]) -> dict[int, str]:
    parts: Iterable[dict[int, str]] = [bad]
    if world_size() > 1:
        gathered: list[dict[int, str]] = [{}] * world_size()
        dist.all_gather_object(gathered, bad)
        parts = gathered
    return {i: why for part in parts for i, why in part.items()}


def _refuse_many(bad: Mapping[int, str], source: Source, what: str, max_bad: float, where: str) -> None:
    """Raises ImageError if too many of a source's pictures are bad."""
    if len(bad) > max_bad * len(source):
        first = min(bad)
        raise ImageError(
            f"{len(bad)} of the {len(source):,} {what} cannot be read, more than data.max_bad={max_bad:g} allows, the "
            f"first: {source.name(first)} ({bad[first]}){where}; python -m moco.check_data finds all: mend or remove "
            "them, or raise data.max_bad"
        )
