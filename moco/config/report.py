"""The schema of `moco.reporting`: a page about one run, or about several side by side."""

from dataclasses import dataclass, field

from moco.config.base import ComputeConfig, at_least, check_bounds, one_of, require
from moco.config.subject import SubjectDataConfig


@dataclass
class ReportConfig(ComputeConfig):
    """Which runs, and what of their pictures is shown."""

    run: str = ""
    """a run of moco.train, finished or not"""
    compare: list[str] = field(default_factory=list)
    """other runs, beside it in the same page"""
    output: str = ""
    """the file; empty: report.html in the run"""
    pictures: int = 1000
    """held-out pictures (without any: training pictures) in the map, drawn by the seed; 0: no map, neighbors or
    attention, and the data set is not opened"""
    map: str = "tsne"
    """tsne, umap (needs umap-learn), or none"""
    perplexity: float = 30.0
    """about how many neighbors of a picture the map tries to keep"""
    clusters: int = 0
    """groups found by k-means in the features; 0: as many as there are classes (at most 20), 10 without labels"""
    queries: int = 8
    """pictures of which the nearest neighbors, and for a ViT the attention, are shown; at most `pictures`"""
    neighbours: int = 6
    """of each query"""
    references: int = 5000
    """the training pictures among which neighbors are looked for, drawn by the seed; 0: all"""
    projector: bool = True
    """also write the embedding for TensorBoard's projector, with the pictures, into projector/ in each run"""
    seed: int = 0
    """of what is drawn, of the map and the groups"""
    images_at_once: int = 512
    """through the encoder without gradient; changes memory, not results"""
    data: SubjectDataConfig = field(default_factory=SubjectDataConfig)
    """where the pictures are now, for all runs, if not where the runs say"""


def check_report(config: ReportConfig) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_bounds(config)
    require(bool(config.run), "say which run: run=DIR, the directory of a run of moco.train, e.g. run=runs/digits")
    one_of("map", config.map, ("tsne", "umap", "none"))
    at_least(0, {"pictures": config.pictures, "clusters": config.clusters, "queries": config.queries})
    at_least(0, {"references": config.references})
    at_least(1, {"neighbours": config.neighbours, "images_at_once": config.images_at_once})
    require(config.perplexity >= 1, f"perplexity={config.perplexity:g} must be at least 1, e.g. perplexity=30")
    require(0 <= config.seed < 2**64, f"seed={config.seed} must lie in 0 ... 2**64 - 1")
    require(
        config.data.hold_out == 0,
        f"data.hold_out={config.data.hold_out} says nothing here, where nothing is judged: leave it out",
    )
    at_least(0, {"data.workers": config.data.workers or 0})
    twice = {each for each in [config.run, *config.compare] if [config.run, *config.compare].count(each) > 1}
    require(
        not twice, f"run={config.run} and compare={config.compare} name {', '.join(sorted(twice))} twice: once will do"
    )
