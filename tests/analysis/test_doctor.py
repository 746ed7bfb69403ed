"""The doctor of a run: its facts, when it logs a finding, and real runs with injected faults."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moco.analysis.doctor import Doctor, Facts, facts_of
from moco.config import TrainConfig
from moco.digest import digest
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3_config import MoCoV3Config
from moco.methods.simclr_config import SimCLRConfig
from moco.runs import checkpoint
from moco.runs.metrics import read_metrics
from moco.training.trainer import pretrain
from tests.analysis.faults import LOGGED, defect

FACTS = Facts(temperature=0.2, momentum=0.99, queue_size=512, dataset_size=100_000, keys_per_step=128)


def test_facts_of_each_method() -> None:
    plain = MoCoConfig(queue_size=512, temperature=0.1, momentum=0.9, mask_own_keys=False)
    assert facts_of(plain, 1000, 64) == Facts(0.1, 0.9, 512, 1000, 64, False)
    assert facts_of(MoCoConfig(queue_size=512, symmetric=True), 1000, 64).keys_per_step == 128
    assert facts_of(MoCoV3Config(temperature=1.0, momentum=0.99), 1000, 64) == Facts(
        *(1.0, 0.99, 0, 1000, 128, True), keys_per_image=2
    )
    simclr = facts_of(SimCLRConfig(), 1000, 64)
    assert (simclr.momentum, simclr.queue_size, simclr.keys_per_step) == (None, 0, 64)


def waiting(share: float, epoch: float = 1.0) -> dict[str, float]:
    return {"train/epoch": epoch, "speed/data_wait": share}


def test_each_finding_is_logged_once_even_if_it_disappears_and_returns(tmp_path: Path) -> None:
    lines: list[str] = []
    doctor = Doctor(FACTS._replace(momentum=0.5), tmp_path / "metrics.jsonl", lines.append)
    doctor.check()
    assert [line.split(":")[1] for line in lines] == [" momentum too low"]
    assert "Try method.momentum=0.999" in lines[0]
    for _ in range(7):  # the first two are the start of the loader
        doctor.record(waiting(0.9, 2.0))
    doctor.check()
    assert lines[1].startswith("doctor, epoch 2: data starvation: 90 %")
    for share in (0.0, 0.9):
        for _ in range(5):
            doctor.record(waiting(share))
        doctor.check()
        assert [alarm.name for alarm in doctor.found] == ["momentum too low"] + ["data starvation"] * (share > 0)
    assert len(lines) == 2


def test_a_resumed_run_is_diagnosed_by_all_its_records(tmp_path: Path) -> None:
    """Six records before a kill and one after it: the median of the last five is high."""
    file = tmp_path / "metrics.jsonl"
    records = [{"step": step, **waiting(0.3)} for step in range(1, 7)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 7, "speed/da')
    lines: list[str] = []
    doctor = Doctor(FACTS, file, lines.append)
    doctor.record(waiting(0.0, 3.0))
    doctor.check()
    assert [line.split(" %")[0] for line in lines] == ["doctor, epoch 3: data starvation: 30"]
    alone = Doctor(FACTS, tmp_path / "other.jsonl", lines.append)
    alone.record(waiting(0.0))
    alone.check()
    assert alone.found == []


# ---- real runs; `python -m tests.analysis.faults` does this for every alarm and at full length ----


def digits(run: Path, **method: Any) -> TrainConfig:
    """The digits with a small network: 5 steps per epoch, all of them measured."""
    made = TrainConfig(
        method=MoCoConfig(**{"queue_size": 512, "temperature": 0.5, "momentum": 0.9} | method),
        run=str(run),
        epochs=1,
        batch_size=256,
        device="cpu",
        threads=1,
        log_every=1,
        analyse_every=1,
    )
    made.precision, made.hang_after = "fp32", 0.0
    made.data.name, made.augment.size, made.augment.crop_scale = "digits", 16, [1.0, 1.0]
    made.augment.affine_p, made.augment.degrees, made.augment.noise = 1.0, 10.0, [0.0, 0.05]
    made.augment.translate, made.augment.zoom, made.augment.shear = 0.07, [0.9, 1.1], 10.0
    made.augment.mean, made.augment.std = [0.5] * 3, [0.5] * 3
    made.model.backbone, made.model.options, made.model.dim, made.model.head_hidden = "convnet", {"width": 8}, 32, 32
    made.optim.lr, made.evaluate.every_epochs = 0.06, 0
    return made


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run's lock is held to the end
@pytest.mark.parametrize(
    ("method", "injected", "alarm"),
    [
        ({}, "", ""),
        ({"momentum": 0.5}, "", "momentum too low"),
        ({"momentum": 0.999}, "", "momentum too high"),
        ({"mask_own_keys": False}, "early", "positive among the negatives"),
        ({}, "slow", "data starvation"),
    ],
)
def test_the_doctor_finds_the_fault_of_a_run_and_nothing_in_a_healthy_one(
    method: dict[str, Any], injected: str, alarm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = digits(tmp_path / "run", **method)
    if injected == "slow":
        config.epochs = 2
    with defect(injected):
        pretrain(config)
    out = capsys.readouterr().out
    assert "─ done ─" in out
    found = {name: epoch for epoch, name, _ in LOGGED.findall(out)}
    # Other programs may use the processor meanwhile, and fast keys do collapse so small a network.
    also = {"data starvation"} | ({"collapse", "nothing learned"} if alarm else set())
    assert found.keys() - {alarm} <= also
    assert not alarm or found[alarm] == ("before the first step" if method.get("momentum") else str(config.epochs))
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics["analysis/effective_rank"][1]) == 5 * config.epochs


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_measuring_does_not_change_a_run_and_a_resumed_run_keeps_its_series(tmp_path: Path) -> None:
    full, cut, unmeasured = (digits(tmp_path / name) for name in ("full", "cut", "unmeasured"))
    for config in (full, cut, unmeasured):
        config.checkpoint.every_steps, config.checkpoint.keep_last = 2, 9
    unmeasured.analyse_every = 0
    for config in (full, unmeasured):
        pretrain(config)
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/step_00000002.pt"):
        shutil.copy(tmp_path / "full" / name, tmp_path / "cut" / name)
    pretrain(cut)
    first, *others = (
        checkpoint.load(checkpoint.list_checkpoints(tmp_path / name / "checkpoints")[0])
        for name in ("full", "cut", "unmeasured")
    )
    for other in others:
        assert digest(first["method"]) == digest(other["method"])
        assert digest(first["optimizer"]) == digest(other["optimizer"])
    one, two, none = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("full", "cut", "unmeasured"))
    measures = [name for name in one if name.startswith("analysis/")]
    assert {"analysis/effective_rank", "analysis/loss_shuffled"} <= set(measures)
    assert all(one[name][1] == pytest.approx(two[name][1], nan_ok=True, abs=0) for name in measures)
    assert not [name for name in none if name.startswith("analysis/")]
