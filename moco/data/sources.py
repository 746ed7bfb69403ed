"""Where images come from: each data set as up to three sources (pretraining, labelled bank, held out).

Legend: N images.
"""

import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from moco.data.decode import ImageError, decode
from moco.data.keyed import BANK, SPLIT, permutation
from moco.data.walk import IMAGE_ENDINGS, walk

_SPLIT_SEED = 1797  # a constant: the split is part of the data set, not of a run

Progress = Callable[[int, int], None]  # called with (done, total)


class Source(Protocol):
    """A list of images in a fixed order, with or without labels."""

    @property
    def images(self) -> Tensor | None:
        """All images, uint8 (N, 3, H, W), where they are in memory; None where each is decoded when asked for."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Indices into `classes`, shape (N,); None where unlabelled."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty where unlabelled."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Tensor:
        """Image i, uint8 (3, H, W)."""

    def name(self, i: int) -> str:
        """What to call image i in reports: its path below the root, or such as "digits/17"."""


@dataclass(frozen=True, eq=False)  # eq would compare tensors
class ArraySource:
    """Images of one size in memory."""

    images: Tensor  # uint8 (N, 3, H, W)
    names: Sequence[str]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    bad: Mapping[int, ImageError] = field(default_factory=dict)  # rows without a picture, black here, and why

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        if i in self.bad:
            raise self.bad[i]
        return self.images[i]

    def name(self, i: int) -> str:
        return self.names[i]


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

    def name(self, i: int) -> str:
        return os.fsdecode(bytes(self.paths[i]))


@dataclass(frozen=True, eq=False)
class Sources:
    """A data set: what pretraining sees, and what its features are judged on."""

    train: Source
    bank: Source | None = None  # labelled references, for kNN and linear probes
    held_out: Source | None = None  # labelled, disjoint from train and bank: accuracy is measured here


def subset(source: Source, rows: NDArray[np.int64]) -> Source:
    """Some of a source's images, in the order of `rows`."""
    labels = None if source.labels is None else source.labels[rows]
    if isinstance(source, FolderSource):
        return replace(source, paths=source.paths[rows], labels=labels)
    assert isinstance(source, ArraySource)
    names = [source.name(int(row)) for row in rows]
    bad = {new: source.bad[int(row)] for new, row in enumerate(rows) if int(row) in source.bad}
    return ArraySource(source.images[torch.from_numpy(rows)], names, labels, source.classes, bad)


def limited(source: Source, size: int) -> Source:
    """At most `size` images of a source, the same ones always, in its order; 0 means all."""
    if size == 0 or size >= len(source):
        return source
    return subset(source, np.sort(permutation(_SPLIT_SEED, 0, len(source), BANK)[:size]))


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


SOURCES: dict[str, Callable[[_Options], Sources]] = {
    "digits": lambda _: _digits(),
    "cifar10": lambda o: _cifar(datasets.CIFAR10, o.root, o.download),
    "cifar100": lambda o: _cifar(datasets.CIFAR100, o.root, o.download),
    "stl10": lambda o: _stl10(o.root, o.download),
    "imagenet": lambda o: _imagenet(o),
    "folder": lambda o: _folder(o),
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
) -> Sources:
    """Open a data set. What is in it, and in which order, depends on the files alone, never on the run's seed.

    Args:
        name: one of `SOURCES`.
        root: the folder that holds the data; digits needs none.
        download: fetch CIFAR or STL-10 into the root if it is not there.
        labels: for a folder: "none", or "folder" where the first-level folders are the classes.
        eval_root: for a labelled folder: another tree with the same classes, to measure accuracy on.
        resident: decode a folder (or ImageNet tree) once into memory; all its images must have one size. CIFAR,
            STL-10 and digits are in memory always.
        progress: called with (done, total) while a resident folder is decoded.
        keep_bad: let a picture that cannot be decoded keep its place in a resident source, where asking for it raises,
            as it does in a folder that is not resident; False: it ends the call.

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
            f"data.eval_root={eval_root!r} works with data.name=folder only, and {name} has its own held-out images: "
            "leave data.eval_root empty"
        )
    if not root and name != "digits":
        raise FileNotFoundError(f"data.root is empty: set it to the folder that holds, or shall hold, {name}")
    return SOURCES[name](_Options(root, download, labels, eval_root, resident, keep_bad, progress))


def _digits() -> Sources:
    """1,797 real 8x8 scans of handwritten digits at 16x16; 50 of each class are held out, the other 1,297 train."""
    from sklearn.datasets import load_digits  # here: it would add 2 s to every start

    bunch = load_digits()
    targets: NDArray[np.int64] = bunch.target.astype(np.int64)  # (N,)
    scans = torch.from_numpy(bunch.images).float().unsqueeze(1)  # (N, 1, 8, 8), 0 ... 16
    # Bilinear, as bicubic overshoots 0 ... 16. Its weights are sixteenths and 255 comes after: all values are exact in
    # float32, so the images are the same on every machine.
    scans = torch.nn.functional.interpolate(scans, size=(16, 16), mode="bilinear")  # (N, 1, 16, 16)
    images = (scans * 255 / 16).round().to(torch.uint8).repeat(1, 3, 1, 1)  # (N, 3, 16, 16)
    order = permutation(_SPLIT_SEED, 0, len(targets), SPLIT)
    held_out = np.sort(np.concatenate([order[targets[order] == digit][:50] for digit in range(10)]))
    train = np.setdiff1d(order, held_out)  # sorted

    def subset(indices: NDArray[np.int64]) -> ArraySource:
        names = [f"digits/{i}" for i in indices]
        return ArraySource(images[torch.from_numpy(indices)], names, targets[indices], tuple("0123456789"))

    train_source = subset(train)
    return Sources(train_source, train_source, subset(held_out))


def _cifar(dataset: Any, root: str, download: bool) -> Sources:
    """CIFAR-10 or -100: 50,000 training and 10,000 test images of 32x32."""

    def split(train: bool) -> ArraySource:
        data = _open_torchvision(dataset, root, download, train=train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        names = [f"{dataset.__name__.lower()}/{'train' if train else 'test'}/{i}" for i in range(len(images))]
        return ArraySource(images, names, np.asarray(data.targets, np.int64), tuple(data.classes))

    train = split(train=True)
    return Sources(train, train, split(train=False))


def _stl10(root: str, download: bool) -> Sources:
    """STL-10 at 96x96: 100,000 unlabelled images to train on, 5,000 labelled as bank, 8,000 held out."""

    def split(name: str) -> ArraySource:
        data = _open_torchvision(datasets.STL10, root, download, split=name)
        images = torch.from_numpy(data.data).contiguous()  # (N, 3, 96, 96)
        names = [f"stl10/{name}/{i}" for i in range(len(images))]
        if name == "unlabeled":
            return ArraySource(images, names)
        return ArraySource(images, names, np.asarray(data.labels, np.int64), tuple(data.classes))

    return Sources(split("unlabeled"), split("train"), split("test"))


def _open_torchvision(dataset: Any, root: str, download: bool, **split: Any) -> Any:
    """Torchvision's data set, its errors put into one sentence: it says neither where it looked nor what to do here."""
    folder = os.path.abspath(os.path.expanduser(root))
    where = f"data.root={root} ({folder})"
    try:
        return dataset(folder, download=download, **split)
    except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        if download:
            raise FileNotFoundError(
                f"{dataset.__name__} could not be downloaded to {where}: {error}; "
                f"check network and disk, or put {dataset.url} there yourself"
            ) from error
        found = "is incomplete or corrupted" if Path(folder, dataset.base_folder).exists() else "was not found"
        raise FileNotFoundError(
            f"{dataset.__name__} {found} in {where}, which should hold the folder {dataset.base_folder}: "
            "set data.download=true to fetch it, or correct data.root"
        ) from error


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
    train = _scan(os.path.join(root, "train"), "data.root", "folder")
    held_out = _scan(os.path.join(root, "val"), "data.root", "folder")
    _check_same_classes(train, held_out)
    return _judged(train, held_out, options)


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
    train = _scan(root, "data.root", labels)
    if not eval_root:
        return _judged(train, None, options)
    held_out = _scan(eval_root, "data.eval_root", labels)
    _check_same_classes(train, held_out)
    return _judged(train, held_out, options)


def _judged(train: FolderSource, held_out: FolderSource | None, options: _Options) -> Sources:
    """Training images double as bank where they have labels."""
    first: Source = _decode_all(train, options) if options.resident else train
    second: Source | None = _decode_all(held_out, options) if options.resident and held_out else held_out
    return Sources(first, first if first.labels is not None else None, second)


def _check_same_classes(train: FolderSource, held_out: FolderSource) -> None:
    missing, extra = set(train.classes) - set(held_out.classes), set(held_out.classes) - set(train.classes)
    if missing or extra:
        raise ValueError(
            f"the class folders differ: only in {train.root}: {_some(sorted(missing))}; "
            f"only in {held_out.root}: {_some(sorted(extra))}; give both the same class folders"
        )


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, for an error."""
    return (", ".join(names[:limit]) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _scan(root: str, field: str, labels: str) -> FolderSource:
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
            f"{where} has {len(outside)} images outside class folders ({_some(outside, 3)}): "
            "move each into a folder of its class, or set data.labels=none"
        )
    owners = [path.split("/", 1)[0] for path in paths]
    classes = tuple(sorted(set(owners)))
    if len(classes) < 2:
        raise ValueError(f"{where} has one class folder only ({classes[0]}): two are needed, or set data.labels=none")
    index = {name: i for i, name in enumerate(classes)}
    return FolderSource(folder, packed, np.array([index[name] for name in owners], np.int64), classes, ignored)


def _decode_all(source: FolderSource, options: _Options) -> ArraySource:
    """A folder in memory, decoded by threads, as the decoders release the interpreter lock.

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
                    f"data.resident=true needs images of one size, but below {source.root} {source.name(first)} is "
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
