"""The configuration of `python -m moco.knn`."""

from dataclasses import dataclass

from moco.config.base import bounded, require
from moco.config.quoting import override
from moco.config.subject import SubjectConfig, check_subject


@dataclass
class KnnConfig(SubjectConfig):
    """Evaluate an encoder with a weighted k-nearest-neighbor (kNN) classifier on frozen features."""

    k: list[int] = bounded([200], ge=1, min_length=1, example="k=[20]")
    """Number of neighbors that vote. If several values are given, the one with the best leave-one-out accuracy on
    training images is used."""
    # The lower bound exists because similarities are divided by the temperature in float32.
    temperature: list[float] = bounded([0.1], ge=1e-6, min_length=1, example="temperature=[0.1]")
    """Temperature of the votes: the vote of a neighbor has the weight exp(cosine similarity / temperature). If several
    values are given, the best combination of k and temperature is used."""
    features: str = bounded("backbone", choices=("backbone", "projection"))
    """Features to compare: backbone (the backbone's output), or projection (the embedding that the loss compares, from
    the projection head, which the checkpoint must contain)."""
    choose_on: int = bounded(10000, ge=1)
    """Number of training images, drawn once, on which k and temperature are chosen; all training images if there are
    fewer."""
    labels_per_class: int = bounded(0, ge=0)
    """Use only N labeled training images per class, drawn at random, and average the accuracy over many draws; 0: use
    all labels."""
    draws: int = bounded(100, ge=1)
    """Number of draws if labels_per_class is above 0. The result is the mean over the draws."""
    compare: list[str] = bounded(["untrained"], choices=("untrained", "pixels"))
    """Baselines to evaluate in the same way: untrained (the same network with random weights), pixels (raw pixels)."""
    half: bool = False
    """Store the training features in half precision: half the memory, and slightly different results."""
    # With smaller blocks, BLAS rounds differently, so the block size would affect results.
    queries_at_once: int = bounded(1024, ge=64)
    """Held-out images per block of the search. It affects memory, not results."""
    references_at_once: int = bounded(65536, ge=64)
    """Training images per block of the search. It affects memory, not results."""


def check_knn(config: KnnConfig) -> None:
    """Raise ConfigError for an invalid configuration."""
    check_subject(config)
    require(
        not config.labels_per_class or len(config.k) * len(config.temperature) == 1,
        f"labels_per_class={config.labels_per_class} needs one k and one temperature, not k={config.k} and temperature="
        f"{config.temperature}: set e.g. {override('k', [1])} {override('temperature', [0.1])}",
    )
