"""The plug-ins of docs/howto/extend.md in the commands; and what a recorded configuration must not import."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from moco import plugins
from moco.config import RunWarning
from moco.data.augment import augment
from moco.data.keyed import STEPS as STREAM
from moco.data.keyed import keyed_uniform
from moco.data.view import View, draw
from moco.losses.contrast import Switches, contrast
from moco.runs import checkpoint
from moco.runs.metrics import LOGGERS, Logger, MetricsLogger, read_metrics
from tests.cli.conftest import Run
from tests.docs.pages import REPOSITORY
from tests.plugins import REGISTRIES, examples, temporary_plugins, write_examples

ALL = "plugins=[my_data,my_backbone,my_method,my_step,my_switch,my_logger]"
CHOSEN = [
    "data=grays",
    "model.backbone=my_net",
    "method=scaled",
    "method.factor=0.5",
    "+augment.steps.posterize.levels=8",
    "+method.switches.harden.beta=1",
    "logger=[tensorboard,csv]",
]
SMALL = ["model.options.width=4", "model.options.pool=2", "model.dim=8", "model.bn_group_size=16"]
SMALL += ["method.queue_size=64", "batch_size=64", "epochs=2", "log_every=1", "analyse_every=0", "threads=1"]
SMALL += ["data.workers=0", "device=cpu", "precision=fp32", "evaluate.every_epochs=0", "checkpoint.keep_last=9"]
SMALL += ["optim.lr=0.1", "optim.warmup_epochs=0"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    with temporary_plugins(tmp_path):
        yield tmp_path


@pytest.fixture
def trained(run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that uses a plug-in of each kind."""
    monkeypatch.setattr("moco.training.throughput.step_flops", lambda *_: 1)
    monkeypatch.setattr("moco.training.throughput.matrix_rate", lambda *_: 1.0)
    status, _, error = run("train", ALL, *CHOSEN, *SMALL, "run=mine")
    assert status == 0, error
    return Path("mine")


def losses(run: Path) -> list[float]:
    return read_metrics(run / "metrics.jsonl")["train/loss"][1]


def forget() -> None:
    """Forget all plug-ins, as in a new process."""
    plugins._loaded.clear()
    for registry in REGISTRIES:
        for name in registry.added:
            del registry[name]
    for name in examples():
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("name", examples())
def test_each_example_has_at_most_fifteen_lines(name: str) -> None:
    assert len([line for line in examples()[name].splitlines()[1:] if line]) <= 15
    assert len(examples()) == 6


def test_a_run_with_all_plugins_records_them_and_resumes(trained: Path, run: Run) -> None:
    state = checkpoint.load(trained / "checkpoints" / "step_00000006.pt")
    assert list(state["versions"]["plugins"]) == [
        f"my_{name}" for name in ["data", "backbone", "method", "step", "switch", "logger"]
    ]
    assert state["versions"]["plugins"]["my_step"].startswith("sha256 ")
    rows = [line.split(",") for line in (trained / "metrics.csv").read_text().splitlines()]
    written = [float(value) for _, name, value in rows if name == "train/loss"]
    assert written == losses(trained)
    assert all(math.isfinite(loss) for loss in written)
    assert len(written) == 6

    # Resumed after 3 steps, the run continues exactly.
    (trained / "checkpoints" / "step_00000006.pt").unlink()
    forget()
    status, _, error = run("train", *CHOSEN[:2], *SMALL, "method=moco_v2", "run=mine")
    assert status == 2
    status, _, error = run("train", ALL, *CHOSEN, *SMALL, "run=mine")
    assert status == 0, error
    assert losses(trained) == written


def test_a_missing_plugin_is_reported_in_one_sentence_with_the_argument_to_add(trained: Path, run: Run) -> None:
    forget()
    (trained / "checkpoints" / "step_00000006.pt").unlink()
    for name, *arguments in (
        ("train", "experiment=digits", "run=mine"),
        ("embed", "run=mine", "data.workers=0"),
        ("knn", "run=mine", "data.workers=0"),
        ("convert", "checkpoint=mine/encoder.safetensors", "to=timm", "output=x.pth"),
        ("report", "run=mine", "pictures=0"),
    ):
        status, _, error = run(name, *arguments)
        assert (status, error.count("\n")) == (2, 1), error
        assert f"add {ALL}" in error, error


def test_the_commands_read_a_run_with_its_plugins(trained: Path, run: Run) -> None:
    few = ["threads=1", "device=cpu", "data.workers=0"]
    for name, *arguments in (
        ("embed", "run=mine", "output=features", *few),
        ("search", "index=features", "sample=2", "gallery=none", "threads=1"),
        ("convert", "run=mine", "to=safetensors", "output=x.safetensors", "pictures=2", *few),
        ("report", "run=mine", "pictures=0", "threads=1"),
        ("pack", "data=grays", "output=packed", "workers=0", "data.workers=0"),
    ):
        status, _, error = run(name, ALL, *arguments)
        assert status == 0, f"{name}: {error}"
    assert np.load("features/features.npy").shape == (255, 16)
    assert json.loads(Path("features/features.json").read_text())["plugins"].keys() == plugins.versions().keys()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:data.hold_out=0.2 holds out images")
def test_evaluations_and_studies_use_the_plugins(trained: Path, run: Run) -> None:
    few = ["threads=1", "device=cpu", "data.workers=0"]
    held_out = [*few, "data.hold_out=0.2"]
    shutil.copy(trained / "checkpoints" / "step_00000006.pt", trained / "checkpoints" / "step_00000009.pt")
    shutil.copy(trained / "checkpoints" / "step_00000006.pt", trained / "checkpoints" / "step_00000012.pt")
    for name, *arguments in (
        ("linear", "run=mine", "epochs=1", *held_out),
        ("finetune", "run=mine", "fraction=1.0", "epochs=1", "encoders=[pretrained]", *held_out),
        ("choose", "runs=[mine]", "images=100", *few),
    ):
        status, out, error = run(name, ALL, *arguments)
        assert status == 0, f"{name}: {error}"
        commands = [line for line in out.splitlines() if line.startswith("next: python -m moco")]
        assert commands
        assert all(ALL in line or "check_data" in line for line in commands), commands


@pytest.mark.slow
def test_the_runs_of_a_temperature_study_use_the_plugins(run: Run) -> None:
    settings = ["data=grays", "method=scaled", "method.factor=0.5", "batch_size=64", "method.queue_size=64"]
    settings += ["threads=1", "data.workers=0", "evaluate.every_epochs=0"]
    arguments = [f"overrides={json.dumps(settings)}", "epochs=1", "images=50", "threads=1", "output=study"]
    status, _, error = run("temperature", ALL, "temperatures=[0.2]", *arguments)
    assert status == 0, error
    assert "scaled" in Path("study/t0.2/seed0/config.yaml").read_text()


@pytest.mark.slow
def test_two_processes_under_torchrun_compute_what_one_computes(trained: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moco.train"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, ALL, *CHOSEN, *SMALL, "run=two"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(Path("two")) == pytest.approx(losses(trained), rel=1e-4)
    assert len(Path("two/metrics.csv").read_text().splitlines()) == len(
        Path("mine/metrics.csv").read_text().splitlines()
    )


def test_a_step_gets_numbers_of_seed_epoch_sample_and_view() -> None:
    plugins.load(["my_step"])
    index, size = np.array([5, 2, 9]), 4
    crops = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = View(size, steps={"posterize": {"levels": 4}})
    out = augment(crops, draw(view, 1, 2, index, 1), view)
    for row, sample in enumerate(index):
        pixels = crops[row].float() / 255
        chosen = keyed_uniform(1, 2, [sample], STREAM + 1, 1)[0, 0] < 0.5
        assert torch.equal(out[row], (pixels * 4).floor() / 4 if chosen else pixels)
    assert torch.equal(augment(crops, draw(View(size), 1, 2, index, 1), View(size)), crops.float() / 255)


def test_a_switch_changes_the_logits_of_the_loss() -> None:
    plugins.load(["my_switch"])
    q, k, queue = (F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1) for n in (3, 3, 7))
    k = k.roll(1, 0)
    loss, measures = contrast(q, k, queue, 0.2, Switches(switches={"harden": {"beta": 1.5}}))
    expected = 0.0
    for i in range(3):
        negatives = [math.exp(float(q[i] @ n) / 0.2) for n in queue]
        weights = [each**1.5 for each in negatives]
        hard = 7 * sum(w * n for w, n in zip(weights, negatives, strict=True)) / sum(weights)
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        expected -= math.log(positive / (positive + hard)) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    plain, same = contrast(q, k, queue, 0.2, Switches())
    assert float(plain) < float(loss)
    assert measures.keys() == same.keys()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plugins=[my_typo]"], "there is no module 'my_typo' in this directory"),
        (["plugins=[my_step.py]"], "plugins=[my_step]"),
        (["plugins=[./my_step.py]"], "plugins=[my_step]"),
        (["plugins=my_step"], "plugins=[my_step]"),
        (["plugins=[my_step,my_step]"], "twice"),
        (["plugins=[broken]"], "ZeroDivisionError (division by zero)"),
        (["plugins=[exits]"], "SystemExit"),
        (["plugins=[taken]"], "model.backbone='resnet50' exists already"),
        (["plugins=[needs]"], "No module named 'absent_package'"),
        (["method=scaled"], "plugins=[MODULE]"),
        (["data=grays"], "plugins=[MODULE]"),
        (["data.name=grays"], "plugins=[MODULE]"),
        (["model.backbone=my_net"], "plugins=[MODULE]"),
        (["logger=[csv]"], "logger='csv' must be one of tensorboard, wandb, mlflow"),
        (["+augment.steps.posterize.p=1"], "augment.steps='posterize' must be one of"),
        (["plugins=[my_step]", "+augment.steps.posterize.q=1"], "unexpected keyword argument 'q'"),
        (["plugins=[my_step]", "+augment.steps.posterize=1"], "augment.steps.posterize={}"),
        (["+method.switches.harden.beta=1"], "method.switches='harden' must be one of"),
        (["plugins=[my_switch]", "+method.switches.harden.beta=1", "method.debias=0.1"], "method.debias=0.1 excludes"),
        (["--config-dir", "own", "experiment=includes"], "add plugins=[my_step]"),
    ],
)
def test_an_error_is_reported_in_one_sentence(arguments: list[str], part: str, run: Run, folder: Path) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / "needs.py").write_text("import absent_package\n")
    (folder / "taken.py").write_text("from moco.models.backbones import BACKBONES\nBACKBONES['resnet50'] = None\n")
    (folder / "own" / "experiment").mkdir(parents=True)
    recipes = {"base": "plugins: [my_step]", "includes": "defaults: [base, _self_]\nseed: 1"}
    for name, text in recipes.items():
        (folder / "own" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    status, _, error = run("train", *arguments, "seed=1", "run=other")
    assert (status, error.count("\n")) == (2, 1), error
    assert part in error, error


def test_a_recipe_of_ones_own_names_its_plugins(run: Run, folder: Path) -> None:
    (folder / "own" / "experiment").mkdir(parents=True)
    text = "defaults: [{override /method: scaled}, _self_]\nplugins: [my_method]\nmethod: {factor: 3}\n"
    (folder / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    status, out, error = run("train", "--config-dir", "own", "experiment=mine", "--cfg", "job")
    assert status == 0, error
    config = yaml.safe_load(out)
    assert (config["method"]["name"], config["method"]["factor"], config["plugins"]) == ("scaled", 3, ["my_method"])


def test_a_recorded_configuration_imports_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moco.training.throughput.step_flops", lambda *_: 1)
    monkeypatch.setattr("moco.training.throughput.matrix_rate", lambda *_: 1.0)
    small = [each for each in SMALL if "width" not in each]
    assert run("train", *small, "model.options.width=2", "run=mine")[0] == 0
    (folder / "evil.py").write_text("open('imported', 'w').close()\n")
    file = sorted(Path("mine/checkpoints").glob("*.pt"))[-1]
    state = checkpoint.load(file)
    state["config"]["plugins"] = ["evil"]
    step = state["step"]
    shutil.rmtree("mine/checkpoints")
    file = checkpoint.save(Path("mine/checkpoints"), step, state, 1)
    config = Path("mine/config.yaml")
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"plugins": ["evil"]}))
    few = ["threads=1", "device=cpu", "data.workers=0"]
    for name, status, *arguments in (
        ("train", 2, *small, "model.options.width=2", "run=mine"),
        ("embed", 0, "run=mine", "output=features", *few),
        ("search", 0, "index=features", "sample=1", "gallery=none", "threads=1"),
        ("convert", 0, f"checkpoint={file}", "to=safetensors", "output=x.safetensors", "pictures=2", *few),
        ("report", 0, "run=mine", "pictures=0", "threads=1"),
        ("train", 0, *small, "model.options.width=2", "run=new", f"init_from={file}", "epochs=1"),
    ):
        found, _, error = run(name, *arguments)
        assert found == status, f"{name}: {error}"
        assert "evil" not in sys.modules
    assert not Path("imported").exists()


def test_another_version_is_a_warning(folder: Path) -> None:
    (folder / "versioned.py").write_text("__version__ = '2.0'\n")
    plugins.load(["versioned"])
    with pytest.warns(RunWarning, match=r"plugins=\[versioned\] has version 2\.0, and the run was made with version 1"):
        plugins.warn_of_other_versions({"versioned": "1"})
    for same in ({"versioned": "2.0"}, {}, None, "damaged"):
        plugins.warn_of_other_versions(same)


class Failing(Logger):
    closed: list[str] = []  # noqa: RUF012 # of the test

    def __init__(self, run: Path, config: Any, step: int) -> None:
        self.run = run

    def log(self, step: int, values: Any) -> None:
        assert all(type(value) is float for value in values.values())
        if step == 2:
            raise ConnectionError("the server is away")

    def close(self) -> None:
        self.closed.append(self.run.name)


def test_a_failing_logger_is_left_out_with_one_warning(folder: Path) -> None:
    LOGGERS["failing"] = Failing
    for name, steps in (("whole", (1,)), ("cut", (1, 2, 3))):
        (folder / name).mkdir()
        logger = MetricsLogger(folder / name, 0, ["failing"])
        for step in steps:
            if step == 2:
                with pytest.warns(RunWarning, match=r"logger=failing failed \(ConnectionError: the server is away\)"):
                    logger.log(step, {"train/loss": 1})
            else:
                logger.log(step, {"train/loss": 1})
        logger.close()
        assert len((folder / name / "metrics.jsonl").read_text().splitlines()) == len(steps)
        assert not list((folder / name).glob("events*"))
    assert Failing.closed == ["whole"]
