"""Selections of labeled images: balanced, nested, a function of the seed; and lists of names."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moco.config import ConfigError
from moco.data.keyed import VALIDATION
from moco.evaluation.subsets import (
    SubsetError,
    draw_labels,
    listed,
    naming_field,
    part_of_each_class,
    per_class,
    split_each_class,
)

LABELS = np.repeat(np.arange(4), [200, 100, 30, 3])[np.random.default_rng(0).permutation(333)]


def counts_per_class(rows: np.ndarray) -> list[int]:
    return [int((LABELS[rows] == label).sum()) for label in range(4)]


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(0.01, [2, 1, 1, 1]), (0.1, [20, 10, 3, 1]), (0.5, [100, 50, 15, 2]), (1.0, [200, 100, 30, 3])],
)
def test_the_same_part_of_each_class_and_at_least_one_image(fraction: float, counts: list[int]) -> None:
    rows = part_of_each_class(LABELS, fraction, seed=7)
    assert counts_per_class(rows) == counts
    assert np.array_equal(rows, np.unique(rows))


def test_a_smaller_part_is_a_subset_and_only_the_seed_decides() -> None:
    parts = [set(part_of_each_class(LABELS, fraction, seed=3).tolist()) for fraction in (0.01, 0.1, 0.5, 1.0)]
    assert parts[0] < parts[1] < parts[2] < parts[3]
    assert len(parts[3]) == 333
    assert np.array_equal(part_of_each_class(LABELS, 0.1, 3), part_of_each_class(LABELS, 0.1, 3))
    assert not np.array_equal(part_of_each_class(LABELS, 0.1, 3), part_of_each_class(LABELS, 0.1, 4))


def test_every_image_has_the_same_chance() -> None:
    drawn = np.zeros(333)
    for seed in range(400):
        drawn[part_of_each_class(LABELS, 0.1, seed)] += 1
    shares = drawn / 400
    of_first = shares[LABELS == 0]
    assert abs(of_first.mean() - 0.1) < 1e-9  # 20 of 200 each time
    assert of_first.std() < 1.5 * np.sqrt(0.1 * 0.9 / 400)  # as chance has it


def test_a_number_of_images_per_class() -> None:
    assert counts_per_class(per_class(LABELS, 3, seed=0)) == [3, 3, 3, 3]
    few, more = (set(per_class(LABELS, count, 0).tolist()) for count in (1, 2))
    assert few < more
    for select in (per_class, draw_labels):
        with pytest.raises(SubsetError, match=r"smallest class has 3 images.* 4"):
            select(LABELS, 4, 0)
    with pytest.raises(ConfigError, match=r"labels_per_class=4: .* 3"), naming_field("labels_per_class", 4):
        per_class(LABELS, 4, 0)


# ---- repeated draws ----


def test_a_draw_is_balanced_and_a_function_of_labels_seed_and_number() -> None:
    rows = draw_labels(LABELS, 3, draw=3)
    assert len(set(rows.tolist())) == 12
    assert counts_per_class(rows) == [3] * 4
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 # the global generator must have no effect
    assert np.array_equal(draw_labels(LABELS, 3, 3, seed=0), rows)
    assert not np.array_equal(draw_labels(LABELS, 3, 3, seed=1), rows)
    assert set(draw_labels(LABELS, 1, 3).tolist()) < set(rows.tolist())
    assert len({tuple(draw_labels(LABELS, 2, draw).tolist()) for draw in range(30)}) == 30


def test_every_image_is_drawn_about_equally_often() -> None:
    labels = np.repeat(np.arange(2), 10)
    counts = np.bincount(np.concatenate([draw_labels(labels, 3, draw) for draw in range(400)]), minlength=20)
    # 400 x 3/10 = 120 each; the standard deviation is 9
    assert abs(counts - 120).max() < 45


# ---- splits ----


def test_a_split_holds_the_same_part_of_each_class_and_depends_on_the_seed() -> None:
    labels = np.repeat([0, 1, 2, 3], [40, 10, 2, 3]).astype(np.int64)
    rest, held = split_each_class(labels, 0.2, 5, VALIDATION)
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(55))
    assert np.bincount(labels[held]).tolist() == [8, 2, 1, 1]
    assert np.array_equal(split_each_class(labels, 0.2, 5, VALIDATION)[1], held)
    assert not np.array_equal(split_each_class(labels, 0.2, 6, VALIDATION)[1], held)
    assert np.bincount(labels[split_each_class(labels, 0.99, 5, VALIDATION)[0]]).tolist() == [1, 1, 1, 1]  # never none


def test_a_class_with_one_image_stays_in_the_rest() -> None:
    rest, held = split_each_class(np.array([0, 0, 1], np.int64), 0.5, 0, VALIDATION)
    assert (len(held), 2 in rest) == (1, True)
    for labels, groups in (([0, 1], None), ([0, 0, 1, 1], [0, 0, 2, 2])):
        with pytest.raises(SubsetError, match="so none can be split"):
            split_each_class(np.array(labels), 0.5, 0, VALIDATION, None if groups is None else np.array(groups))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=30), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_copies_stay_on_one_side_of_a_split(rows: list[tuple[int, int]], part: float) -> None:
    labels, contents = (np.array(column) for column in zip(*rows, strict=True))
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    groups = first[inverse]
    # Contents that only one class has: with them, a class can always be split.
    own = [{c for label, c in rows if label == k} - {c for label, c in rows if label != k} for k in range(4)]
    splittable = [k for k in range(4) if len(own[k]) >= 2]
    try:
        rest, held = split_each_class(labels, part, 0, VALIDATION, groups)
    except SubsetError:
        assert not splittable
        return
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(rows)))
    assert not set(contents[rest]) & set(contents[held])
    assert set(labels[rest]) == set(labels)
    assert set(splittable) <= set(labels[held])
    alone = np.arange(len(rows))
    if len(set(contents)) == len(rows):  # without copies the split is that of earlier versions
        assert np.array_equal(split_each_class(labels, part, 0, VALIDATION)[1], held)
    with suppress(SubsetError):
        assert np.array_equal(
            split_each_class(labels, part, 0, VALIDATION)[1], split_each_class(labels, part, 0, VALIDATION, alone)[1]
        )


def test_the_size_of_a_split_with_copies_is_near_its_fraction() -> None:
    labels = np.repeat([0, 1], 40)
    groups = np.arange(80) // 2 * 2  # each image twice
    held = split_each_class(labels, 0.3, 0, VALIDATION, groups)[1]
    assert np.bincount(labels[held]).tolist() == [12, 12]
    groups[:30] = 0  # 30 copies of one image
    held = split_each_class(labels, 0.3, 0, VALIDATION, groups)[1]
    assert np.bincount(labels[held]).tolist() == [10, 12]  # the five other pairs: the copies stay in the rest


# ---- lists of names ----


NAMES = ["n01/n01_5.JPEG", "n01/n01_15.JPEG", "n02/n02_5.JPEG", "n02/x.png", "deep/n02/x.png", "plain.png"]


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (["n01_15.JPEG", "n01_5.JPEG"], [0, 1]),
        (["n02_5.JPEG", "plain.png"], [2, 5]),
        (["deep/n02/x.png"], [4]),
    ],
)
def test_a_list_matches_the_ends_of_names(wanted: list[str], rows: list[int]) -> None:
    assert listed(NAMES, wanted).tolist() == rows


def test_a_list_matches_names_in_either_form_of_unicode() -> None:
    names = ["a/u\u0308.png", "b/\u00fc.png", "b/u.png"]
    assert listed(names, ["a/\u00fc.png", "u.png"]).tolist() == [0, 2]
    assert listed(names, ["\u00fc.png"]).tolist() == [1]  # the same name goes before another form
    with pytest.raises(SubsetError, match="several images"):
        listed([*names[:2], "c/\u00fc.png"], ["\u00fc.png"])


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ([], "is empty"),
        (["5.JPEG", "n01_5.JPEG"], r"1 of .* not in the training split \(5.JPEG\)"),
        ([f"no_{i}.png" for i in range(5)], r"5 of .* \(no_0.png, no_1.png, no_2.png, ...\)"),
        (["n01_5.JPEG", "n01_5.JPEG"], r"1 of .* listed twice \(n01_5.JPEG\)"),
        (["x.png"], r"1 of .* several images \(x.png\)"),
        (["plain.png", "n01_5.JPEG", "n01/n01_5.JPEG"], r"listed under two names \(n01/n01_5.JPEG\)"),
    ],
)
def test_an_invalid_list_is_refused(wanted: list[str], sentence: str) -> None:
    with pytest.raises(SubsetError, match=sentence):
        listed(NAMES, wanted)
