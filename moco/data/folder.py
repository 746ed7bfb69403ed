"""A tree of image files as a source, with or without class folders.

Legend: N images.
"""

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.config import RunWarning
from moco.data.decode import decode, read_bytes
from moco.data.walk import IMAGE_ENDINGS, Tree, walk
from moco.distributed import is_rank_zero


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files below a root, decoded when asked for."""

    root: str  # absolute
    # Relative to the root, as the system's bytes. An array, for a list of a million strings is copied into each worker
    # process bit by bit, as Python writes their reference counts.
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)  # how many files were left out, by kind
    # Left out with all that would be below them, relative to the root: folders, and why they cannot be listed (where
    # `scan` lets them be), and links to nowhere that are no pictures by their names, and to where.
    unreadable: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

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


def scan(root: str, field: str, labels: str, keep_unreadable: bool = False) -> FolderSource:
    """All images below a root in the order of their paths.

    Args:
        root: the tree.
        field: how errors call it.
        labels: "none" or "folder".
        keep_unreadable: leave out a folder that cannot be listed, and say so in the source; False: it ends the call.

    Warns:
        RunWarning: of links that lead nowhere and are no pictures by their names.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if a folder cannot be listed, or labels are asked for and the tree does not give them.
    """
    folder = os.path.abspath(os.path.expanduser(root))
    where = f"{field}={root} ({folder})"
    if not os.path.isdir(folder):
        state = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise FileNotFoundError(f"{where} {state}: check the path")
    tree = walk(folder)
    paths = tree.pictures
    owners = [path.split("/", 1)[0] for path in paths]
    classes = tuple(sorted(set(owners)))
    if tree.unreadable and not (keep_unreadable and len(classes) >= (1 if labels == "none" else 2)):
        named = [f"{path or '.'} ({why})" for path, why in sorted(tree.unreadable.items())]
        raise ValueError(
            f"{where} holds {len(named)} folder{'s' * (len(named) > 1)} that cannot be read: {some(named, 3)}; give "
            "this user the right to (chmod -R u+rX, or ask who owns them), or move them out of the tree"
        )
    if not paths:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(_others(tree).items())) or "nothing"
        raise FileNotFoundError(
            f"{where} holds no images: found {found}; files that end in {' '.join(IMAGE_ENDINGS)} count, in any case"
        )
    if tree.broken and not keep_unreadable and is_rank_zero():
        named = [f"{path} -> {target}" for path, target in sorted(tree.broken.items())]
        warnings.warn(f"{where}: left out are links that lead nowhere ({len(named)}): {some(named, 3)}", RunWarning, 2)
    packed = np.array([os.fsencode(path) for path in paths])
    left_out: dict[str, Any] = {"ignored": tree.ignored, "unreadable": tree.unreadable, "broken": tree.broken}
    if labels == "none":
        return FolderSource(folder, packed, **left_out)
    outside = [path for path in paths if "/" not in path]
    if outside:
        raise ValueError(
            f"{where} has {len(outside)} images outside class folders ({some(outside, 3)}): "
            "move each into a folder of its class, or set data.labels=none"
        )
    if len(classes) < 2:
        raise ValueError(f"{where} has one class folder only ({classes[0]}): two are needed, or set data.labels=none")
    index = {name: i for i, name in enumerate(classes)}
    return FolderSource(folder, packed, np.array([index[name] for name in owners], np.int64), classes, **left_out)


def _others(tree: Tree) -> Counter[str]:
    """What is no picture, by kind."""
    return tree.ignored + Counter({"broken link": len(tree.broken)})
