"""Run directories with a tiny encoder, class folders, and the error of an evaluation."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.builder import KeyQueue, MoCo
from moco.config import TrainConfig
from moco.config.subject import SubjectConfig, check_subject
from moco.evaluation.subject import open_labeled, open_subject
from moco.methods.moco_config import MoCoConfig
from moco.models.encoder import build_encoder
from moco.runs import checkpoint


def trained(folder: Path, data: str = "digits", step: int = 7, supervised: bool = False, **fields: str) -> Path:
    """Write a run's directory with a checkpoint of a tiny encoder."""
    config = TrainConfig(method=MoCoConfig(), seed=3)
    config.model.backbone, config.model.options, config.model.dim = "convnet", {"width": 2}, 8
    config.augment.size, config.augment.mean, config.augment.std = 16, [0.5] * 3, [0.5] * 3
    config.data.name, config.data.workers = data, 0
    config.method = MoCoConfig(labels=supervised)
    for name, value in fields.items():
        setattr(config.data, name, value)
    torch.manual_seed(config.seed)
    method = MoCo(build_encoder("convnet", {"width": 2}, 2, 0, 8, "grouped", 4), KeyQueue(16, 8))
    if step:
        for parameter in method.encoder.parameters():
            parameter.data.mul_(1.5)
    state = {"config": asdict(config), "step": step, "method": method.state_dict()}
    checkpoint.save(folder / "checkpoints", step, state, keep_last=2)
    return folder


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    """Write images of noise: folder/CLASS/0.png, ..., so many of each class."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def sentence(config: SubjectConfig) -> str:
    """Return the message with which an evaluation of this configuration is refused, which must be one line."""

    def attempt() -> None:
        check_subject(config)
        open_labeled(config, open_subject(config))

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)
