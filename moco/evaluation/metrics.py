"""Metrics of class scores on held-out images: accuracies, their uncertainty, the confusion matrix.

Legend: M images, L classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.evaluation.ranking import rank_classes

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
LARGEST_CONFUSION = 200  # classes; a larger matrix is not written to results.json


@dataclass(frozen=True, eq=False)
class Metrics:
    """Accuracies in percent of one classifier on one set of images."""

    top1: float
    top5: float | None  # None with five classes or fewer
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

    def baselines(self) -> str:
        """Describe the accuracy of a guess and, if classes differ in size, majority and balanced accuracy."""
        classes = len(self.per_class)
        chance = f"chance is {100 / classes:.1f} %"
        if self.majority < 110 / classes:
            return chance
        return (
            f"{chance}, always the most frequent class {self.majority:.1f} %; balanced accuracy {self.balanced:.1f} %"
        )

    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval of top1 in percent: the uncertainty due to the finite number of test images.

        Equal to scipy.stats.binomtest(...).proportion_ci(method="wilson"), whose import takes half a second.
        """
        p, n = self.top1 / 100, self.count
        center = (p + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
        half = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n**2)) / (1 + _Z95**2 / n)
        return 100 * (center - half), 100 * (center + half)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        confusion = self.confusion.tolist() if len(self.per_class) <= LARGEST_CONFUSION else None
        plain = {name: getattr(self, name) for name in ("top1", "top5", "balanced", "majority", "per_class")}
        return plain | {"confusion": confusion, "count": self.count, "interval95": list(self.interval())}


def compute_metrics(scores: Tensor, labels: NDArray[np.int64], votes: bool = False) -> Metrics:
    """Compare class scores with the true classes.

    Not scikit-learn's top_k_accuracy_score: it prefers the last of equal scores, and has no option for votes.

    Args:
        scores: (M, L); the first of equal scores counts.
        labels: (M,).
        votes: the scores are votes of neighbors, and a class without a vote is not among the top five, even if
            fewer than five classes have votes.
    """
    return ranking_metrics(rank_classes(scores, votes).cpu().numpy(), labels, scores.shape[1])


def ranking_metrics(ranked: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> Metrics:
    """Compare the best classes of each image, (M, min(5, L)) of `rank_classes`, with the true classes (M,).

    Time and memory are linear in the number of classes L.
    """
    truth = np.asarray(labels)
    predicted = ranked[:, 0]
    in_top5 = (ranked == truth[:, None]).any(axis=1)
    top1, top5 = 100 * float(np.mean(predicted == truth)), 100 * float(np.mean(in_top5)) if classes > 5 else None
    correct, total = (np.bincount(each, minlength=classes) for each in (truth[predicted == truth], truth))
    per_class = [100 * float(c) / int(t) if t else None for c, t in zip(correct, total, strict=True)]
    codes, counts = np.unique(truth * classes + predicted, return_counts=True)
    pairs = np.stack([codes // classes, codes % classes, counts], axis=1)
    return Metrics(top1, top5, per_class, pairs, len(truth))


def confusion_of(pairs: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Sum `Metrics.pairs` (P, 3), of one repeat or several, to a confusion matrix (L, L)."""
    counts = np.bincount(pairs[:, 0] * classes + pairs[:, 1], pairs[:, 2], classes**2)
    return counts.astype(np.int64).reshape(classes, classes)


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over seeds and half the width of its 95 % interval (Student's t); None for a single seed."""
    if len(values) < 2:
        return float(np.mean(values)), None
    from scipy.stats import t  # importing it takes half a second

    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1)) * spread


class TestSplitReadTwice(RuntimeError):
    """The held-out split was opened twice, so a choice could depend on it."""

    __test__ = False  # pytest would collect it because of its name


class HeldOut:
    """A held-out split that opens once, after every choice (learning rate, layer, k) is made.

    Its features (M, D) are computed when it is opened, not before.
    """

    def __init__(self, features: Callable[[], Tensor], labels: NDArray[np.int64]) -> None:
        self._features, self._labels, self._opened = features, labels, False

    def open(self) -> tuple[Tensor, NDArray[np.int64]]:
        """Return features and labels for the final metrics.

        Raises:
            TestSplitReadTwice: on a second call.
        """
        if self._opened:
            raise TestSplitReadTwice("the held-out split was already read: choose on a part of the training split")
        self._opened = True
        return self._features(), self._labels
