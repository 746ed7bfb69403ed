"""The names of evaluations in tables: what tells two entries of results.json apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from moco.runs.results import evaluation_key
from scripts import results_table


def test_evaluations_on_other_data_are_told_apart() -> None:
    entry = {"command": "knn", "protocol": "all labels", "encoder": "pretrained", "settings": {"k": 5}}
    roots = ("a/test", "b/test", "a/test")
    entries = [entry | {"data": {"name": "folder", "root": root}, "figures": {}} for root in roots]
    assert len({evaluation_key(each) for each in entries}) == 2


def test_the_table_of_a_run_never_mixes_data_or_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def entry(encoder: str, top1: float, data: str, **changed: Any) -> dict[str, Any]:
        names = {"command": "knn", "protocol": "all labels", "encoder": encoder, "changed": changed}
        return names | {"data": {"name": data}, "figures": {"top1": top1}}

    entries = [entry("untrained", 90.0, "digits"), entry("pretrained", 24.0, "cifar10")]
    entries += [entry("pretrained", 99.0, "digits", k=[1])]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    results_table.main(tmp_path)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| knn, all labels, on digits | 90.0 | – |",
        "| knn, all labels, on cifar10 | – | 24.0 |",
        "| knn, all labels (k=[1]), on digits | – | 99.0 |",
    ]
