"""Intersection over union (IoU) of predicted and true classes, and its uncertainty.

Legend: M images, L classes, R bootstrap resamples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moco.evaluation.metrics import mean_known
from moco.segmentation.masks import IGNORED

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Overlap:
    """The result of one network on one split.

    Attributes:
        both: For each image and class, the number of pixels whose true and predicted class is this one, (M, L).
        true: The number of pixels with this true class, (M, L).
        predicted: The number of pixels with this predicted class, among those that have a true class, (M, L).
    """

    both: NDArray[np.int64]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @property
    def per_class(self) -> list[float | None]:
        """The IoU of each class over all pixels of the split, in percent; None for a class that does not occur."""
        both, union = self.both.sum(axis=0), (self.true + self.predicted - self.both).sum(axis=0)
        return [100 * float(b) / float(u) if u else None for b, u in zip(both, union, strict=True)]

    @property
    def mean(self) -> float:
        """The mean IoU (mIoU) in percent, over the classes that occur in the masks or the predictions."""
        mean = mean_known(self.per_class)
        assert mean is not None
        return mean

    @property
    def pixel_accuracy(self) -> float:
        """The percentage of correctly predicted pixels among those that have a true class."""
        return 100 * float(self.both.sum()) / float(self.true.sum())

    def interval(self) -> tuple[float, float]:
        """Return the 95 % bootstrap interval of the mIoU: the uncertainty due to the finite number of test images."""
        rng, images = np.random.default_rng(0), len(self.both)
        union = self.true + self.predicted - self.both
        weights = rng.multinomial(images, np.full(images, 1 / images), RESAMPLES)  # (R, M)
        both, union = weights @ self.both, weights @ union  # (R, L)
        means = np.nanmean(np.where(union > 0, both / np.maximum(union, 1), np.nan), axis=1)
        low, high = np.percentile(100 * means, [2.5, 97.5])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return {
            "mIoU": self.mean,
            "pixel_accuracy": self.pixel_accuracy,
            "per_class": self.per_class,
            "count": len(self.both),
            "interval95": list(self.interval()),
        }


def overlap_of(predicted: NDArray[np.int64], mask: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Count the pixels of one image: the rows `both`, `true` and `predicted` of an `Overlap`, (3, L).

    Args:
        predicted: class of each pixel, (H, W).
        mask: true class, (H, W); `IGNORED` for pixels that are not counted.
        classes: L.
    """
    known = mask != IGNORED
    predicted, true = predicted[known], mask[known].astype(np.int64)
    parts = (true[predicted == true], true, predicted)
    return np.stack([np.bincount(each, minlength=classes) for each in parts])
