"""Folders of image files as a data set, with or without class folders; ImageNet is one of them.

Legend: N images.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
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
from moco.data.labels import first_names, read_label_sets, read_labels
from moco.data.pixel_format import RGB, PixelFormat
from moco.data.walk import ARRAY_ENDINGS, IMAGE_ENDINGS, size_and_time, walk
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

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Tensor:
        return decode(self.path(i), self.pixel_format)

    def name(self, i: int) -> str:
        return os.fsdecode(bytes(self.paths[i]))

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.name(i))

    def content(self, i: int) -> bytes:
        return read_bytes(self.path(i))

    def content_fingerprints(self) -> NDArray[np.int64]:
        sizes = np.array([size_and_time(self.path(i))[0] for i in range(len(self))], np.int64)
        return np.where(sizes < 0, super().content_fingerprints(), sizes)

    def left_out(self) -> Mapping[str, int]:
        return self.ignored

    def subset(self, rows: NDArray[np.int64]) -> "FolderSource":
        labels, several = labels_at(self.labels, rows), labels_at(self.multi_labels, rows)
        return replace(self, paths=self.paths[rows], labels=labels, multi_labels=several)

    def encoded_names(self) -> Iterable[bytes]:
        return list(self.paths.tolist())

    def content_digest(self) -> str:
        entries = ([self.name(i), *size_and_time(self.path(i))] for i in range(len(self)))
        return entries_digest(entries, pixel_format=self.pixel_format)


def open_folder(config: DataConfig, keep_unlistable: bool = False) -> Sources:
    """Open any folder of images, with or without class folders; see `scan` for `keep_unlistable`."""
    if config.label_file:
        return _open_with_label_file(config, keep_unlistable)
    root, labels, eval_root = config.root, config.labels, config.eval_root
    arrays = _with_arrays(config)
    if not eval_root:
        return labeled(scan("data.root", root, labels, keep_unlistable, arrays=arrays))
    if labels == "none":
        raise ValueError(
            f"data.eval_root={eval_root!r} needs labels to measure accuracy with, but data.labels=none: "
            "set data.labels=folder, or leave data.eval_root empty"
        )
    train_real, eval_real = (os.path.realpath(os.path.expanduser(path)) for path in (root, eval_root))
    if os.path.commonpath([train_real, eval_real]) in (train_real, eval_real):
        raise ValueError(
            f"data.eval_root={eval_root!r} and data.root={root!r} contain each other, so accuracy would be measured on "
            "training images: set two separate folders"
        )
    train = scan("data.root", root, labels, keep_unlistable, arrays=arrays)
    held_out = scan("data.eval_root", eval_root, labels, keep_unlistable, min_classes=1, arrays=arrays)
    return labeled(train, held_out, f"data.eval_root={eval_root}")


def _with_arrays(config: DataConfig) -> bool:
    """Return whether NPY and NPZ files are images: for other channels or another type than RGB in 8 bits."""
    return (config.channels, config.dtype) != (RGB.channels, RGB.dtype)


def _open_with_label_file(config: DataConfig, keep_unlistable: bool) -> Sources:
    """Open a folder of images whose labels and splits are in data.label_file."""
    table, where = config.label_file, f"data.label_file={config.label_file}"
    rows = read_label_file(table, config.label_separator)  # before the folder, which can be large
    images = scan("data.root", config.root, "none", keep_unlistable, arrays=_with_arrays(config))
    found = rows_of_images(rows, [images.name(i) for i in range(len(images))], f"data.root={config.root}", table)

    def part(split: str, min_classes: int) -> FolderSource:
        chosen = [i for i, row in enumerate(found) if row.split == split]
        fix = "leave data.label_file empty"
        values, picked = [found[i].label for i in chosen], images.subset(np.array(chosen, np.int64))
        if any(isinstance(value, tuple) for value in values):
            several, classes = read_label_sets(values, f"{where} split={split}" if split else where, fix)
            return replace(picked, multi_labels=several, classes=classes)
        labels, classes = read_labels(values, where, fix, min_classes=min_classes)
        return replace(picked, labels=labels, classes=classes)

    if not found[0].split:  # the table has no such column
        return labeled(part("", 2))
    held_out = held_out_split(found, config.split, config.eval_split, table)
    return labeled(part(config.split, 2), part(held_out, 1) if held_out else None, f"{where} split={held_out}")


def open_imagenet(config: DataConfig, keep_unlistable: bool = False) -> Sources:
    """Open ImageNet as root/train/CLASS and root/val/CLASS; see `scan` for `keep_unlistable`."""
    folder = os.path.abspath(os.path.expanduser(config.root))
    if not (Path(folder, "train").is_dir() and Path(folder, "val").is_dir()):
        found = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
        state = "does not exist" if found is None else f"contains {', '.join(found[:5]) or 'nothing'}"
        raise FileNotFoundError(
            f"data.root={config.root} ({folder}) must contain train/CLASS/*.JPEG and val/CLASS/*.JPEG, but it {state}: "
            "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (data.download "
            "cannot do this: an account is needed) and unpack both into one folder per class"
        )
    parts = [os.path.join(config.root, part) for part in ("train", "val")]
    train = scan("data.root", parts[0], "folder", keep_unlistable)
    val = scan("data.root", parts[1], "folder", keep_unlistable, min_classes=1)
    return labeled(train, val, f"data.root={parts[1]}")


def scan(
    field: str, root: str, labels: str, keep_unlistable: bool = False, min_classes: int = 2, arrays: bool = False
) -> FolderSource:
    """Find all images below a root, ordered by path.

    Args:
        field: the field that names the root, for errors.
        root: the folder.
        labels: "none" or "folder".
        keep_unlistable: return the source, which names the folders that cannot be listed, if an image (with labels: two
            classes) remains; False: raise an error.
        min_classes: the smallest number of classes, with labels.
        arrays: whether NPY and NPZ files are images too.

    Warns:
        RunWarning: about broken links whose names have no image ending.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if a folder cannot be listed, or if labels are requested and the class folders do not fit.
    """
    folder = os.path.abspath(os.path.expanduser(root))
    where = f"{field}={root} ({folder})"
    if not os.path.isdir(folder):
        state = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise FileNotFoundError(f"{where} {state}: check the path")
    endings = IMAGE_ENDINGS + ARRAY_ENDINGS * arrays
    paths = (tree := walk(folder, endings)).images
    owners = [path.split("/", 1)[0] for path in paths]
    classes = tuple(sorted(set(owners)))
    if tree.unlistable and not (keep_unlistable and len(classes) >= (1 if labels == "none" else 2)):
        named = [f"{path or '.'} ({reason})" for path, reason in sorted(tree.unlistable.items())]
        raise ValueError(
            f"{where} contains {len(named)} folder{'s' * (len(named) > 1)} that cannot be listed: "
            f"{first_names(named, 3)}; give this user permission (chmod -R u+rX), or move them elsewhere"
        )
    if not paths:
        others = tree.ignored + Counter({"broken link": len(tree.broken)})
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items())) or "nothing"
        hint = "" if arrays else "; .npy and .npz count with another data.channels or data.dtype than 3 and uint8"
        raise FileNotFoundError(
            f"{where} holds no images: found {found}; images are files that end in {' '.join(endings)}, in "
            f"upper or lower case{hint}"
        )
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
        raise ValueError(f"{where} has one class folder only ({classes[0]}): at least two are needed")
    indices, classes = read_labels(owners, where, "set data.labels=none", min_classes=min_classes)
    return FolderSource(folder, encoded_paths, indices, classes, **left_out)
