"""The rows and columns of tables of results.json: what they keep apart, and how they name it."""

import json
from pathlib import Path
from typing import Any

import pytest

from moco.runs.comparison import EXCLUDED, of_weights, placed
from scripts import results_table

ENTRY: dict[str, Any] = {
    "command": "knn",
    "protocol": "all labels",
    "encoder": "pretrained",
    "weights": "encoder",
    "sha256": "a" * 64,
    "step": 46,
    "source": "/runs/a/checkpoints/step_00000046.pt",
    "look": {"size": 32, "resize": 36},
    "settings": {"k": 5},
    "changed": {},
    "figures": {"top1": 28.5},
}


def names(*entries: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [each[1:] for each in placed(entries)]


def test_evaluations_on_other_data_are_told_apart() -> None:
    entries = [ENTRY | {"data": {"name": "folder", "root": root}} for root in ("a/test", "b/test", "a/test")]
    assert [data for _, data, _ in names(*entries)] == ["folder a/test", "folder b/test"]


def test_other_weights_image_preparation_and_checkpoints_are_told_apart() -> None:
    resized = ENTRY | {"look": {"size": 40, "resize": 40}, "changed": {"images.size": 40, "images.resize": 40}}
    other = [
        ENTRY | {"weights": "momentum_encoder", "sha256": "b" * 64},
        resized,
        ENTRY | {"step": 23, "sha256": "c" * 64},
        ENTRY | {"encoder": "untrained"},
        ENTRY | {"encoder": "untrained", "step": 23, "sha256": "c" * 64},  # the same weights: repeats the one above
    ]
    found = placed([ENTRY, *other, ENTRY | {"figures": {"top1": 28.75}}])
    assert [each.entry["figures"]["top1"] for each in found] == [28.75, 28.5, 28.5, 28.5, 28.5]
    assert [(each.evaluation, each.encoder) for each in found] == [
        ("knn, all labels", "pretrained, step 46"),
        ("knn, all labels", "pretrained, momentum_encoder"),
        ("knn, all labels (images.size=40, images.resize=40)", "pretrained, step 46"),
        ("knn, all labels", "pretrained, step 23"),
        ("knn, all labels", "untrained"),
    ]
    assert [encoder for _, _, encoder in names(ENTRY, *other[:2])] == [
        "pretrained",
        "pretrained, momentum_encoder",
        "pretrained",
    ]


def test_the_files_of_objects_are_data_of_their_own() -> None:
    boxes = {"root": "images", "file": "a.json", "eval_file": "test.json"}
    (one, two) = names({"command": "detect", "data": boxes}, {"command": "detect", "data": boxes | {"file": "b.json"}})
    assert (one[1], two[1]) == ("images a.json, held out: test.json", "images b.json, held out: test.json")


def test_the_table_of_a_run_never_mixes_data_or_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def entry(encoder: str, top1: float, data: str, **changed: Any) -> dict[str, Any]:
        names = {"command": "knn", "protocol": "all labels", "encoder": encoder, "changed": changed}
        return names | {"data": {"name": data}, "figures": {"top1": top1}}

    entries = [entry("untrained", 90.0, "digits"), entry("pretrained", 24.0, "cifar10")]
    entries += [entry("pretrained", 99.0, "digits", k=[1])]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    results_table.main([tmp_path])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| knn, all labels, on digits | 90.0 | – |",
        "| knn, all labels, on cifar10 | – | 24.0 |",
        "| knn, all labels (k=[1]), on digits | – | 99.0 |",
    ]


@pytest.mark.parametrize(
    ("about", "note"),
    [
        ({}, ""),
        ({"held_out_in_training": 3}, ", on digits (3 held-out images are copies of training images)"),
        ({"held_out_seen": True}, ", on digits (held-out images were in the training set, without labels)"),
    ],
)
def test_the_table_of_a_run_names_what_changes_its_figures(
    about: dict[str, Any], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"command": "knn", "protocol": "all labels", "encoder": "pretrained", "data": {"name": "digits"} | about}
    (tmp_path / "results.json").write_text(json.dumps([entry | {"figures": {"top1": 24.0}}]))
    results_table.main([tmp_path])
    assert capsys.readouterr().out.splitlines()[2:] == [f"| knn, all labels{note} | 24.0 |"]


# ---- what is part of a key ----


def leaves(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the name of each field of an entry, and the entry with another value of that field."""
    found = []
    for name, value in entry.items():
        if name in ("data", "settings", "choice", "look"):
            found += [(f"{name}.{each}", entry | {name: value | {each: ["other"]}}) for each in value]
        else:
            found.append((name, entry | {name: ["other"]}))
    return found


def keeps_apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two entries have a place of their own, with a name of its own."""
    places = {each[1:] for each in placed([one, other])}
    return len(places) == 2


def test_each_field_that_is_not_excluded_keeps_entries_apart() -> None:
    """A field that `EXCLUDED` lacks, such as one that is added to entries later, is part of a key."""
    entry = ENTRY | {
        "data": {"name": "folder", "root": "a", "bits": None, "dtype": "uint8", "channels": 3, "sha256": "d" * 64}
        | {"labels": "folder", "label_separator": "", "frame_interval": 1.0, "workers": 4, "a_new_field": 1},
        "settings": {"k": 5, "draws": 100, "encoders": ["pretrained"], "seeds": 1, "a_new_field": 1},
        "choice": {"leave_one_out": [[1.0]]},
        "backbone": "resnet18",
        "options": {},
        "a_new_field": 1,
        "time": "now",
        "saved": "file",
    }
    apart = {name for name, other in leaves(entry) if keeps_apart(entry, other)}
    assert {name for name, _ in leaves(entry)} - apart == {
        *("figures", "choice.leave_one_out", "time", "saved", "source", "step", "settings.encoders", "data.workers"),
    }
    assert {name for name, _ in leaves(entry)} - apart <= EXCLUDED


def test_names_state_what_differs() -> None:
    data: dict[str, Any] = {"name": "folder", "root": "a", "bits": None, "training": 30, "held_out": 9}
    data["classes"] = ["x", "y"]
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"settings": {"k": 5, "draws": 100}}, "knn, all labels, draws=100", "folder a"),
        ({"settings": {"k": 5, "draws": 3}}, "knn, all labels, draws=3", "folder a"),
    ]
    assert names(*(ENTRY | {"data": data} | case for case, *_ in cases)) == [
        (evaluation, of_data, "pretrained") for _, evaluation, of_data in cases
    ]
    others: list[dict[str, Any]] = [{"bits": 16}, {"classes": ["x"] * 9}, {"training": 1200}]
    others += [{"sha256": "e" * 64}, {"sha256": "f" * 64}]
    texts = [
        of_data for _, of_data, _ in names(*(ENTRY | {"data": data | {"sha256": "d" * 64} | each} for each in others))
    ]
    assert texts == [
        "folder a, 2 classes, 30 training images, bits=16",
        "folder a, 9 classes",
        "folder a, 2 classes, 1,200 training images",
        "folder a, 2 classes, 30 training images, bits=automatic",
        "folder a, 2 classes, 30 training images, bits=automatic (other images or labels)",
    ]


def test_rows_of_one_protocol_state_their_draws_and_seeds() -> None:
    def knn(count: int, **changed: Any) -> dict[str, Any]:
        return ENTRY | {"protocol": "1 label a class", "settings": {"draws": count, **changed}, "changed": changed}

    def linear(count: int, **changed: Any) -> dict[str, Any]:
        return ENTRY | {"command": "linear", "settings": {"seeds": count}, "changed": changed}

    entries = [knn(100, k=1), knn(50, features="projection"), knn(50), linear(1), linear(5, seeds=5), linear(1, lr=2)]
    assert [each[0] for each in names(*entries)] == [
        "knn, 1 label a class (k=1), draws=100",
        "knn, 1 label a class (features=projection), draws=50",
        "knn, 1 label a class, draws=50",
        "linear, all labels, seeds=1",
        "linear, all labels (seeds=5)",
        "linear, all labels (lr=2), seeds=1",
    ]
    assert [each[0] for each in names(knn(100, k=1), knn(100))] == [
        "knn, 1 label a class (k=1)",
        "knn, 1 label a class",
    ]


def test_a_field_that_a_name_cannot_state_is_named_as_different() -> None:
    data = {"name": "folder", "root": "a", "classes": ["x", "y"]}
    others: list[dict[str, Any]] = [{"classes": ["x", "z"]}, {"more_field": "v" * 101}, {"more_field": "w" * 101}]
    assert [each[1] for each in names(*(ENTRY | {"data": data | each} for each in ({}, *others)))] == [
        "folder a",
        "folder a (other classes)",
        "folder a (other more_field)",
        "folder a (other more_field, 3)",
    ]
    view = [ENTRY | {"settings": {"k": 5, "view": each * 101}} for each in "vw"]
    assert [each[0] for each in names(*view)] == ["knn, all labels", "knn, all labels (other view)"]


def test_baselines_beside_other_weights_are_kept_if_the_evaluation_is_the_same() -> None:
    other = ENTRY | {"sha256": "b" * 64}
    same = [other | {"encoder": encoder} for encoder in ("untrained", "pixels")]
    different: list[dict[str, Any]] = [
        each | change
        for each in same
        for change in ({"data": {"name": "x"}}, {"settings": {"k": 6}}, {"look": {"size": 40}}, {"backbone": "x"})
    ]
    entries = [ENTRY, other, *same, *different]
    assert of_weights(entries, ["a" * 64]) == [ENTRY, *same]
    assert of_weights(entries, ["c" * 64]) == []


def test_weights_with_one_step_have_columns_of_their_own() -> None:
    other = ENTRY | {"sha256": "1234abcd" * 8}
    assert [each[2] for each in names(ENTRY, other)] == ["pretrained, weights aaaaaaaa", "pretrained, weights 1234abcd"]
    of_other_run = other | {"source": "/runs/b/checkpoints/step_00000046.pt"}
    assert [each[2] for each in names(ENTRY, of_other_run)] == ["pretrained, a", "pretrained, b"]


def test_untrained_networks_of_other_seeds_or_backbones_have_columns_of_their_own() -> None:
    start = ENTRY | {"encoder": "untrained", "backbone": "resnet18", "initial_seed": 0}
    entries = [start, start | {"initial_seed": 1}, start | {"backbone": "convnet", "initial_seed": 1}]
    assert [each[2] for each in names(*entries)] == [
        "untrained, seed 0",
        "untrained, seed 1, backbone=resnet18",
        "untrained, seed 1, backbone=convnet",
    ]
    pixels = [each | {"encoder": "pixels"} for each in entries]
    assert [each[2] for each in names(*pixels)] == ["pixels"]


def test_entries_of_earlier_versions_lack_fields_and_stand_apart_only_if_needed() -> None:
    older = [ENTRY | {"data": {"name": "folder"}}, ENTRY | {"data": {"name": "folder"}, "encoder": "untrained"}]
    newer: list[dict[str, Any]] = [
        each | {"data": {"name": "folder", "sha256": "d" * 64}, "channels": 3} for each in older
    ]
    newer[1] |= {"initial_seed": 3}
    assert [each.entry for each in placed(older)] == older
    assert [each.entry for each in placed(older + newer)] == newer  # the same evaluations, as far as is known
    changed = [each | {"data": {"name": "folder", "sha256": "e" * 64}} for each in newer]
    assert {of_data for _, of_data, _ in names(*older, *newer, *changed)} == {
        "folder",
        "folder (other images or labels)",
        "folder (other images or labels, 3)",
    }


def test_neighbors_that_were_chosen_do_not_separate_encoders() -> None:
    choice = {"k": [5, 20], "temperature": [0.1], "images": 90}
    entry = ENTRY | {"choice": choice | {"leave_one_out": [1.0]}}
    untrained = entry | {"encoder": "untrained", "settings": {"k": 20}, "choice": choice | {"leave_one_out": [0.5]}}
    assert [each[:2] for each in names(entry, untrained)] == [("knn, all labels", "")] * 2


def test_features_of_the_projection_head_have_a_column_only_if_the_heads_differ() -> None:
    head = ENTRY | {"sha256": "b" * 64, "backbone_sha256": ENTRY["sha256"], "projection": [[8, 2]]}
    head |= {"settings": {"features": "projection"}, "changed": {"features": "projection"}}
    assert {each[2] for each in names(ENTRY, head)} == {"pretrained"}
    other = head | {"sha256": "c" * 64}
    assert len({each[2] for each in names(head, other)}) == 2


def test_the_newest_result_is_shown_and_an_older_one_does_not_hide_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ENTRY | {"source": "/runs/b/checkpoints/step_00000046.pt", "sha256": "b" * 64, "figures": {"top1": 2.0}}
    entries = [ENTRY | {"figures": {"top1": 1.0}}, other, ENTRY | {"figures": {"top1": 3.0}}]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    results_table.main([tmp_path])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| top-1 % | pretrained, a | pretrained, b |"
    assert lines[2:] == ["| knn, all labels | 3.0 | 2.0 |"]


def test_a_baseline_of_the_supervised_network_is_not_shown_as_supervised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "supervised").mkdir()
    start = ENTRY | {"encoder": "untrained", "figures": {"top1": 1.0}}
    (tmp_path / "results.json").write_text(json.dumps([ENTRY, start]))
    supervised = ENTRY | {"sha256": "b" * 64, "figures": {"top1": 9.0}}
    (tmp_path / "supervised" / "results.json").write_text(json.dumps([supervised, start]))
    results_table.main([tmp_path])
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[2]) == (
        "| top-1 % | untrained | pretrained | supervised |",
        "| knn, all labels | 1.0 | 28.5 | 9.0 |",
    )


def test_an_encoder_that_was_trained_with_labels_is_named_so() -> None:
    found = names(ENTRY, ENTRY | {"sha256": "b" * 64, "trained_with_labels": True}, ENTRY | {"encoder": "untrained"})
    assert [encoder for _, _, encoder in found] == ["pretrained", "pretrained, trained with labels", "untrained"]
    baselines = [ENTRY | {"encoder": "untrained", "trained_with_labels": value} for value in (True, False)]
    assert {encoder for _, _, encoder in names(*baselines)} == {"untrained"}
