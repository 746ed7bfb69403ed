"""A `torch.utils.data.Dataset` as a source: each item is an image, or a tuple that begins with the image and its label.

Legend: N images.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.config import ConfigError, DataConfig, require
from moco.data.base import Source, Sources, entries_digest, labeled, labels_at
from moco.data.decode import ImageError
from moco.data.in_memory import to_pixels
from moco.data.pixel_format import RGB, PixelFormat

_SAMPLED = 64  # images whose pixels enter the digest of the content; hashing all of them would take too long


@dataclass(frozen=True, eq=False)
class DatasetSource(Source):
    """The images of a map-style data set, each read on request."""

    dataset: Any  # len(dataset) and dataset[i]
    split: str
    rows: NDArray[np.int64]  # (N,), indices of the data set's items
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    pixel_format: PixelFormat = RGB
    multi_labels: NDArray[np.bool_] | None = None  # see `Source`

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Tensor:
        try:
            return to_pixels(_parts(self.dataset[int(self.rows[i])])[0], self.pixel_format)
        except Exception as error:  # the data set is the user's code and can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"cannot read image {self.name(i)}: {reason}", "damaged", reason) from error

    def name(self, i: int) -> str:
        return f"{self.split}/{self.rows[i]}"

    def subset(self, rows: NDArray[np.int64]) -> "DatasetSource":
        labels, multi_labels = labels_at(self.labels, rows), labels_at(self.multi_labels, rows)
        return replace(self, rows=self.rows[rows], labels=labels, multi_labels=multi_labels)

    def content_digest(self) -> str:
        """Return the SHA-256 over all names and the pixels of at most `_SAMPLED` evenly spaced images."""
        sha = hashlib.sha256()
        for i in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(np.int64)).tolist():
            try:
                sha.update(self.image(i).contiguous().numpy().tobytes())
            except ImageError as error:
                sha.update(error.reason.encode())
        names = ([self.name(i)] for i in range(len(self)))
        return entries_digest(names, sha.hexdigest(), self.pixel_format)


def open_datasets(open_dataset: Callable[[DataConfig], Any], config: DataConfig) -> Sources:
    """Open what `open_dataset` returns: a data set, or a pair of data sets (training, held-out)."""
    found = open_dataset(config)
    splits = found if isinstance(found, tuple) else (found,)
    problem = f"data.name={config.name}: {len(splits)} data sets instead of one, or of a pair (training, held-out)"
    require(len(splits) in (1, 2), f"{problem}: return one or two")
    train, *rest = (
        _source(config.name, part, split) for part, split in zip(("train", "held_out"), splits, strict=False)
    )
    return labeled(train, rest[0] if rest else None, f"data.name={config.name}")


def _source(name: str, part: str, dataset: Any) -> DatasetSource:
    """Return a source; raise ConfigError for a data set that is not map-style, is empty, or has invalid labels."""
    if not all(hasattr(dataset, each) for each in ("__len__", "__getitem__")):
        members = "__len__ and __getitem__, as a map-style torch.utils.data.Dataset has"
        raise ConfigError(f"data.name={name}: {type(dataset).__name__} must have {members}")
    require(len(dataset) > 0, f"data.name={name}: {type(dataset).__name__} ({part}) has no images")
    labels = _labels(name, dataset)
    source = DatasetSource(dataset, f"{name}/{part}", np.arange(len(dataset)))
    if labels is None:
        return source
    multi_label = labels.ndim == 2
    count = labels.shape[1] if multi_label else int(labels.max()) + 1
    known = [str(each) for each in getattr(dataset, "classes", ())]
    fits = len(known) == count if multi_label else len(known) >= count
    given: dict[str, Any] = {"multi_labels" if multi_label else "labels": labels}
    return replace(source, classes=tuple(known if fits else map(str, range(count))), **given)


def _labels(name: str, dataset: Any) -> NDArray[np.int64] | NDArray[np.bool_] | None:
    """Return the attribute `targets` or `labels`, as torchvision's data sets have, or else the labels of all items.

    Labels are (N,), or (N, L) with 0 and 1 if images can have several. None if the items have no labels.
    """
    stored = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if stored is None or len(stored) != len(dataset):
        if len(_parts(dataset[0])) < 2:
            return None
        stored = [_parts(dataset[i])[1] for i in range(len(dataset))]  # this reads each image once
    try:
        values = np.asarray(stored)
    except ValueError:  # rows of different lengths
        values = np.empty(0)
    rows = values.ndim == 2 and values.shape[1] > 1 and values.dtype.kind in "biuf"
    if rows and bool(np.isin(values, (0, 1)).all()) and values.any():
        return values.astype(np.bool_)
    integers = values.ndim == 1 and values.dtype.kind in "iu" and values.min() >= 0
    rule = (
        "labels must be whole numbers of at least 0, or, if images can have several, lists of 0 or 1 for each of at "
        "least two classes, with a 1 in at least one list"
    )
    signed = values.ndim == 1 and values.dtype.kind == "i"
    shown = f"the smallest is {values.min()}" if signed else f"the first is {stored[0]!r}"
    require(integers, f"data.name={name}: {rule}; {shown}")
    return values.astype(np.int64)


def _parts(item: Any) -> Sequence[Any]:
    return item if isinstance(item, tuple | list) else (item,)
