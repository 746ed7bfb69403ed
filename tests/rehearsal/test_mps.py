"""Training and evaluation on an emulated MPS device, the GPU of a Mac, which refuses what MPS refuses.

The CPU computes all operations, so the rounding, the speed and the errors of MPS itself are not tested.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rehearsal import mps
from tests.rehearsal.run import Record
from tests.rehearsal.test_rehearsal import SMALL, differences, job

pytestmark = [pytest.mark.slow, pytest.mark.skipif(mps.missing() != "", reason=mps.missing())]
LOGGED = "log_every=2 analyse_every=1"
VIT = (
    "model=moco_v3_vit model.backbone=timm/vit_tiny_patch16_224 ~model.options.pool ++model.options.img_size=32 "
    "model.dim=64 model.head_hidden=64 model.predictor_hidden=64 augment.size=32 optim=adamw_cosine "
    "optim.lr=1e-6"  # Adam's first steps have the size of the learning rate, for any gradient
)
RECIPES = [
    f"digits {LOGGED} evaluate.every_epochs=1 evaluate.online_probe=true",
    "digits method=moco_v1 method.queue_size=512 accumulate=2 optim.clip_grad=1",
    "digits model=resnet18_cifar ~model.options.pool optim=lars_cosine",
    f"moco_v3_digits {LOGGED}",
    f"moco_v3_digits {VIT}",
    f"densecl_digits {LOGGED}",
    f"densecl_digits method.correspondence=crops {LOGGED}",
    "simclr_digits data.labels=none evaluate.every_epochs=1",
    "supcon_digits",
    "supmoco_digits",
    f"nnclr_digits {LOGGED}",
    "ressl_digits",
    "distill_digits",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mps.build(tmp_path_factory.mktemp("stand_in"))


def run(library: Path, module: str, *words: str) -> None:
    command = [sys.executable, "-m", f"tests.rehearsal.{module}", *words]
    env = mps.environment(library)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def rehearse(library: Path, folder: Path, jobs: list[Any]) -> list[Record]:
    run(library, "run", str(folder), json.dumps(jobs))
    records: list[Record] = torch.load(folder / "records.pt", weights_only=False)
    return records


def test_steps_on_mps_equal_those_on_the_cpu(library: Path, tmp_path: Path) -> None:
    """With `channels_last`, which must have no effect there."""
    settings = f"{SMALL} precision=fp32 channels_last"
    layouts = {"mps": "true", "cpu": "false"}
    jobs = [job(f"{each} {settings}={layouts[device]}", device) for each in RECIPES for device in layouts]
    records = rehearse(library, tmp_path, jobs)
    assert [record["error"] for record in records] == [""] * len(jobs)
    pairs = zip(RECIPES, records[::2], records[1::2], strict=True)
    found = {each: differences(on_mps, on_cpu, 1e-4, 1e-5) for each, on_mps, on_cpu in pairs}
    assert found == {each: [] for each in RECIPES}


def test_planted_faults_are_found(library: Path, tmp_path: Path) -> None:
    messages = {
        "float64": "TypeError: Cannot convert a MPS Tensor to float64",
        "host tensor": "RuntimeError: Expected all tensors to be on the same device",
        "queued copy": "AssertionError: non_blocking=True",
        "channels last": "not contiguous",
        "no kernel": "NotImplementedError: The operator 'aten._pdist_forward",
        "wrong gradient": "ConfigError: device=mps: gradients on mps differ by",
    }
    recipe = f"digits {SMALL} augment.contrast=0.4 augment.jitter_p=1 evaluate.every_epochs=1 log_every=2"
    records = rehearse(library, tmp_path, [job(recipe, "mps", fault) for fault in messages])
    for record, message in zip(records, messages.values(), strict=True):
        assert message in record["error"], record["job"]


def test_commands_on_mps_give_the_results_of_the_cpu(library: Path, tmp_path: Path) -> None:
    """Results of the evaluations, features, neighbors, groups of duplicates and outliers."""
    for device in ("mps", "cpu"):
        rest = f"run={tmp_path / device} device={device} threads=1"
        linear = f"linear seeds=1 batch_size=256 {rest}"
        commands = [
            f"train experiment=digits epochs=1 optim.warmup_epochs=0 evaluate.every_epochs=0 logger=[] {rest}",
            f"knn {rest}",
            f"{linear} epochs=2 sweep.lrs=[0.1,1]",
            f"{linear} protocol=moco_v2 epochs=1 official.schedule=constant augment.flip_p=0.5",
            f"finetune seeds=1 min_steps=1 epochs=1 fraction=0.2 {rest}",
            f"embed {rest}",
            *(f"search {mode} {rest}" for mode in ("sample=8", "mode=duplicates", "mode=outliers")),
            f"report {rest}",
        ]
        run(library, "mps", json.dumps(commands))
    ours, theirs = ({**results(tmp_path / device)} for device in ("mps", "cpu"))
    assert ours.keys() == theirs.keys()
    assert ours == {name: pytest.approx(value, rel=1e-3) for name, value in theirs.items()}
    assert (tmp_path / "mps" / "report.html").stat().st_size > 0


def results(folder: Path) -> dict[str, float]:
    """Return all numbers of the results of a run, by their place in the file."""
    files = [folder / "results.json", *sorted((folder / "search").glob("*.json"))]
    found: dict[str, float] = {}
    for file in files:
        found |= numbers(json.loads(file.read_text()), file.name)
    assert found
    return found


def numbers(value: Any, place: str) -> dict[str, float]:
    if isinstance(value, dict):
        return {name: x for key, each in value.items() for name, x in numbers(each, f"{place}/{key}").items()}
    if isinstance(value, list):
        return {name: x for at, each in enumerate(value) for name, x in numbers(each, f"{place}/{at}").items()}
    timed = any(word in place for word in ("seconds", "time", "date"))
    return {place: float(value)} if isinstance(value, int | float) and not timed else {}
