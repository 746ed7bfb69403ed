"""Few-shot episodes: a loop over images, their keys, refusals."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moco.data.keyed import EPISODES, permutation
from moco.evaluation.few_shot import Episodes, draw_episodes, episode_accuracies
from moco.evaluation.subsets import SubsetError


def samples(seed: int = 0) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return 120 features of 8 classes of different sizes, in a random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(8), [5, 10, 15, 20, 10, 20, 20, 20]))
    means = rng.normal(size=(8, 6))
    return torch.from_numpy(means[labels] + rng.normal(size=(120, 6))).float(), labels


def by_loop(features: torch.Tensor, labels: NDArray[np.int64], sizes: Episodes) -> list[float]:
    """Classify one query after another."""
    large = [label for label in range(8) if np.sum(labels == label) >= sizes.shots + sizes.queries]
    found = []
    for episode in range(sizes.episodes):
        classes = [large[i] for i in permutation(sizes.seed, episode, len(large), EPISODES)[: sizes.ways]]
        support, queries = [], []
        for place, label in enumerate(classes):
            rows = np.flatnonzero(labels == label)
            order = rows[permutation(sizes.seed, episode, len(rows), EPISODES + 1 + place)]
            support.append(order[: sizes.shots])
            queries.append(order[sizes.shots : sizes.shots + sizes.queries])
        right = 0
        for place, rows in enumerate(queries):
            for row in rows:
                distances = [float(((features[row] - features[s].mean(dim=0)) ** 2).sum()) for s in support]
                right += int(np.argmin(distances)) == place
        found.append(100 * right / (sizes.ways * sizes.queries))
    return found


@pytest.mark.parametrize(("ways", "shots", "queries"), [(5, 1, 9), (3, 5, 2), (2, 10, 10)])
def test_the_accuracies_equal_those_of_a_loop(ways: int, shots: int, queries: int) -> None:
    features, labels = samples()
    sizes = Episodes(ways, shots, queries, 20, 3)
    found = episode_accuracies(features, labels, sizes)
    assert found == pytest.approx(by_loop(features, labels, sizes))
    assert 100 / ways < np.mean(found) < 100


def test_the_episodes_depend_on_the_seed_and_the_labels_only() -> None:
    _, labels = samples()
    drawn = [[each[0].tolist() for each in draw_episodes(labels, Episodes(4, 2, 3, 5, seed))] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    longer = [each[0].tolist() for each in draw_episodes(labels, Episodes(4, 2, 3, 9, 0))]
    assert longer[:5] == drawn[0]


def test_support_and_queries_are_disjoint_and_of_one_class() -> None:
    _, labels = samples()
    for support, queries in draw_episodes(labels, Episodes(5, 4, 6, 30, 0)):
        assert len(np.unique(np.concatenate([support, queries], axis=1))) == 5 * 10
        for few, others in zip(support, queries, strict=True):
            assert len({*labels[few], *labels[others]}) == 1
        assert len(set(labels[support[:, 0]])) == 5


@pytest.mark.parametrize(
    ("ways", "shots", "queries", "fix"),
    [
        (5, 5, 15, r"and 4 of the 8 classes have so many: set ways=4, or lower shots \+ queries to 15 or less$"),
        (5, 6, 15, r"and 0 of the 8 classes have so many: lower shots \+ queries to 15 or less$"),
        (9, 6, 15, r"and 0 of the 8 classes have so many: set ways=8 and lower shots \+ queries to 5 or less$"),
        (9, 1, 4, r"and 8 of the 8 classes have so many: set ways=8$"),
    ],
)
def test_too_few_large_classes_are_refused_with_numbers_that_suffice(
    ways: int, shots: int, queries: int, fix: str
) -> None:
    _, labels = samples()
    with pytest.raises(SubsetError, match=rf"ways={ways} classes .* need {shots + queries} test images each .* {fix}"):
        next(draw_episodes(labels, Episodes(ways, shots, queries, 1, 0)))
