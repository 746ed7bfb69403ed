"""A linear support vector machine (SVM) for each class, and its 11-point average precision: the protocol of VOC07.

    Goyal et al., "Scaling and benchmarking self-supervised visual representation learning", ICCV 2019

Features have unit length; the cost is chosen for each class by cross-validation. All ranks compute the same result.

Legend: N training images, M test images, D feature dimension, L classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco.data.base import Progress
from moco.data.keyed import VALIDATION, permutation
from moco.evaluation.average_precision import eleven_point
from moco.evaluation.metrics import mean_known

COSTS = tuple(10.0**power for power in range(-4, 4))
FOLDS = 3
UNKNOWN = -1  # a label that is left out of training and of the average precision: a difficult object of VOC

Labels = NDArray[np.int64]  # 1: the image has the class; 0: it does not have the class; UNKNOWN


@dataclass(frozen=True)
class SvmResult:
    """The average precision of each class in percent, and the chosen costs; None for a class that is not measured.

    A class is measured if some training images have it, others do not have it, and a test image has it.
    """

    per_class: list[float | None]
    costs: list[float | None]

    @property
    def mean(self) -> float:
        """The mAP: the mean over the measured classes."""
        return mean_known(self.per_class) or 0.0


def evaluate_svm(
    training: tuple[Tensor, Labels],
    test: tuple[Tensor, Labels],
    seed: int,
    costs: Sequence[float] = COSTS,
    progress: Progress = lambda *_: None,
) -> SvmResult:
    """Train an SVM per class on features (N, D) with labels (N, L), and test it on features (M, D) with labels (M, L).

    Args:
        training, test: features and labels.
        seed: the seed of the random division into folds.
        costs: the costs to choose from; of several costs with the same average precision, the first is chosen.
        progress: called with (classes done, L).
    """
    x, queries = (F.normalize(features.double(), dim=1).cpu().numpy() for features, _ in (training, test))
    labels, truth = training[1], test[1]
    aps: list[float | None] = []
    chosen: list[float | None] = []
    for number in range(labels.shape[1]):
        known, measured = labels[:, number] != UNKNOWN, truth[:, number] != UNKNOWN
        positive, test_positive = labels[known, number] == 1, truth[measured, number] == 1
        ap = cost = None
        if positive.any() and not positive.all() and test_positive.any():
            cost = _choose_cost(x[known], positive, costs, seed)
            scores = _svm(cost).fit(x[known], positive).decision_function(queries[measured])
            ap = eleven_point(scores, test_positive)
        aps.append(ap)
        chosen.append(cost)
        progress(number + 1, labels.shape[1])
    return SvmResult(aps, chosen)


def _svm(cost: float) -> Any:
    from sklearn.svm import LinearSVC  # imported here: it takes a second

    # Images that have the class are few, so the published protocol gives each of them twice the weight.
    return LinearSVC(C=cost, class_weight={True: 2, False: 1}, max_iter=5000, random_state=0)


def _choose_cost(x: NDArray[np.float64], positive: NDArray[np.bool_], costs: Sequence[float], seed: int) -> float:
    """Return the cost with the highest average precision of this class, averaged over the folds.

    Return the first cost if fewer than two images have the class, or fewer than two do not have it.
    """
    if min(positive.sum(), (~positive).sum()) < 2:
        return costs[0]
    order, fold = permutation(seed, 0, len(positive), VALIDATION), np.zeros(len(positive), np.int64)
    for value in (True, False):  # both kinds of images are divided evenly over the folds
        rows = order[positive[order] == value]
        fold[rows] = np.arange(len(rows)) % FOLDS
    folds = [fold == number for number in range(FOLDS) if positive[fold == number].any()]

    def mean_precision(cost: float) -> float:
        fitted = ((_svm(cost).fit(x[~held], positive[~held]), held) for held in folds)
        return float(np.mean([eleven_point(svm.decision_function(x[held]), positive[held]) for svm, held in fitted]))

    return max(costs, key=mean_precision)
