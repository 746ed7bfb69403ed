"""Tables of results.json after real evaluations: what shares a row and a column, and what does not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from moco.config.finetune import FinetuneConfig
from moco.config.knn import KnnConfig
from moco.config.linear import LinearConfig
from moco.evaluation.finetune import evaluate_finetune
from moco.evaluation.knn import evaluate_knn
from moco.evaluation.linear import evaluate_linear
from moco.runs import checkpoint
from moco.runs.comparison import EXCLUDED, placed
from scripts import results_table
from tests.evaluation.runs import trained, write_images
from tests.runs.test_comparison import keeps_apart, leaves


def knn(run: Path, output: Path | None = None, data: dict[str, Any] | None = None, **values: Any) -> None:
    config = KnnConfig(run=str(run), device="cpu", output=str(output or ""))
    config.k, config.compare = [5], []
    for name, value in values.items():
        setattr(config, name, value)
    for name, value in (data or {}).items():
        setattr(config.data, name, value)
    evaluate_knn(config)


def linear(run: Path, output: Path | None = None, **values: Any) -> None:
    config = LinearConfig(run=str(run), device="cpu", output=str(output or ""), epochs=2, **values)
    config.sweep.lrs, config.sweep.weight_decays = [0.1], [0.0]
    evaluate_linear(config)


def change_weights(run: Path) -> None:
    """Replace the checkpoint of a run by one with the same step and other weights."""
    state = checkpoint.load(run / "checkpoints" / "step_00000007.pt")
    weights = {name: 2 * each if each.is_floating_point() else each for name, each in state["method"].items()}
    checkpoint.save(run / "checkpoints", 7, {**state, "method": weights}, keep_last=2)


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def table(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns of a run's table, and the cells of its rows."""
    capsys.readouterr()
    results_table.main([run])
    head, _, *rows = ([each.strip() for each in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    return head[1:], {first: rest for first, *rest in rows}


def test_the_encoders_of_one_call_share_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run")
    knn(run, compare=["untrained", "pixels"], k=[1, 20], labels_per_class=3, draws=3)
    knn(run, compare=["untrained"], features="projection")
    linear(run, compare=["untrained", "pixels"])
    config = FinetuneConfig(run=str(run), device="cpu", encoders=["pretrained", "untrained"], epochs=1, seed=3)
    config.labels_per_class = 2
    evaluate_finetune(config)
    columns, rows = table(run, capsys)
    assert columns == ["pixels", "untrained", "pretrained"]
    assert ["–" in each for each in rows.values()] == [False, True, False, True]
    assert [each[0] for each in rows.values()].count("–") == 2  # no pixels
    for entry in entries(run):
        apart = {name for name, other in leaves(entry) if keeps_apart(entry, other)}
        # What does not identify the encoder or the evaluation of this entry.
        free = {"untrained": {"weights", "sha256", "backbone_sha256"}, "pretrained": set[str]()}.get(entry["encoder"])
        chosen = {"settings.k", "settings.temperature"} if "choice" in entry else set()
        changed = {f"look.{each.removeprefix('images.')}" for each in entry["changed"]}
        if free is not None:
            free = free | {"data.root"}  # of the digits, which scikit-learn contains
            assert {name for name, _ in leaves(entry)} - apart <= EXCLUDED | free | chosen | changed


def test_a_run_that_was_trained_again_has_a_column_for_each_of_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run")
    knn(run)
    change_weights(run)
    linear(run)
    columns, rows = table(run, capsys)
    assert [each.partition(" weights ")[0] for each in columns] == ["pretrained,"] * 2
    assert len(set(columns)) == 2
    assert sorted(each.index("–") for each in rows.values()) == [0, 1]


def test_two_runs_with_one_output_have_columns_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [trained(tmp_path / name) for name in "ab"]
    change_weights(runs[1])
    for run in (*runs, runs[0]):
        knn(run, tmp_path / "mix", compare=["untrained"])
    columns, rows = table(tmp_path / "mix", capsys)
    assert columns == ["untrained", "pretrained, a", "pretrained, b"]  # both started from the same seed
    (cells,) = rows.values()
    assert "–" not in cells


def test_an_edited_label_file_is_another_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_images(tmp_path / "images", {"all": 40})
    run = trained(tmp_path / "run")

    def evaluate(classes: int, **values: Any) -> None:
        lines = [f"all/{i}.png,{chr(97 + i % classes)},{'test' if i >= 20 else 'train'}" for i in range(40)]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
        data = {"name": "folder", "root": str(root), "label_file": str(tmp_path / "labels.csv"), "workers": 0}
        knn(run, data=data, **values)

    evaluate(10, compare=["untrained"])
    evaluate(2)
    columns, rows = table(run, capsys)
    assert columns == ["untrained", "pretrained"]
    (old, old_cells), (new, new_cells) = rows.items()
    assert ("10 classes" in old, "2 classes" in new) == (True, True)
    assert new_cells[0] == "–"
    assert old_cells[0] != "–"
    # With the same classes and numbers of images, other labels are named as other ones.
    text = (tmp_path / "labels.csv").read_text()
    for before, after in (("all/2.png,a", "all/2.png,b"), ("all/3.png,b", "all/3.png,a")):
        text = text.replace(before, after)
    (tmp_path / "labels.csv").write_text(text)
    data = {"name": "folder", "root": str(root), "label_file": str(tmp_path / "labels.csv"), "workers": 0}
    knn(run, data=data)
    _, rows = table(run, capsys)
    assert [each.endswith("(other images or labels)") for each in rows] == [False, False, True]


def _two_folders(folder: Path) -> dict[str, Any]:
    """Write training images and other held-out images; return the fields of `data`."""
    roots = {"root": write_images(folder / "train", {"a": 5, "b": 5})}
    roots["eval_root"] = write_images(folder / "test", {"a": 2, "b": 2})
    for number, file in enumerate(sorted(roots["eval_root"].rglob("*.png"))):
        Image.effect_noise((16, 16 + number), 50).convert("RGB").save(file)
    return {"name": "folder", "labels": "folder", "workers": 0} | {name: str(root) for name, root in roots.items()}


def test_added_images_are_another_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _two_folders(tmp_path)
    run = trained(tmp_path / "run")
    knn(run, data=data, compare=["untrained"])
    write_images(tmp_path / "more", {"a": 3})
    for file in (tmp_path / "more" / "a").iterdir():
        file.rename(tmp_path / "train" / "a" / f"new_{file.name}")
    knn(run, data=data)
    _, rows = table(run, capsys)
    assert ["10 training images" in rows_name for rows_name in rows] == [True, False]
    assert ["13 training images" in rows_name for rows_name in rows] == [False, True]


def test_images_edited_in_place_are_another_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _two_folders(tmp_path)
    run = trained(tmp_path / "run")
    knn(run, data=data, compare=["untrained"])
    knn(run, data=data)  # a repetition
    _, rows = table(run, capsys)
    assert len(rows) == 1
    for file in (tmp_path / "test" / "a").iterdir():
        ImageOps.invert(Image.open(file)).save(file)
    knn(run, data=data)
    _, rows = table(run, capsys)
    assert [each.endswith("(other images or labels)") for each in rows] == [False, True]


@pytest.mark.filterwarnings("ignore:.*data.bits")
def test_other_bits_are_another_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 4096, (16, 16)).astype(np.uint16)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    data = {"name": "folder", "root": str(tmp_path / "train"), "eval_root": str(tmp_path / "test"), "labels": "folder"}
    run = trained(tmp_path / "run")
    knn(run, data=data | {"workers": 0})
    knn(run, data=data | {"workers": 0, "bits": 16})
    _, rows = table(run, capsys)
    assert ["bits=automatic" in each for each in rows] == [True, False]
    assert ["bits=16" in each for each in rows] == [False, True]


def test_rows_name_draws_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run")
    for draws in (9, 3):
        knn(run, labels_per_class=1, draws=draws, k=[1])
    for seeds in (1, 2):
        config = FinetuneConfig(run=str(run), device="cpu", encoders=["pretrained"], epochs=1, seeds=seeds)
        config.labels_per_class = 1
        evaluate_finetune(config)
    _, rows = table(run, capsys)
    assert [each.rpartition(", ")[2] for each in rows] == ["draws=9", "draws=3", "seeds=1", "seeds=2"]


def test_a_repeated_evaluation_keeps_its_place(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    knn(run)
    linear(run)
    knn(run)
    found = placed(entries(run))
    assert [each.entry["command"] for each in found] == ["knn", "linear"]
    assert found[0].entry == entries(run)[2]
