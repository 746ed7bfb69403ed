"""Judging by nearest neighbors, from a configuration to results.json: figures, the choice, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.config import ConfigError
from moco.config.knn import KnnConfig
from moco.data.decode import ImageError
from moco.data.keyed import VALIDATION, permutation
from moco.evaluation import knn as stage
from moco.evaluation.features import pixels
from moco.evaluation.knn_classifier import knn_accuracy, leave_one_out
from moco.evaluation.knn_report import confused
from moco.evaluation.subject import encoders, features_of, open_labeled, open_subject
from moco.interop.encoder_file import save_encoder
from moco.knn import knn
from moco.runs import checkpoint
from tests.evaluation.test_subject import pictures, trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder on the digits; nothing but results.json and TensorBoard's files is written here."""
    return trained(tmp_path_factory.mktemp("knn") / "run")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in two classes, and held out five and two more of it."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures(folder / "train", {"cat": 6, "dog": 5})
    pictures(folder / "test", {"cat": 5, "dog": 2})
    return folder


def asked(where: Path, **values: Any) -> KnnConfig:
    config = KnnConfig(run=str(where), device="cpu")
    for name, value in values.items():
        setattr(config, name, value)
    return config


def on_pictures(run: Path, root: Path, eval_root: Path | None, **values: Any) -> KnnConfig:
    config = asked(run, **values)
    config.data.name, config.data.root, config.data.labels, config.data.workers = "folder", str(root), "folder", 0
    if eval_root is not None:
        config.data.eval_root = str(eval_root)
    return config


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


# ---- figures ----


def test_few_labels_give_the_live_figures_exactly(run: Path, tmp_path: Path) -> None:
    config = asked(run, k=[1], labels_per_class=1, draws=9, compare=["untrained", "pixels"], output=str(tmp_path))
    results = stage.evaluate_knn(config)
    subject = open_subject(config)
    bank, held_out = open_labeled(config, subject)
    networks: dict[str, Any] = {name: each.backbone for name, each in encoders(subject, ["untrained"], CPU)}
    assert [each.name for each in results] == ["pretrained", "untrained", "pixels"]
    for result, entry in zip(results, entries(tmp_path), strict=True):
        network = networks.get(result.name, pixels)
        features = [features_of(network, source, subject, config, CPU) for source in (bank, held_out)]
        assert bank.labels is not None
        assert held_out.labels is not None
        live = knn_accuracy(features[0], bank.labels, features[1], held_out.labels, 1, 0.1, 1, 9)
        figures = entry["figures"]
        assert (figures["top1"], figures["std"], figures["draws"]) == tuple(live)
        assert figures["top5"] is None  # one neighbor has one class
        assert "interval95" not in figures
        confusion = np.array(figures["confusion"])
        assert confusion.sum(axis=1).tolist() == [9 * 50] * 10
        np.testing.assert_allclose(figures["per_class"], 100 * np.diag(confusion) / 450)
        assert entry["protocol"] == "1 label a class"
        assert "choice" not in entry


def test_one_pair_is_judged_without_a_choice(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = asked(run, k=[20], temperature=[0.2], compare=[], output=str(tmp_path))
    (result,) = stage.evaluate_knn(config)
    subject = open_subject(config)
    bank, held_out = open_labeled(config, subject)
    network = next(iter(encoders(subject, [], CPU)))[1].backbone
    features = [features_of(network, source, subject, config, CPU) for source in (bank, held_out)]
    assert bank.labels is not None
    assert held_out.labels is not None
    assert result.top1 == knn_accuracy(features[0], bank.labels, features[1], held_out.labels, 20, 0.2).mean
    assert result.grid is None
    (entry,) = entries(tmp_path)
    assert entry["figures"]["interval95"][0] < result.top1 < entry["figures"]["interval95"][1]
    assert entry["figures"]["top5"] >= result.top1
    assert (entry["settings"]["k"], entry["settings"]["temperature"]) == (20, 0.2)
    assert entry["data"]["training"] == 1297
    said = capsys.readouterr().out
    for words in ("all labels", "95 % interval", "most confused", "results.json", "next: python -m moco.linear run="):
        assert words in said
    assert "leave-one-out" not in said


def test_k_and_temperature_are_chosen_on_the_training_split_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ks, temperatures = [1, 5, 200], [0.05, 0.3]
    config = asked(run, k=ks, temperature=temperatures, choose_on=150, seed=4, output=str(tmp_path))
    config.compare = ["pixels"]
    seen: list[int] = []

    def watched(network: Any, source: Any, *rest: Any) -> Any:
        seen.append(len(source))
        return features_of(network, source, *rest)

    def choose(*arguments: Any) -> Any:
        assert seen[-1] == 1297, "the held-out split is opened after the choice"
        return leave_one_out(*arguments)

    monkeypatch.setattr(stage, "features_of", watched)
    monkeypatch.setattr(stage, "leave_one_out", choose)
    results = stage.evaluate_knn(config)
    assert seen == [1297, 500, 1297, 500]  # each encoder's test features once

    subject = open_subject(config)
    bank, _ = open_labeled(config, subject)
    assert bank.labels is not None
    rows = torch.from_numpy(np.sort(permutation(4, 0, 1297, VALIDATION)[:150]))
    networks: list[Any] = [next(iter(encoders(subject, [], CPU)))[1].backbone, pixels]
    for result, network, entry in zip(results, networks, entries(tmp_path), strict=True):
        references = features_of(network, bank, subject, config, CPU)
        grid = leave_one_out(references, torch.from_numpy(bank.labels), rows, ks, temperatures)
        assert entry["choice"] == {
            "k": ks,
            "temperature": temperatures,
            "leave_one_out": grid.tolist(),
            "images": 150,
        }
        assert grid[ks.index(result.k), temperatures.index(result.temperature)] == grid.max() > grid.min()
        assert (entry["settings"]["k"], entry["settings"]["temperature"]) == (result.k, result.temperature)
    said = capsys.readouterr().out
    assert "on 150 of 1,297" in said
    assert said.count(" <") >= 1


def test_more_neighbors_than_references_says_that_all_vote(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = on_pictures(run, tree / "train", tree / "test", k=[200], compare=[], output=str(tmp_path / "many"))
    (many,) = stage.evaluate_knn(config)
    assert "k=200 exceeds the 11 reference images: all of them vote" in capsys.readouterr().out
    config.k, config.output = [11], str(tmp_path / "all")
    (every,) = stage.evaluate_knn(config)
    assert "exceeds" not in capsys.readouterr().out
    assert np.array_equal(many.confusion(), every.confusion())
    assert many.confusion().sum() == 7


def test_a_folder_without_a_held_out_tree_gives_a_part_of_itself(run: Path, tree: Path, tmp_path: Path) -> None:
    config = on_pictures(run, tree / "train", None, k=[1], compare=[], output=str(tmp_path))
    config.data.hold_out = 0.3
    (result,) = stage.evaluate_knn(config)
    assert result.confusion().sum(axis=1).tolist() == [2, 2]  # of six and of five
    (entry,) = entries(tmp_path)
    assert (entry["data"]["training"], entry["data"]["hold_out"]) == (7, 0.3)


def test_parts_and_half_precision_do_not_change_what_comes_out(run: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"k": [20], "compare": [], "output": str(tmp_path)}
    (plain,) = stage.evaluate_knn(asked(run, **values))
    (parts,) = stage.evaluate_knn(asked(run, queries_at_once=64, references_at_once=100, **values))
    (half,) = stage.evaluate_knn(asked(run, half=True, **values))
    assert np.array_equal(parts.confusion(), plain.confusion())
    assert half.top1 == pytest.approx(plain.top1, abs=1)


def test_the_projection_is_judged_where_there_is_one(run: Path, tmp_path: Path) -> None:
    (backbone,) = stage.evaluate_knn(asked(run, k=[1], compare=[], output=str(tmp_path)))
    config = asked(run, k=[1], compare=[], features="projection", output=str(tmp_path))
    (projection,) = stage.evaluate_knn(config)
    assert not np.array_equal(backbone.confusion(), projection.confusion())
    first, second = entries(tmp_path)
    assert [each["settings"]["features"] for each in (first, second)] == ["backbone", "projection"]
    assert first["sha256"] != second["sha256"]


def test_a_seed_draws_other_few_labels(run: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"k": [1], "labels_per_class": 1, "draws": 2, "compare": [], "output": str(tmp_path)}
    found = [stage.evaluate_knn(asked(run, seed=seed, **values))[0].confusion() for seed in (0, 0, 2)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_damaged_results_file_is_told_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text("[{")
    monkeypatch.setattr(stage, "features_of", None)  # nothing is computed
    refused(asked(run, output=str(tmp_path)), r"results\.json is damaged")


def test_the_most_confused_pairs_by_share_of_the_true_class() -> None:
    confusion = np.array([[6, 4, 0], [1, 99, 0], [1, 1, 2]])
    assert confused(confusion, ("a", "b", "c")) == ["a for b 40.0 %", "c for a 25.0 %", "c for b 25.0 %"]
    assert confused(np.diag([3, 0, 2]), ("a", "b", "c")) == []


# ---- what is refused ----


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"k": [0]}, r"k=\[0\]: 0 must be at least 1"),
        ({"k": []}, r"k=\[\] must hold"),
        ({"temperature": [0.1, 0.0]}, r"temperature=\[0.1, 0.0\]: 0.0 must be"),
        ({"temperature": []}, r"temperature=\[\] must hold"),
        ({"temperature": [float("nan")]}, "temperature=nan must be a finite number"),
        ({"features": "head"}, "features='head' must be one of backbone, projection"),
        ({"compare": ["raw"]}, "'raw' must be one of untrained, pixels"),
        ({"choose_on": 0}, "choose_on=0 must be at least 1"),
        ({"references_at_once": 1}, "references_at_once=1 must be at least 64"),
        ({"labels_per_class": -1}, "labels_per_class=-1 must be at least 0"),
        ({"labels_per_class": 1, "k": [1, 5]}, r"labels_per_class=1 leaves too few .* e\.g\. k=\[1\]"),
        ({"run": ""}, "no encoder: set run=DIR"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        knn(asked(Path("nowhere"), **values))


def refused(config: KnnConfig, sentence: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        knn(config)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(asked(tmp_path / "empty"), "empty holds no checkpoint: train it first")
    refused(asked(tmp_path / "none"), "none does not exist")


def test_a_file_without_a_projection_head(run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])
    network = next(iter(encoders(open_subject(asked(run)), [], CPU)))[1].backbone
    save_encoder(tmp_path / "encoder.safetensors", network, state["config"], 7)
    config = KnnConfig(checkpoint=str(tmp_path / "encoder.safetensors"), features="projection", device="cpu")
    refused(config, r"features=projection, but .*encoder\.safetensors .* holds no projection head: set features=backb")


def test_a_file_of_another_architecture(run: Path, tmp_path: Path) -> None:
    network = next(iter(encoders(open_subject(asked(run)), [], CPU)))[1].backbone
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    config = KnnConfig(checkpoint=str(tmp_path / "weights.pt"), backbone="resnet18", device="cpu")
    config.data.name = "digits"
    refused(config, r"weights\.pt .* does not fit backbone=resnet18: no weight matches")


def test_features_that_are_not_finite(run: Path, tmp_path: Path) -> None:
    network = next(iter(encoders(open_subject(asked(run)), [], CPU)))[1].backbone
    state = checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])
    next(network.parameters()).data.fill_(1e38)  # finite, as a file's weights must be, but no sum of them is
    save_encoder(tmp_path / "encoder.safetensors", network, state["config"], 7)
    config = KnnConfig(checkpoint=str(tmp_path / "encoder.safetensors"), device="cpu", output=str(tmp_path))
    refused(config, "the pretrained encoder of .* gives features that are NaN or infinite")


def test_pictures_that_cannot_be_judged_by(run: Path, tree: Path, tmp_path: Path) -> None:
    train, test = tree / "train", tree / "test"
    refused(on_pictures(run, train, None), "no held-out split: set data.eval_root=DIR")
    unlabeled = on_pictures(run, train, None)
    unlabeled.data.labels = "none"
    refused(unlabeled, "has no labels to judge by: set data.labels=folder")
    pictures(tmp_path / "single", {"cat": 3, "dog": 1})
    held = on_pictures(run, tmp_path / "single", None)
    held.data.hold_out = 0.2
    refused(held, r"data\.hold_out=0\.2: class dog has one picture only")
    (tmp_path / "nothing").mkdir()
    refused(on_pictures(run, tmp_path / "nothing", test), "nothing.* holds no images", FileNotFoundError)
    refused(on_pictures(run, tmp_path / "missing", test), "missing.* does not exist", FileNotFoundError)
    pictures(tmp_path / "one", {"cat": 3})
    refused(on_pictures(run, tmp_path / "one", test), r"one class folder only \(cat\)")
    pictures(tmp_path / "other", {"cat": 3, "cow": 3})
    refused(on_pictures(run, tmp_path / "other", test), "class folders differ: .*cow.*dog")
    few = on_pictures(run, train, test, k=[1], labels_per_class=6)
    refused(few, "labels_per_class=6, but class dog has 5 training images")


def test_an_unreadable_picture_is_named(run: Path, tree: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "test", {"cat": 2, "dog": 2})
    (tmp_path / "test" / "dog" / "1.png").write_bytes(b"no picture")
    config = on_pictures(run, tree / "train", tmp_path / "test", k=[1], output=str(tmp_path))
    refused(config, r"dog/1\.png", ImageError)
    assert not (tmp_path / "results.json").exists()
