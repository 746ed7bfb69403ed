"""A refactor reproduces these losses: ten steps of MoCo v2 on the digits, recorded in trajectory.json.

The network computes in float64. CPUs round convolutions differently; in float32 ten steps amplify that to 0.3 % of a
gradient norm. In float64 only the float32 augmentation differs between CPUs. A change that is meant to alter the
trajectory states the reason in its message, and records it again:

    python -m tests.golden.test_trajectory
"""

import json
from pathlib import Path

import pytest
import torch

from moco.builder import KeyQueue, MoCo
from moco.config import DataConfig
from moco.data.loader import Batch, batches
from moco.data.plan import Plan
from moco.data.sources import load_source
from moco.data.view import View
from moco.models.encoder import build_encoder
from moco.models.norm import set_calls_per_step
from moco.training.step import StepSettings, train_step

FILE = Path(__file__).parent / "trajectory.json"
STEPS = 10


def trajectory(symmetric: bool) -> dict[str, list[float]]:
    source = load_source(DataConfig("digits")).train
    view = View(16, affine_p=1.0, degrees=15, translate=0.1, zoom=(0.85, 1.15), shear=15, noise=(0.0, 0.1))
    plan = Plan(len(source), batch_size=64, epochs=1, seed=0)
    torch.manual_seed(0)
    encoder = build_encoder("convnet", {"width": 8}, 2, 0, 32, "grouped", 16)
    method = MoCo(encoder, KeyQueue(200, 32), 0.2, symmetric)
    for each in (method.encoder, method.momentum_encoder):
        set_calls_per_step(each, len(method.directions))
    method.double()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    recorded: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "positive_similarity": []}
    stream = batches(source, plan, (view, view), torch.device("cpu"), workers=0)
    for step in range(STEPS):
        batch = next(stream)
        batch = Batch(batch.index, [each.double() for each in batch.views])
        settings = StepSettings(lr=0.02, momentum=0.9)
        measures = train_step(method, method, optimizer, scaler, batch, plan.shuffles(step, 2), settings)
        for name, values in recorded.items():
            values.append(measures[name].item())
    return recorded


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_trajectory_equals_the_recorded_one(symmetric: bool) -> None:
    expected = json.loads(FILE.read_text())["symmetric" if symmetric else "asymmetric"]
    for name, values in trajectory(symmetric).items():
        assert values == pytest.approx(expected[name], rel=1e-6), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({"asymmetric": trajectory(False), "symmetric": trajectory(True)}, indent=1) + "\n")
