"""The configuration of `python -m moco.report`."""

from collections import Counter
from dataclasses import dataclass, field

from moco.config.base import ComputeConfig, bounded, check_bounds, require
from moco.config.data import SubjectDataConfig, refuse_hold_out


@dataclass
class ReportConfig(ComputeConfig):
    """Write an HTML page about one run, or about several runs side by side."""

    run: str = bounded("", min_length=1, path=True, example="run=runs/digits")
    """Directory of a run of moco.train, which may still be in progress."""
    compare: list[str] = bounded([], path=True)
    """Directories of other runs to show side by side with `run`."""
    output: str = bounded("", path=True)
    """File to write; empty: report.html in the run's directory."""
    pictures: int = bounded(1000, ge=0)
    """Number of images in the map, drawn at random from the held-out images, or from the training images if none are
    held out. 0: no map, neighbors or attention, and the data set is not opened."""
    map: str = bounded("tsne", choices=("tsne", "umap", "none"))
    """Method of the map: tsne, umap (needs umap-learn), or none (no map)."""
    perplexity: float = bounded(30.0, ge=1)
    """Perplexity of t-SNE or number of neighbors of UMAP: about how many neighbors of each image the map preserves."""
    clusters: int = bounded(0, ge=0)
    """Number of k-means clusters of the features; 0: the number of classes (at most 20), or 10 without labels."""
    queries: int = bounded(8, ge=0)
    """Number of images of the map for which nearest neighbors and, for a ViT, attention are shown."""
    neighbours: int = bounded(6, ge=1)
    """Number of nearest neighbors shown per query image."""
    references: int = bounded(5000, ge=0)
    """Number of training images, drawn at random, among which neighbors are searched; 0: all of them."""
    projector: bool = True
    """Also write the features and images for TensorBoard's projector, into projector/ in each run's directory."""
    seed: int = bounded(0, ge=0, lt=2**64)
    """Seed of the drawn images, the map and the clusters."""
    images_at_once: int = bounded(512, ge=1)
    """Images per forward pass of the encoder. It affects memory, not results."""
    data: SubjectDataConfig = field(default_factory=SubjectDataConfig)
    """The current location of the images, if they were moved after the runs. It applies to all runs."""


def check_report(config: ReportConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_bounds(config)
    refuse_hold_out(config.data)
    repeated = sorted(name for name, count in Counter([config.run, *config.compare]).items() if count > 1)
    require(not repeated, f"run={config.run} and compare={config.compare} repeat {', '.join(repeated)}: remove one")
