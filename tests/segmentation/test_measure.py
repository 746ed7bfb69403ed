"""mIoU: against scikit-learn, and closed forms."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score

from moco.segmentation.masks import IGNORED
from moco.segmentation.measure import Overlap, overlap_of


def overlap(predicted: np.ndarray, masks: np.ndarray, classes: int) -> Overlap:
    counts = np.stack([overlap_of(*each, classes) for each in zip(predicted, masks, strict=True)])
    return Overlap(*counts.transpose(1, 0, 2))


def test_iou_and_pixel_accuracy_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 5, (7, 9, 11)).astype(np.uint8)
    predicted = np.where(rng.random(masks.shape) < 0.6, masks, rng.integers(0, 5, masks.shape)).astype(np.int64)
    masks[rng.random(masks.shape) < 0.2] = IGNORED
    found, known = overlap(predicted, masks, 6), masks != IGNORED
    expected = 100 * jaccard_score(masks[known], predicted[known], average=None, labels=range(5))
    assert found.per_class[:5] == pytest.approx(expected, abs=1e-12)
    assert found.per_class[5] is None  # in no mask and no prediction
    assert found.mean == pytest.approx(expected.mean(), abs=1e-12)
    assert found.pixel_accuracy == pytest.approx(100 * accuracy_score(masks[known], predicted[known]), abs=1e-12)
    low, high = found.interval()
    assert low < found.mean < high


def test_a_right_prediction_has_100_percent_and_a_class_that_is_only_predicted_has_0() -> None:
    masks = np.array([[[0, 1], [1, IGNORED]]], dtype=np.uint8)
    right = overlap(np.array([[[0, 1], [1, 0]]]), masks, 3)
    assert (right.mean, right.pixel_accuracy, right.interval()) == (100, 100, (100, 100))
    wrong = overlap(np.array([[[2, 1], [1, 2]]]), masks, 3)
    assert wrong.per_class == [0, 100, 0]
    assert wrong.to_json()["mIoU"] == pytest.approx(100 / 3)
