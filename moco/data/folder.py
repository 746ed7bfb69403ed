"""Folders of image files as a data set, with or without class folders. ImageNet is such a data set.

Legend: N images.
"""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.config import DataConfig, RunWarning
from moco.data.base import Source, Sources, entries_digest, labeled, labels_at
from moco.data.decode import decode, read_bytes
from moco.data.label_file import held_out_split, read_label_file, rows_of_images
from moco.data.labels import first_names, labels_of_split, read_label_sets, read_labels
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.walk import IMAGE_ENDINGS, VIDEO_ENDINGS, Tree, size_and_time, walk
from moco.distributed import is_rank_zero


@dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files below a root, decoded on request."""

    root: str  # absolute
    # Relative to the root, in the file system's encoding. An array, because Python's reference counts would make every
    # worker process copy a list of a million strings, page by page.
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    pixel_format: PixelFormat = RGB
    ignored: Mapping[str, int] = field(default_factory=dict)  # number of files that are not images, by kind
    unlistable: Mapping[str, str] = field(default_factory=dict)  # folders that cannot be listed -> reason
    broken: Mapping[str, str] = field(default_factory=dict)  # broken links whose names have no image ending -> target
    multi_labels: NDArray[np.bool_] | None = None  # see `Source`
    more_roots: tuple[str, ...] = ()  # absolute; with more roots, each path begins with the number of its root, from 0
    draws: tuple[tuple[int, int], ...] = ()  # see `Source`

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Tensor:
        return decode(self.path(i), self.pixel_format)

    def name(self, i: int) -> str:
        return os.fsdecode(bytes(self.paths[i]))

    def path(self, i: int) -> str:
        if not self.more_roots:
            return os.path.join(self.root, self.name(i))
        number, _, path = self.name(i).partition("/")
        return os.path.join((self.root, *self.more_roots)[int(number)], path)

    def content(self, i: int) -> bytes:
        return read_bytes(self.path(i))

    def content_fingerprints(self) -> NDArray[np.int64]:
        sizes = np.array([size_and_time(self.path(i))[0] for i in range(len(self))], np.int64)
        return np.where(sizes < 0, super().content_fingerprints(), sizes)

    def left_out(self) -> Mapping[str, int]:
        return self.ignored

    def subset(self, rows: NDArray[np.int64]) -> "FolderSource":
        labels, multi_labels = labels_at(self.labels, rows), labels_at(self.multi_labels, rows)
        return replace(self, paths=self.paths[rows], labels=labels, multi_labels=multi_labels, draws=())

    def encoded_names(self) -> Iterable[bytes]:
        return list(self.paths.tolist())

    def content_digest(self) -> str:
        entries = ([self.name(i), *size_and_time(self.path(i))] for i in range(len(self)))
        return entries_digest(entries, pixel_format=self.pixel_format)


def open_folder(config: DataConfig, keep_unlistable: bool = False) -> Sources:
    """Open any folder of images, with or without class folders; see `scan` for `keep_unlistable`."""
    if config.label_file:
        return _open_with_label_file(config, keep_unlistable)
    labels, eval_root = config.labels, config.eval_root
    if not eval_root:
        return labeled(_scan_roots(config, keep_unlistable))
    if labels == "none":
        raise ValueError(
            f"data.eval_root={eval_root!r} needs labels to measure accuracy with, but data.labels=none: "
            "set data.labels=folder, or leave data.eval_root empty"
        )
    for field_name, root in _roots(config):
        if _overlap(root, eval_root):
            raise ValueError(
                f"data.eval_root={eval_root!r} and {field_name}={root!r} overlap (one folder contains the other), "
                "so accuracy would be measured on training images: set two separate folders"
            )
    train = _scan_roots(config, keep_unlistable)
    held_out = scan("data.eval_root", eval_root, labels, keep_unlistable, min_classes=1, endings=_endings(config))
    return labeled(train, held_out, f"data.eval_root={eval_root}")


def _roots(config: DataConfig) -> list[tuple[str, str]]:
    """Return each folder of training images with the field that names it."""
    return [("data.root", config.root), *(("data.more_roots", root) for root in config.more_roots)]


def _overlap(first: str, second: str) -> bool:
    """Return whether one of two folders contains the other."""
    paths = [os.path.realpath(os.path.expanduser(path)) for path in (first, second)]
    return os.path.commonpath(paths) in paths


def _scan_roots(config: DataConfig, keep_unlistable: bool) -> FolderSource:
    """Find the images of data.root and data.more_roots, and how often data.weights draw them."""
    roots, endings = _roots(config), _endings(config)
    for (_, first), (name, second) in itertools.combinations(roots, 2):
        if _overlap(first, second):
            raise ValueError(
                f"{name}={second!r} and {first!r} overlap (one folder contains the other): name separate folders"
            )
    min_classes = 1 if config.more_roots else 2
    parts = [scan(name, root, config.labels, keep_unlistable, min_classes, endings) for name, root in roots]
    found = parts[0] if len(parts) == 1 else joined(parts)
    draws = [(len(part), max(1, round(w * len(part)))) for part, w in zip(parts, config.weights, strict=False)]
    return replace(found, draws=tuple(draws))


def joined(parts: Sequence[FolderSource]) -> FolderSource:
    """Return one source with the images of several folders, in the order of the folders.

    Classes of the same name become one. The names of the images then begin with the number of their folder.
    """
    same = len({part.classes for part in parts}) == 1  # keep this class order: labels of other splits use it
    classes = parts[0].classes if same else tuple(sorted({name for part in parts for name in part.classes}))
    labels = [labels_of_split(p.labels, p.classes, classes, p.root) for p in parts if p.labels is not None]
    return FolderSource(
        parts[0].root,
        np.array([b"%d/%s" % (number, path) for number, part in enumerate(parts) for path in part.paths.tolist()]),
        np.concatenate(labels) if labels else None,
        classes,
        ignored=sum((Counter(part.ignored) for part in parts), Counter()),
        unlistable={os.path.join(p.root, path): why for p in parts for path, why in p.unlistable.items()},
        broken={os.path.join(p.root, path): target for p in parts for path, target in p.broken.items()},
        more_roots=tuple(part.root for part in parts[1:]),
    )


def _endings(config: DataConfig) -> tuple[str, ...]:
    """Return the endings of the files to find: of images, or of videos for data.name=video."""
    return VIDEO_ENDINGS if config.name == "video" else PixelFormat(config.channels, config.dtype).endings


def _open_with_label_file(config: DataConfig, keep_unlistable: bool) -> Sources:
    """Open a folder of images whose labels and splits are in data.label_file."""
    table, where = config.label_file, f"data.label_file={config.label_file}"
    rows = read_label_file(table, config.label_separator)  # before the folder, which can be large
    images = scan("data.root", config.root, "none", keep_unlistable, endings=_endings(config), table=table)
    found = rows_of_images(rows, [images.name(i) for i in range(len(images))], f"data.root={config.root}", table)

    def part(split: str, min_classes: int) -> FolderSource:
        chosen = [i for i, row in enumerate(found) if row.split == split]
        fix = "leave data.label_file empty"
        values, picked = [found[i].label for i in chosen], images.subset(np.array(chosen, np.int64))
        if any(isinstance(value, tuple) for value in values):
            multi_labels, classes = read_label_sets(values, f"{where} split={split}" if split else where, fix)
            return replace(picked, multi_labels=multi_labels, classes=classes)
        labels, classes = read_labels(values, where, fix, min_classes=min_classes)
        return replace(picked, labels=labels, classes=classes)

    if not found[0].split:  # the table has no column of splits
        return labeled(part("", 2))
    held_out = held_out_split(found, config.split, config.eval_split, table)
    unused = Counter(row.split for row in found if row.split not in (config.split, held_out))
    evaluated = None
    if held_out:  # the training split alone reports the folder's other files
        evaluated = replace(part(held_out, 1), ignored={}, unlistable={}, broken={})
    return replace(labeled(part(config.split, 2), evaluated, f"{where} split={held_out}"), unused_splits=unused)


def open_imagenet(config: DataConfig, keep_unlistable: bool = False) -> Sources:
    """Open ImageNet as root/train/CLASS and root/val/CLASS; see `scan` for `keep_unlistable`."""
    folder = os.path.abspath(os.path.expanduser(config.root))
    if not (Path(folder, "train").is_dir() and Path(folder, "val").is_dir()):
        found = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
        missing = "is a file" if os.path.exists(folder) else "does not exist"
        state = missing if found is None else f"contains {', '.join(found[:5]) or 'nothing'}"
        raise FileNotFoundError(
            f"data.root={config.root} ({folder}) must contain train/CLASS/*.JPEG and val/CLASS/*.JPEG, but it {state}: "
            "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (data.download "
            "cannot do this: an account is needed) and unpack both into one folder per class"
        )
    parts = [os.path.join(config.root, part) for part in ("train", "val")]
    train = scan("data.root", parts[0], "folder", keep_unlistable)
    val = scan("data.root", parts[1], "folder", keep_unlistable, min_classes=1)
    return labeled(train, val, f"data.root={parts[1]}")


_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # names of folders of splits


def scan(
    field: str,
    root: str,
    labels: str,
    keep_unlistable: bool = False,
    min_classes: int = 2,
    endings: tuple[str, ...] = IMAGE_ENDINGS,
    table: str = "",
) -> FolderSource:
    """Find all images, or videos, below a root, ordered by path.

    Args:
        root, field: the folder, and the field that names it, for errors.
        labels: "none" or "folder".
        keep_unlistable: what to do if a folder cannot be listed. True: return a source that names this folder, provided
            that an image is found (with labels: images of two classes). False: raise an error.
        min_classes: the smallest number of classes, with labels.
        endings: of the files to find.
        table: the label file, which does not count as a file that is left out.

    Warns:
        RunWarning: about class folders named like splits; about broken links, unless `keep_unlistable`.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if a folder cannot be listed; with labels, for images outside class folders and too few classes.
    """
    folder = os.path.abspath(os.path.expanduser(root))
    where = f"{field}={root}" + f" ({folder})" * (folder != root)
    if not os.path.isdir(folder):
        state = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise FileNotFoundError(f"{where} {state}: check the path")
    paths = (tree := walk(folder, endings, os.path.expanduser(table))).images
    owners = [path.split("/", 1)[0] for path in paths]
    classes = tuple(sorted(set(owners)))
    if tree.unlistable and not (keep_unlistable and len(classes) >= (1 if labels == "none" else 2)):
        named = [f"{path or '.'} ({reason})" for path, reason in sorted(tree.unlistable.items())]
        raise ValueError(
            f"{where} contains {len(named)} folder{'s' * (len(named) > 1)} that cannot be listed: "
            f"{first_names(named, 3)}; give this user permission (chmod -R u+rX), or move them elsewhere"
        )
    if not paths:
        raise FileNotFoundError(f"{where} {_what_is_there(tree, endings)}")
    if tree.broken and not keep_unlistable and is_rank_zero():
        named = [f"{path} -> {target}" for path, target in sorted(tree.broken.items())]
        warnings.warn(f"{where}: {len(named)} broken links are ignored: {first_names(named, 3)}", RunWarning, 2)
    encoded_paths = np.array([os.fsencode(path) for path in paths])
    left_out: dict[str, Any] = {"ignored": tree.ignored, "unlistable": tree.unlistable, "broken": tree.broken}
    if labels == "none":
        return FolderSource(folder, encoded_paths, **left_out)
    if outside := [path for path in paths if "/" not in path]:
        raise ValueError(
            f"{where} has {len(outside)} images outside class folders ({first_names(outside, 3)}): "
            "move each into the folder of its class, or set data.labels=none"
        )
    if len(classes) < min_classes:
        raise ValueError(f"{where} has one class folder only ({classes[0]}): add at least one more")
    _warn_of_splits(where, classes)
    indices, classes = read_labels(owners, where, "set data.labels=none", min_classes=min_classes)
    return FolderSource(folder, encoded_paths, indices, classes, **left_out)


def _warn_of_splits(where: str, classes: Sequence[str]) -> None:
    """Warn of class folders that have the names of splits."""
    if {name.lower() for name in classes} <= _SPLITS and is_rank_zero():
        problem = f"{where}: its folders {', '.join(classes)} are used as classes, but their names are those of splits"
        fix = "for splits, set data.root to the folder of training images, and data.eval_root to that of held-out ones"
        warnings.warn(f"{problem}: {fix}", RunWarning, stacklevel=2)


def _what_is_there(tree: Tree, endings: tuple[str, ...]) -> str:
    """Return the end of the error message about a folder without files of these endings: what it contains."""
    others = tree.ignored + Counter({"broken link": len(tree.broken)})
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items())) or "nothing"
    what, hint = ("videos" if endings == VIDEO_ENDINGS else "images"), ""
    if endings == IMAGE_ENDINGS:
        hint = "; .npy and .npz files are used unless data.channels=3 and data.dtype=uint8"
        hint += "; data=video uses the frames of videos" * any(kind in VIDEO_ENDINGS for kind in others)
    known = f"{what} are files that end in {' '.join(endings)}, in upper or lower case"
    return f"holds no {what}: found {found}; {known}{hint}"
