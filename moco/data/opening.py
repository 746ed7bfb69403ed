"""Open a run's data set from the configuration, describe what it contains, and build its views."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from moco.config import AugmentConfig, ConfigError, DataConfig, RunWarning, require
from moco.config.data import check_normalization
from moco.data.base import Source, Sources
from moco.data.label_file import UNUSED
from moco.data.labels import first_names
from moco.data.sources import limited, load_source
from moco.data.unreadable import without_unreadable
from moco.data.view import View
from moco.data.walk import OTHER_IMAGE_ENDINGS, SPECIAL_FILE, VIDEO_ENDINGS
from moco.distributed import is_rank_zero, on_rank_zero
from moco.runtime.console import log, progress_bar
from moco.runtime.next_command import stats_command

MAX_CLASSES = 10  # how many classes a line lists with their counts
# Names of classes that are probably names of splits.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}


def open_sources(
    config: DataConfig,
    bank_size: int,
    keep_unreadable: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
    announce: bool = True,
) -> Sources:
    """Open a data set on every rank, with a progress bar; for errors see `moco.data.sources.load_source`.

    Args:
        config: the data set.
        bank_size: the largest number of reference images for the live kNN; 0: all.
        keep_unreadable: see `moco.data.sources.load_source`.
        heartbeat: called regularly while images are decoded.
        announce: print what the data set contains; False: the caller does.
    """

    def load(download: bool) -> Sources:
        with progress_bar("decoding images", heartbeat) as progress:
            return load_source(replace(config, download=download), progress, keep_unreadable)

    if config.download:
        on_rank_zero(lambda: len(load(True).train))  # one rank downloads; the broadcast result must be small
    sources = load(False)
    if announce and is_rank_zero():
        for line in opening_lines(sources):
            log(line)
    return sources if sources.bank is None else replace(sources, bank=limited(sources.bank, bank_size))


def opening_lines(sources: Sources) -> list[str]:
    """Return the lines about a data set's classes, and about the files and splits that are left out.

    Warns:
        RunWarning: if classes have the names of splits.
    """
    parts = [sources.train, *([sources.held_out] if sources.held_out is not None else [])]
    lines = [left_out_line(counts) for part in parts if (counts := part.left_out())]
    if unused := sources.unused_splits:
        named = " and ".join(
            f"{split} ({count:,} {'files' if count > 1 else 'file'})" for split, count in unused.items()
        )
        hint = "; data.eval_split selects the held-out split" if unused.keys() - {UNUSED} else ""
        lines.append(f"not used: split {named}{hint}")
    labeled = sources.bank if sources.train.labels is None and sources.bank is not None else sources.train
    if not class_counts(labeled):
        return lines
    lines.append(class_line(labeled))
    if sources.held_out is not None and (lacking := classes_without_images(sources.held_out)):
        lines.append(f"no held-out image of: {first_names(lacking, MAX_CLASSES)}")
    splits = [name for name in labeled.classes if name.casefold() in SPLIT_NAMES]
    if len(splits) > 1:
        warnings.warn(
            f"the classes {first_names(splits)} have the names of splits: if they are splits, "
            "open one of them as the training images and the other as the held-out images",
            RunWarning,
            stacklevel=2,
        )
    return lines


def class_counts(source: Source) -> dict[str, int]:
    """Return the number of images of each class, by name; empty without labels."""
    if source.multi_labels is not None:
        counts = source.multi_labels.sum(axis=0)
    elif source.labels is not None:
        counts = np.bincount(source.labels, minlength=len(source.classes))
    else:
        return {}
    return dict(zip(source.classes, counts.tolist(), strict=True))


def classes_without_images(source: Source) -> list[str]:
    """Return the classes that have no image in a labeled source."""
    return [name for name, count in class_counts(source).items() if not count]


def class_line(source: Source) -> str:
    """Return the classes of a labeled source with their numbers of images, as one line."""
    counts = class_counts(source)
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:MAX_CLASSES])
    more = ""
    if len(counts) > MAX_CLASSES:
        smallest, largest = min(counts.values()), max(counts.values())
        more = f" and {len(counts) - MAX_CLASSES:,} more; {smallest:,} to {largest:,} images each"
    if source.multi_labels is not None:
        each = source.multi_labels.sum(axis=1)
        none = np.count_nonzero(each == 0)
        more += f"; {each.mean():.2f} labels per image, {none:,} image{' has' if none == 1 else 's have'} none"
    return f"{len(counts):,} classes: {shown}{more}"


def left_out_line(counts: Mapping[str, int]) -> str:
    """Return, as one line, how many files are left out because of their names or their type."""
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    named = [f"{count:,} {kind}" for kind, count in ordered]
    convert = sorted(counts.keys() & OTHER_IMAGE_ENDINGS)
    fix = f"; to use {', '.join(convert)}, convert to JPEG or PNG" if convert else ""
    videos = sorted(counts.keys() & set(VIDEO_ENDINGS))
    fix += f"; data=video uses the frames of {', '.join(videos)}" if videos else ""
    why = "" if SPECIAL_FILE in counts else ", because of their names"
    return f"left out{why}: {first_names(named, MAX_CLASSES)}{fix}"


def without_unreadable_evaluation_images(
    sources: Sources, config: DataConfig, heartbeat: Callable[[], None]
) -> tuple[Sources, list[str]]:
    """Exclude unreadable images from the bank and the held-out split, and return one message per split about them.

    Substitutes would falsify the accuracy. Every image of both splits is decoded once, which takes about as long as
    the first evaluation; each rank decodes a part of them. `heartbeat` is called regularly.

    Raises:
        ImageError: if more than `data.max_bad` of a split is unreadable.
    """
    if sources.bank is None or sources.held_out is None:
        return sources, []
    messages, kept = [], []
    for name, source in (("reference", sources.bank), ("held-out", sources.held_out)):
        with progress_bar(f"reading the {name} images", heartbeat) as progress:
            readable, unreadable = without_unreadable(source, f"{name} images", config.max_bad, progress)
        kept.append(readable)
        if unreadable:
            first = min(unreadable)
            messages.append(
                f"{len(unreadable)} of the {len(source):,} {name} images cannot be read and are excluded from the live "
                f"accuracy, the first: {source.name(first)} ({unreadable[first]})"
            )
    return replace(sources, bank=kept[0], held_out=kept[1]), messages


def build_views(config: AugmentConfig, data: DataConfig | None = None) -> list[View]:
    """Return the augmentation of each view.

    Views alternate between the fields of `config` and the same fields with the changes in `second`. The small views
    follow and alternate likewise, with `small_size` and `small_scale`.

    Raises:
        ConfigError: for an unknown field of `second`, an invalid value, or a mean and std that do not fit the data set.
    """
    first = {each.name: getattr(config, each.name) for each in fields(View)}
    unknown = set(config.second) - set(first)
    require(not unknown, f"augment.second has unknown fields {', '.join(sorted(unknown))}: use {', '.join(first)}")
    require("size" not in config.second, "augment.second cannot change size: both views have augment.size")
    data = data or DataConfig()
    of_data = data.channels, data.dtype, f"data.channels={data.channels}", stats_command(data)
    small = {"size": config.small_size, "crop_scale": config.small_scale}
    recipes = []
    for values in (first, first | config.second, first | small, first | config.second | small):
        try:
            check_normalization("augment", values["mean"], values["std"], *of_data)
            recipes.append(View(**with_tuples(values)))
        except ConfigError:  # about the normalization or the steps of plug-ins; its message names the field
            raise
        except (ValueError, TypeError) as error:
            named = str(error)
            if len(recipes) > 1:
                named = re.sub("^size", "small_size", named.replace("crop_scale", "small_scale"))
            raise ConfigError(f"augment.{named}") from error
    full = [recipes[view % 2] for view in range(config.views)]
    return full + [recipes[2 + view % 2] for view in range(config.small_views)]


def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `View` with tuples instead of the lists of a configuration."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
