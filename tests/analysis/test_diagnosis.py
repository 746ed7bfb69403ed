"""The doctor beside a run: what it knows, when it speaks, and that it speaks in real runs with a fault in them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

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
from tests.analysis.faults import SAID, defect

FACTS = Facts(temperature=0.2, momentum=0.99, queue_size=512, dataset_size=100_000, keys_per_step=128)


def test_facts_of_each_method() -> None:
    plain = MoCoConfig(queue_size=512, temperature=0.1, momentum=0.9, mask_own_keys=False)
    assert facts_of(plain, 64, 1000) == Facts(0.1, 0.9, 512, 1000, 64, False)
    assert facts_of(MoCoConfig(queue_size=512, symmetric=True), 64, 1000).keys_per_step == 128
    assert facts_of(MoCoV3Config(temperature=1.0, momentum=0.99), 64, 1000) == Facts(1.0, 0.99, 0, 1000, 128, True)
    simclr = facts_of(SimCLRConfig(), 64, 1000)
    assert (simclr.momentum, simclr.queue_size, simclr.keys_per_step) == (None, 0, 64)  # no momentum to complain about


def test_recorded_series_leave_out_a_cut_line_and_read_null_as_nan(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == {}
    lines = ['{"step": 1, "train/loss": 2.5, "analysis/key_drift": null}', '{"step": 2, "accuracy/knn": 60.0}']
    file.write_text("\n".join([*lines, "[3]", "7", '{"step": 3, "train/loss": 1', ""]))
    found = read_metrics(file)
    assert found.keys() == {"train/loss", "analysis/key_drift", "accuracy/knn"}
    assert found["train/loss"] == ([1.0], [2.5])
    assert math.isnan(found["analysis/key_drift"][1][0])


def waiting(share: float, epoch: float = 1.0) -> dict[str, float]:
    return {"train/epoch": epoch, "speed/data_wait": share}


def test_each_finding_is_said_once_even_if_it_goes_and_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    doctor = Doctor(FACTS._replace(momentum=0.5), tmp_path / "metrics.jsonl", said.append)
    doctor.check()
    assert [line.split(":")[1] for line in said] == [" momentum too low"]
    assert "Try method.momentum=0.999" in said[0]
    for _ in range(5):
        doctor.record(waiting(0.9, 2.0))
    doctor.check()
    assert said[1].startswith("doctor, epoch 2: data starvation: 90% of the time")
    for share in (0.0, 0.9):
        for _ in range(5):
            doctor.record(waiting(share))
        doctor.check()
        assert [alarm.name for alarm in doctor.found] == ["momentum too low"] + ["data starvation"] * (share > 0)
    assert len(said) == 2


def test_a_run_that_goes_on_is_judged_by_all_its_records(tmp_path: Path) -> None:
    """Four waits before a kill and one after it: five make the mean."""
    file = tmp_path / "metrics.jsonl"
    records = [{"step": step, **waiting(0.3)} for step in range(1, 5)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 5, "speed/da')
    said: list[str] = []
    doctor = Doctor(FACTS, file, said.append)
    doctor.record(waiting(0.0, 3.0))
    doctor.check()
    assert [line.partition(" of the time")[0] for line in said] == ["doctor, epoch 3: data starvation: 24%"]
    alone = Doctor(FACTS, tmp_path / "other.jsonl", said.append)
    alone.record(waiting(0.0))
    alone.check()
    assert alone.found == []


# ---- through the real loop; `python -m tests.analysis.faults` does it for every alarm and at full length ----


def digits(run: Path) -> TrainConfig:
    """The digits with a small network: 5 steps an epoch, each of them looked at."""
    made = TrainConfig(
        method=MoCoConfig(queue_size=512, temperature=0.5, momentum=0.99),
        run=str(run),
        epochs=3,
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


def said_by(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The doctor's findings in a run's output, and in which epoch it spoke."""
    pretrain(config)
    out = capsys.readouterr().out
    assert "─ done ─" in out
    return {name: epoch for epoch, name, _ in SAID.findall(out)}


def momentum(config: TrainConfig) -> None:
    config.method = MoCoConfig(queue_size=512, temperature=0.5, momentum=0.5)


def unmasked(config: TrainConfig) -> None:
    config.method = MoCoConfig(queue_size=512, temperature=0.5, momentum=0.99, mask_own_keys=False)


def nothing(config: TrainConfig) -> None:
    pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a run's lock is held to the end
@pytest.mark.parametrize(
    ("change", "injected", "alarms"),
    [
        (nothing, "", {}),
        (momentum, "", {"momentum too low": "1"}),
        (unmasked, "early", {"positive among the negatives": "1"}),
        (nothing, "slow", {"data starvation": "1"}),
    ],
)
def test_the_doctor_speaks_in_a_run_with_a_fault_and_in_no_other(
    change: Callable[[TrainConfig], None],
    injected: str,
    alarms: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = digits(tmp_path / "run")
    config.epochs = 1 if injected == "slow" else 3
    change(config)
    with defect(injected):
        said = said_by(config, capsys)
    # Another program may hold the core while this test runs, and with fast keys so small a network does collapse.
    besides = {"data starvation"} | ({"collapse"} if alarms else set())
    assert said.items() >= alarms.items()
    assert said.keys() - alarms.keys() <= besides
    names = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(names["analysis/effective_rank"][1]) == 5 * config.epochs


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_looks_do_not_change_a_run_and_a_resumed_one_keeps_its_series(tmp_path: Path) -> None:
    whole, cut, blind = (digits(tmp_path / name) for name in ("whole", "cut", "blind"))
    for config in (whole, cut, blind):
        config.epochs, config.checkpoint.every_steps, config.checkpoint.keep_last = 1, 2, 9
    blind.analyse_every = 0
    for config in (whole, blind):
        pretrain(config)
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/step_00000002.pt"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "cut" / name)
    pretrain(cut)
    first, *others = (
        checkpoint.load(checkpoint.list_checkpoints(tmp_path / name / "checkpoints")[0])
        for name in ("whole", "cut", "blind")
    )
    for other in others:
        assert digest(first["method"]) == digest(other["method"])
        assert digest(first["optimizer"]) == digest(other["optimizer"])
    one, two, none = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut", "blind"))
    measures = [name for name in one if name.startswith("analysis/")]
    assert len(measures) == 16
    assert all(one[name][1] == pytest.approx(two[name][1], nan_ok=True, abs=0) for name in measures)
    assert not [name for name in none if name.startswith("analysis/")]
