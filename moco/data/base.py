"""The interface of every source of images, and the digest of its names.

Legend: N images, L classes.
"""

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.data.decode import ImageError
from moco.data.labels import labels_of_split, with_classes
from moco.data.pixel_format import RGB, PixelFormat

T = TypeVar("T")
Labels = TypeVar("Labels", NDArray[np.int64], NDArray[np.bool_])
Progress = Callable[[int, int], None]  # called with (done, total)


class Source(Protocol):
    """A list of images in a fixed order, with or without labels.

    A source derives from this class and defines the abstract members (`ArraySource` defines all members instead). The
    defaults of the other members suit RGB images that are read one by one, without access to their files or encoded
    bytes.
    """

    @property
    def images(self) -> Tensor | None:
        """All images (N, C, H, W), of `pixel_format`, if they are in memory; None if each is decoded on request."""
        return None

    @property
    @abstractmethod
    def labels(self) -> NDArray[np.int64] | None:
        """Indices into `classes`, shape (N,); None if unlabeled."""

    @property
    def multi_labels(self) -> NDArray[np.bool_] | None:
        """Which classes each image has, (N, L), if images can have several (then `labels` is None); otherwise None."""
        return None

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The class names; empty if unlabeled."""

    @property
    def pixel_format(self) -> PixelFormat:
        """The channels of the images and their type."""
        return RGB

    @property
    def draws(self) -> tuple[tuple[int, int], ...]:
        """The number of images of each part of the source, and how many of them an epoch draws; (): each image once."""
        return ()

    @property
    def unreadable(self) -> Mapping[int, ImageError]:
        """The errors, by index, of the images that could not be decoded into memory; they are black in `images`."""
        return {}

    @property
    def stream(self) -> Callable[..., Any] | None:
        """The function that makes the loader of a source that can only be read from start to end; None for others."""
        return None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int) -> Tensor:
        """Return image i, (C, H, W), of `pixel_format`.

        Raises:
            ImageError: if it cannot be read.
        """

    @abstractmethod
    def name(self, i: int) -> str:
        """Return the name of image i in reports: its path below the root, or for example "digits/17"."""

    def path(self, i: int) -> str | None:
        """Return the path of image i's own file; None if it has none."""
        return None

    def file_of(self, i: int) -> str | None:
        """Return the path of the file that image i is read from; None for arrays, shards and streams."""
        return self.path(i)

    def content(self, i: int) -> bytes | None:
        """Return the encoded bytes of image i; None if the source holds pixels only.

        Raises:
            ImageError: if they cannot be read.
        """
        return None

    def content_fingerprints(self) -> NDArray[np.int64]:
        """Return a number per image, (N,), to find images that can be copies: copies have the same number.

        Images that are no copies can have the same number, too: for files it is the size, because reading them would
        take too long. An image whose content is unknown, such as an unreadable one, has -1 - i, which no other image
        has. This default gives such a number to all images, so no copies are found.
        """
        return -1 - np.arange(len(self))

    def left_out(self) -> Mapping[str, int]:
        """Return the number of files that are left out because of their name or type, by kind, such as ".txt"."""
        return {}

    @abstractmethod
    def subset(self, rows: NDArray[np.int64]) -> "Source":
        """Return the given images as a source, in the order of `rows`."""

    def encoded_names(self) -> Iterable[bytes]:
        """Return the names in order, in the file system's encoding; for a stream the names of its shards."""
        return (os.fsencode(self.name(i)) for i in range(len(self)))

    @abstractmethod
    def content_digest(self) -> str:
        """Return the SHA-256 over the names and the content, in order.

        The source chooses what represents the content, such as pixels, the size and modification time of files, or
        checksums. The digest does not depend on the data set's folder, except for a folder of parquet files
        (`HubSource`).
        """


@dataclass(frozen=True, eq=False)
class Sources:
    """A data set: the images to train on, and the labeled images to evaluate with."""

    train: Source
    bank: Source | None = None  # references with one class each, for kNN and linear probes
    held_out: Source | None = None  # labeled, disjoint from train and bank: accuracy is measured here
    unused_splits: Mapping[str, int] = field(
        default_factory=dict
    )  # number of files of each unused split of a label file

    def changed(self, change: Callable[[Source], Source]) -> "Sources":
        """Return the data set after `change` of each split; a source that serves as two splits is changed once."""
        splits = {id(split): split for split in (self.train, self.bank, self.held_out) if split is not None}
        new = {key: change(split) for key, split in splits.items()}
        bank, held_out = new.get(id(self.bank)), new.get(id(self.held_out))
        return replace(self, train=new[id(self.train)], bank=bank, held_out=held_out)


def labeled(train: Source, held_out: Source | None = None, where: str = "") -> Sources:
    """Return a data set in which the training images, if labeled, are the bank as well.

    If `where` is given, the labels of the held-out images become indices into the classes of training, and errors name
    the held-out split by `where`. If `where` is empty, they must already be such indices.
    If images have several labels, each split gets the classes of the two splits together, and there is no bank.
    """
    pair: tuple[Any, Any] = train, held_out  # Any, because `replace` takes only dataclasses
    if held_out is not None and held_out.multi_labels is not None and train.multi_labels is not None:
        classes = tuple(dict.fromkeys(train.classes + held_out.classes))
        train, held_out = (
            replace(each, multi_labels=with_classes(each.multi_labels, each.classes, classes), classes=classes)
            for each in pair
        )
    if held_out is not None and held_out.labels is not None and where:
        labels = labels_of_split(held_out.labels, held_out.classes, train.classes, where)
        split: Any = held_out  # Any, because `replace` takes only dataclasses
        held_out = replace(split, labels=labels, classes=train.classes)
    return Sources(train, train if train.labels is not None else None, held_out)


def labels_at(labels: Labels | None, rows: NDArray[np.int64]) -> Labels | None:
    """Return the labels of the given rows; None for unlabeled images."""
    return None if labels is None else labels[rows]


def classes_of(source: Source, i: int) -> list[int] | None:
    """Return the indices of the classes of image i: one, or any number with `multi_labels`; None if unlabeled."""
    if source.multi_labels is not None:
        return [int(each) for each in np.flatnonzero(source.multi_labels[i])]
    return None if source.labels is None else [int(source.labels[i])]


def in_threads(
    read: Callable[[int], T], rows: Sequence[int], progress: Progress | None = None, at_once: int = 64
) -> list[T]:
    """Call `read` for every row, in threads, because decoders release the interpreter lock; return the results.

    A thread gets `at_once` rows at a time. `progress` is called with (done, total). The first error cancels the rest.
    """
    results: list[T] = []
    parts = (rows[start : start + at_once] for start in range(0, len(rows), at_once))
    with ThreadPoolExecutor() as pool:
        for part in pool.map(lambda part: [read(row) for row in part], parts):
            results += part
            if progress is not None:
                progress(len(results), len(rows))
    return results


def names_digest(source: Source, with_size: bool = False) -> str:
    """Return the SHA-256 of the names in order: equal for copies of the images in another folder.

    With `with_size`, channels, height and width of images in memory are included.
    """
    sha = hashlib.sha256()
    for name in source.encoded_names():
        sha.update(name + b"\0")  # no name contains a zero byte, so different lists give different bytes
    if with_size and source.images is not None:
        sha.update(str(tuple(source.images.shape[1:])).encode())
    return sha.hexdigest()


def entries_digest(entries: Iterable[list[Any]], head: str = "", pixel_format: PixelFormat = RGB) -> str:
    """Return the SHA-256 over `head` and one JSON list per image: the common part of `Source.content_digest`.

    A pixel format other than the default changes the pixels, so it changes the digest too.
    """
    sha = hashlib.sha256(head.encode())
    if pixel_format.bits != 16:
        sha.update(f"bits={pixel_format.bits}".encode())
    if (pixel_format.channels, pixel_format.dtype) != (RGB.channels, RGB.dtype):
        sha.update(str(pixel_format).encode())
    for entry in entries:
        sha.update(json.dumps(entry).encode())
    return sha.hexdigest()
