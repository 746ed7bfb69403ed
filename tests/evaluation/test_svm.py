"""The protocol of VOC07: 11-point average precision, an SVM per class, difficult images left out."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from moco.evaluation.average_precision import eleven_point
from moco.evaluation.svm import COSTS, UNKNOWN, evaluate_svm


def by_loop(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """Follow the development kit of the challenge: VOCap, and precision and recall of each rank."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    right, precision, recall = 0, [], []
    for rank, i in enumerate(order, 1):
        right += bool(labels[i])
        precision.append(right / rank)
        recall.append(right / labels.sum())
    total = 0.0
    for tenth in range(11):
        reached = [p for p, r in zip(precision, recall, strict=True) if r >= tenth / 10]
        total += max(reached, default=0.0) / 11
    return 100 * total


def test_eleven_points_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.random(40) < 0.3
        labels[0] = True
        scores = rng.normal(size=40).round(1)  # with ties
        assert eleven_point(scores, labels) == pytest.approx(by_loop(scores, labels))


def test_eleven_points_of_a_perfect_and_of_the_worst_order() -> None:
    labels = np.array([True, True, False, False, False])
    assert eleven_point(np.array([5.0, 4, 3, 2, 1]), labels) == 100
    # The positives come last: precision 1/4 at recall 1/2 and 2/5 at recall 1, which is higher.
    assert eleven_point(np.array([1.0, 2, 3, 4, 5]), labels) == pytest.approx(40)


def data(seed: int, rows: int = 120) -> tuple[torch.Tensor, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5))
    labels = (x[:, :3] + rng.normal(size=(rows, 3)) > 0.8).astype(np.int64)
    return torch.from_numpy(x).float(), labels


def test_the_mean_is_that_of_one_svm_per_class_with_its_cost() -> None:
    (x, labels), (queries, truth) = data(0), data(1)
    found = evaluate_svm((x, labels), (queries, truth), seed=0)
    lengths = [each / each.norm(dim=1, keepdim=True) for each in (x.double(), queries.double())]
    for number in range(3):
        assert found.costs[number] in COSTS
        svm = LinearSVC(C=found.costs[number], class_weight={0: 1, 1: 2}, max_iter=5000, random_state=0)
        scores = svm.fit(lengths[0].numpy(), labels[:, number]).decision_function(lengths[1].numpy())
        assert found.per_class[number] == pytest.approx(by_loop(scores, truth[:, number] == 1))
    assert found.mean == pytest.approx(np.mean([each or 0.0 for each in found.per_class]))
    assert found.mean > 100 * truth.mean() + 10


def test_difficult_images_count_neither_in_training_nor_in_the_test() -> None:
    (x, labels), (queries, truth) = data(0), data(1)
    hidden, hidden_truth = labels.copy(), truth.copy()
    hidden[:30, 0], hidden_truth[:30, 0] = UNKNOWN, UNKNOWN
    found = evaluate_svm((x, hidden), (queries, hidden_truth), seed=0)
    shorter = evaluate_svm((x[30:], labels[30:]), (queries[30:], truth[30:]), seed=0)
    complete = evaluate_svm((x, labels), (queries, truth), seed=0)
    assert found.per_class[0] == shorter.per_class[0]
    assert found.per_class[1:] == complete.per_class[1:]


def test_a_class_without_images_in_a_split_is_not_measured() -> None:
    (x, labels), (queries, truth) = data(0), data(1)
    labels[:, 1], truth[:, 2] = 0, 0
    found = evaluate_svm((x, labels), (queries, truth), seed=0)
    assert found.per_class[1:] == [None, None]
    assert found.mean == found.per_class[0]
