"""The names of evaluations in tables: what tells two entries of results.json apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from moco.runs.results import encoder_names, evaluated_on, evaluation_key, label, newest
from scripts import results_table


def test_evaluations_on_other_data_are_told_apart() -> None:
    entry = {"command": "knn", "protocol": "all labels", "encoder": "pretrained", "settings": {"k": 5}}
    roots = ("a/test", "b/test", "a/test")
    entries = [entry | {"data": {"name": "folder", "root": root}, "figures": {}} for root in roots]
    assert len({evaluation_key(each) for each in entries}) == 2


def test_other_weights_image_preparation_and_checkpoints_are_told_apart() -> None:
    entry: dict[str, Any] = {"command": "knn", "protocol": "all labels", "encoder": "pretrained", "weights": "encoder"}
    entry |= {"sha256": "a", "step": 46, "look": {"size": 32, "resize": 36}, "figures": {"top1": 28.5}}
    resized = entry | {"look": {"size": 40, "resize": 40}, "changed": {"images.size": 40, "images.resize": 40}}
    other = [
        entry | {"weights": "momentum_encoder", "sha256": "b"},
        resized,
        entry | {"step": 23, "sha256": "c"},
        entry | {"encoder": "untrained"},
        entry | {"encoder": "untrained", "step": 23, "sha256": "c"},  # the same weights: repeats the one above
    ]
    found = newest([entry, *other, entry | {"figures": {"top1": 28.75}}])
    assert [each["figures"]["top1"] for each in found] == [28.75, 28.5, 28.5, 28.5, 28.5]
    assert list(zip(map(label, found), encoder_names(found), strict=True)) == [
        ("knn, all labels", "pretrained, step 46"),
        ("knn, all labels", "pretrained, momentum_encoder"),
        ("knn, all labels (images.size=40, images.resize=40)", "pretrained, step 46"),
        ("knn, all labels", "pretrained, step 23"),
        ("knn, all labels", "untrained"),
    ]
    assert encoder_names(found[:3]) == ["pretrained", "pretrained, momentum_encoder", "pretrained"]


def test_the_files_of_objects_are_data_of_their_own() -> None:
    boxes = {"root": "images", "file": "a.json", "eval_file": "test.json"}
    entries: list[dict[str, Any]] = [
        {"command": "detect", "data": data} for data in (boxes, boxes | {"file": "b.json"})
    ]
    assert len(newest(entries)) == 2
    assert evaluated_on(boxes) == "images a.json, held out: test.json"


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
