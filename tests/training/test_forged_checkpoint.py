"""A checkpoint with a valid digest whose values do not fit the run is refused in one sentence (R9)."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moco.config import ConfigError
from moco.runs import checkpoint
from moco.runs.checkpoint import CheckpointError
from moco.training.trainer import pretrain
from tests.analysis.test_doctor import digits

MISSING = object()
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::moco.config.RunWarning"
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of five steps with the checkpoint of its second step, and the content of that checkpoint."""
    run = tmp_path_factory.mktemp("forged") / "run"
    config = digits(run)
    config.checkpoint.every_steps, config.checkpoint.keep_last = 2, 9
    pretrain(config)
    return run, checkpoint.load(run / "checkpoints" / "step_00000002.pt")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((part, MISSING) for part in ("config", "method", "optimizer", "scaler", "step")),
        ("step", 6),
        ("step", 10**9),
        ("method", {}),
        ("optimizer", {}),
        ("data", {}),
        ("method.queue.keys", MISSING),
        ("method.queue.keys", torch.zeros(3)),
        ("optimizer.state", MISSING),
        ("optimizer.param_groups", []),
    ],
)
def test_a_value_that_does_not_fit(
    place: str, value: Any, stopped: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, content = stopped
    forged = copy.deepcopy(content)
    part, _, name = place.partition(".")
    at, key = (forged[part], name) if name else (forged, part)
    if value is MISSING:
        del at[key]
    else:
        at[key] = value
    config = digits(tmp_path / "run")
    config.checkpoint.every_steps, config.checkpoint.keep_last = 2, 9
    checkpoint.save(tmp_path / "run" / "checkpoints", 2, forged, 9)
    shutil.copy(run / "config.yaml", tmp_path / "run" / "config.yaml")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        pretrain(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "encoder.safetensors").exists()
