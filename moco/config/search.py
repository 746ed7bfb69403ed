"""The schema of `moco.search`: nearest pictures, near-duplicates, outliers."""

from dataclasses import dataclass, field

from moco.config.base import at_least, check_bounds, one_of, require
from moco.config.embed import EmbedConfig, check_features
from moco.config.subject import check_subject


@dataclass
class SearchConfig(EmbedConfig):
    """What to look for. Features come from `index`, or are computed as by moco.embed and kept for the next search."""

    index: str = ""
    """the output of moco.embed; empty: features/ inside output, computed where it is not there yet"""
    mode: str = "nearest"
    """nearest, duplicates or outliers"""
    query: list[str] = field(default_factory=list)
    """for `nearest`: picture files, in the folder or not"""
    sample: int = 0
    """for `nearest`: or so many pictures of the data set itself, drawn by the seed; 8 where nothing is said"""
    k: int = 12
    """neighbors; for `outliers` those whose mean similarity is the score"""
    threshold: float = 0.95
    """for `duplicates`: pictures at least as similar (cosine) are linked, and what is linked is one group"""
    show: int = 60
    """groups or outliers in the gallery; the JSON file holds all"""
    gallery: str = "html"
    """html (one file, nothing loaded from elsewhere), png or none"""


def check_search(config: SearchConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_bounds(config)
    if not (config.index and not config.run and not config.checkpoint):  # an index knows its encoder
        check_subject(config)
    check_features(config)
    one_of("mode", config.mode, ("nearest", "duplicates", "outliers"))
    one_of("gallery", config.gallery, ("html", "png", "none"))
    at_least(1, {"k": config.k, "show": config.show, "images_at_once": config.images_at_once})
    at_least(0, {"sample": config.sample, "seed": config.seed})
    require(
        -1 < config.threshold <= 1,
        f"threshold={config.threshold:g} must lie above -1 and not above 1: it is a cosine, e.g. threshold=0.95",
    )
    require(
        not (config.query and config.sample),
        f"query and sample={config.sample} both say what to look for: leave one of them out",
    )
    require(
        config.mode == "nearest" or not (config.query or config.sample),
        f"mode={config.mode} compares all pictures with each other: leave query and sample out, or set mode=nearest",
    )
