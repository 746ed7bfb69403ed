"""The configuration of `python -m moco.search`."""

from dataclasses import dataclass

from moco.config.base import bounded, check_bounds, require
from moco.config.data import refuse_hold_out
from moco.config.embed import EmbedConfig
from moco.config.subject import check_subject


@dataclass
class SearchConfig(EmbedConfig):
    """Find similar images, near-duplicates or outliers. The features are computed once and kept for later searches."""

    output: str = bounded("", path=True)
    """Directory in which the folder search/ is made for the results. Empty: the directory of `index`; if index is empty
    too, the run's directory; for an encoder.safetensors of moco.train, the directory of that file; for any other
    checkpoint=.../NAME.ending, runs/NAME. The results replace those of an earlier search with the same mode in this
    folder."""
    index: str = bounded("", path=True)
    """Directory with the output of moco.embed; empty: the folder features/ in `output`, whose features are computed if
    they do not exist."""
    mode: str = bounded("nearest", choices=("nearest", "duplicates", "outliers"))
    """What to find: nearest (the most similar images to each query), duplicates (groups: an image to keep, and the
    images that may be copies of it), or outliers (images that resemble no others)."""
    query: list[str] = bounded([], path=True)
    """For mode=nearest: the query images, as in query=[a.jpg,b.jpg]. Each is an image file, which need not belong to
    the data set, or a name from the table of the index, such as clips/a.mp4@1.000 for a frame of a video."""
    sample: int = bounded(0, ge=0)
    """For mode=nearest: use N random images of the data set as queries; 0: use 8 random images if `query` is empty,
    else no random images."""
    k: int = bounded(12, ge=1)
    """Number of nearest neighbors: those listed for each query with mode=nearest; with mode=outliers, the score of an
    image is the mean similarity to its k nearest neighbors."""
    threshold: float = bounded(0.97, gt=-1, le=1, example="threshold=0.97")
    """For mode=duplicates: an image joins a group if its cosine similarity to the image to keep is at least the
    threshold. The best threshold depends on the encoder: raise it if a group holds different images, lower it to find
    edited copies."""
    show: int = bounded(60, ge=1)
    """Largest number of groups or outliers in the gallery. The JSON file holds all of them."""
    gallery: str = bounded("html", choices=("html", "png", "none"))
    """Format of the gallery: html (a single file that works offline), png, or none."""


def check_search(config: SearchConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_bounds(config)
    if not config.index or config.run or config.checkpoint:  # an index alone is enough: it records its encoder
        check_subject(config)
    refuse_hold_out(config.data)
    both = f"query={config.query} and sample={config.sample}"
    require(not (config.query and config.sample), f"{both} exclude each other: remove one of them")
    require(
        config.mode == "nearest" or not (config.query or config.sample),
        f"mode={config.mode} compares all images with each other: remove {both}, or set mode=nearest",
    )
