"""Resume and evaluate a run of commit a78f1f1; fixtures/run_a78f1f1/README.md describes how it was made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moco.composition import register
from moco.config import TrainConfig, check, config_dir
from moco.config.knn import KnnConfig
from moco.digest import digest
from moco.knn import knn
from moco.runs import checkpoint
from moco.training.trainer import pretrain

OLD = Path(__file__).parent / "fixtures" / "run_a78f1f1"
EXPECTED = json.loads((OLD / "resumed.json").read_text())
ARGUMENTS = [
    "epochs=4",
    "batch_size=256",
    "threads=1",
    "model.options.width=2",
    "model.dim=8",
    "model.head_hidden=16",
    "method.queue_size=64",
    "optim.warmup_epochs=0.5",
    "evaluate.draws=3",
    "evaluate.every_epochs=2",
    "log_every=1",
    "checkpoint.keep_last=1",
]


EXPECTED_ACCURACY = pytest.approx(EXPECTED["knn"]["pretrained"]["top1"], abs=0.5)


def accuracy(output: Path, **encoder: Any) -> float:
    """Return the kNN accuracy with the k and temperature that the old code chose."""
    knn(KnnConfig(output=str(output), device="cpu", k=[5], temperature=[0.05], compare=[], **encoder))
    (result,) = json.loads((output / "results.json").read_text())
    top1: float = result["figures"]["top1"]
    return top1


def same_machine() -> bool:
    """Return whether results are equal to the bit to those of the machine that made the fixture."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        EXPECTED["torch"] == str(torch.__version__)
        and EXPECTED["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
        and cpuinfo.exists()
        and EXPECTED["cpu"] in cpuinfo.read_text()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Resume the old run to its end; return its directory."""
    run = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(OLD / "stopped", run)
    register("train", TrainConfig)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        composed = compose("train", overrides=[*ARGUMENTS, f"run={run}"])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), composed))
    assert isinstance(config, TrainConfig)
    check(config)
    pretrain(config)
    return run


def test_an_old_run_resumes_as_the_old_code_resumed_it(run: Path) -> None:
    state = checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[0])
    assert sorted(state) == sorted([*EXPECTED["keys"], "computed_on", "bits", "measured"])  # the last three are newer
    assert state["step"] == EXPECTED["step"] == 20
    assert [each["step"] for each in state["history"]] == [each["step"] for each in EXPECTED["history"]] == [0, 10, 20]
    if same_machine():
        assert digest(state["method"]) == EXPECTED["method_sha256"]
        assert digest(state["optimizer"]) == EXPECTED["optimizer_sha256"]
        assert state["history"] == EXPECTED["history"]


def test_the_records_of_a_resumed_old_run_are_complete(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert lines[:8] == (OLD / "stopped" / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines[8:]]
    assert len(records) == len(EXPECTED["records"])
    for found, expected in zip(records, EXPECTED["records"], strict=True):
        found = {name: value for name, value in found.items() if not name.startswith("speed/")}
        assert found.keys() == expected.keys()
        if same_machine():
            assert found == expected
        elif "train/loss" in expected:
            assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-3)


def test_an_old_encoder_is_evaluated_as_by_the_old_code(tmp_path: Path) -> None:
    shutil.copy(OLD / "encoder.safetensors", tmp_path)
    assert accuracy(tmp_path, checkpoint=str(tmp_path / "encoder.safetensors")) == EXPECTED_ACCURACY


def test_a_resumed_old_run_is_evaluated(run: Path) -> None:
    assert accuracy(run, run=str(run)) == EXPECTED_ACCURACY
