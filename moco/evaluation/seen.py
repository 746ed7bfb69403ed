"""The images that an encoder saw in its training: the accuracy on them is not the accuracy on new images."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moco.config import ConfigError, DataConfig, RunWarning
from moco.config.data import FOLDERS
from moco.data.sources import Source
from moco.distributed import is_rank_zero
from moco.files import resolved
from moco.interop.encoder_file import EncoderFile
from moco.runtime.console import log


def roots(data: Mapping[str, Any]) -> list[Path]:
    """Return the folders of a data set, data.root first."""
    named = [data.get("root") or "", *(data.get("more_roots") or ())]
    return [resolved(Path(str(root)).expanduser()) for root in named]


def shares_images(data: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Return whether two data sets have the same name and a common folder, among data.root and data.more_roots."""
    return bool(data.get("name") == recorded.get("name") and set(roots(data)) & set(roots(recorded)))


def count_seen(paths: Sequence[str], file: EncoderFile) -> int:
    """Return how many of the image files lie in the folders whose images the encoder was trained on.

    Returns 0 if these folders are not recorded, or if a label file chose the training images.
    """
    recorded = file.config.get("data", {})
    if recorded.get("name") not in (*FOLDERS, "imagenet") or recorded.get("label_file"):
        return 0
    searched = [root / "train" if recorded["name"] == "imagenet" else root for root in roots(recorded)]
    folders = {folder: resolved(folder) for folder in {Path(path).parent for path in paths}}
    seen = {folder for folder, real in folders.items() if any(real.is_relative_to(root) for root in searched)}
    return sum(Path(path).parent in seen for path in paths)


def paths_of(source: Source) -> list[str]:
    """Return the file of each image or frame of a source, without those that are not read from a file of their own."""
    return [path for i in range(len(source)) if (path := source.file_of(i)) is not None]


def held_out_seen(data: DataConfig, hold_out: float, file: EncoderFile, held_out: Source | None = None) -> bool:
    """Return whether the held-out images can be among those that the encoder was trained on. There are three cases.

    (1) `hold_out` is above 0, and `data` shares images with the data of the training. (2) `data` shares images with the
    data of the training and has a label file, and its label_file, split or eval_split differs from that of the
    training. (3) Files of `held_out` lie in the folders of the training, see `count_seen`.
    """
    evaluated, recorded = asdict(data), file.config.get("data", {})
    splits = [
        [str(each.get("label_file") and resolved(each["label_file"]))]
        + [each.get(name) for name in ("split", "eval_split")]
        for each in (evaluated, recorded)
    ]
    other_split = bool(evaluated["label_file"]) and splits[0] != splits[1]
    if (hold_out > 0 or other_split) and shares_images(evaluated, recorded):
        return True
    return held_out is not None and count_seen(paths_of(held_out), file) > 0


def log_labels(file: EncoderFile) -> None:
    """Print a line about an encoder that was trained with labels."""
    if file.used_labels:
        log(f"{file.source} was trained with labels: do not compare it with encoders trained without labels")


def refuse_or_warn(problem: str, file: EncoderFile, fix: str) -> None:
    """Report that an encoder was trained on held-out images: an error if it was trained with labels, else a warning.

    Args:
        problem: the beginning of the message, which names the images.
        file: the file of the encoder.
        fix: the setting that selects other images.

    Raises:
        ConfigError: if the encoder was trained with labels.
    """
    if file.used_labels:
        raise ConfigError(f"{problem}, with their labels: {fix}")
    if is_rank_zero():
        warnings.warn(f"{problem}, without their labels: for a better estimate, {fix}", RunWarning, stacklevel=2)


def warn_of_seen(held_out: Sequence[str], files: Iterable[EncoderFile]) -> bool:
    """Warn if an encoder was trained on held-out image files, and return whether one was."""
    counts = {each.source: count for each in files if (count := count_seen(held_out, each))}
    if counts and is_rank_zero():
        source, count = next(iter(counts.items()))
        problem = f"{count:,} of the {len(held_out):,} held-out images are in the folder of images that {source} was"
        fix = "for a better estimate, choose other held-out images"
        warnings.warn(f"{problem} trained on: {fix}", RunWarning, stacklevel=2)
    return bool(counts)
