"""One reader of labels: columns of any values give labels and classes, or one refusal; classes of two splits."""

import csv
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moco.data.labels import labels_of_split, read_labels

FIX = "set x.column=none"


def read(values: Sequence[Any], **more: Any) -> tuple[list[int] | None, tuple[str, ...]]:
    labels, classes = read_labels(values, "x.column=y", FIX, **more)
    return None if labels is None else labels.tolist(), classes


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
        ([10, 9, 10], [1, 0, 1], ("9", "10")),
        ([True, False, True], [1, 0, 1], ("False", "True")),
        ([True, True], [1, 1], ("False", "True")),
        ([1.0, 0.0, 1.0], [1, 0, 1], ("0", "1")),  # as pandas reads a column of integers with gaps
        ([-2, 5], [0, 1], ("-2", "5")),
        ([2**63, 0], [1, 0], ("0", str(2**63))),
        ([None, -1, "", " ", float("nan"), -1.0, np.int64(-1), np.float32("nan")], None, ()),
        (["-1", "x"], [0, 1], ("-1", "x")),  # a text is a name
    ],
)
def test_columns_of_classes(values: list[Any], labels: list[int] | None, classes: tuple[str, ...]) -> None:
    assert read(values) == (labels, classes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a", None, ""], "2 of the 3 images have no label"),
        ([0, 1, -1], "1 of the 3 images have no label"),
        ([True, None], "1 of the 2 images have no label"),
        ([0.5, 1.0], "number with a fraction, whole number"),
        ([float("inf"), 1.0], "number with a fraction"),
        ([0, "a"], "text, whole number"),
        ([0, True], "true or false, whole number"),
        ([b"a", b"b"], "bytes"),
        ([[0, 1], [1]], "multi-label"),
        ([["a"], None], "multi-label"),
        ([np.array([0, 1]), np.array([1, 1])], "multi-label"),
        ([3, 3], "the only label is 3"),
    ],
)
def test_refusals_name_the_column_the_cause_and_the_fix(values: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read(values)
    assert str(caught.value).startswith("x.column=y: ")
    assert FIX in str(caught.value)


def test_indices_into_given_names() -> None:
    assert read([1, 0], classes=("cat", "dog", "owl")) == ([1, 0], ("cat", "dog", "owl"))
    assert read([0, 0], classes=("cat",)) == ([0, 0], ("cat",))
    for outside in (3, -2):
        with pytest.raises(ValueError, match=f"label {outside} is not an index of its 3 class names"):
            read([1, outside], classes=("cat", "dog", "owl"))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(allow_infinity=True, width=32),
    st.sampled_from([0.0, 1.0, -1.0]),
    st.sampled_from(["", " ", "a", "b", "cafe\u0301", "-1", "0", "\n"]),
    st.binary(max_size=2),
)
# Columns of one type with gaps, as files have them, and of any types.
COLUMNS = st.one_of(
    st.lists(st.none() | st.booleans(), min_size=1, max_size=6),
    st.lists(st.none() | st.integers(-2, 3), min_size=1, max_size=6),
    st.lists(st.none() | st.floats(width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=6),
    st.lists(st.none() | st.sampled_from(["", "a", "b", " "]), min_size=1, max_size=6),
    st.lists(st.none() | st.lists(st.integers(0, 2) | st.text(max_size=1), max_size=3), min_size=1, max_size=4),
    st.lists(SCALARS | st.lists(SCALARS, max_size=2), min_size=1, max_size=6),
)


def is_valid(labels: Any, classes: tuple[str, ...], count: int) -> None:
    """Labels (N,) of int64 within at least two different class names, or no labels and no classes."""
    if labels is None:
        assert classes == ()
        return
    assert labels.dtype == np.int64
    assert labels.shape == (count,)
    assert len(set(classes)) == len(classes) >= 2
    assert all(isinstance(each, str) for each in classes)
    assert 0 <= labels.min() <= labels.max() < len(classes)


def labels_or_refusal(read: Callable[[], Any]) -> Any:
    """Return labels and class names, or a refusal of one line."""
    try:
        return read()
    except ValueError as error:
        return "" if "\n" in str(error) else str(error)


@given(COLUMNS)
@settings(max_examples=50, deadline=None)
@example([0, -1])
@example([["a"], []])
def test_any_column_is_read_or_refused(values: list[Any]) -> None:
    found = labels_or_refusal(lambda: read_labels(values, "x.column=y", FIX))
    if isinstance(found, str):
        assert "x.column=y" in found
        assert FIX in found
        return
    labels, classes = found
    is_valid(labels, classes, len(values))
    if labels is not None and not isinstance(values[0], float):
        assert [classes[label] for label in labels] == [str(value) for value in values]


@given(COLUMNS)
@settings(max_examples=50, deadline=None)
def test_any_hugging_face_column_is_read_or_refused(values: list[Any]) -> None:
    datasets = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    from moco.data.hub import _labels

    try:
        table = datasets.Dataset.from_dict({"y": values})
    except Exception:  # pyarrow refuses columns of several types
        assume(False)
    check_hub(table, _labels)


@given(COLUMNS)
@settings(max_examples=50, deadline=None)
def test_any_csv_column_is_read_or_refused(values: list[Any]) -> None:
    datasets = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    pandas = pytest.importorskip("pandas", reason="installed with the extra `huggingface`")
    from moco.data.hub import _labels

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["x", "y"])
    writer.writerows(enumerate(values))
    text.seek(0)
    check_hub(datasets.Dataset.from_pandas(pandas.read_csv(text)), _labels)


def check_hub(table: Any, labels_of: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's would be printed with a line of its source
        found = labels_or_refusal(lambda: labels_of(table, "y", "images (train)"))
    if isinstance(found, str):
        assert "data.label_column=y" in found
    else:
        labels, classes = found
        is_valid(labels, classes, len(table))


def test_class_labels_of_hugging_face_with_gaps() -> None:
    datasets = pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    from moco.data.hub import _labels

    kind = datasets.Features({"y": datasets.ClassLabel(names=["cat", "dog"])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values, count in (([0, None, 1], 1), ([0, -1, None], 2)):
            with pytest.raises(ValueError, match=rf"data\.label_column=y of images: {count} of the 3 images"):
                _labels(datasets.Dataset.from_dict({"y": values}, features=kind), "", "images")
        assert _labels(datasets.Dataset.from_dict({"y": [None, -1]}, features=kind), "", "images") == (None, ())
    several = datasets.Features({"y": datasets.List(datasets.ClassLabel(names=["cat", "dog"]))})
    table = datasets.Dataset.from_dict({"y": [[1], [0, 1], []]}, features=several)
    for column in ("", "y"):
        labels, names = _labels(table, column, "images")
        assert names == ("cat", "dog")
        assert labels is not None
        assert labels.tolist() == [[False, True], [True, True], [False, False]]
    texts = datasets.Dataset.from_dict({"y": [["b", "a", "b"], ["c"]]})
    assert _labels(texts, "", "images") == (None, ())  # a column of texts must be named
    labels, names = _labels(texts, "y", "images")
    assert names == ("a", "b", "c")
    assert labels is not None
    assert labels.tolist() == [[True, True, False], [False, False, True]]
    for lists, error in (
        ([[0], None], "1 of the 2 images have no list"),
        ([[], []], "no image has a label"),
        ([[-1], [None]], "no image has a label"),
        ([[0, -1], [1]], "1 of the 3 labels in the lists are missing, empty or -1: remove them, or set"),
    ):
        with pytest.raises(ValueError, match=rf"data\.label_column=y of images: {error}"):
            _labels(datasets.Dataset.from_dict({"y": lists}, features=several), "", "images")
    nested = datasets.Dataset.from_dict({"y": [{"a": 1}, {"a": 2}]})
    with pytest.raises(ValueError, match=r"data\.label_column=y of images: this column contains no classes"):
        _labels(nested, "y", "images")


def test_a_held_out_split_may_lack_classes() -> None:
    labels = np.array([1, 0, 1])
    assert labels_of_split(labels, ("b", "d"), ("a", "b", "c", "d"), "held").tolist() == [3, 1, 3]
    assert labels_of_split(labels, ("b", "d", "unused"), ("a", "b", "c", "d"), "held").tolist() == [3, 1, 3]
    with pytest.raises(ValueError, match=r"held has images of d, and training has no such class: add"):
        labels_of_split(labels, ("b", "d"), ("a", "b"), "held")


CAFE, OTHER_CAFE = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("name", "training", "words"),
    [
        (OTHER_CAFE, CAFE, r"('cafe\u0301' and 'caf\xe9' look equal but differ in their Unicode form: rename one)"),
        ("cat", "Cat", "(cat and Cat differ in upper and lower case: rename one)"),
        (OTHER_CAFE.upper(), CAFE, "differ in upper and lower case"),
    ],
)
def test_names_that_nearly_equal_one_of_training_have_a_hint(name: str, training: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        labels_of_split(np.array([0]), (name,), (training, "dog"), "held")


def test_metadata_of_a_csv_file_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="data=huggingface needs the extra `huggingface`")
    from moco.config import DataConfig
    from moco.data.sources import load_source
    from tests.data import images

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = images.folder(tmp_path / "images", 4)
    rows = [f"{i:02}.png,{label}\n" for i, label in enumerate("abba")]
    (root / "metadata.csv").write_text("file_name,kind\n" + "".join(rows))
    train = load_source(DataConfig("huggingface", str(root), label_column="kind")).train
    assert (train.classes, None if train.labels is None else train.labels.tolist()) == (("a", "b"), [0, 1, 1, 0])
