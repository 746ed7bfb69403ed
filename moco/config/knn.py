"""The schema of `python -m moco.knn`."""

from dataclasses import dataclass, field

from moco.config.base import at_least, one_of, require
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class KnnConfig(SubjectConfig):
    """Weighted k-nearest-neighbor classification on frozen features."""

    k: list[int] = field(default_factory=lambda: [200])
    """neighbors that vote; of several, leave-one-out on the training split chooses"""
    temperature: list[float] = field(default_factory=lambda: [0.1])
    """a vote weighs exp(cosine / temperature); of several, chosen as k is"""
    features: str = "backbone"
    """backbone, or projection (the embedding that the loss sees) where the file has its head"""
    choose_on: int = 10000
    """how many training images at most, drawn once by the seed, k and temperature are chosen on"""
    labels_per_class: int = 0
    """so many labeled training images a class, averaged over draws of them, which the seed makes; 0: all"""
    draws: int = 100
    """how often labels_per_class labels are drawn; the figure is their mean"""
    compare: list[str] = field(default_factory=lambda: ["untrained"])
    """judged in the same way: untrained (the same network with its first weights), pixels"""
    half: bool = False
    """keep the training features in half precision, for half the memory; changes the last digits"""
    queries_at_once: int = 1024
    """this and references_at_once set the memory of the search; they change no result"""
    references_at_once: int = 65536
    """see queries_at_once"""


def check_knn(config: KnnConfig) -> None:
    """Refuses what cannot run, before any work starts.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    check_subject(config)
    require(
        bool(config.k) and min(config.k) >= 1,
        f"k={config.k} must hold at least one number of neighbors, none below 1, e.g. k=[20]",
    )
    require(
        bool(config.temperature) and min(config.temperature) >= 1e-6,  # float32 divides by it
        f"temperature={config.temperature} must hold at least one number, all above 0, e.g. temperature=[0.1]",
    )
    one_of("features", config.features, ("backbone", "projection"))
    unknown = [each for each in config.compare if each not in ("untrained", "pixels")]
    require(not unknown, f"compare names {', '.join(unknown)}; it can hold untrained and pixels")
    at_least(1, {"choose_on": config.choose_on, "draws": config.draws})
    at_least(0, {"labels_per_class": config.labels_per_class})
    # Below, BLAS rounds a product's elements differently in parts of different size.
    at_least(64, {"queries_at_once": config.queries_at_once, "references_at_once": config.references_at_once})
    require(
        not config.labels_per_class or len(config.k) * len(config.temperature) == 1,
        f"labels_per_class={config.labels_per_class} leaves too few images to choose k={config.k} and temperature="
        f"{config.temperature} on: give one of each, e.g. k=[1] temperature=[0.1]",
    )
