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

from tests.rehearsal import commands, mps
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


@pytest.mark.long
def test_commands_on_mps_give_the_results_of_the_cpu(library: Path, tmp_path: Path) -> None:
    """Results of the evaluations, features, neighbors, groups of duplicates and outliers."""
    for device in ("mps", "cpu"):
        run(library, "commands", "mps", json.dumps(commands.on(tmp_path, device)))
    ours, theirs = (commands.results(tmp_path / device) for device in ("mps", "cpu"))
    assert ours.keys() == theirs.keys()
    assert ours == {name: pytest.approx(value, rel=1e-3) for name, value in theirs.items()}
    assert (tmp_path / "mps" / "report.html").stat().st_size > 0
