"""A tree of image files as a source, with or without class folders.

Legend: N images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.data.decode import decode, read_bytes
from moco.data.walk import IMAGE_ENDINGS, walk


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files below a root, decoded when asked for."""

    root: str  # absolute
    # Relative to the root, as the system's bytes. An array, for a list of a million strings is copied into each worker
    # process bit by bit, as Python writes their reference counts.
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)  # how many entries were left out, by kind

    @property
    def images(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Tensor:
        return decode(self.path(i))

    def path(self, i: int) -> str:
        """Where image i lies."""
        return os.path.join(self.root, self.name(i))

    def content(self, i: int) -> bytes:
        """The bytes of image i's file."""
        return read_bytes(self.path(i))

    def name(self, i: int) -> str:
        return os.fsdecode(bytes(self.paths[i]))

    def subset(self, rows: NDArray[np.int64]) -> "FolderSource":
        """Some of the images, in the order of `rows`."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, paths=self.paths[rows], labels=labels)


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, for an error."""
    return (", ".join(names[:limit]) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")


def scan(root: str, field: str, labels: str) -> FolderSource:
    """All images below a root in the order of their paths.

    Args:
        root: the tree.
        field: how errors call it.
        labels: "none" or "folder".

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if labels are asked for and the tree does not give them.
    """
    folder = os.path.abspath(os.path.expanduser(root))
    where = f"{field}={root} ({folder})"
    if not os.path.isdir(folder):
        state = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise FileNotFoundError(f"{where} {state}: check the path")
    paths, ignored = walk(folder)
    if not paths:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items())) or "nothing"
        raise FileNotFoundError(
            f"{where} holds no images: found {found}; files that end in {' '.join(IMAGE_ENDINGS)} count, in any case"
        )
    packed = np.array([os.fsencode(path) for path in paths])
    if labels == "none":
        return FolderSource(folder, packed, ignored=ignored)
    outside = [path for path in paths if "/" not in path]
    if outside:
        raise ValueError(
            f"{where} has {len(outside)} images outside class folders ({some(outside, 3)}): "
            "move each into a folder of its class, or set data.labels=none"
        )
    owners = [path.split("/", 1)[0] for path in paths]
    classes = tuple(sorted(set(owners)))
    if len(classes) < 2:
        raise ValueError(f"{where} has one class folder only ({classes[0]}): two are needed, or set data.labels=none")
    index = {name: i for i, name in enumerate(classes)}
    return FolderSource(folder, packed, np.array([index[name] for name in owners], np.int64), classes, ignored)
