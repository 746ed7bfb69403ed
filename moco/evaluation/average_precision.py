"""Average precision of class scores on images that can have several classes each, and its mean over classes (mAP).

Legend: M images, L classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco.evaluation.metrics import mean_known


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """Average precisions in percent of one classifier on one set of images.

    The average precision of a class is the sum over n of P(n) (R(n) - R(n - 1)), where P(n) and R(n) are precision and
    recall of the images whose score of this class is at least the n-th highest distinct score.
    scikit-learn has the same definition. PASCAL VOC 2007 defines another average precision, which interpolates at
    eleven recalls, see `eleven_point`.
    """

    per_class: list[float | None]  # None for a class that no evaluated image or no training image has
    random: float  # mAP of a random order, in percent: the mean share of the images that have the class
    count: int  # M

    @property
    def mean(self) -> float:
        """The mAP: the mean over the classes that have images in both splits."""
        return mean_known(self.per_class) or 0.0

    def baselines(self, _encoder: str) -> str:
        """Describe the mAP of a random order."""
        return f"a random order has an mAP of {self.random:.1f} %"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return {"mAP": self.mean, "random_mAP": self.random, "per_class_ap": self.per_class, "count": self.count}


def average_precision(scores: Tensor, labels: NDArray[np.bool_], training: NDArray[np.bool_]) -> AveragePrecision:
    """Compute the average precision of each class that has an image in these labels and in the training labels.

    Args:
        scores: (M, L), higher for images that more probably have the class; on any device.
        labels: the true classes, (M, L).
        training: the classes of the training images, (any number, L).
    """
    from sklearn.metrics import average_precision_score  # imported here: it takes a second

    values = scores.cpu().double().numpy()
    measured = np.asarray(labels.any(axis=0) & training.any(axis=0))  # (L,)
    per_class = [
        100 * float(average_precision_score(labels[:, i], values[:, i])) if measured[i] else None
        for i in range(labels.shape[1])
    ]
    random = 100 * float(labels[:, measured].mean()) if measured.any() else 0.0
    return AveragePrecision(per_class, random, len(labels))


def eleven_point(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """Return the average precision of PASCAL VOC 2007 in percent: the mean over recalls 0, 0.1, ..., 1.

    For each recall it takes the highest precision at this recall or a higher one.

    Args:
        scores: (M,), higher for images that more probably have the class; equal scores keep their order.
        labels: (M,), which images have the class; at least one image has it.
    """
    right = np.cumsum(labels[np.argsort(-scores, kind="stable")])  # (M,)
    recall, precision = right / right[-1], right / np.arange(1, len(right) + 1)
    return 100 * float(np.mean([precision[recall >= tenth / 10].max() for tenth in range(11)]))
