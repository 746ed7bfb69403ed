"""Images with several labels each in the commands that measure no accuracy: moco.embed, moco.search, moco.report."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from moco.config import ConfigError
from moco.config.data import SubjectDataConfig
from moco.config.embed import EmbedConfig
from moco.config.report import ReportConfig
from moco.config.search import SearchConfig
from moco.reporting.report import report
from moco.retrieval.embed import embed
from moco.retrieval.search import search
from tests.data.images import encoder, folder
from tests.reporting import runs

LABELS = ["dog", "cat|dog", "", "cat", "dog|owl", "cat|dog|owl"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    encoder(tmp_path / "encoder.safetensors")
    folder(tmp_path / "images", len(LABELS))
    lines = [f"{i:02}.png,{labels}" for i, labels in enumerate(LABELS)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines]))
    return tmp_path


def data(made: Path, file: str = "labels.csv", separator: str = "|") -> SubjectDataConfig:
    labels: dict[str, Any] = {"label_file": str(made / file), "label_separator": separator}
    return SubjectDataConfig("folder", str(made / "images"), workers=0, **labels)


def config(made: Path, **changes: Any) -> EmbedConfig:
    values = {"data": data(made)} | changes
    return EmbedConfig(checkpoint=str(made / "encoder.safetensors"), output=str(made / "out"), device="cpu", **values)


def test_the_table_holds_lists_or_separated_text(made: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    embed(config(made))
    embed(config(made, table="parquet"))  # the features are complete: this adds the other table
    with (made / "out" / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(each["labels"], each["classes"]) for each in rows] == [
        ("1", "dog"),
        ("0|1", "cat|dog"),
        ("", ""),
        ("0", "cat"),
        ("1|2", "dog|owl"),
        ("0|1|2", "cat|dog|owl"),
    ]
    there = parquet.read_table(made / "out" / "index.parquet").to_pydict()
    assert there["labels"] == [[1], [0, 1], [], [0], [1, 2], [0, 1, 2]]
    assert there["classes"] == [[part for part in labels.split("|") if part] for labels in LABELS]
    assert there["path"] == [f"{i:02}.png" for i in range(len(LABELS))]


def test_a_class_that_contains_the_separator_needs_parquet(made: Path) -> None:
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    labels = [["a;b"], [], ["c"], ["c"], ["c"], ["a;b", "c"]]
    table = arrow.table({"path": [f"{i:02}.png" for i in range(6)], "label": labels})
    parquet.write_table(table, made / "labels.parquet")
    lists = data(made, "labels.parquet", "")
    with pytest.raises(ConfigError, match=r"table=csv separates .* by ';', and the class 'a;b' .*set table=parquet"):
        embed(config(made, data=lists))
    assert not (made / "out").exists()  # refused before any work
    embed(config(made, data=lists, table="parquet"))
    assert parquet.read_table(made / "out" / "index.parquet").to_pydict()["classes"] == labels


def test_search_names_all_classes(made: Path) -> None:
    embed(config(made))
    search(SearchConfig(index=str(made / "out"), query=[str(made / "images" / "00.png")], k=5, device="cpu"))
    (query,) = json.loads((made / "out" / "search" / "nearest.json").read_text())["queries"]
    found = {each["path"]: each["classes"] for each in query["neighbours"]}
    assert found == {f"{i:02}.png": [part for part in LABELS[i].split("|") if part] for i in range(1, 6)}
    page = (made / "out" / "search" / "nearest.html").read_text()
    assert "cat, dog, owl" in page
    assert "no label" in page


def test_the_report_marks_common_labels_and_shows_the_map(made: Path) -> None:
    run = runs.run(made / "run", made / "images", done=4)
    entry = {"command": "knn", "protocol": "all labels", "encoder": "pretrained", "step": 4, "settings": {}}
    (run / "results.json").write_text(json.dumps([entry | {"figures": {"mAP": 61.25, "mAP_half_width95": 2.5}}]))
    given: dict[str, Any] = {"queries": 6, "neighbours": 5, "projector": False, "map": "none"}
    report(ReportConfig(run=str(run), device="cpu", data=data(made), **given))
    page = (run / "report.html").read_text()
    # dog, cat dog, cat, dog owl and cat dog owl have 4, 4, 2, 3 and 4 neighbors with a common label; no label has none.
    sets = [set(labels.split("|")) - {""} for labels in LABELS]
    common = sum(bool(a & b) for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j)
    assert page.count("✓ a common label") == common
    assert page.count("✗ no common label") == 30 - common
    assert f"{common} of the 30 neighbors below share a label with their query." in page
    assert "mAP 61.2 ± 2.5 (95 % over seeds)" in page
