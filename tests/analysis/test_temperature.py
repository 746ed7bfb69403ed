"""The temperature study: measures, finished and failing runs, signals, refusals."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moco.analysis.studies import temperature as study_module
from moco.analysis.studies.figures import FIGURES, draw_curves, penalties
from moco.analysis.studies.measures import Contrast, Run, Space, contrast_of, measure
from moco.analysis.studies.temperature import PlannedRun, command_of, explain, summary, sweep
from moco.config import AugmentConfig, ConfigError, DataConfig, ModelConfig, TrainConfig
from moco.config.temperature import TemperatureConfig, check_temperature
from moco.data.sources import Sources, load_source
from moco.evaluation.knn_classifier import Accuracy
from moco.files import WriteError
from moco.methods.build import build_method
from moco.methods.simclr_config import SimCLRConfig
from moco.runs import checkpoint
from moco.temperature import temperature
from moco.untrusted import read_yaml
from tests.full_disk import full_at
from tests.losses.loops import dot, unit

SMALL = ["batch_size=64", "method.queue_size=64", "model.options.width=4", "threads=1", "device=cpu"]
SMALL += ["optim.warmup_epochs=0", "evaluate.every_epochs=0"]


def config(output: Path, **changes: Any) -> TemperatureConfig:
    values: dict[str, Any] = {
        "temperatures": [0.1, 1.0],
        "overrides": SMALL,
        "epochs": 1,
        "images": 60,
        "draws": 3,
        "bins": 20,
        "device": "cpu",
    }
    return TemperatureConfig(output=str(output), **(values | changes))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """Two real runs of one epoch, by the study's own command lines but in this process."""
    output = tmp_path_factory.mktemp("study") / "out"

    def train_here(command: Sequence[str], folder: Path) -> str:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(sys, "argv", list(command[2:]))
            patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the command replaces it
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it
        patch.setattr(study_module, "train", train_here)
        return output, sweep(config(output))


@pytest.fixture
def copy(study: tuple[Path, list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the study, whose figures are not drawn again."""
    monkeypatch.setattr(study_module, "FIGURES", {})
    return Path(shutil.copytree(study[0], tmp_path / "out"))


def test_a_study_is_its_runs_measures_and_figures(study: tuple[Path, list[Run]]) -> None:
    output, runs = study
    assert [(run.temperature, run.seed, run.step, run.pictures) for run in runs] == [(0.1, 0, 20, 60), (1.0, 0, 20, 60)]
    for run in runs:
        state = checkpoint.load_newest(Path(run.path) / "checkpoints")
        assert state is not None
        assert state["config"]["method"]["temperature"] == run.temperature
        assert run.seconds == state["seconds"]
        assert run.knn is not None
        assert 0 < run.knn.mean < 100
        assert run.projection.tolerance is not None
        assert run.projection != run.backbone
        assert run.contrast.negatives == 64
        assert sum(run.contrast.positives_at) == 60
        assert sum(run.contrast.negatives_at) == 60 * 64
        assert sum(run.contrast.push_at) == pytest.approx(1)
    assert runs[0].contrast.effective_negatives < runs[1].contrast.effective_negatives <= 64
    written = json.loads((output / "temperature.json").read_text())
    assert [each["temperature"] for each in written["runs"]] == [0.1, 1.0]
    assert written["summary"][0]["knn"] == {"mean": runs[0].knn.mean if runs[0].knn else None, "std": None}
    assert written["runs"][1]["contrast"]["push_at"] == runs[1].contrast.push_at
    for name in FIGURES:
        assert "<svg" in (output / name).read_text()


def test_finished_runs_are_not_run_again_and_evaluations_in_the_output_stay(
    copy: Path, study: tuple[Path, list[Run]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "train", lambda command, folder: pytest.fail(f"{folder} was run again"))
    evaluations = copy / "results.json"
    evaluations.write_text('[{"command": "knn"}]')
    again = sweep(config(copy))
    assert evaluations.read_text() == '[{"command": "knn"}]'
    assert "2 of 2 runs" in capsys.readouterr().out
    for run, before in zip(again, study[1], strict=True):
        assert (run.knn, run.contrast, run.projection) == (before.knn, before.contrast, before.projection)


def test_the_next_command_shows_the_figure_of_the_table(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sweep(config(copy, images=2000))  # all held-out digits, as in moco.knn
    (line,) = re.findall(r"^next: (.*?)  \(the highest few-label kNN", capsys.readouterr().out, re.MULTILINE)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr(sys, "argv", [*shlex.split(line)[2:], "compare=[]", "device=cpu", f"output={copy}"])
        runpy.run_module("moco.knn", run_name="__main__", alter_sys=True)
    (entry,) = json.loads((copy / "results.json").read_text())
    assert entry["protocol"] == "1 label a class"
    assert entry["figures"]["top1"] == pytest.approx(max(run.knn.mean for run in runs if run.knn))


def test_a_failing_run_is_reported_with_its_last_line_and_the_others_run(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "import sys; print('epoch 1'); print('moco: batch_size=0'); sys.exit(2)"
    monkeypatch.setattr(study_module, "command_of", lambda *_: [sys.executable, "-c", failing])
    with pytest.raises(ValueError, match=r"1 of 3 runs failed: .*t0\.2/seed0: moco: batch_size=0") as caught:
        sweep(config(copy, temperatures=[0.1, 0.2, 1.0]))
    assert "\n" not in str(caught.value)
    assert [each["temperature"] for each in json.loads((copy / "temperature.json").read_text())["runs"]] == [0.1, 1.0]


def test_a_preempted_run_ends_the_study_with_its_status(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preempted = [sys.executable, "-c", "import os; print('saved', flush=True); os._exit(75)"]
    monkeypatch.setattr(study_module, "command_of", lambda *_: preempted)
    with pytest.raises(SystemExit) as caught:
        sweep(config(copy, seeds=2))
    assert caught.value.code == 75
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sent", "status", "raised"),
    [("SIGTERM", 75, SystemExit), ("SIGUSR1", 0, SystemExit), ("SIGINT", 130, KeyboardInterrupt)],
)
def test_a_signal_reaches_the_run_and_ends_the_study(
    sent: str, status: int, raised: type[BaseException], tmp_path: Path
) -> None:
    """The run receives SIGTERM and saves. A run whose last step was done has status 0, and the study ends as well."""
    waits = (
        f"import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit({status})); "
        f"os.kill({os.getpid()}, signal.{sent}); time.sleep(60)"
    )
    with pytest.raises(raised) as caught:
        study_module.train([sys.executable, "-c", waits], tmp_path / "run")
    assert getattr(caught.value, "code", 75) == 75


def test_another_study_is_refused_and_more_temperatures_are_not(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"epochs=1 \(now 2\)"):
        sweep(config(copy, epochs=2))
    assert len(sweep(config(copy, temperatures=[0.1]))) == 1


def test_images_of_a_hub_are_fetched_only_if_the_person_names_them(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[DataConfig] = []

    def open_digits(data: DataConfig, bank_size: int) -> Sources:
        opened.append(data)
        return load_source(DataConfig("digits"))

    monkeypatch.setattr(study_module, "open_sources", open_digits)
    for folder in copy.glob("t*/seed0"):
        trained = read_yaml(folder / "config.yaml")
        trained["data"] |= {"name": "huggingface", "root": "user/images", "download": True}
        (folder / "config.yaml").write_text(json.dumps(trained))
    with pytest.raises(ConfigError, match=r"t0\.1/seed0 names .*data\.root=user/images.*: set another output"):
        sweep(config(copy))
    assert opened == []
    (copy / "study.json").unlink()
    sweep(config(copy, overrides=[*SMALL, "data=huggingface", "data.root='user/images'"]))
    assert [(data.name, data.root, data.download) for data in opened] == [("huggingface", "user/images", False)]


def test_the_command_of_a_run() -> None:
    made = config(Path("o"), overrides=["batch_size=8"], epochs=None, keep_epochs=2, recipe="mine")
    assert command_of(made, PlannedRun(0.07, 3, Path("o/t0.07/seed3")))[1:] == [
        "-m",
        "moco.train",
        "experiment=mine",
        "batch_size=8",
        "checkpoint.keep_epochs=2",
        "method.temperature=0.07",
        "seed=3",
        "run=o/t0.07/seed3",
    ]
    assert command_of(made, PlannedRun(0.07, 3, Path("a,b/seed3")))[-1] == 'run="a,b/seed3"'


@pytest.mark.parametrize("with_queue", [True, False])
def test_similarities_and_pushes_equal_the_loops(with_queue: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moco.analysis.studies.measures.BATCH", 3)  # does not divide 5
    query, key, queue = unit(5, 4, seed=0), unit(5, 4, seed=1), unit(9, 4, seed=2)
    found = contrast_of(query, key, queue if with_queue else None, 0.2, bins=8)
    negatives_at, push_at, effective, push = [0] * 8, [0.0] * 8, 0.0, 0.0
    for n, q in enumerate(query.tolist()):
        others = queue.tolist() if with_queue else [k for j, k in enumerate(key.tolist()) if j != n]
        weights = [math.exp(dot(q, k) / 0.2) for k in others]
        shares = [weight / sum(weights) for weight in weights]
        effective += math.exp(-sum(share * math.log(share) for share in shares)) / 5
        push += sum(weights) / (sum(weights) + math.exp(dot(q, key[n].tolist()) / 0.2)) / 5
        for k, share in zip(others, shares, strict=True):
            place = int((dot(q, k) + 1) * 4)
            negatives_at[place] += 1
            push_at[place] += share / 5
    assert found.negatives == (9 if with_queue else 4)
    assert found.negatives_at == negatives_at
    assert found.push_at == pytest.approx(push_at, abs=1e-6)
    assert found.effective_negatives == pytest.approx(effective, rel=1e-5)
    assert found.push == pytest.approx(push, rel=1e-5)
    assert found.positive_similarity == pytest.approx((query * key).sum(dim=1).mean().item(), abs=1e-6)


def made(temperature: float, seed: int, knn: float | None, contrast: Contrast) -> Run:
    accuracy = None if knn is None else Accuracy(knn, 1.0, 3)
    space = Space(-2.0 + seed, 0.5, 0.1)
    return Run(temperature, seed, "", 1, 10.0, 4, accuracy, space, space, contrast)


def test_a_summary_is_mean_and_spread_over_seeds() -> None:
    contrast = Contrast(0.9, 4, 2.0, 0.1, [4], [16], [1.0])
    rows = summary([made(0.5, 0, 70.0, contrast), made(0.5, 1, 74.0, contrast), made(0.1, 0, None, contrast)])
    assert [(row["temperature"], row["seeds"]) for row in rows] == [(0.1, 1), (0.5, 2)]
    assert rows[0]["knn"] == {"mean": None, "std": None}
    assert rows[1]["knn"] == {"mean": 72.0, "std": pytest.approx(math.sqrt(8))}
    assert rows[1]["uniformity"] == {"mean": -1.5, "std": pytest.approx(math.sqrt(0.5))}


def test_penalty_curves_are_shares_and_multiples_of_the_mean() -> None:
    contrast = Contrast(0.9, 4, 2.0, 0.1, [4, 0, 0], [60, 40, 5], [0.2, 0.7, 0.1])
    share, one = penalties([made(0.5, 0, 70.0, contrast)])
    np.testing.assert_allclose(share, [0.2, 0.7, 0.1])
    np.testing.assert_allclose(one, [0.2 * 105 / 60, 0.7 * 105 / 40, np.nan])  # the last holds too few


def test_without_labels_the_curves_show_a_note(tmp_path: Path) -> None:
    contrast = Contrast(0.9, 4, 2.0, 0.1, [4], [16], [1.0])
    draw_curves(tmp_path / "curves.svg", [made(0.1, 0, None, contrast), made(0.5, 0, None, contrast)])
    assert "needs labels" in (tmp_path / "curves.svg").read_text()


def test_three_candidates_are_explained_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain(config(tmp_path / "out", mode="explain", temperatures=[0.1]))
    out = capsys.readouterr().out
    z = [math.exp(each / 0.1) for each in (0.8, 0.5, 0.1)]
    assert f"{100 * z[0] / sum(z):.1f}" in out  # 95.2
    assert f"{-math.log(z[1] / sum(z)):.3g}" in out  # 3.05
    assert f"{(1 - z[1] / sum(z)) / 0.1:.3g}" in out  # 9.53
    first = (tmp_path / "out" / "explain.svg").read_bytes()
    assert b"<svg" in first
    explain(config(tmp_path / "out", mode="explain", temperatures=[0.1]))
    assert (tmp_path / "out" / "explain.svg").read_bytes() == first  # a figure is a function of its numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": []}, r"temperatures=\[\]"),
        ({"temperatures": [0.1, 0.0]}, r"temperatures=\[0\.1, 0\.0\]"),
        ({"temperatures": [0.1, 0.1]}, r"temperatures=.* 0\.1 "),
        ({"temperatures": [math.nan]}, "temperatures=nan"),
        ({"recipe": "digit"}, "recipe='digit' .*, digits, .*, supmoco_digits"),
        ({"seeds": 0}, "seeds=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"mode": "both"}, "mode='both' .*sweep, explain"),
        ({"overrides": ["seed=3"]}, "overrides.*seed=3"),
        ({"overrides": ["+run=x"]}, "overrides.*run=x"),
        ({"overrides": ["--multirun"]}, "overrides.*--multirun"),
        ({"overrides": ["method.temperature_schedule=learned"]}, "overrides.*temperature_schedule=learned"),
        ({"similarities": [0.1]}, r"similarities=\[0\.1\]"),
        ({"images": 1}, "images=1"),
        ({"output": " "}, "output=' '"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        temperature(
            config(tmp_path, **changes) if "output" not in changes else TemperatureConfig(temperatures=[1.0], **changes)
        )
    assert "\n" not in str(caught.value)
    check_temperature(config(tmp_path))


def test_without_a_queue_the_other_images_are_the_negatives(tmp_path: Path) -> None:
    """SimCLR has neither a momentum encoder nor a queue."""
    trained = TrainConfig(
        augment=AugmentConfig(size=16, mean=[0.5] * 3, std=[0.5] * 3),
        model=ModelConfig(backbone="convnet", options={"width": 4}, dim=8, bn="sync"),
        method=SimCLRConfig(),
    )
    state = {"config": asdict(trained), "step": 3, "seconds": 1.0, "method": build_method(trained).state_dict()}
    checkpoint.save(tmp_path / "run" / "checkpoints", 3, state, 1)
    sources = replace(load_source(DataConfig("digits")), held_out=None)
    run = measure(tmp_path / "run", 0.5, 0, sources, config(tmp_path), torch.device("cpu"))
    assert run.knn is None
    assert run.contrast.negatives == 59
    assert sum(run.contrast.negatives_at) == 60 * 59
    assert sum(run.contrast.push_at) == pytest.approx(1)


def test_the_results_are_printed_if_the_disk_becomes_full(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_at(monkeypatch, "temperature.json")
    with pytest.raises(WriteError, match=r"temperature\.json cannot be written"):
        sweep(config(copy))
    assert "temperature study" in capsys.readouterr().out
