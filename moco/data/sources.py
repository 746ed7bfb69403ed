"""Where images come from: each data set as up to three sources (pretraining, labeled bank, held out).

Each kind has a module of its own: arrays in memory; a folder, shards or a Hugging Face data set, whose files are
decoded when asked for; remote, a stream.

Legend: N images.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from moco.data import arrays
from moco.data.arrays import SPLIT_SEED, ArraySource
from moco.data.decode import ImageError
from moco.data.folder import FolderSource, scan, some
from moco.data.hub import HubSource, open_hub
from moco.data.keyed import BANK, permutation
from moco.data.remote import open_remote
from moco.data.shards import ShardSource, open_shards

__all__ = [
    "SOURCES",
    "ArraySource",
    "FileSource",
    "FolderSource",
    "HubSource",
    "Progress",
    "ShardSource",
    "Source",
    "Sources",
    "limited",
    "load_source",
    "subset",
]

Progress = Callable[[int, int], None]  # called with (done, total)


class Source(Protocol):
    """A list of images in a fixed order, with or without labels."""

    @property
    def images(self) -> Tensor | None:
        """All images, uint8 (N, 3, H, W), where they are in memory; None where each is decoded when asked for."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Indices into `classes`, shape (N,); None where unlabeled."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty where unlabeled."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Tensor:
        """Image i, uint8 (3, H, W)."""

    def name(self, i: int) -> str:
        """What to call image i in reports: its path below the root, or such as "digits/17"."""


FileSource = FolderSource | ShardSource | HubSource  # what holds encoded files, which `content` gives


@dataclass(frozen=True, eq=False)
class Sources:
    """A data set: what pretraining sees, and what its features are judged on."""

    train: Source
    bank: Source | None = None  # labeled references, for kNN and linear probes
    held_out: Source | None = None  # labeled, disjoint from train and bank: accuracy is measured here


def subset(source: Source, rows: NDArray[np.int64]) -> Source:
    """Some of a source's images, in the order of `rows`."""
    if isinstance(source, FileSource):
        return source.subset(rows)
    assert isinstance(source, ArraySource)
    labels = None if source.labels is None else source.labels[rows]
    names = [source.name(int(row)) for row in rows]
    bad = {new: source.bad[int(row)] for new, row in enumerate(rows) if int(row) in source.bad}
    return ArraySource(source.images[torch.from_numpy(rows)], names, labels, source.classes, bad)


def limited(source: Source, size: int) -> Source:
    """At most `size` images of a source, the same ones always, in its order; 0 means all."""
    if size == 0 or size >= len(source):
        return source
    return subset(source, np.sort(permutation(SPLIT_SEED, 0, len(source), BANK)[:size]))


@dataclass(frozen=True)
class _Options:
    """The arguments of `load_source`, so that each entry of `SOURCES` takes what it needs."""

    root: str
    download: bool
    labels: str
    eval_root: str
    resident: bool
    keep_bad: bool
    progress: Progress | None
    subset: str
    split: str
    eval_split: str
    image_column: str
    label_column: str
    length: int
    shuffle_buffer: int
    allow_pipe: bool
    keep_unreadable: bool


SOURCES: dict[str, Callable[[_Options], Sources]] = {
    "digits": lambda _: Sources(*arrays.digits()),
    "cifar10": lambda o: Sources(*arrays.cifar(datasets.CIFAR10, o.root, o.download)),
    "cifar100": lambda o: Sources(*arrays.cifar(datasets.CIFAR100, o.root, o.download)),
    "stl10": lambda o: Sources(*arrays.stl10(o.root, o.download)),
    "imagenet": lambda o: _imagenet(o),
    "folder": lambda o: _folder(o),
    "shards": lambda o: _shards(o),
    "webdataset": lambda o: Sources(open_remote(o.root, o.length, o.shuffle_buffer, o.allow_pipe)),
    "huggingface": lambda o: _hub(o),
}

_ROOTS = {  # what data.root is where it is not simply the data set's folder
    "shards": "the output of moco.pack",
    "webdataset": "the addresses of tar files, such as 'https://HOST/train-{000000..000099}.tar'",
    "huggingface": "a name on the hub, or the folder of a data set",
}


def load_source(
    name: str,
    root: str = "",
    download: bool = False,
    labels: str = "none",
    eval_root: str = "",
    resident: bool = False,
    progress: Progress | None = None,
    keep_bad: bool = False,
    subset: str = "",
    split: str = "train",
    eval_split: str = "",
    image_column: str = "",
    label_column: str = "",
    length: int = 0,
    shuffle_buffer: int = 1000,
    allow_pipe: bool = False,
    keep_unreadable: bool = False,
) -> Sources:
    """Open a data set. What is in it, and in which order, depends on the files alone, never on the run's seed.

    Args:
        name: one of `SOURCES`.
        root: the folder that holds the data; digits needs none. Of huggingface a folder or a name, of webdataset
            addresses.
        download: fetch CIFAR or STL-10 into the root if it is not there.
        labels: for a folder: "none", or "folder" where the first-level folders are the classes.
        eval_root: for a labeled folder: another tree with the same classes, to measure accuracy on.
        resident: decode a folder (or ImageNet tree) once into memory; all its images must have one size. CIFAR,
            STL-10 and digits are in memory always.
        progress: called with (done, total) while a resident folder is decoded.
        keep_bad: let a picture that cannot be decoded keep its place in a resident source, where asking for it raises,
            as it does in a folder that is not resident; False: it ends the call.
        subset, split, eval_split, image_column, label_column: of huggingface, see `moco.data.hub.open_hub`.
        length, shuffle_buffer, allow_pipe: of webdataset, see `moco.data.remote.open_remote`.
        keep_unreadable: of folders and ImageNet, see `moco.data.folder.scan`.

    Raises:
        FileNotFoundError: if the data is not there, or could not be downloaded.
        ValueError: if an argument does not fit.
        ImageError: if a resident image cannot be decoded.
    """
    if name not in SOURCES:
        raise ValueError(f"data.name={name!r} is unknown: choose one of {', '.join(SOURCES)}")
    if labels not in ("none", "folder"):
        raise ValueError(
            f"data.labels={labels!r} is unknown: set none, or folder (first-level folders are the classes)"
        )
    if eval_root and name != "folder":
        raise ValueError(
            f"data.eval_root={eval_root!r} works with data.name=folder only, and {name} has its own held-out images"
            f"{' if they were packed with it' * (name == 'shards')}: leave data.eval_root empty"
        )
    if not root and name != "digits":
        kind = _ROOTS.get(name, f"the folder that holds, or shall hold, {name}")
        raise FileNotFoundError(f"data.root is empty: set it to {kind}")
    return SOURCES[name](
        _Options(
            root,
            download,
            labels,
            eval_root,
            resident,
            keep_bad,
            progress,
            subset,
            split,
            eval_split,
            image_column,
            label_column,
            length,
            shuffle_buffer,
            allow_pipe,
            keep_unreadable,
        )
    )


def _imagenet(options: _Options) -> Sources:
    """ImageNet as root/train/CLASS and root/val/CLASS."""
    root = options.root
    folder = os.path.abspath(os.path.expanduser(root))
    if not (Path(folder, "train").is_dir() and Path(folder, "val").is_dir()):
        found = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
        state = "does not exist" if found is None else f"holds {', '.join(found[:5]) or 'nothing'}"
        raise FileNotFoundError(
            f"data.root={root} ({folder}) must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, but it {state}: get "
            "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (with an account: "
            "data.download cannot fetch them) and unpack both into one folder a class"
        )
    train, held_out = (
        scan(os.path.join(root, part), "data.root", "folder", options.keep_unreadable) for part in ("train", "val")
    )
    _check_same_classes(train, held_out)
    return _subject(train, held_out, options)


def _folder(options: _Options) -> Sources:
    """Any tree of images, with or without class folders."""
    root, labels, eval_root = options.root, options.labels, options.eval_root
    if eval_root and labels == "none":
        raise ValueError(
            f"data.eval_root={eval_root!r} needs labels to measure accuracy with, but data.labels=none: "
            "set data.labels=folder, or leave data.eval_root empty"
        )
    if eval_root:
        train_real, eval_real = (os.path.realpath(os.path.expanduser(path)) for path in (root, eval_root))
        if os.path.commonpath([train_real, eval_real]) in (train_real, eval_real):
            raise ValueError(
                f"data.eval_root={eval_root!r} and data.root={root!r} lie in each other, so accuracy would be "
                "measured on training images: give two separate trees"
            )
    train = scan(root, "data.root", labels, options.keep_unreadable)
    if not eval_root:
        return _subject(train, None, options)
    held_out = scan(eval_root, "data.eval_root", labels, options.keep_unreadable)
    _check_same_classes(train, held_out)
    return _subject(train, held_out, options)


def _shards(options: _Options) -> Sources:
    """What moco.pack wrote."""
    splits = open_shards(options.root)
    sources = _subject(splits["train"], splits.get("held_out"), options)
    bank = splits.get("bank")
    if bank is None:
        return sources
    return Sources(sources.train, _decode_all(bank, options) if options.resident else bank, sources.held_out)


def _hub(options: _Options) -> Sources:
    """A Hugging Face data set."""
    o = options
    train, held_out = open_hub(o.root, o.subset, o.split, o.eval_split, o.image_column, o.label_column)
    return _subject(train, held_out, options)


def _subject(train: FileSource, held_out: FileSource | None, options: _Options) -> Sources:
    """Training images double as bank where they have labels."""
    first: Source = _decode_all(train, options) if options.resident else train
    second: Source | None = _decode_all(held_out, options) if options.resident and held_out else held_out
    return Sources(first, first if first.labels is not None else None, second)


def _check_same_classes(train: FolderSource, held_out: FolderSource) -> None:
    missing, extra = set(train.classes) - set(held_out.classes), set(held_out.classes) - set(train.classes)
    if missing or extra:
        raise ValueError(
            f"the class folders differ: only in {train.root}: {some(sorted(missing))}; "
            f"only in {held_out.root}: {some(sorted(extra))}; give both the same class folders"
        )


def _decode_all(source: FileSource, options: _Options) -> ArraySource:
    """Files in memory, decoded by threads, as the decoders release the interpreter lock.

    Raises:
        ValueError: if two images differ in size.
        ImageError: if an image cannot be decoded and none may be missing, or all are.
    """
    bad: dict[int, ImageError] = {}

    def decoded(i: int) -> Tensor | None:
        try:
            return source.image(i)
        except ImageError as error:
            if not options.keep_bad or len(bad) == len(source) - 1:
                raise
            bad[i] = error
            return None

    first, sample = next((i, image) for i in range(len(source)) if (image := decoded(i)) is not None)
    size = sample.shape  # (3, H, W)
    images = torch.zeros((len(source), *size), dtype=torch.uint8)  # (N, 3, H, W)

    def fill(part: range) -> int:
        for i in part:
            image = decoded(i) if i >= first else None
            if image is None:
                continue
            if image.shape != size:
                raise ValueError(
                    f"data.resident=true needs images of one size, but in {options.root} {source.name(first)} is "
                    f"{size[2]} x {size[1]} and {source.name(i)} is {image.shape[2]} x {image.shape[1]}: "
                    "set data.resident=false, or resize them"
                )
            images[i] = image
        return part.stop

    parts = [range(start, min(start + 64, len(source))) for start in range(0, len(source), 64)]
    with ThreadPoolExecutor() as pool:
        for done in pool.map(fill, parts):  # in order, and the first error cancels the rest
            if options.progress is not None:
                options.progress(done, len(source))
    names = [source.name(i) for i in range(len(source))]
    return ArraySource(images, names, source.labels, source.classes, bad)
