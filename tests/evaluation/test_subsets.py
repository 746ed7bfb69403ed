"""Which pictures get a label: balanced, nested, a function of the seed; and lists of names."""

import numpy as np
import pytest

from moco.evaluation.subsets import SubsetError, listed, part_of_each_class, per_class

LABELS = np.repeat(np.arange(4), [200, 100, 30, 3])[np.random.default_rng(0).permutation(333)]


def counts_per_class(rows: np.ndarray) -> list[int]:
    return [int((LABELS[rows] == label).sum()) for label in range(4)]


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(0.01, [2, 1, 1, 1]), (0.1, [20, 10, 3, 1]), (0.5, [100, 50, 15, 2]), (1.0, [200, 100, 30, 3])],
)
def test_each_class_gives_its_part_and_at_least_one(fraction: float, counts: list[int]) -> None:
    rows = part_of_each_class(LABELS, fraction, seed=7)
    assert counts_per_class(rows) == counts
    assert np.array_equal(rows, np.unique(rows))


def test_less_lies_within_more_and_the_seed_alone_decides() -> None:
    parts = [set(part_of_each_class(LABELS, fraction, seed=3).tolist()) for fraction in (0.01, 0.1, 0.5, 1.0)]
    assert parts[0] < parts[1] < parts[2] < parts[3]
    assert len(parts[3]) == 333
    assert np.array_equal(part_of_each_class(LABELS, 0.1, 3), part_of_each_class(LABELS, 0.1, 3))
    assert not np.array_equal(part_of_each_class(LABELS, 0.1, 3), part_of_each_class(LABELS, 0.1, 4))


def test_every_picture_has_the_same_chance() -> None:
    drawn = np.zeros(333)
    for seed in range(400):
        drawn[part_of_each_class(LABELS, 0.1, seed)] += 1
    shares = drawn / 400
    of_first = shares[LABELS == 0]
    assert abs(of_first.mean() - 0.1) < 1e-9  # 20 of 200 each time
    assert of_first.std() < 1.5 * np.sqrt(0.1 * 0.9 / 400)  # as chance has it


def test_so_many_of_each_class() -> None:
    assert counts_per_class(per_class(LABELS, 3, seed=0)) == [3, 3, 3, 3]
    few, more = (set(per_class(LABELS, count, 0).tolist()) for count in (1, 2))
    assert few < more
    with pytest.raises(SubsetError, match="labels_per_class=4 is more than the smallest class has: take 3 at most"):
        per_class(LABELS, 4, seed=0)


NAMES = ["n01/n01_5.JPEG", "n01/n01_15.JPEG", "n02/n02_5.JPEG", "n02/x.png", "deep/n02/x.png", "plain.png"]


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (["n01_15.JPEG", "n01_5.JPEG"], [0, 1]),
        (["n02_5.JPEG", "plain.png"], [2, 5]),
        (["deep/n02/x.png"], [4]),
    ],
)
def test_a_list_finds_the_names_that_end_so(wanted: list[str], rows: list[int]) -> None:
    assert listed(NAMES, wanted).tolist() == rows


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ([], "names no picture"),
        (["5.JPEG", "n01_5.JPEG"], r"1 of the listed pictures are not in the training split \(5.JPEG\)"),
        ([f"no_{i}.png" for i in range(5)], r"5 of .* \(no_0.png, no_1.png, no_2.png, ...\): take the list"),
        (["n01_5.JPEG", "n01_5.JPEG"], r"1 of .* stand in the list twice \(n01_5.JPEG\)"),
        (["x.png"], r"1 of .* fit several pictures \(x.png\): write their folders too"),
        (["plain.png", "n01_5.JPEG", "n01/n01_5.JPEG"], r"listed under two names \(n01/n01_5.JPEG\)"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(wanted: list[str], sentence: str) -> None:
    with pytest.raises(SubsetError, match=sentence):
        listed(NAMES, wanted)
