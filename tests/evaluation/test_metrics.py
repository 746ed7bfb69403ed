"""Accuracies, intervals and the confusion matrix against scikit-learn, SciPy and plain counting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, ttest_1samp
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from moco.evaluation.metrics import Metrics, compute_metrics, mean_interval, rank_classes

SCORES = torch.randn(83, 7, generator=torch.Generator().manual_seed(0))
LABELS = np.random.default_rng(0).integers(0, 6, 83)  # class 6 has no image


def metrics_of(scores: torch.Tensor, labels: NDArray[np.int64], votes: bool = False) -> Metrics:
    return compute_metrics(rank_classes(scores, votes), labels, scores.shape[1])


def test_accuracies_and_confusion_equal_scikit_learn() -> None:
    got = metrics_of(SCORES, LABELS)
    for k, value in ((1, got.top1), (5, got.top5)):
        expected = 100 * top_k_accuracy_score(LABELS, SCORES.numpy(), k=k, labels=range(7))
        assert value == pytest.approx(expected)
    matrix = confusion_matrix(LABELS, SCORES.argmax(dim=1).numpy(), labels=range(7))
    assert got.confusion.tolist() == matrix.tolist()
    assert got.per_class[6] is None
    for label in range(6):
        assert got.per_class[label] == pytest.approx(100 * matrix[label, label] / matrix[label].sum())
    assert got.count == 83


def test_top5_is_none_for_five_classes() -> None:
    assert metrics_of(SCORES[:, :5], LABELS % 5).top5 is None


def test_top5_of_votes_does_not_depend_on_the_classes_numbers() -> None:
    votes = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 1.0]]).expand(3, 7)
    labels = np.array([0, 5, 6])  # the first has no vote: only its number would put it among the five
    assert metrics_of(votes, labels, votes=True).top5 == pytest.approx(200 / 3)
    assert metrics_of(votes.flip(1), 6 - labels, votes=True).top5 == pytest.approx(200 / 3)
    assert (
        metrics_of(-SCORES.abs(), LABELS).top5 == metrics_of(-SCORES.abs() + 10, LABELS).top5
    )  # other scores have no zero


def test_of_equal_scores_the_first_class_counts() -> None:
    assert metrics_of(torch.zeros(4, 3), np.array([0, 0, 1, 2])).top1 == 50.0


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (377, 500), (9876, 10000)])
def test_interval_is_wilsons(right: int, count: int) -> None:
    scores = torch.eye(2)[torch.tensor([0] * right + [1] * (count - right))]
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert metrics_of(scores, np.zeros(count, np.int64)).interval() == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=1e-6
    )


def test_interval_over_seeds_is_students() -> None:
    values = [71.0, 73.5, 70.2, 72.9]
    mean, half = mean_interval(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert mean_interval([3.0]) == (3.0, None)


def test_unequal_classes_have_a_majority_and_a_balanced_accuracy() -> None:
    labels = np.array([0] * 60 + [1] * 4)
    scores = torch.zeros(64, 2)
    scores[:, 0] = 1  # always the most frequent class
    found = metrics_of(scores, labels)
    assert (found.top1, found.majority, found.balanced) == (93.75, 93.75, 50.0)
    sentence = "chance is 50.0 %, always the most frequent class 93.8 %; pixels: balanced accuracy 50.0 %"
    assert found.baselines("pixels") == sentence
    assert found.to_json()["balanced"] == 50.0
    assert metrics_of(scores[:4], labels[58:62]).baselines("pixels") == "chance is 50.0 %"


def test_metrics_are_plain_json() -> None:
    plain = metrics_of(SCORES, LABELS).to_json()
    assert plain["count"] == 83
    assert math.isclose(sum(sum(row) for row in plain["confusion"]), 83)
    assert len(plain["interval95"]) == 2


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_metrics_equal_plain_counting(data: st.DataObject) -> None:
    classes, count, votes = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12)), data.draw(st.booleans())
    values = st.lists(st.integers(0, 3), min_size=classes, max_size=classes).filter(any)  # many ties
    scores = [data.draw(values) for _ in range(count)]
    labels = [data.draw(st.integers(0, classes - 1)) for _ in range(count)]
    got = metrics_of(torch.tensor(scores, dtype=torch.float32), np.array(labels), votes)
    ranked = [sorted(range(classes), key=lambda c, row=row: (-row[c], c))[:5] for row in scores]  # type: ignore[misc]
    hits = [label in r and (not votes or row[label] > 0) for r, row, label in zip(ranked, scores, labels, strict=True)]
    assert got.top1 == pytest.approx(100 * np.mean([r[0] == label for r, label in zip(ranked, labels, strict=True)]))
    assert got.top5 == (pytest.approx(100 * np.mean(hits)) if classes > 5 else None)
    matrix = np.zeros((classes, classes), int)
    for r, label in zip(ranked, labels, strict=True):
        matrix[label, r[0]] += 1
    assert got.confusion.tolist() == matrix.tolist()
    shares = [100 * row[i] / row.sum() if row.sum() else None for i, row in enumerate(matrix)]
    assert got.per_class == [None if each is None else pytest.approx(each) for each in shares]


def test_many_classes_need_no_quadratic_memory() -> None:
    classes, images = 100_000, 20  # a matrix would have 10 billion cells
    labels = np.arange(images) * 7
    scores = torch.zeros(images, classes)
    scores[torch.arange(images), torch.from_numpy(labels)] = 1
    scores[0, 3] = 2
    got = metrics_of(scores, labels)
    assert (got.top1, got.top5, got.per_class[:8]) == (95.0, 100.0, [0.0, *[None] * 6, 100.0])
    assert got.pairs[:2].tolist() == [[0, 3, 1], [7, 7, 1]]
    assert got.to_json()["confusion"] is None
