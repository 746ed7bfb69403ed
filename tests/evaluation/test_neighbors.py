"""Search among features against brute force written with plain loops."""

import numpy as np
import pytest
from numpy.typing import NDArray

from moco.evaluation.neighbors import duplicate_groups, nearest, outlier_scores, rows_with_neighbor

STEPS = 2**23


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """In double precision, rounded to 2**-23, as the module documents."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    length = max(float(np.linalg.norm(x)), 1e-12) * max(float(np.linalg.norm(y)), 1e-12)
    return float(np.rint((x @ y) / length * STEPS)) / STEPS


def brute_nearest(
    features: NDArray[np.float32], queries: NDArray[np.float32], k: int, exclude: list[int]
) -> tuple[list[list[float]], list[list[int]]]:
    scores, rows = [], []
    for query, banned in zip(queries, exclude, strict=True):
        pool = sorted((-cosine(query, other), row) for row, other in enumerate(features) if row != banned)[:k]
        scores.append([-score for score, _ in pool])
        rows.append([row for _, row in pool])
    return scores, rows


def brute_groups(
    features: NDArray[np.float32], order: list[int], threshold: float
) -> list[tuple[list[int], list[float]]]:
    """Keeps the first row that is left, with the rows that are left and similar to it."""
    left, groups = list(order), []
    while left:
        kept = left.pop(0)
        near = sorted((-cosine(features[kept], features[row]), row) for row in left)
        near = [(score, row) for score, row in near if -score >= threshold]
        left = [row for row in left if row not in [other for _, other in near]]
        if near:
            groups.append(([kept, *(row for _, row in near)], [1.0, *(-score for score, _ in near)]))
    return sorted(groups, key=lambda group: (-len(group[0]), group[0][0]))


def found_groups(
    features: NDArray[np.float32], order: list[int], threshold: float, block: int
) -> list[tuple[list[int], list[float]]]:
    groups = duplicate_groups(features, np.array(order), threshold, block)
    return [(rows.tolist(), scores.tolist()) for rows, scores in groups]


@pytest.fixture
def features() -> NDArray[np.float32]:
    """Thirty vectors in a plane's neighborhood, so that similarities spread, with repeats, opposites and a zero."""
    angles = np.linspace(0, 3, 30) ** 1.5
    rows = np.stack([np.cos(angles), np.sin(angles), 0.1 * np.sin(7 * angles)], axis=1).astype(np.float32)
    rows[[5, 17, 29]] = rows[2]  # equal to each other: ties
    rows[11] = -rows[3]
    rows[20] = 0  # no direction: similar to nothing
    rows[8] *= 1000  # length does not count
    return rows


@pytest.mark.parametrize("block", [1, 7, 30, 4096])
@pytest.mark.parametrize("k", [1, 4, 29, 100])
def test_nearest_equals_brute_force(features: NDArray[np.float32], k: int, block: int) -> None:
    own = np.arange(len(features))
    scores, rows = nearest(features, features, k, own, block)
    wanted_scores, wanted_rows = brute_nearest(features, features, k, list(own))
    assert rows.tolist() == wanted_rows
    assert scores.tolist() == wanted_scores


def test_ties_are_ordered_by_row_and_minus_one_excludes_nothing(features: NDArray[np.float32]) -> None:
    _, rows = nearest(features, features[[2, 2]], 4, np.array([-1, 5]))
    assert rows[0].tolist() == [2, 5, 17, 29]
    assert rows[1, :3].tolist() == [2, 17, 29]
    _, every = nearest(features, features[:1], 100)
    assert sorted(every[0].tolist()) == list(range(30))
    opposite, _ = nearest(features[[11]], features[[3]], 1)
    assert opposite.tolist() == [[-1.0]]


def test_features_may_be_on_disk_and_in_half_precision(features: NDArray[np.float32], tmp_path: object) -> None:
    halves = np.lib.format.open_memmap(f"{tmp_path}/f.npy", mode="w+", dtype=np.float16, shape=features.shape)
    halves[:] = features
    same = np.array(halves, np.float32)
    assert nearest(halves, halves, 3)[1].tolist() == nearest(same, same, 3)[1].tolist()


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("threshold", [1.0, 0.999, 0.95, 0.5, -0.99])
def test_groups_equal_brute_force(features: NDArray[np.float32], threshold: float, block: int) -> None:
    near = rows_with_neighbor(features, threshold, block).tolist()
    assert near == [
        row
        for row in range(len(features))
        if any(cosine(features[row], features[other]) >= threshold for other in range(len(features)) if other != row)
    ]
    for order in (near, near[::-1], np.random.default_rng(0).permutation(near).tolist()):
        groups = found_groups(features, order, threshold, block)
        wanted = brute_groups(features, order, threshold)
        assert [rows for rows, _ in groups] == [rows for rows, _ in wanted]
        assert [scores[1:] for _, scores in groups] == [scores[1:] for _, scores in wanted]
    if threshold == 1.0:
        assert found_groups(features, near, threshold, block) == [([2, 5, 17, 29], [1.0] * 4)]


def test_no_row_means_no_group(features: NDArray[np.float32]) -> None:
    assert duplicate_groups(features, np.zeros(0, np.int64), 0.9) == []


@pytest.mark.parametrize("block", [1, 2, 8])
def test_a_chain_is_no_group(block: int) -> None:
    angles = np.deg2rad([0, 10, 20, 30, 90])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert rows_with_neighbor(features, 0.98, block).tolist() == [0, 1, 2, 3]
    for order, wanted in {
        (0, 1, 2, 3): [[0, 1], [2, 3]],  # 2 resembles 1, but not 0
        (1, 0, 2, 3): [[1, 0, 2]],
        (3, 0, 1, 2): [[0, 1], [3, 2]],
    }.items():
        assert [rows for rows, _ in found_groups(features, list(order), 0.98, block)] == wanted


@pytest.mark.parametrize("block", [1, 6, 4096])
def test_outlier_scores_are_means_over_the_nearest_others(features: NDArray[np.float32], block: int) -> None:
    calls: list[tuple[int, int]] = []
    scores = outlier_scores(features, 3, block, progress=lambda done, total: calls.append((done, total)))
    wanted, _ = brute_nearest(features, features, 3, list(range(30)))
    assert scores.tolist() == pytest.approx([sum(each) / 3 for each in wanted], abs=1e-12)
    assert int(scores.argmin()) == 20  # the zero: similar to nothing
    assert calls[-1] == (30, 30)
