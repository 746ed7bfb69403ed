"""What a classifier's scores on held-out images come to: accuracies, their uncertainty, who is taken for whom.

Legend: M samples, L classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True, eq=False)
class Figures:
    """Accuracies in percent of one classifier on one set of images."""

    top1: float
    top5: float | None  # None with five classes or fewer
    per_class: list[float | None]  # None for a class without an image
    confusion: NDArray[np.int64]  # (L, L): row is the truth, column the prediction
    count: int  # M

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of top1, percent: what another draw of as many test images could have given."""
        p, n = self.top1 / 100, self.count
        center = (p + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
        half = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n**2)) / (1 + _Z95**2 / n)
        return 100 * (center - half), 100 * (center + half)

    def plain(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "interval95": list(self.interval()),
            "count": self.count,
            "per_class": self.per_class,
            "confusion": self.confusion.tolist() if len(self.confusion) <= 200 else None,
        }


def figures(scores: Tensor, labels: NDArray[np.int64], votes: bool = False) -> Figures:
    """Accuracies of class scores against the true classes.

    Args:
        scores: (M, L); of equal ones the first class counts.
        labels: (M,).
        votes: the scores are shares of neighbors' votes, and a class without any is not among the top five. It would
            stand there by its number alone where fewer than five classes have votes.
    """
    classes, truth = scores.shape[1], np.asarray(labels)
    ranked = scores.float().argsort(dim=1, descending=True, stable=True)[:, : min(5, classes)].cpu().numpy()
    predicted = ranked[:, 0]
    among_five = (ranked == truth[:, None]).any(axis=1)
    if votes:
        among_five &= scores.cpu().numpy()[np.arange(len(truth)), truth] > 0
    confusion = np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)
    totals = confusion.sum(axis=1)
    return Figures(
        top1=100 * float(np.mean(predicted == truth)),
        top5=100 * float(np.mean(among_five)) if classes > 5 else None,
        per_class=[
            100 * float(right) / int(total) if total else None
            for right, total in zip(np.diag(confusion), totals, strict=True)
        ],
        confusion=confusion.astype(np.int64),
        count=len(truth),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and half the width of Student's 95 % interval of it; None for a single seed."""
    if len(values) < 2:
        return float(np.mean(values)), None
    from scipy.stats import t  # costs half a second at start-up

    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1)) * spread


class TestSplitReadTwice(RuntimeError):
    """The test split was asked for again: what has seen it once could choose by it."""

    __test__ = False  # no test class, whatever pytest takes from its name


class HeldOut:
    """A test split that opens once. What chooses (a learning rate, a layer, k) is written without it at hand.

    Args:
        features: computes the features (M, D) of the split; called when it is opened, not before.
        labels: (M,).
    """

    def __init__(self, features: Any, labels: NDArray[np.int64]) -> None:
        self._features, self._labels, self._opened = features, labels, False

    def open(self) -> tuple[Tensor, NDArray[np.int64]]:
        """Features and labels, for the one final figure.

        Raises:
            TestSplitReadTwice: on a second call.
        """
        if self._opened:
            raise TestSplitReadTwice("the test split was read once already: choose on a part of the training split")
        self._opened = True
        return self._features(), self._labels
