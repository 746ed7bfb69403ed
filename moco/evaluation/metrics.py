"""Metrics of class scores on held-out images: accuracies, their uncertainty, the confusion matrix.

Legend: M images, L classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
LARGEST_CONFUSION = 200  # classes; a larger matrix is not written to results.json
BEST = 5  # number of ranked classes per image
NO_VOTE = -1  # in place of a class without a vote, see `rank_classes`
_AT_ONCE = 2**24  # scores in memory: 64 MiB of float32


@dataclass(frozen=True, eq=False)
class Metrics:
    """Accuracies in percent of one classifier on one set of images."""

    top1: float
    top5: float | None  # None with five classes or fewer, or of a kNN classifier with fewer than five neighbors
    per_class: list[float | None]  # None for a class without images
    pairs: NDArray[np.int64]  # (P, 3): true class, prediction and number of images of each pair that occurs
    count: int  # M

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Build the confusion matrix (L, L): rows are true classes, columns predictions. Memory is quadratic in L."""
        return confusion_of(self.pairs, len(self.per_class))

    @property
    def balanced(self) -> float | None:
        """Compute the balanced accuracy: the mean of the accuracies of the classes that have images."""
        return mean_known(self.per_class)

    @property
    def majority(self) -> float:
        """Compute the accuracy in percent of always answering the most frequent class of these images."""
        return 100 * float(np.bincount(self.pairs[:, 0], weights=self.pairs[:, 2]).max()) / self.count

    def baselines(self, encoder: str) -> str:
        """Describe the accuracy of a guess; if classes differ in size, also majority and balanced accuracy."""
        chance = 100 / len(self.per_class)
        text = f"chance is {chance:.1f} %"
        if self.majority < 1.1 * chance:
            return text
        text += f", always the most frequent class {self.majority:.1f} %"
        return f"{text}; {encoder}: balanced accuracy {self.balanced:.1f} %"

    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval of top1 in percent: the uncertainty due to the finite number of test images.

        Equal to scipy.stats.binomtest(...).proportion_ci(method="wilson"), whose import takes half a second.
        """
        p, n = self.top1 / 100, self.count
        center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
        return 100 * (center - half), 100 * (center + half)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        confusion = self.confusion.tolist() if len(self.per_class) <= LARGEST_CONFUSION else None
        plain = {name: getattr(self, name) for name in ("top1", "top5", "balanced", "majority", "per_class")}
        return plain | {"confusion": confusion, "count": self.count, "interval95": list(self.interval())}


def rank_classes(scores: Tensor, votes: bool = False) -> Tensor:
    """Return the five best classes of each image, or all if there are fewer: (M, min(5, L)), the best first.

    Args:
        scores: (M, L); of classes with equal scores, the first one is better.
        votes: the scores are votes of neighbors; `NO_VOTE` replaces each class without a vote except the best class.
    """
    classes = scores.shape[1]
    parts = []
    for part in scores.split(max(1, _AT_ONCE // max(1, classes))):
        values, ranked = largest(part.float(), min(BEST, classes))
        if votes:
            ranked[:, 1:] = ranked[:, 1:].where(values[:, 1:] > 0, NO_VOTE)
        parts.append(ranked)
    return torch.cat(parts)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row, descending, and their columns: (M, L) -> (M, min(k, L)) each.

    Of equal values the first is taken, while `topk` takes any.
    """
    k = min(k, values.shape[1])
    top, at = values.topk(min(k + 1, values.shape[1]), dim=1)
    edge, at = top[:, k - 1 : k], at[:, :k]
    tied = (top[:, k:] == edge).any(dim=1)  # more equal values than places
    if tied.any():
        some, edge = values[tied], edge[tied]
        above, equal = some > edge, some == edge
        kept = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
        at[tied] = kept.nonzero()[:, 1].view(-1, k)
    at = at.sort(dim=1).values
    top, order = values.gather(1, at).sort(dim=1, descending=True, stable=True)
    return top, at.gather(1, order)


def compute_metrics(ranked: Tensor, labels: NDArray[np.int64], classes: int) -> Metrics:
    """Compare the best classes of each image, (M, min(5, L)) of `rank_classes`, with the true classes (M,).

    Time and memory are linear in the number of classes L. scikit-learn's top_k_accuracy_score is not used: it prefers
    the last of equal scores and has no option for votes.
    """
    predicted = ranked[:, 0].cpu().numpy()
    in_top5 = (ranked.cpu().numpy() == labels[:, None]).any(axis=1)
    top1, top5 = 100 * float(np.mean(predicted == labels)), 100 * float(np.mean(in_top5)) if classes > 5 else None
    correct, total = (np.bincount(each, minlength=classes) for each in (labels[predicted == labels], labels))
    per_class = [100 * float(c) / int(t) if t else None for c, t in zip(correct, total, strict=True)]
    codes, counts = np.unique(labels * classes + predicted, return_counts=True)
    pairs = np.stack([codes // classes, codes % classes, counts], axis=1)
    return Metrics(top1, top5, per_class, pairs, len(labels))


def confusion_of(pairs: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Sum `Metrics.pairs` (P, 3) to a confusion matrix (L, L). They may come from several draws of labeled images."""
    counts = np.bincount(pairs[:, 0] * classes + pairs[:, 1], pairs[:, 2], classes**2)
    return counts.astype(np.int64).reshape(classes, classes)


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of repeats and half the width of its 95 % interval (Student's t); None for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    from scipy.stats import t  # importing it takes half a second

    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1)) * spread
