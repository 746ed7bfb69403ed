"""Few-shot episodes: images of a few classes are classified by the nearest mean of a few labeled images per class.

    Snell, Swersky & Zemel, "Prototypical networks for few-shot learning", NeurIPS 2017; here the encoder is not trained
    Ericsson, Gouk & Hospedales, "How well do self-supervised models transfer?", CVPR 2021

Legend: M images, D feature dimension, W classes (ways), S labeled images (shots) and Q queries per class.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco.data.base import Progress
from moco.data.keyed import EPISODES, permutation
from moco.evaluation.subsets import SubsetError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Episodes:
    """The size of the episodes, and the seed of their random choices."""

    ways: int
    shots: int
    queries: int
    episodes: int  # number of episodes
    seed: int


def draw_episodes(labels: Rows, episodes: Episodes) -> Iterator[tuple[Rows, Rows]]:
    """Yield the rows of the labeled images (W, S) and of the queries (W, Q) of each episode.

    The choice depends on the labels, the sizes and the seed only, so it is the same for every encoder. Classes with
    fewer than S + Q images are not drawn.

    Args:
        labels: (M,).
        episodes: the sizes and the seed.

    Raises:
        SubsetError: if fewer than W classes have enough images.
    """
    each = episodes.shots + episodes.queries
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    rows = [found for found in by_class if len(found) >= each]
    if len(rows) < episodes.ways:
        raise SubsetError(_too_few([len(found) for found in by_class], len(rows), episodes))
    for episode in range(episodes.episodes):
        classes = permutation(episodes.seed, episode, len(rows), EPISODES)[: episodes.ways]
        drawn = [
            rows[label][permutation(episodes.seed, episode, len(rows[label]), EPISODES + 1 + place)[:each]]
            for place, label in enumerate(classes)
        ]
        picked = np.stack(drawn)  # (W, S + Q)
        yield picked[:, : episodes.shots], picked[:, episodes.shots :]


def _too_few(counts: list[int], enough: int, episodes: Episodes) -> str:
    """Return the error's message: of classes with `counts` test images each, only `enough` classes have enough."""
    each, ways, fixes = episodes.shots + episodes.queries, min(len(counts), episodes.ways), []
    if enough >= 2:
        fixes.append(f"set ways={enough}")
    if ways >= 2 and 2 <= (most := sorted(counts)[-ways]) < each:
        fewer = f"set ways={ways} and " * (ways < episodes.ways)
        fixes.append(f"{fewer}lower shots + queries to {most} or less")
    return (
        f"ways={episodes.ways} classes of an episode need {each} test images each (shots + queries), and {enough} of "
        f"the {len(counts)} classes have so many: {', or '.join(fixes) or 'add test images'}"
    )


def episode_accuracies(
    features: Tensor, labels: Rows, episodes: Episodes, progress: Progress = lambda *_: None
) -> list[float]:
    """Return the accuracy in percent of each episode; a query has the class of the nearest mean (Euclidean distance).

    Args:
        features: (M, D).
        labels: (M,).
        episodes: the sizes and the seed.
        progress: counts the episodes.

    Raises:
        SubsetError: see `draw_episodes`.
    """
    x = features.double()
    found = []
    for support, queries in draw_episodes(labels, episodes):
        means = x[_index(support, x)].mean(dim=1)  # (W, D)
        nearest = torch.cdist(x[_index(queries, x)].flatten(0, 1), means).argmin(dim=1)  # (W Q,)
        truth = torch.arange(len(means), device=x.device).repeat_interleave(queries.shape[1])
        found.append(100 * float((nearest == truth).double().mean()))
        progress(len(found), episodes.episodes)
    return found


def _index(rows: Rows, x: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(x.device)
