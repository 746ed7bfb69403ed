"""The loggers Weights & Biases and MLflow, with stand-ins that record the calls; with the packages, if installed."""

import importlib.util
import math
import os
import posixpath
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moco.config import ConfigError, RunWarning
from moco.runs import results, trackers
from moco.runs.metrics import MetricsLogger, check_loggers

Calls = list[tuple[Any, ...]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    path = Path("runs/mine")
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"epochs": 2, "method": {"name": "moco_v2", "temperature": 0.2}}))
    return path


class Wandb(ModuleType):
    """A stand-in for wandb, with runs that continue by their id as on its server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, key: bool = True) -> None:
        super().__init__("wandb")
        self.__version__, self.key = "0", key
        self.opened: list[dict[str, Any]] = []
        self.calls: Calls = []
        self.last: dict[str, int] = {}
        self.summary: dict[str, Any] = {}
        self.Settings, self.Histogram, self.Image = SimpleNamespace, SimpleNamespace, np.asarray
        monkeypatch.setitem(sys.modules, "wandb", self)

    def setup(self) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(mode=os.environ.get("WANDB_MODE", "online")))

    def login(self, prompt: bool) -> bool:
        assert not prompt
        return self.key

    def init(self, **options: Any) -> Any:
        self.opened.append(options)
        run = SimpleNamespace(summary=self.summary, step=self.last.get(options["id"], -1) + 1)

        def log(values: dict[str, Any], step: int) -> None:
            assert step >= run.step
            run.step = self.last[options["id"]] = step
            self.calls.append((step, values))

        run.log, run.finish = log, lambda exit_code=0: self.calls.append(("finish", exit_code))
        return run


class MLflow(ModuleType):
    """A stand-in for mlflow, which is its own client."""

    class Error(Exception):
        error_code = "RESOURCE_DOES_NOT_EXIST"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("mlflow")
        self.__version__ = "0"
        self.runs: dict[str, Any] = {}
        self.fails: Exception | None = None
        self.delay = 0.0
        entities = ModuleType("mlflow.entities")
        entities.__dict__.update(
            Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
            Param=lambda key, value: (key, value),
        )
        exceptions = ModuleType("mlflow.exceptions")
        exceptions.__dict__["MlflowException"] = self.Error
        for module in (self, entities, exceptions):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def MlflowClient(self) -> "MLflow":  # noqa: N802 # its name
        return self

    def set_experiment(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name)

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        name = f"id{len(self.runs)}"
        about = {"experiment": experiment, "name": run_name, "tags": tags, "status": "RUNNING"}
        self.runs[name] = SimpleNamespace(**about, params={}, metrics=[])
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def update_run(self, name: str, status: str) -> None:
        if name not in self.runs:
            raise self.Error
        self.runs[name].status = status

    def set_terminated(self, name: str, status: str) -> None:
        self.runs[name].status = status

    def get_metric_history(self, name: str, metric: str) -> list[Any]:
        return [each for each in self.runs[name].metrics if each.key == metric]

    def log_batch(self, name: str, metrics: Any = (), params: Any = ()) -> None:
        time.sleep(self.delay)
        if self.fails:
            raise self.fails
        self.runs[name].metrics += metrics
        self.runs[name].params |= dict(params)

    def points(self, name: str) -> list[tuple[str, int, float]]:
        return [(each.key, each.step, each.value) for each in self.runs[name].metrics]


def train(path: Path, tracker: str, start: int, end: int) -> None:
    """Record the steps after `start`, as a run does."""
    check_loggers([tracker])
    logger = MetricsLogger(path, start, [tracker])
    logger.log_image("views", torch.rand(3, 4, 6))
    for step in range(start + 1, end + 1):
        logger.log(step, {"train/loss": step / 2})
        logger.log_histogram("similarity/positives", torch.tensor([1, 2]), step)
    logger.close()


RESULT = {"command": "knn", "protocol": "all labels", "encoder": "pretrained", "figures": {"top1": 71.5, "per": [1]}}


def test_a_resumed_run_continues_the_same_run_of_wandb(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb(monkeypatch)
    train(run, "wandb", 0, 3)
    train(run, "wandb", 1, 4)  # from a checkpoint after one step
    results.record(run, [RESULT], step=4)
    first, second, evaluation = wandb.opened
    assert first["id"] == second["id"] == evaluation["id"] == (run / "wandb_id.txt").read_text().strip()
    assert (first["project"], first["name"], first["resume"], first["dir"]) == ("moco", str(run), "allow", str(run))
    assert first["config"]["method"]["temperature"] == 0.2
    assert "commit" in first["config"]
    assert evaluation["config"] is None
    losses = [(step, values["train/loss"]) for step, values in wandb.calls if "train/loss" in (values or ())]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    image = wandb.calls[0][1]["views"]
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)
    assert wandb.summary == {"evaluation/knn_all labels/pretrained_top1": 71.5}
    train(run, "wandb", 0, 3)  # no checkpoint: another run
    assert wandb.opened[-1]["id"] not in ("", first["id"])


def test_a_resumed_run_continues_the_same_run_of_mlflow(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = MLflow(monkeypatch)
    train(run, "mlflow", 0, 3)
    train(run, "mlflow", 1, 4)
    results.record(run, [RESULT], step=4)
    (found,) = mlflow.runs.values()
    assert (found.experiment, found.name, found.status) == ("moco", str(run), "FINISHED")
    assert found.params == {"epochs": "2", "method.name": "moco_v2", "method.temperature": "0.2"}
    assert found.tags.keys() == {"mlflow.source.git.commit"}
    losses = [(step, value) for name, step, value in mlflow.points("id0") if name == "train/loss"]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 1.5), (4, 2.0)]  # step 3 may have been incomplete
    assert mlflow.points("id0")[-1] == ("evaluation/knn_all labels/pretrained_top1", 4, 71.5)
    (run / "mlflow_id.txt").write_text("of another store\n")
    train(run, "mlflow", 1, 3)
    assert list(mlflow.runs) == ["id0", "id1"]
    assert (run / "mlflow_id.txt").read_text() == "id1\n"


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_an_id_of_the_environment(run: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    stand_in = {"wandb": Wandb, "mlflow": MLflow}[tracker](monkeypatch)
    if isinstance(stand_in, MLflow):
        stand_in.create_run("moco", "earlier", {})
    monkeypatch.setenv(f"{tracker.upper()}_RUN_ID", "id0")
    train(run, tracker, 5, 6)
    assert (run / f"{tracker}_id.txt").read_text() == "id0\n"


def test_a_run_that_an_error_ends_has_failed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = Wandb(monkeypatch), MLflow(monkeypatch)
    logger = MetricsLogger(run, 0, ["wandb", "mlflow"])
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        logger.close()
    assert wandb.calls == [("finish", 1)]
    assert mlflow.runs["id0"].status == "FAILED"


def test_mlflow_neither_delays_a_step_nor_ends_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = MLflow(monkeypatch)
    logger = MetricsLogger(run, 0, ["mlflow"])
    mlflow.delay = 0.5
    began = time.perf_counter()
    for step in range(1, 20):
        logger.log(step, {"train/loss": math.nan})
    assert time.perf_counter() - began < 0.4
    monkeypatch.setattr(trackers, "_WAIT", 0.1)
    with pytest.warns(RunWarning, match=r"logger=mlflow failed .*has not taken all records"):
        logger.close()

    mlflow.delay, mlflow.fails = 0.0, None
    logger = MetricsLogger(run, 0, ["mlflow"])
    mlflow.fails = ConnectionError("the server is away")
    logger.log(1, {"train/loss": 1.0})
    with pytest.warns(RunWarning, match=r"logger=mlflow failed \(ConnectionError: the server is away\)"):
        logger.close()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_what_is_missing_is_reported_in_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tracker in ("wandb", "mlflow"):
        for absent in (None, ModuleType(tracker)):  # a folder of this name is imported as an empty module
            monkeypatch.setitem(sys.modules, tracker, absent)
            with pytest.raises(ConfigError, match=rf"logger=\[{tracker}\] needs .*pip install {tracker}.*extra"):
                check_loggers(["tensorboard", tracker])
    (run / "wandb_id.txt").write_text("id\n")
    with pytest.warns(RunWarning, match=r"logger=wandb failed .*: it did not record the results"):
        results.record(run, [RESULT], step=1)
    Wandb(monkeypatch, key=False)
    with pytest.warns(RunWarning, match=r"logger=wandb failed .*WANDB_MODE=offline\): it did not record the results"):
        results.record(run, [RESULT], step=1)
    with pytest.raises(ConfigError, match="`wandb login`, or set WANDB_MODE=offline"):
        check_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(["wandb"])


NAMES = [
    *("evaluation/finetune_20 % of labels/pretrained_top1", "evaluation/transfer_linear, CIFAR-10/mine_top1"),
    *("evaluation/linear_Bäume/猫_top1", "evaluation/linear_Ba\u0308ume/猫_top1", "a, b", "a - b", "a b", "a_b", "a:b"),
    *("20 percent of labels", "20 % of labels", "/data", "_/data", "a/../b", "a//b", "../b", "a/", "", "\n", "\udcff"),
    *("a" * 250, "a" * 251, "a" * 252, "hi\n", "hi"),
]


def test_names_in_mlflow() -> None:
    names = [trackers.mlflow_name(name) for name in NAMES]
    assert names[:2] == [
        "evaluation/finetune_20 percent of labels/pretrained_top1",
        "evaluation/transfer_linear - CIFAR-10/mine_top1",
    ]
    assert names[2] == NAMES[2]
    assert len(set(names)) == len(set(NAMES)) == len(NAMES)
    for name in names:
        assert re.fullmatch(r"[\w ./-]{1,250}", name)
        assert posixpath.normpath(name) == name
        assert not name.startswith(("/", ".."))


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


@pytest.mark.slow
@pytest.mark.skipif(not installed("mlflow", "sqlalchemy"), reason="needs the extra mlflow")
def test_the_local_store_of_mlflow(run: Path) -> None:
    import mlflow

    options = {"größe": "x" * 7000, "50 %": 1}
    (run / "config.yaml").write_text(yaml.safe_dump({"method": {"temperature": 0.2}, "options": options}))
    train(run, "mlflow", 0, 3)
    train(run, "mlflow", 1, 4)
    results.record(run, [RESULT, RESULT | {"protocol": "20 % of labels"}], step=4)
    trackers.MLflow.add_results(run, dict.fromkeys(NAMES, 1.0), 5)
    client = mlflow.MlflowClient()
    found = client.get_run((run / "mlflow_id.txt").read_text().strip())
    assert (found.info.status, found.info.run_name) == ("FINISHED", str(run))
    assert found.data.params["method.temperature"] == "0.2"
    assert (len(found.data.params["options.größe"]), found.data.params["options.50 percent"]) == (6000, "1")
    measured = {f"evaluation/knn_{labels} labels/pretrained_top1": 71.5 for labels in ("all", "20 percent of")}
    assert found.data.metrics == {"train/loss": 2.0, **measured, **{trackers.mlflow_name(name): 1.0 for name in NAMES}}


@pytest.mark.slow
@pytest.mark.skipif(not installed("wandb"), reason="needs the extra wandb")
def test_wandb_offline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(run, "wandb", 0, 3)
    train(run, "wandb", 1, 4)
    results.record(run, [RESULT | {"protocol": name} for name in NAMES], step=4)  # in TensorBoard too
    (name,) = (run / "wandb_id.txt").read_text().split()
    assert len(list(run.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))) == 3
