"""The schema of `moco.embed`: features of any pictures, written to files."""

from dataclasses import dataclass

from moco.config.base import one_of, require
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class EmbedConfig(SubjectConfig):
    """What to compute and how to write it. `output` is its own folder here; empty: features/ inside the run."""

    features: str = "backbone"
    """backbone (what transfers), or projection (the head's output) where the file holds a head"""
    split: str = "train"
    """train (all pictures of an unlabeled folder), bank (the labeled references), or held_out"""
    normalize: bool = False
    """scale each feature vector to length 1"""
    dtype: str = "float32"
    """float32, or float16: half the disk"""
    table: str = "csv"
    """index.csv, or parquet: index.parquet, which needs pyarrow"""
    on_bad_image: str = "stop"
    """stop at a picture that cannot be read, or skip: leave it out and list it in unreadable.csv"""


def check_embed(config: EmbedConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_subject(config)
    check_features(config)


def check_features(config: EmbedConfig) -> None:
    """The fields of this schema alone: a search through features that are there already names no encoder."""
    require(
        config.data.hold_out == 0,
        f"data.hold_out={config.data.hold_out} says nothing here, where nothing is judged: leave it out "
        "(split=held_out takes a data set's own held-out pictures)",
    )
    one_of("features", config.features, ("backbone", "projection"))
    one_of("split", config.split, ("train", "bank", "held_out"))
    one_of("dtype", config.dtype, ("float32", "float16"))
    one_of("table", config.table, ("csv", "parquet"))
    one_of("on_bad_image", config.on_bad_image, ("stop", "skip"))
