"""The kNN evaluation from a configuration to results.json: metrics, choice of k and temperature, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from moco.config import ConfigError, RunWarning
from moco.config.knn import KnnConfig
from moco.data.decode import ImageError
from moco.data.keyed import VALIDATION, permutation
from moco.evaluation import knn as knn_module
from moco.evaluation import task as task_module
from moco.evaluation.features import extract, pixels
from moco.evaluation.knn import evaluate_knn, most_confused, pairs_of_draws
from moco.evaluation.knn_classifier import KnnSettings, knn_accuracy, leave_one_out
from moco.evaluation.metrics import Metrics, confusion_of
from moco.evaluation.subject import encoders, labels_of, open_labeled, open_subject
from moco.evaluation.task import Task
from moco.interop.encoder_file import save_encoder
from moco.knn import knn
from moco.runs import checkpoint
from tests.evaluation.runs import trained, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder on the digits; only results.json and TensorBoard files are written here."""
    return trained(tmp_path_factory.mktemp("knn") / "run")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise in two classes, with five and two held-out images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", {"cat": 6, "dog": 5})
    write_images(folder / "test", {"cat": 5, "dog": 2})
    return folder


def configured(where: Path, **values: Any) -> KnnConfig:
    config = KnnConfig(run=str(where), device="cpu")
    for name, value in values.items():
        setattr(config, name, value)
    return config


def on_folders(run: Path, root: Path, eval_root: Path | None, **values: Any) -> KnnConfig:
    config = configured(run, **values)
    config.data.name, config.data.root, config.data.labels, config.data.workers = "folder", str(root), "folder", 0
    if eval_root is not None:
        config.data.eval_root = str(eval_root)
    return config


def opened(config: KnnConfig) -> Task[KnnConfig]:
    subject = open_subject(config)
    return Task(config, subject, *open_labeled(config, subject), CPU)


def total_confusion(metrics: list[Metrics]) -> NDArray[np.int64]:
    """Sum the confusion matrices (L, L) over the draws."""
    return confusion_of(pairs_of_draws(metrics), len(metrics[0].per_class))


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


# ---- metrics ----


def test_few_labels_equal_the_live_accuracy_exactly(run: Path, tmp_path: Path) -> None:
    config = configured(run, k=[1], labels_per_class=1, draws=9, compare=["untrained", "pixels"], output=str(tmp_path))
    results = evaluate_knn(config)
    task = opened(config)
    networks: dict[str, Any] = {name: each.backbone for name, each in encoders(task.subject, ["untrained"], CPU)}
    assert [each.encoder for each in results] == ["pretrained", "untrained", "pixels"]
    for result, entry in zip(results, entries(tmp_path), strict=True):
        network = networks.get(result.encoder, pixels)
        bank, queries = (task.features(network, source) for source in (task.train, task.held_out))
        settings = KnnSettings(1, 0.1, labels_per_class=1, draws=9)
        live = knn_accuracy(bank, labels_of(task.train), queries, labels_of(task.held_out), settings)
        figures = entry["figures"]
        assert (figures["top1"], figures["std"], figures["draws"]) == tuple(live)
        assert figures["top5"] is None  # one neighbor has one class
        assert "interval95" not in figures
        confusion = np.array(figures["confusion"])
        assert confusion.sum(axis=1).tolist() == [9 * 50] * 10
        np.testing.assert_allclose(figures["per_class"], 100 * np.diag(confusion) / 450)
        assert entry["protocol"] == "1 label a class"
        assert "choice" not in entry


def test_a_single_pair_needs_no_choice(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(run, k=[20], temperature=[0.2], compare=[], output=str(tmp_path))
    (result,) = evaluate_knn(config)
    task = opened(config)
    network = next(iter(encoders(task.subject, [], CPU)))[1].backbone
    bank, queries = (task.features(network, source) for source in (task.train, task.held_out))
    live = knn_accuracy(bank, labels_of(task.train), queries, labels_of(task.held_out), KnnSettings(20, 0.2))
    assert result.top1 == live.mean
    (entry,) = entries(tmp_path)
    assert "choice" not in entry
    assert entry["figures"]["interval95"][0] < result.top1 < entry["figures"]["interval95"][1]
    assert entry["figures"]["top5"] >= result.top1
    assert (entry["settings"]["k"], entry["settings"]["temperature"]) == (20, 0.2)
    assert entry["data"]["training"] == 1297
    output = capsys.readouterr().out
    for text in ("all labels", "95 % interval", "confusions", "results.json", "next: python -m moco.linear "):
        assert text in output
    assert "leave-one-out" not in output


def test_k_and_temperature_are_chosen_on_the_training_split_only(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ks, temperatures = [1, 5, 200], [0.05, 0.3]
    config = configured(run, k=ks, temperature=temperatures, choose_on=150, seed=4, output=str(tmp_path))
    config.compare = ["pixels"]
    seen: list[int] = []

    def recorded(network: Any, source: Any, *rest: Any) -> Any:
        seen.append(len(source))
        return extract(network, source, *rest)

    def choose(*arguments: Any) -> Any:
        assert seen[-1] == 1297, "the held-out split is opened after the choice"
        return leave_one_out(*arguments)

    monkeypatch.setattr(task_module, "extract", recorded)
    monkeypatch.setattr(knn_module, "leave_one_out", choose)
    evaluate_knn(config)
    assert seen == [1297, 500, 1297, 500]  # each encoder's test features once

    task, labels = opened(config), labels_of(opened(config).train)
    rows = torch.from_numpy(np.sort(permutation(4, 0, 1297, VALIDATION)[:150]))
    networks: list[Any] = [next(iter(encoders(task.subject, [], CPU)))[1].backbone, pixels]
    for network, entry in zip(networks, entries(tmp_path), strict=True):
        grid = leave_one_out(task.features(network, task.train), labels, rows, ks, temperatures, torch.arange(1297))
        assert entry["choice"] == {
            "k": ks,
            "temperature": temperatures,
            "leave_one_out": grid.tolist(),
            "images": 150,
            "copies": 0,
        }
        chosen = ks.index(entry["settings"]["k"]), temperatures.index(entry["settings"]["temperature"])
        assert grid[chosen] == grid.max() > grid.min()
    output = " ".join(capsys.readouterr().out.split())
    assert "on 150 of 1,297 images, each without itself as a neighbor" in output
    assert output.count(" <") >= 1


def test_copies_are_no_neighbors_in_the_choice(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of one color, a direction in the plane of red and green: the angle between two is that of their features.

    Both images of 0, 10 and 40 degrees have their nearest other image in the other class. Those of 50 degrees and that
    of 56 are each other's nearest. With three neighbors, two at 40 degrees outvote one at 56 for those of 50.
    """
    colors = {"cat": (0, 0, 40, 40), "dog": (10, 10, 50, 50, 56)}  # degrees
    for name, degrees in colors.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for i, angle in enumerate(np.deg2rad(degrees)):
            color = (round(255 * np.cos(angle)), round(255 * np.sin(angle)), 0)
            Image.new("RGB", (16, 16), color).save(tmp_path / "train" / name / f"{i}.png")
    config = on_folders(run, tmp_path / "train", tree / "test", k=[1, 3], temperature=[1.0], output=str(tmp_path))
    config.compare = ["pixels"]
    config.images.mean, config.images.std = [0.0] * 3, [1.0] * 3
    evaluate_knn(config)
    choice = entries(tmp_path)[-1]["choice"]
    np.testing.assert_allclose(choice["leave_one_out"], [[100 * 3 / 9], [100 * 1 / 9]])  # 100 % with copies at k=1
    assert choice["copies"] == 8
    output = " ".join(capsys.readouterr().out.split())
    assert "each without itself and its copies as neighbors (8 images have byte-identical copies)" in output


def test_more_neighbors_than_references_logs_that_all_vote(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = on_folders(run, tree / "train", tree / "test", k=[200], compare=[], output=str(tmp_path / "many"))
    (many,) = evaluate_knn(config)
    assert "k=200 exceeds the 11 reference images: all of them vote, k=11" in capsys.readouterr().out
    assert many.details["settings"]["k"] == 11
    config.k, config.output = [1, 20, 50, 200], str(tmp_path / "table")
    (chosen,) = evaluate_knn(config)
    capsys.readouterr()
    assert chosen.details["choice"]["k"] == [1, 11]  # each number of voters once
    config.k, config.output = [11], str(tmp_path / "all")
    (every,) = evaluate_knn(config)
    assert "exceeds" not in capsys.readouterr().out
    assert np.array_equal(total_confusion(many.metrics), total_confusion(every.metrics))
    assert total_confusion(many.metrics).sum() == 7


def test_a_folder_without_a_held_out_tree_holds_out_a_part(run: Path, tree: Path, tmp_path: Path) -> None:
    config = on_folders(run, tree / "train", None, k=[1], compare=[], output=str(tmp_path))
    config.data.hold_out = 0.3
    (result,) = evaluate_knn(config)
    assert total_confusion(result.metrics).sum(axis=1).tolist() == [2, 2]  # of six and of five
    (entry,) = entries(tmp_path)
    assert (entry["data"]["training"], entry["data"]["hold_out"]) == (7, 0.3)


def test_copies_of_an_image_are_on_one_side_of_hold_out(run: Path, tmp_path: Path) -> None:
    """Noise in two classes, each image under two names: only the copies could be recognized."""
    write_images(tmp_path / "train", {"cat": 20, "dog": 20})
    for path in list((tmp_path / "train").rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy_of_{path.name}"))
    config = on_folders(run, tmp_path / "train", None, k=[1], compare=["pixels"], output=str(tmp_path))
    config.data.hold_out = 0.3
    results = evaluate_knn(config)
    assert [total_confusion(each.metrics).sum(axis=1).tolist() for each in results] == [[12, 12]] * 2
    assert all(each.top1 < 90 for each in results)  # 100 % if copies are on both sides
    assert [entry["data"]["held_out_in_training"] for entry in entries(tmp_path)] == [0, 0]


def test_held_out_images_that_are_training_images_are_reported(run: Path, tree: Path, tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/3.png"):
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / name).symlink_to(tree / "train" / name)
    Image.new("RGB", (16, 16)).save(tmp_path / "test" / "dog" / "other.png")
    config = on_folders(run, tree / "train", tmp_path / "test", k=[1], compare=[], output=str(tmp_path))
    with pytest.warns(RunWarning, match="3 of the 4 held-out images are byte-identical to training images"):
        evaluate_knn(config)
    assert entries(tmp_path)[-1]["data"]["held_out_in_training"] == 3


def test_chunks_change_no_result_and_half_precision_little(run: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"k": [20], "compare": [], "output": str(tmp_path)}
    (plain,) = evaluate_knn(configured(run, **values))
    (parts,) = evaluate_knn(configured(run, queries_at_once=64, references_at_once=100, **values))
    (half,) = evaluate_knn(configured(run, half=True, **values))
    assert np.array_equal(total_confusion(parts.metrics), total_confusion(plain.metrics))
    assert half.top1 == pytest.approx(plain.top1, abs=1)


def test_the_projection_has_results_of_its_own(run: Path, tmp_path: Path) -> None:
    (backbone,) = evaluate_knn(configured(run, k=[1], compare=[], output=str(tmp_path)))
    config = configured(run, k=[1], compare=[], features="projection", output=str(tmp_path))
    (projection,) = evaluate_knn(config)
    assert not np.array_equal(total_confusion(backbone.metrics), total_confusion(projection.metrics))
    first, second = entries(tmp_path)
    assert (first["changed"]["k"], "features" in first["changed"]) == ([1], False)
    assert second["changed"] == first["changed"] | {"features": "projection"}
    assert [each["settings"]["features"] for each in (first, second)] == ["backbone", "projection"]
    assert first["sha256"] != second["sha256"]


def test_another_seed_draws_other_labels(run: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"k": [1], "labels_per_class": 1, "draws": 2, "compare": [], "output": str(tmp_path)}
    first, second, other = [
        total_confusion(evaluate_knn(configured(run, seed=seed, **values))[0].metrics) for seed in (0, 0, 2)
    ]
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_damaged_results_file_is_refused_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text("[{")
    monkeypatch.setattr(task_module, "extract", None)  # nothing is computed
    refused(configured(run, output=str(tmp_path)), r"results\.json is damaged")


def test_the_most_confused_pairs_by_share_of_the_true_class() -> None:
    def pairs(matrix: list[list[int]]) -> Any:
        return np.array([(i, j, count) for i, row in enumerate(matrix) for j, count in enumerate(row) if count])

    confusion = pairs([[6, 4, 0], [1, 99, 0], [1, 1, 2]])
    wanted = ["a as b 40.0 %", "c as a 25.0 %", "c as b 25.0 %"]
    assert most_confused(confusion, ("a", "b", "c")) == wanted
    assert most_confused(np.concatenate([confusion, confusion]), ("a", "b", "c")) == wanted  # of two draws
    assert most_confused(pairs([[3, 0, 0], [0, 0, 0], [0, 0, 2]]), ("a", "b", "c")) == []


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
        ({"labels_per_class": 1, "k": [1, 5]}, "labels_per_class=1 needs one k and one temperature, .*: set e.g. 'k="),
        ({"run": ""}, "no encoder: set run=DIR"),
    ],
)
def test_an_invalid_value_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        knn(configured(Path("nowhere"), **values))


def refused(config: KnnConfig, sentence: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        knn(config)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_projection_head(run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])
    network = next(iter(encoders(open_subject(configured(run)), [], CPU)))[1].backbone
    save_encoder(tmp_path / "encoder.safetensors", network, state["config"], 7)
    config = KnnConfig(checkpoint=str(tmp_path / "encoder.safetensors"), features="projection", device="cpu")
    refused(config, r"features=projection, but .*encoder\.safetensors .* has no projection head")


def test_non_finite_features(run: Path, tmp_path: Path) -> None:
    network = next(iter(encoders(open_subject(configured(run)), [], CPU)))[1].backbone
    state = checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])
    next(network.parameters()).data.fill_(1e38)  # finite, as a file's weights must be, but no sum of them is
    save_encoder(tmp_path / "encoder.safetensors", network, state["config"], 7)
    config = KnnConfig(checkpoint=str(tmp_path / "encoder.safetensors"), device="cpu", output=str(tmp_path))
    refused(config, "pretrained: .* NaN or infinity")


def test_more_labels_than_a_class_has(run: Path, tree: Path) -> None:
    few = on_folders(run, tree / "train", tree / "test", k=[1], labels_per_class=6)
    refused(few, "labels_per_class=6: .* 5 images")


def test_an_unreadable_image_is_named(run: Path, tree: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "test", {"cat": 2, "dog": 2})
    (tmp_path / "test" / "dog" / "1.png").write_bytes(b"no image")
    config = on_folders(run, tree / "train", tmp_path / "test", k=[1], output=str(tmp_path))
    refused(config, r"dog/1\.png", ImageError)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("supervised", [False, True])
def test_an_unfinished_run_and_a_training_with_labels_are_named(
    supervised: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run", supervised=supervised)
    evaluate_knn(configured(run, k=[1], temperature=[0.1]))
    printed = capsys.readouterr().out
    assert "is not finished: this is its encoder after step 7" in printed
    assert ("was trained with labels" in printed) == supervised
    assert entries(run)[0].get("trained_with_labels", False) == supervised
    shutil.copy(next((run / "checkpoints").iterdir()), run / "encoder.safetensors")  # only its presence counts
    evaluate_knn(configured(run, k=[1], temperature=[0.1]))
    assert "is not finished" not in capsys.readouterr().out
