"""Encoders on images in several folders, data.more_roots: each command uses all of them, and forgets the weights."""

import itertools
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.analysis.studies.choose import choose
from moco.config import ConfigError, RunWarning, TrainConfig
from moco.config.choose import ChooseConfig
from moco.config.data import SubjectDataConfig
from moco.config.embed import EmbedConfig
from moco.config.finetune import FinetuneConfig
from moco.config.knn import KnnConfig
from moco.config.linear import LinearConfig
from moco.config.search import SearchConfig
from moco.config.subject import SubjectConfig
from moco.data.recorded import recorded_data
from moco.evaluation.finetune import evaluate_finetune
from moco.evaluation.knn import evaluate_knn
from moco.evaluation.linear import evaluate_linear
from moco.evaluation.subject import data_config, is_other_data, open_data, open_labeled, open_subject
from moco.retrieval.embed import embed
from moco.retrieval.search import search
from tests.data.images import gradient
from tests.distributed.launch import run_ranks
from tests.evaluation.runs import trained

WEIGHTS: dict[str, Any] = {"weights": [1.0, 3.0]}
PARTS = {"first": {"cat": 4, "dog": 5}, "second": {"dog": 3, "owl": 4}, "test": {"cat": 2, "dog": 2, "owl": 2}}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Write a run on two folders with weights, the folders, and held-out images."""
    numbers = itertools.count()
    for part, counts in PARTS.items():
        for name, count in counts.items():
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                gradient(next(numbers), 16, 16).save(tmp_path / part / name / f"{i}.png")
    run(tmp_path / "run", tmp_path)
    return tmp_path


def run(folder: Path, made: Path, step: int = 7) -> Path:
    fields: dict[str, Any] = {"root": str(made / "first"), "more_roots": [str(made / "second")], **WEIGHTS}
    return trained(folder, "folder", step, labels="folder", eval_root=str(made / "test"), **fields)


def subject(made: Path, **data: Any) -> SubjectConfig:
    return SubjectConfig(run=str(made / "run"), data=SubjectDataConfig(**data))


def evaluations(made: Path) -> dict[str, Any]:
    """Return the newest entry of each evaluation; every rank reads rank 0's file."""
    usual: dict[str, Any] = {"run": str(made / "run"), "device": "cpu", "threads": 1}
    evaluate_knn(KnnConfig(**usual, k=[3], compare=[]))
    linear = LinearConfig(**usual, epochs=3, batch_size=8)
    linear.sweep.lrs, linear.sweep.weight_decays = [0.1], [0.0]
    evaluate_linear(linear)
    finetuning: dict[str, Any] = {
        "encoders": ["pretrained"],
        "epochs": 1,
        "min_steps": 2,
        "batch_size": 8,
        "fraction": 0.5,
    }
    evaluate_finetune(FinetuneConfig(**usual, **finetuning))
    entries = json.loads((made / "run" / "results.json").read_text())
    return {each["command"]: each for each in entries}


def test_evaluations_use_the_images_of_all_folders(made: Path) -> None:
    entries = evaluations(made)
    assert set(entries) == {"knn", "linear", "finetune"}
    for entry in entries.values():
        data = entry["data"]
        assert (data["training"], data["held_out"], data["classes"]) == (16, 6, ["cat", "dog", "owl"])
        assert (data["root"], data["more_roots"]) == (str(made / "first"), [str(made / "second")])
        assert data["weights"] == []


def test_two_processes_measure_as_one(made: Path) -> None:
    expected = {name: each["figures"] for name, each in evaluations(made).items()}
    (made / "run" / "results.json").unlink()
    for entries in run_ranks(2, evaluations, made):
        assert {name: each["figures"] for name, each in entries.items()} == expected


def test_features_and_searches_name_the_folder_of_each_image(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    embed(EmbedConfig(run=str(made / "run"), output=str(made / "out"), device="cpu"))
    assert np.load(made / "out" / "features.npy").shape[0] == 16
    assert f"16 images of {made / 'first'} and 1 more folder" in capsys.readouterr().out
    query = made / "second" / "owl" / "1.png"
    search(SearchConfig(index=str(made / "out"), query=[str(query)], k=15, device="cpu"))
    found = json.loads((made / "out" / "search" / "nearest.json").read_text())
    assert (found["root"], found["more_roots"]) == (str(made / "first"), [str(made / "second")])
    paths = {each["path"] for each in found["queries"][0]["neighbours"]}
    assert len(paths) == 15  # the query is a row of the index
    assert "1/owl/1.png" not in paths
    assert {"0/cat/0.png", "1/owl/0.png"} < paths
    (made / "second").rename(made / "moved")
    data = SubjectDataConfig(root=str(made / "first"), more_roots=[str(made / "moved")])
    search(SearchConfig(index=str(made / "out"), data=data, sample=1, device="cpu"))
    data = SubjectDataConfig(root=str(made / "first"), more_roots=[], eval_root="")
    with pytest.raises(ConfigError, match=r"belongs to other images than .*first and 1 more folder contains now"):
        search(SearchConfig(index=str(made / "out"), data=data, sample=1, device="cpu"))


def test_other_folders_are_not_bound_to_the_weights_of_the_run(made: Path) -> None:
    for roots in ([], [str(made / "second"), str(made / "test")]):
        config = subject(made, more_roots=roots, eval_root="")
        data = data_config(config, open_subject(config))
        assert (data.more_roots, data.weights) == (roots, [])
        assert open_data(config, open_subject(config)).train.draws == ()


def test_a_missing_folder_is_named_with_its_field(made: Path) -> None:
    (made / "second").rename(made / "moved")
    config = subject(made)
    with pytest.raises(FileNotFoundError, match=r"data\.more_roots=.*taken from the run.*data\.more_roots=\[DIR\]"):
        open_data(config, open_subject(config))


def test_images_of_any_folder_of_the_run_count_as_seen(made: Path) -> None:
    config = subject(made, root=str(made / "second"), labels="folder", hold_out=0.3)
    assert not is_other_data(config, open_subject(config))
    with pytest.warns(RunWarning, match=r"hold_out=0\.3 holds out images that the encoder was trained on"):
        open_labeled(config, open_subject(config))
    config = subject(made, root=str(made / "test"), labels="folder", hold_out=0.5)
    assert is_other_data(config, open_subject(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_labeled(config, open_subject(config))


def test_a_bare_file_names_all_folders_that_it_would_read(made: Path) -> None:
    made_of = TrainConfig().data
    made_of.name, made_of.root, made_of.more_roots, made_of.weights = "folder", "/a", ["/b c"], [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"add data\.root=/a 'data\.more_roots=\[\"/b c\"\]'; for others"):
        recorded_data(asdict(made_of), {}, "x.pt", trusted=False)


def test_choose_measures_runs_on_the_same_folders_only(made: Path) -> None:
    runs = [run(made / "runs" / str(i), made, i + 1) for i in range(2)]
    values: dict[str, Any] = {"images": 16, "draws": 2, "labels_per_class": 1, "probe_labels_per_class": 1}
    config = ChooseConfig(runs=list(map(str, runs)), output=str(made / "chosen"), device="cpu", **values)
    torch.manual_seed(0)
    points = choose(config)
    assert [set(point.accuracies) for point in points] == [{"knn", "probe"}] * 2
    fields: dict[str, Any] = {"root": str(made / "first"), "labels": "folder", "eval_root": str(made / "test")}
    other = trained(made / "other", "folder", **fields)
    with pytest.raises(ConfigError, match=r"data\.more_roots=.*choose runs on the same images"):
        choose(ChooseConfig(runs=[str(runs[0]), str(other)], output=str(made / "chosen"), device="cpu"))
