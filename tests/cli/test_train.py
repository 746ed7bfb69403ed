"""`python -m moco.train`: the files of a run, resuming, refusals and recipes. Two tests start processes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file

from moco.composition import register, to_dataclass
from moco.config import RunWarning, TrainConfig, check, config_dir
from moco.data.opening import build_views
from moco.digest import digest
from moco.runs import checkpoint
from tests.cli.conftest import Run
from tests.data import images as example_images

REPOSITORY = Path(config_dir()).parent
# A run of 15 steps in seconds: the digits recipe with a tiny encoder.
TINY = [
    "epochs=3",
    "batch_size=256",
    "threads=1",
    "model.options.width=4",
    "model.dim=16",
    "method.queue_size=300",
    "optim.warmup_epochs=0.5",
    "evaluate.draws=3",
    "evaluate.every_epochs=3",
    "log_every=1",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moco.train", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}


def train(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def finished(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[0])


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = train(folder, *TINY, "run=full")
    assert result.returncode == 0, result.stderr
    return folder / "full", result.stdout


def test_a_run_writes_all_its_files_and_a_summary(uninterrupted: tuple[Path, str]) -> None:
    run, output = uninterrupted
    for name in ("config.yaml", "metrics.jsonl", "views.png", "encoder.safetensors"):
        assert (run / name).stat().st_size > 0
    assert list(run.glob("events.out.tfevents.*"))
    assert checkpoint.list_checkpoints(run / "checkpoints")[0].name == "step_00000015.pt"
    for words in ("untrained", "raw pixels", "pretrained", "chance", "data wait", "full/encoder.safetensors"):
        assert words in output
    written = records(run)
    assert [each["step"] for each in written if "train/loss" in each] == list(range(1, 16))
    assert [each["step"] for each in written if "accuracy/knn" in each] == [0, 15]
    assert not (run.parent / "outputs").exists()  # nothing of Hydra's own


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(
    uninterrupted: tuple[Path, str], tmp_path: Path, seed: int
) -> None:
    """Sends SIGKILL at a random moment of training, twice, then runs the same command to the end."""
    chance = random.Random(seed)
    arguments = [*TINY, "run=killed", "checkpoint.every_steps=2"]
    run = tmp_path / "killed"
    for _ in range(2):
        process = subprocess.Popen(
            command(*arguments), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Wait for a random number of steps, then kill the process.
        already = len(records(run)) if (run / "metrics.jsonl").is_file() else 0
        target = already + chance.randint(1, 6)
        while process.poll() is None:
            if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= target:
                time.sleep(chance.random() * 0.2)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        process.wait()
    result = train(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    expected, resumed = finished(uninterrupted[0]), finished(run)
    assert digest(expected["method"]) == digest(resumed["method"])
    assert digest(expected["optimizer"]) == digest(resumed["optimizer"])
    # No record is missing or repeated, and each loss equals that of the uninterrupted run.
    losses = [(each["step"], each["train/loss"]) for each in records(run) if "train/loss" in each]
    assert losses == [(each["step"], each["train/loss"]) for each in records(uninterrupted[0]) if "train/loss" in each]


def test_the_saved_encoder_loads_with_the_code_of_the_documentation(uninterrupted: tuple[Path, str]) -> None:
    code = (REPOSITORY / "docs/howto/use.md").read_text().split("```python\n")[1].split("```")[0]
    folder, trained = uninterrupted[0], finished(uninterrupted[0])["method"]
    scope: dict[str, Any] = {"pil_image": Image.new("RGB", (20, 30))}
    exec(code.replace("runs/digits", str(folder)), scope)
    assert scope["image"].shape[0] == 3
    saved = load_file(folder / "encoder.safetensors")
    loaded = scope["encoder"].backbone.state_dict()
    assert set(saved) == set(loaded)
    for name, value in loaded.items():
        assert torch.equal(value, trained[f"encoder.backbone.{name}"]), name
        assert torch.equal(value, saved[name]), name


def test_a_finished_run_is_not_trained_again(uninterrupted: tuple[Path, str], run: Run) -> None:
    folder, _ = uninterrupted
    before = (folder / "metrics.jsonl").read_text()
    status, output, errors = run("train", *TINY, f"run={folder}", "threads=2")
    assert status == 0, errors
    assert "already finished" in output
    assert re.search(r"computed +in fp32 on 1 x cpu, threads=1 ", output)  # not on the device of this call
    assert (folder / "metrics.jsonl").read_text() == before


def test_the_summary_names_the_devices_of_all_attempts(run: Run) -> None:
    arguments = [*TINY, "evaluate.every_epochs=0", "run=moved"]
    assert run("train", *arguments, "stop_after=0.00001")[0] == 75
    _, output, _ = run("train", *arguments, "threads=2")
    assert re.search(r"computed +in fp32 on 1 x cpu, threads=1, then 1 x cpu, threads=2 ", output)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one_with_a_warning(
    uninterrupted: tuple[Path, str], run: Run, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted[0], tmp_path / "damaged")
    newest, before = checkpoint.list_checkpoints(tmp_path / "damaged" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(RunWarning, match=f"{newest.name} cannot be read"):
        status, output, errors = run("train", *TINY, "run=damaged")
    assert status == 0, errors
    assert f"resuming damaged at step {int(before.name[5:13])}" in output
    assert digest(finished(tmp_path / "damaged")["method"]) == digest(finished(uninterrupted[0])["method"])


def test_a_non_finite_loss_ends_the_run_and_names_the_batch(run: Run, tmp_path: Path) -> None:
    never = ["evaluate.every_epochs=0"]
    status, _, errors = run("train", *TINY, "run=lost", "optim.lr=1e20", "checkpoint.every_steps=1", *never)
    assert status == 1
    (line,) = errors.strip().splitlines()
    for words in ("moco: step", "epoch 1, batch", "had images", "lower optim.lr"):
        assert words in line
    # The newest checkpoint is the state before the step that failed, and it is finite.
    newest = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "lost" / "checkpoints")[0])
    assert f"moco: step {newest['step'] + 1} (" in line
    assert all(torch.isfinite(value).all() for value in newest["method"].values())


def test_a_warning_turned_into_an_error_is_reported_in_one_sentence(run: Run) -> None:
    """As `python -W error` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunWarning)
        status, _, errors = run("train", "experiment=digits", "epochs=1")
    assert status == 1
    (line,) = errors.splitlines()
    assert line.startswith("moco: optim.warmup_epochs=2.0 is not below epochs=1")


def test_a_run_without_its_checkpoints_starts_again_with_a_warning(run: Run, tmp_path: Path) -> None:
    arguments = (*TINY, "epochs=1", "evaluate.every_epochs=0", "run=emptied")
    assert run("train", *arguments)[0] == 0
    shutil.rmtree(tmp_path / "emptied" / "checkpoints")
    with pytest.warns(RunWarning, match="run=emptied contains no checkpoint: training starts again at step 0"):
        assert run("train", *arguments)[0] == 0
    assert run("train", *arguments)[0] == 0  # a warning would be an error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["images.size=64"], "moco: images is a group of the evaluations; for training, set augment.size"),
        (["data.hold_out=0.2"], "moco: data.hold_out is a field of the evaluations, such as moco.knn; here, set "),
        (["+optim.lr=1"], "moco: optim.lr exists: change it without the plus, optim.lr=VALUE"),
        (["lr=1"], "moco: there is no field 'lr'; did you mean 'optim.lr'?"),
        (["temperature=1"], "did you mean 'method.temperature' or 'evaluate.temperature'?"),
        (["--lr", "1"], "moco: --lr: write a field without dashes, optim.lr=VALUE"),
        (["--experiment=moco_v2_small"], "--experiment=moco_v2_small: write a field without dashes, experiment=moco"),
        (["--run=runs/a"], "moco: --run=runs/a: write a field without dashes, run=runs/a"),
        (["--conf=digits"], "moco: --conf=digits: write a field without dashes, FIELD=VALUE"),
        (["-x"], "moco: -x: write a field without dashes, FIELD=VALUE"),
        (["optm.lr=1"], "moco: there is no field 'optm'; did you mean 'optim'?"),
        (["+optim.learning_rate=1"], "moco: there is no field 'optim.learning_rate'"),
        (["epochs=many"], "moco: epochs=many must be of type integer"),
        (["experiment=digit"], "moco: there is no 'experiment/digit'; did you mean 'digits'?"),
        (["method.temperature=0"], "moco: method.temperature=0.0 must be above 0"),
        (["batch_size=100"], "moco: model.bn_group_size="),
        (["optim.schedule=step"], "moco: optim.milestones=[]"),
        (["augment.jitter_p=1.5"], "moco: augment.jitter_p=1.5"),
        (["augment.second={blurp: 1}"], "add it with +augment.second.blurp=VALUE"),
        (["+augment.second.blurp=1"], "moco: augment.second has unknown fields blurp"),
        (["data.root=IMAGES"], "moco: data.root=IMAGES has no effect with data.name=digits"),
        (["model.backbone=resnet19"], "moco: model.backbone='resnet19' must be one of"),
        (["+model.options.depth=3"], "moco: model.options={"),
        (["data.name=folder", "data.root=nowhere"], "nowhere"),
        (["data=cifar10"], "data.download=true"),
        (["batch_size=2048"], "moco: batch_size=2048"),
        (["device=cuda"], "moco: device=cuda"),
        (["--multirun", "optim.lr=0.01,0.02", "run=one"], "moco: --multirun has 2 jobs with run=one"),
        (["threads=1", "--multirun", "optim.lr=0.01,0.02", "run=one"], "moco: --multirun has 2 jobs with run=one"),
    ],
)
def test_an_invalid_configuration_is_refused_in_one_sentence(
    arguments: list[str], sentence: str, run: Run, tmp_path: Path
) -> None:
    if arguments == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, output, errors = run("train", *arguments)
    assert status in (1, 2)
    assert output == ""
    (line,) = errors.splitlines()
    assert sentence in line
    assert list(tmp_path.iterdir()) == []  # refused before any work starts


@pytest.mark.parametrize(
    ("files", "changes", "fields"),
    [
        (
            "*",
            ["method.temperature=0.3", "seed=1"],
            ["temperature (there 0.5, now 0.3)", "seed (there 0, now 1)"],
        ),
        # Without config.yaml, the configuration in the checkpoint counts.
        ("checkpoints", ["method.symmetric=true"], ["method.symmetric (there False, now True)"]),
        ("*", ["experiment=supmoco_digits"], ["run=other was made with experiment=digits: ", "add experiment=digits"]),
    ],
)
def test_a_run_of_another_configuration_is_refused(
    files: str, changes: list[str], fields: list[str], uninterrupted: tuple[Path, str], run: Run, tmp_path: Path
) -> None:
    for path in uninterrupted[0].glob(files):
        target = tmp_path / "other" / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    status, _, errors = run("train", *TINY, "run=other", *changes)
    assert status == 2
    (line,) = errors.splitlines()
    assert all(field in line for field in fields)


def test_every_recipe_composes_and_opens_with_its_command() -> None:
    register("train", TrainConfig)
    recipes = sorted((Path(config_dir()) / "experiment").glob("*.yaml"))
    assert {"digits", "cifar10_notebook", "moco_v1_imagenet", "moco_v2_folder"} <= {each.stem for each in recipes}
    with initialize_config_dir(config_dir(), version_base="1.3"):
        for recipe in recipes:
            head = recipe.read_text().split("defaults:")[0]
            for word in ("moco.train", "Hardware", "Expected"):
                assert word in head, recipe.name
            teacher = ["method.teacher=FILE"] * ("method.teacher=" in head)
            composed = compose("train", overrides=[f"experiment={recipe.stem}", *teacher])
            if "stats=true" in head:  # moco.check_data computes these
                composed.augment.mean = composed.augment.std = [0.5] * composed.data.channels
            config = to_dataclass(composed, TrainConfig)
            check(config, processes=8 if "imagenet" in recipe.stem else 1)
            build_views(config.augment, config.data)
            assert config.run == f"runs/{recipe.stem}"


def test_cfg_job_prints_the_recipe_without_running_it(run: Run, tmp_path: Path) -> None:
    status, output, errors = run("train", "experiment=cifar10_notebook", "--cfg", "job")
    assert status == 0, errors
    printed = yaml.safe_load(output)
    assert printed["optim"]["lr"] == 0.06
    assert printed["method"]["queue_size"] == 4096
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_in_a_directory_of_the_user(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "wide.yaml").write_text(
        "# @package _global_\ndefaults:\n  - digits\n  - _self_\nmethod:\n  temperature: 0.123\n"
    )
    (folder / "bare.yaml").write_text("method: {temperature: 0.1}\n")
    status, _, errors = run("train", "--config-dir", "mine", "experiment=bare")
    assert status == 2
    assert "must open with the line '# @package _global_'" in errors
    status, output, errors = run("train", "--config-dir", "mine", "experiment=wide", "--cfg", "job")
    assert status == 0, errors
    assert yaml.safe_load(output)["method"]["temperature"] == 0.123


def test_help_lists_recipes_and_groups(run: Run) -> None:
    status, output, errors = run("train", "--help")
    assert status == 0, errors
    for words in ("experiment=NAME", "moco_v2_imagenet", "temperature", "--config-dir"):
        assert words in output


def test_a_run_without_labels_reports_retrieval_with_baselines(run: Run, tmp_path: Path) -> None:
    folder = example_images.folder(tmp_path / "images", 16)
    small = ["experiment=moco_v2_folder", f"data.root={folder}", "data.workers=0", "model=convnet", "augment.size=16"]
    small += ["model.options={width: 4}", "model.dim=8", "model.head_hidden=16", "model.bn_group_size=4", "epochs=2"]
    small += ["batch_size=8", "method.queue_size=8", "optim.warmup_epochs=0", "augment.eval_resize=16", "threads=1"]
    status, output, errors = run("train", *small, f"run={tmp_path / 'first'}")
    assert status == 0, errors
    for name in ("raw pixels", "untrained", "pretrained"):
        assert name in output
    assert f"moco.embed threads=1 run={tmp_path / 'first'}" in output.replace("\n", "")
    history = finished(tmp_path / "first")["history"]
    assert [set(each) for each in history] == [
        {"step", "epoch", "retrieval", "raw_pixels"},
        {"step", "epoch", "retrieval"},
    ]
    assert records(tmp_path / "first")[-1]["retrieval/untrained"] == history[0]["retrieval"][0]

    start = f"init_from={tmp_path / 'first' / 'encoder.safetensors'}"
    status, output, errors = run("train", *small, f"run={tmp_path / 'second'}", start)
    assert status == 0, errors
    first, *_, last = finished(tmp_path / "second")["history"]
    assert first["untrained"] == history[0]["retrieval"]  # the same seed
    assert first["retrieval"] == history[-1]["retrieval"]
    assert last["step"] == 4
