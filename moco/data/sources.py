"""Every kind of data set by name, and the function that opens one.

To add a kind: write a module with a source (`moco.data.base.Source`) and a function that opens it, and add a line to
`SOURCES`. The options of the kind are fields of `moco.config.data.SourceConfig`, or of `DataConfig` if only pretraining
needs them; `check_data_fields` there refuses them with other kinds.

Legend: N images.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig
from moco.config.base import check_bounds, require
from moco.config.data import check_data_fields
from moco.data.arrays import SPLIT_SEED, ArraySource, open_cifar, open_digits, open_stl10
from moco.data.base import Progress, Source, Sources, in_threads
from moco.data.decode import ImageError
from moco.data.depth import with_pixel_format
from moco.data.folder import FolderSource, open_folder, open_imagenet
from moco.data.hub import open_hub
from moco.data.keyed import BANK, permutation
from moco.data.map_dataset import open_datasets
from moco.data.remote import open_remote
from moco.data.shards import open_shards
from moco.data.video import open_video
from moco.plugins import Registry

__all__ = [
    "SOURCES",
    "ArraySource",
    "FolderSource",
    "Source",
    "Sources",
    "folders",
    "from_dataset",
    "limited",
    "load_source",
]


class Kind(NamedTuple):
    """A kind of data set."""

    open: Callable[..., Sources]  # called with the DataConfig
    root: str = "the folder that contains the data set"  # what data.root must be set to; "" if it is not used
    searched: tuple[str, ...] = ()  # folders that are searched for images or videos, relative to data.root


_DOWNLOADED = "the folder that contains the data set, or into which data.download=true downloads it"

SOURCES: Registry[Kind] = Registry(
    "data.name",
    {
        "digits": Kind(open_digits, root=""),
        "cifar10": Kind(partial(open_cifar, "CIFAR10"), root=_DOWNLOADED),
        "cifar100": Kind(partial(open_cifar, "CIFAR100"), root=_DOWNLOADED),
        "stl10": Kind(open_stl10, root=_DOWNLOADED),
        "imagenet": Kind(open_imagenet, searched=("train", "val")),
        "folder": Kind(open_folder, searched=("",)),
        "video": Kind(open_video, root="a folder of video files", searched=("",)),
        "shards": Kind(open_shards, root="the output of moco.pack"),
        "webdataset": Kind(
            open_remote, root="addresses of tar files, such as 'https://HOST/train-{000000..000099}.tar'"
        ),
        "huggingface": Kind(open_hub, root="a name on the hub, or the folder of a data set", searched=("",)),
    },
)


def from_dataset(open_dataset: Callable[[DataConfig], Any]) -> Kind:
    """Return a kind that opens a map-style data set of PyTorch.

        SOURCES["mine"] = from_dataset(lambda config: MyDataset(config.root))

    Args:
        open_dataset: returns a map-style `torch.utils.data.Dataset` without transforms, or a pair of them (training,
            held-out). For the items see `moco.data.map_dataset`.
    """
    return Kind(partial(open_datasets, open_dataset))


def load_source(
    config: DataConfig, progress: Progress | None = None, keep_unreadable: bool = False, keep_unlistable: bool = False
) -> Sources:
    """Open a data set. Its images and their order depend on the files and on `config`, never on the seed of a run.

    A stream (webdataset) is an exception: its order also depends on the seed and the numbers of ranks and workers.

    Args:
        config: the data set.
        progress: called with (done, total) while images are decoded into memory.
        keep_unreadable: if images are decoded into memory, keep those that cannot be decoded; the source raises their
            errors when they are requested. False: raise the first error now.
        keep_unlistable: open a data set although some folders cannot be listed; only for folder, imagenet and video.

    Raises:
        FileNotFoundError: if data.root is empty, or the data set is not there.
        OSError: if the data set could not be downloaded.
        ValueError: if a field does not fit the data set.
        TypeError: if the source of a plug-in lacks members of `Source`.
        ImageError: if an image cannot be decoded into memory.
    """
    kind = SOURCES.find(config.name)
    check_bounds(config, "data.")
    check_data_fields(config)
    if kind.root and not config.root:
        raise FileNotFoundError(f"data.root is empty: set it to {kind.root}")
    found = kind.open(config, keep_unlistable=True) if keep_unlistable else kind.open(config)
    found = with_pixel_format(found.changed(partial(_checked, config)), config)
    if not config.resident:
        return found
    return found.changed(lambda source: _decode_all(source, config, progress, keep_unreadable))


def _checked(config: DataConfig, source: Source) -> Source:
    """Return the source; raise TypeError if it lacks members of the interface."""
    members = [*(name for name in vars(Source) if not name.startswith("_")), "__len__"]
    missing = [name for name in members if not hasattr(source, name)]
    if missing:
        raise TypeError(
            f"data.name={config.name}: {type(source).__name__} lacks {', '.join(missing)}; derive it from "
            "moco.data.base.Source (docs/howto/extend.md)"
        )
    return source


def refuse_output_inside(config: DataConfig, field: str, output: str | Path, of_root: str = "data.root") -> None:
    """Refuse an output directory in a folder that is searched for images or videos.

    Files in the output directory could become part of the data.

    Args:
        config: the data set.
        field: the field that names the directory, for the error.
        output: the directory, which need not exist.
        of_root: the field that names the root, for the error.

    Raises:
        ConfigError: if the output directory lies in such a folder.
    """
    searched = SOURCES[config.name].searched if config.name in SOURCES else ()
    roots = [(of_root, config.root, part) for part in searched] if config.root else []
    roots += [("data.eval_root", config.eval_root, "")] if config.eval_root else []
    roots += [("data.more_roots", root, "") for root in config.more_roots]
    place = Path(os.path.realpath(output))
    for name, root, part in roots:
        folder = Path(os.path.realpath(os.path.join(os.path.expanduser(root), part)))
        outside = folder.parent / ("output" if place == folder else place.name)
        require(
            not (folder.is_dir() and place.is_relative_to(folder)),
            f"{field}={output} lies in {name}={root}, and {folder} is searched for images and videos, so that what is "
            f"written could become part of the data: set {field} to a directory outside, such as {outside}",
        )


def folders(root: str, more_roots: Sequence[str] | None) -> str:
    """Return the first folder of a data set and the number of the others, as text."""
    more = len(more_roots or ())
    return root + f" and {more} more folder{'s' * (more > 1)}" * (more > 0)


def limited(source: Source, size: int) -> Source:
    """Return at most `size` images of a source, always the same ones, in its order; 0 means all."""
    if size == 0 or size >= len(source):
        return source
    return source.subset(np.sort(permutation(SPLIT_SEED, 0, len(source), BANK)[:size]))


def _decode_all(source: Source, config: DataConfig, progress: Progress | None, keep_unreadable: bool) -> Source:
    """Decode a source into memory, unless it is there already, or is a stream."""
    if source.images is not None or source.stream is not None:
        return source
    unreadable: dict[int, ImageError] = {}

    def decoded(i: int) -> Tensor | None:
        try:
            return source.image(i)
        except ImageError as error:
            if not keep_unreadable or len(unreadable) == len(source) - 1:  # no image can be decoded
                raise
            unreadable[i] = error
            return None

    first, sample = next((i, image) for i in range(len(source)) if (image := decoded(i)) is not None)
    size = sample.shape  # (C, H, W)
    images = torch.zeros((len(source), *size), dtype=sample.dtype)  # (N, C, H, W)

    def fill(i: int) -> None:
        image = decoded(i) if i >= first else None
        if image is None:
            return
        if image.shape != size:
            raise ValueError(
                f"data.resident=true needs images of one size, but in {config.root} {source.name(first)} is "
                f"{size[2]} x {size[1]} and {source.name(i)} is {image.shape[2]} x {image.shape[1]}: "
                "set data.resident=false, or resize the images"
            )
        images[i] = image

    in_threads(fill, range(len(source)), progress)
    names = [source.name(i) for i in range(len(source))]
    known = source.labels, source.classes, unreadable, source.left_out(), source.pixel_format, source.multi_labels
    return ArraySource(images, names, *known, source.draws)
