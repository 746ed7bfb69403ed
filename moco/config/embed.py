"""The configuration of `python -m moco.embed`."""

from dataclasses import dataclass

from moco.config.base import bounded
from moco.config.data import refuse_hold_out
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class EmbedConfig(SubjectConfig):
    """Compute the features of images and write them to files."""

    output: str = bounded("", path=True)
    """Directory for the features and their table. Empty: a folder features/. It is in the run's directory; for an
    encoder.safetensors of moco.train, in the directory of that file; for any other checkpoint=.../NAME.ending, in
    runs/NAME."""
    features: str = bounded("backbone", choices=("backbone", "projection"))
    """Features to write: backbone (the backbone's output, which suits most tasks), or projection (the output of the
    projection head, which the checkpoint must contain)."""
    split: str = bounded("train", choices=("train", "bank", "held_out"))
    """Images to use: train (for an unlabeled folder, all images), bank (the labeled reference images), or held_out."""
    normalize: bool = False
    """Scale each feature vector to length 1."""
    dtype: str = bounded("float32", choices=("float32", "float16"))
    """Number format of the features. float16 takes half of the disk space of float32."""
    table: str = bounded("csv", choices=("csv", "parquet"))
    """Format of the table that names, for each row of the features, the image and its classes: csv (index.csv), or
    parquet (index.parquet, needs pyarrow). If images can have several classes, the classes of an image are a list in
    Parquet. In CSV they are a text, separated by data.label_separator, or by a semicolon if data.label_separator is
    empty."""


def check_embed(config: EmbedConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_subject(config)
    refuse_hold_out(config.data)
