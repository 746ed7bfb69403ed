"""The kNN classifier, compared with scikit-learn."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from moco.config import EvaluateConfig
from moco.evaluation.knn_classifier import (
    Accuracy,
    KnnSettings,
    _votes,
    classes_of_draws,
    knn_accuracy,
    knn_classes,
    knn_title,
    leave_one_out,
    nearest,
)
from moco.evaluation.metrics import NO_VOTE, rank_classes
from moco.evaluation.subsets import draw_labels

BANK, QUERIES, DIM, CLASSES = 60, 41, 7, 5


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, settings: KnnSettings) -> Tensor:
    return knn_classes(bank, labels, queries, int(labels.max()) + 1, settings)[:, 0]


def features(rows: int, seed: int, dim: int = DIM) -> Tensor:
    """Of any length, as an encoder gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator) * (1 + 3 * torch.rand(rows, 1, generator=generator))


def classes(rows: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, CLASSES, rows)


def reference(k: int, temperature: float) -> KNeighborsClassifier:
    def weights(distance: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp((1 - distance) / temperature)

    return KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")


# ---- prediction ----


@pytest.mark.parametrize("k", [1, 5, 20, BANK])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_predictions_equal_scikit_learn(k: int, temperature: float) -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), classes(BANK, 2)
    similarity = np.sort(torch.nn.functional.cosine_similarity(queries[:, None], bank, dim=2).numpy(), axis=1)
    assert np.diff(similarity, axis=1).min() > 0  # distinct, so there is one right order
    fitted = reference(k, temperature).fit(bank.double().numpy(), labels)
    expected = fitted.predict(queries.double().numpy())
    assert (
        knn_predict(bank, torch.from_numpy(labels), queries, KnnSettings(k, temperature)).tolist() == expected.tolist()
    )


def test_votes_are_weighted_by_similarity() -> None:
    angles = torch.tensor([0.1, 0.6, 0.6])
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([1, 0, 0])
    near, far = math.cos(0.1), math.cos(0.6)
    even = (near - far) / math.log(2)  # the temperature at which one near neighbor outweighs two far ones
    assert knn_predict(bank, labels, query, KnnSettings(3, even * 0.9)).tolist() == [1]
    assert knn_predict(bank, labels, query, KnnSettings(3, even * 1.1)).tolist() == [0]


def test_length_of_features_does_not_matter() -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), torch.from_numpy(classes(BANK, 2))
    expected = knn_predict(bank, labels, queries, KnnSettings(9))
    stretched = torch.linspace(0.01, 100, BANK)[:, None] * bank
    assert torch.equal(knn_predict(stretched, labels, 50 * queries, KnnSettings(9)), expected)


def test_very_low_temperature_is_the_nearest_neighbor() -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), torch.from_numpy(classes(BANK, 2))
    assert torch.equal(
        knn_predict(bank, labels, queries, KnnSettings(20, 1e-5)), knn_predict(bank, labels, queries, KnnSettings(1))
    )


def test_more_neighbors_than_samples_means_all() -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), torch.from_numpy(classes(BANK, 2))
    assert torch.equal(
        knn_predict(bank, labels, queries, KnnSettings(999)), knn_predict(bank, labels, queries, KnnSettings(BANK))
    )


@pytest.mark.parametrize("chunk", [1, 7, QUERIES, 1000])
def test_chunks_do_not_change_predictions(chunk: int) -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), torch.from_numpy(classes(BANK, 2))
    expected = torch.cat([knn_predict(bank, labels, queries[i : i + 1], KnnSettings(9)) for i in range(QUERIES)])
    assert torch.equal(knn_predict(bank, labels, queries, KnnSettings(9, query_chunk=chunk)), expected)


# ---- votes of a grid, in parts ----

KS, TEMPERATURES = (1, 3, 10, BANK), (0.05, 0.2, 1.0)


@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1024, 65536), (7, 9)])
def test_votes_equal_scikit_learn_for_every_k_and_temperature(chunk: int, bank_chunk: int) -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), classes(BANK, 2)
    for k in KS:
        for temperature in TEMPERATURES:
            expected = (
                reference(k, temperature).fit(bank.double().numpy(), labels).predict_proba(queries.double().numpy())
            )
            similarity, rows = nearest(bank, queries, k, bank_chunk=bank_chunk)
            votes = _votes(similarity, torch.from_numpy(labels)[rows], temperature, CLASSES).double()
            np.testing.assert_allclose(votes / votes.sum(dim=1, keepdim=True), expected, atol=2e-5)
            settings = KnnSettings(k, temperature, query_chunk=chunk, bank_chunk=bank_chunk)
            ranked = knn_classes(bank, torch.from_numpy(labels), queries, CLASSES, settings)
            assert torch.equal(ranked, rank_classes(votes, votes=True))
            assert ranked[:, 0].tolist() == expected.argmax(axis=1).tolist()
            assert ((ranked == NO_VOTE).sum(dim=1) == (votes == 0).sum(dim=1)).all()


@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1024, 65536), (7, 9), (1, 1)])
@pytest.mark.parametrize("copies", [0, 3])
def test_leave_one_out_equals_a_loop_that_takes_each_sample_out_of_the_bank(
    chunk: int, bank_chunk: int, copies: int
) -> None:
    bank, labels, rows = features(BANK, 0), classes(BANK, 2), [0, 3, 4, 17, 30, BANK - 1]
    groups = np.arange(BANK)
    for row in rows[:copies]:
        bank[[row + 20, row + 25]] = bank[row].clone()
        groups[[row + 20, row + 25]] = row
    ks = (1, 3, 10, BANK - 1, 999)
    settings = KnnSettings(query_chunk=chunk, bank_chunk=bank_chunk)
    got = leave_one_out(bank, labels, torch.tensor(rows), ks, TEMPERATURES, torch.from_numpy(groups), settings)
    for i, k in enumerate(ks):
        for j, temperature in enumerate(TEMPERATURES):
            right = 0
            for row in rows:
                others = np.flatnonzero(groups != groups[row])
                fitted = reference(min(k, len(others)), temperature).fit(bank[others].double().numpy(), labels[others])
                right += int(fitted.predict(bank[row : row + 1].double().numpy())[0] == labels[row])
            assert got[i, j] == pytest.approx(100 * right / len(rows))


def test_a_query_without_neighbors_is_no_neighbor_of_itself() -> None:
    same, ones = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    assert torch.isneginf(nearest(same, same, 5, (ones, ones))[0]).all()
    grid = leave_one_out(same, np.array([1, 1, 2]), torch.arange(3), [1, 5], [0.1], ones)
    assert grid.tolist() == [[0.0], [0.0]]  # no votes: class 0, which none of them has


def signs(rows: int, seed: int) -> Tensor:
    """Features of +1 and -1, 16 of them: each cosine is a multiple of 1/8, exactly, and most of them are tied."""
    return torch.randint(0, 2, (rows, 16), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


@pytest.mark.parametrize("with_own", [False, True])
@pytest.mark.parametrize("k", [1, 5, 59, 60, 99])
def test_among_equally_near_references_the_lower_row_comes_first_for_any_chunks(k: int, with_own: bool) -> None:
    bank = signs(BANK, 0)
    own = torch.tensor([5, 0, 59, 31]) if with_own else None
    queries = signs(9, 1) if own is None else bank[own]
    similarity = queries @ bank.T / 16  # exact
    if own is not None:
        similarity[torch.arange(len(own)), own] = -math.inf
    values, order = similarity.sort(dim=1, descending=True, stable=True)
    wanted = min(k, BANK - with_own)
    for bank_chunk in (1, 7, 16, 59, 60, 1000):
        got, rows = nearest(bank, queries, k, None if own is None else (torch.arange(BANK), own), bank_chunk)
        assert torch.equal(rows, order[:, :wanted])
        assert torch.equal(got, values[:, :wanted])


def test_copies_of_an_image_are_tied_for_any_features() -> None:
    bank, queries = features(500, 0, 192), features(100, 1, 192)
    bank[[250, 499]] = bank[3].clone()
    for bank_chunk in (100, 499, 1000):
        similarity, rows = nearest(bank, bank[3] + 0.01 * queries, 4, bank_chunk=bank_chunk)
        assert rows[:, :3].tolist() == [[3, 250, 499]] * 100
        assert torch.equal(similarity[:, 0], similarity[:, 2])


def test_half_precision_references_give_nearly_the_same_votes() -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), torch.from_numpy(classes(BANK, 2))
    exact, half = (
        _votes(similarity, labels[rows], 0.1, CLASSES)
        for similarity, rows in (nearest(each, queries, 20) for each in (bank, bank.half()))
    )
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0.02)


def test_draws_vote_with_their_few_labels_only() -> None:
    bank, queries, labels = features(BANK, 0), features(QUERIES, 1), classes(BANK, 2)
    each = list(classes_of_draws(bank, labels, queries, CLASSES, KnnSettings(3, 0.1, 2, draws=3)))
    assert len(each) == 3
    for draw, ranked in enumerate(each):
        rows = draw_labels(labels, 2, draw)
        few = torch.from_numpy(labels[rows])
        assert torch.equal(ranked, knn_classes(bank[torch.from_numpy(rows)], few, queries, CLASSES, KnnSettings(3)))


def test_progress_counts_the_parts() -> None:
    seen: list[tuple[int, int]] = []
    bank, labels = features(BANK, 0), torch.from_numpy(classes(BANK, 2))
    settings = KnnSettings(1, query_chunk=10)
    knn_classes(bank, labels, features(QUERIES, 1), CLASSES, settings, lambda *done: seen.append(done))
    assert seen == [(done, 5) for done in range(5)]


# ---- accuracy ----


def test_accuracy_with_all_labels_counts_right_predictions() -> None:
    bank, queries = features(BANK, 0), features(QUERIES, 1)
    labels, truth = classes(BANK, 2), classes(QUERIES, 3)
    predictions = knn_predict(bank, torch.from_numpy(labels), queries, KnnSettings(9)).tolist()
    right = sum(int(a == b) for a, b in zip(predictions, truth.tolist(), strict=True))
    score = knn_accuracy(bank, labels, queries, truth, KnnSettings(9))
    assert score.mean == pytest.approx(100 * right / QUERIES)
    assert (score.std, score.draws) == (0.0, 1)
    assert str(score) == f"{100 * right / QUERIES:.1f} %"


def test_accuracy_with_few_labels_is_mean_and_deviation_over_the_draws() -> None:
    bank, queries = features(BANK, 0), features(QUERIES, 1)
    labels, truth = classes(BANK, 2), classes(QUERIES, 3)
    scores = []
    for draw in range(7):
        rows = draw_labels(labels, 2, draw)
        fitted = reference(3, 0.1).fit(bank.double().numpy()[rows], labels[rows])
        scores.append(100 * float(np.mean(fitted.predict(queries.double().numpy()) == truth)))
    mean = sum(scores) / 7
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 7)
    score = knn_accuracy(bank, labels, queries, truth, KnnSettings(3, labels_per_class=2, draws=7))
    assert score.draws == 7
    assert score.mean == pytest.approx(mean)
    assert score.std == pytest.approx(deviation)
    assert str(score) == f"{mean:.1f} % ± {deviation:.1f}"


def test_perfect_features_score_100_and_a_class_missing_from_the_bank_scores_0() -> None:
    labels = np.repeat(np.arange(CLASSES), 4)
    perfect = torch.eye(CLASSES)[torch.from_numpy(labels)]
    assert knn_accuracy(perfect, labels, perfect, labels, KnnSettings(4)).mean == 100.0
    few = KnnSettings(4, labels_per_class=1, draws=5)
    assert knn_accuracy(perfect, labels, perfect, labels, few) == Accuracy(100.0, 0.0, 5)
    assert knn_accuracy(perfect[:-4], labels[:-4], perfect[-4:], labels[-4:], KnnSettings(4)).mean == 0.0


def test_features_of_noise_score_at_chance() -> None:
    labels, truth = np.repeat(np.arange(CLASSES), 40), np.repeat(np.arange(CLASSES), 200)
    score = knn_accuracy(
        features(200, 0), labels, features(1000, 1), truth, KnnSettings(20, labels_per_class=10, draws=10)
    )
    assert score.mean == pytest.approx(100 / CLASSES, abs=4)


def test_the_title_names_the_neighbors_that_vote_and_what_differs_in_kind() -> None:
    assert knn_title(EvaluateConfig(k=200), 1297) == "held-out kNN (k 200)"
    assert knn_title(EvaluateConfig(k=200), 180) == "held-out kNN (k 180)"
    assert knn_title(EvaluateConfig(k=200)) == "held-out kNN (k 200, or all references if fewer)"
    other = EvaluateConfig(labels_per_class=1, draws=9, temperature=0.07, features="projection")
    assert knn_title(other, 180) == (
        "held-out kNN, 1 label per class, 9 draws (± standard deviation of the draws), T 0.07, projection features"
    )
