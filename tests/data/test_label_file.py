"""Labels and splits from a table: CSV and Parquet agree; each mistake in a table is one sentence."""

import json
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from moco.config import ConfigError, DataConfig, RunWarning
from moco.config.check_data import CheckDataConfig
from moco.data.check import check_data
from moco.data.opening import opening_lines
from moco.data.sources import load_source
from tests.data.images import gradient, names

HEADER = "path,label,split\n"
GOOD = HEADER + "x/a.png,dog,train\n./x/b.png, cat ,train\nc.png,cat,test\nd.png,dog,val\nc.png,cat,test\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i, name in enumerate(("x/a.png", "x/b.png", "c.png", "d.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        gradient(i, 8, 8).save(tmp_path / "images" / name)
    return tmp_path / "images"


MULTI = HEADER + "x/a.png,cat;dog,train\nx/b.png,,train\nc.png,owl; cat;,test\nd.png,dog,val\n"


def config(root: Path, table: str | bytes = "", **values: str) -> DataConfig:
    file = root.parent / "labels.csv"
    file.write_bytes(table.encode() if isinstance(table, str) else table)
    return DataConfig("folder", str(root), **{"label_file": str(file)} | values)  # type: ignore[arg-type]


def test_labels_and_splits_come_from_the_table(root: Path) -> None:
    sources = load_source(config(root, "\ufeff" + GOOD))
    train, test = sources.train, sources.held_out
    assert sources.bank is train
    assert test is not None
    assert train.labels is not None
    assert test.labels is not None
    assert [train.name(i) for i in range(len(train))] == ["x/a.png", "x/b.png"]
    assert (train.classes, train.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert ([test.name(0)], test.labels.tolist(), test.classes) == (["c.png"], [0], ("cat", "dog"))
    val = load_source(config(root, GOOD, eval_split="val")).held_out
    assert val is not None
    assert val.name(0) == "d.png"
    assert val.labels is not None
    assert val.labels.tolist() == [1]


def test_a_separator_gives_each_image_any_number_of_labels(root: Path) -> None:
    sources = load_source(config(root, MULTI, label_separator=";"))
    train, test = sources.train, sources.held_out
    assert sources.bank is None  # one class per image is needed for it
    assert test is not None
    assert train.labels is None
    assert train.multi_labels is not None
    assert test.multi_labels is not None
    assert train.classes == test.classes == ("cat", "dog", "owl")
    assert train.multi_labels.tolist() == [[True, True, False], [False] * 3]
    assert test.multi_labels.tolist() == [[True, False, True]]
    subset = train.subset(np.array([1]))
    assert subset.multi_labels is not None
    assert subset.multi_labels.tolist() == [[False] * 3]
    resident = load_source(config(root, MULTI, label_separator=";", resident=True)).train  # type: ignore[arg-type]
    assert resident.images is not None
    assert resident.multi_labels is not None
    assert resident.subset(np.array([0])).multi_labels.tolist() == [[True, True, False]]  # type: ignore[union-attr]
    assert opening_lines(sources) == [
        "not used: split val (1 file); data.eval_split selects the held-out split",
        "3 classes: cat (1), dog (1), owl (0); 1.00 labels per image, 1 image has none",
        "no held-out image of: dog",
    ]


def test_lists_of_a_parquet_file_are_several_labels(root: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = root.parent / "labels.parquet"
    columns = {"path": ["x/a.png", "x/b.png", "c.png", "d.png"], "label": [["cat", "dog"], [], ["owl", "cat"], ["dog"]]}
    parquet.write_table(arrow.table(columns | {"split": ["train", "train", "test", "val"]}), file)
    found = load_source(config(root, label_file=str(file))).train
    expected = load_source(config(root, MULTI, label_separator=";")).train
    assert found.classes == expected.classes
    assert found.multi_labels is not None
    assert expected.multi_labels is not None
    assert found.multi_labels.tolist() == expected.multi_labels.tolist()


@pytest.mark.parametrize(
    ("table", "separator", "error"),
    [
        (MULTI, "|", r"no row has labels separated by data.label_separator='\|': correct the separator, or"),
        (MULTI.replace("cat;dog", ""), ";", r"split=train: no image has a label"),
        (
            MULTI + "c.png,owl;dog,test\n",
            ";",
            "line 4 and line 6 give c.png different labels .*owl and cat in test and",
        ),
    ],
)
def test_a_mistake_in_several_labels_is_reported_in_one_sentence(
    root: Path, table: str, separator: str, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        load_source(config(root, table, label_separator=separator))


def test_without_a_split_column_all_images_are_for_training(root: Path) -> None:
    sources = load_source(config(root, "label,note,path\n7,,c.png\n10,,d.png\n7,,x/a.png\n7,,x/b.png\n"))
    assert sources.held_out is None
    assert len(sources.train) == 4
    assert sources.train.labels is not None
    assert [sources.train.classes[i] for i in sources.train.labels] == ["7", "10", "7", "7"]


@pytest.mark.parametrize("header", ["path,label,Split", "Path, LABEL , split", "\ufeffPATH,Label,\tSPLIT"])
def test_case_and_spaces_of_column_names_do_not_matter(root: Path, header: str) -> None:
    sources = load_source(config(root, GOOD.replace("path,label,split", header)))
    assert sources.held_out is not None
    assert (len(sources.train), sources.held_out.name(0), sources.train.classes) == (2, "c.png", ("cat", "dog"))


def test_case_of_column_names_does_not_matter_in_parquet(root: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = root.parent / "labels.parquet"
    columns = {" Split": ["train", "train", "test", "val"], "LABEL": ["a", "b", "a", "b"]}
    parquet.write_table(arrow.table(columns | {"Path": ["x/a.png", "x/b.png", "c.png", "d.png"]}), file)
    sources = load_source(config(root, label_file=str(file)))
    assert sources.held_out is not None
    assert (len(sources.train), sources.held_out.name(0)) == (2, "c.png")


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("path,label,splits", "the column 'splits'; used: path, label$"),
        ("path,label,data_split", "the column 'data_split'; used"),
        ("path,label,spilt", "the column 'spilt'; used"),
    ],
)
def test_an_ignored_column_with_a_similar_name_is_named(root: Path, header: str, named: str) -> None:
    with pytest.warns(RunWarning, match=f"not used: {named}"):
        sources = load_source(config(root, GOOD.replace("path,label,split", header).replace("test", "train")))
    assert len(sources.train) == 4


def test_the_images_of_a_split_that_is_not_used_are_counted(root: Path) -> None:
    lines = opening_lines(load_source(config(root, GOOD)))
    assert lines[0] == "not used: split val (1 file); data.eval_split selects the held-out split"
    assert not any("not used" in line for line in opening_lines(load_source(config(root, GOOD.replace("val", "test")))))


def test_the_table_in_the_folder_is_not_left_out_and_other_files_count_once(root: Path) -> None:
    (root / "labels.csv").write_text(GOOD)
    (root / "labels.txt").write_text("")
    (root / "x/labels.csv").write_text("")  # the table's name in another folder
    (root / "nowhere").symlink_to(root / "gone")
    for name in (str(root / "labels.csv"), f"{root}/../{root.name}/x/../labels.csv"):
        data = config(root, label_file=name)
        with pytest.warns(RunWarning, match="1 broken links"):
            lines = opening_lines(load_source(data))
        assert lines[0] == "left out, because of their names: 1 .csv, 1 .txt"
        assert sum("left out" in line for line in lines) == 1
        check_data(CheckDataConfig(data, str(root.parent / "report.json")))
        report = json.loads((root.parent / "report.json").read_text())
        assert report["ignored"] == {".csv": 1, ".txt": 1}
        assert report["unreadable"]["broken link"]["count"] == 1


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("label", ["", "owl"])
def test_images_of_the_split_unused_need_no_label(root: Path, label: str, resident: bool) -> None:
    table = HEADER + f"x/a.png,dog,train\nx/b.png,cat,train\nc.png,cat,test\nd.png,{label},unused\n"
    sources = load_source(config(root, table, resident=resident))  # type: ignore[arg-type]
    assert sources.held_out is not None
    assert [sources.train.name(0), sources.train.name(1), sources.held_out.name(0)] == ["x/a.png", "x/b.png", "c.png"]
    assert (len(sources.train), len(sources.held_out)) == (2, 1)
    assert sources.train.classes == sources.held_out.classes == ("cat", "dog")
    assert opening_lines(sources) == [
        "not used: split unused (1 file)",
        "2 classes: cat (1), dog (1)",
        "no held-out image of: dog",
    ]


def test_with_several_labels_an_empty_label_means_none_except_in_the_split_unused(root: Path) -> None:
    sources = load_source(config(root, MULTI.replace("d.png,dog,val", "d.png,,unused"), label_separator=";"))
    assert sources.train.multi_labels is not None
    assert sources.train.classes == ("cat", "dog", "owl")
    assert sources.train.multi_labels.tolist() == [[True, True, False], [False] * 3]
    assert opening_lines(sources)[0] == "not used: split unused (1 file)"


def test_only_some_images_can_be_labeled_without_a_held_out_split(root: Path) -> None:
    sources = load_source(config(root, GOOD.replace("cat,test", ",unused").replace("dog,val", ",unused")))
    assert (len(sources.train), sources.held_out, sources.unused_splits) == (2, None, {"unused": 2})


@pytest.mark.parametrize("field", ["split", "eval_split"])
def test_the_split_unused_cannot_be_used(root: Path, field: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}=unused: images of this split are not used"):
        load_source(config(root, GOOD.replace("val", "unused"), **{field: "unused"}))


def test_parquet_gives_the_same_as_csv(root: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths, labels = ["c.png", "d.png", "x/a.png", "x/b.png"], [7.0, 10.0, 7.0, 7.0]
    file = root.parent / "labels.parquet"
    parquet.write_table(arrow.table({"path": paths, "label": labels}), file)
    found = load_source(config(root, label_file=str(file))).train
    lines = "".join(f"{path},{label:.0f}\n" for path, label in zip(paths, labels, strict=True))
    expected = load_source(config(root, "path,label\n" + lines)).train
    assert found.classes == expected.classes
    assert found.labels is not None
    assert expected.labels is not None
    assert found.labels.tolist() == expected.labels.tolist()
    for bad, error in (([None, 1, 1, 2], "row 1 has an empty label"), ([{"a": 1}] * 4, r"row 1 holds \{'a': 1\} ")):
        parquet.write_table(arrow.table({"path": paths, "label": bad}), file)
        with pytest.raises(ValueError, match=error):
            load_source(config(root, label_file=str(file)))
    file.write_bytes(b"no table")
    with pytest.raises(ValueError, match="is no Parquet file"):
        load_source(config(root, label_file=str(file)))


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ("", "has no column path and no column label: it is empty; rename its columns"),
        (HEADER, "has no rows"),
        ("path;label\na;b\n", "has no column path .*its columns are path;label; rename its columns"),
        (GOOD + "e.png,cat,train\n", r"names 1 image that data.root=.* does not hold: e.png \(line 7\)"),
        (
            GOOD + "c.png,dog,test\n",
            r"line 4 and line 7 give c.png different labels or splits \(cat in test and dog in test\)",
        ),
        (GOOD.replace("d.png,dog,val\n", ""), "has no row for 1 of the 4 images in .*: d.png; add a row.*unused"),
        (
            GOOD.replace("c.png,cat,test", "c.png,,test"),
            "line 4 has an empty label: fill it in, or give the row the split unused; if .*label_separator",
        ),
        (
            GOOD.replace("c.png,cat,test", "c.png,cat,"),
            "line 4 has an empty split: fill it in, .* data.root$",
        ),
        (GOOD.replace("split", "label"), "has the columns 'label' and 'label', whose names count as the same: rename"),
        (GOOD.replace("split", " Label"), "has the columns 'label' and ' Label', whose names count"),
        (GOOD.replace("val", "vla"), "line 5 has the unknown split 'vla': use train, test, .*, unused; or name it"),
        (GOOD.replace("train", "test"), "has no row of data.split='train': its splits are test, val; correct"),
        (GOOD.replace("dog,val", "dog,very,val"), "line 5 has more values than there are columns"),
        (GOOD.replace("dog,train", "cat,train"), "the only label is 'cat'"),
        (GOOD.encode("utf-16"), "is no CSV file in UTF-8"),
    ],
)
def test_a_mistake_in_the_table_is_reported_in_one_sentence(root: Path, table: str | bytes, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load_source(config(root, table))


def test_an_error_names_the_line_of_the_file(root: Path) -> None:
    table = GOOD.replace("c.png,cat,test", "c.png,cat,").replace("x/a.png", "\n\nx/a.png")
    with pytest.raises(ValueError, match="line 6 has an empty split"):
        load_source(config(root, table))


Form = Literal["NFC", "NFD"]


@pytest.mark.parametrize(("here", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_form_of_unicode(root: Path, here: Form, there: Form) -> None:
    (root / "x/a.png").rename(root / "x" / unicodedata.normalize(there, "ä.png"))
    table = GOOD.replace("a.png", unicodedata.normalize(here, "ä.png"))
    expected = load_source(config(root, GOOD.replace("a.png", unicodedata.normalize(there, "ä.png")))).train
    found = load_source(config(root, table)).train
    assert names(found) == names(expected)
    assert found.labels is not None
    assert found.labels.tolist() == expected.labels.tolist()  # type: ignore[union-attr]


def test_an_exact_name_goes_before_another_form(root: Path) -> None:
    for i, form in enumerate(("ä.png", "a\u0308.png")):
        gradient(i).save(root / form)
    both = load_source(config(root, GOOD + "ä.png,cat,train\na\u0308.png,dog,train\n")).train
    labels = dict(zip(names(both), both.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert [both.classes[labels[name]] for name in ("ä.png", "a\u0308.png")] == ["cat", "dog"]
    with pytest.raises(ValueError, match="has no row for 1 of"):
        load_source(config(root, GOOD + "ä.png,cat,train\n"))


@pytest.mark.parametrize("values", [{"labels": "folder"}, {"eval_root": "other"}, {"name": "cifar10"}])
def test_contradicting_fields_are_refused(root: Path, values: dict[str, str]) -> None:
    data = config(root, GOOD)
    for name, value in values.items():
        setattr(data, name, value)
    with pytest.raises(ConfigError, match=r"data\.label_file="):
        load_source(data)


def test_a_separator_without_a_file_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.label_separator=';' separates the labels in data\.label_file"):
        load_source(DataConfig("folder", str(root), label_separator=";"))


def test_a_missing_file_and_one_split_twice_are_refused(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: check the path"):
        load_source(config(root, label_file="/nowhere.csv"))
    with pytest.raises(ValueError, match=r"data\.eval_split='train' is also data\.split"):
        load_source(config(root, GOOD, eval_split="train"))
