"""Run directories as moco.train writes them, with a tiny untrained encoder, for the tests of reports."""

import colorsys
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from moco.builder import KeyQueue, MoCo
from moco.config import TrainConfig
from moco.methods.moco_config import MoCoConfig
from moco.models.encoder import build_encoder
from moco.runs import checkpoint

EVIL = "<script>alert(1)<_script>'&.png"
CLASSES = ("blue", "green", "red")


def color(i: int, count: int) -> tuple[int, int, int]:
    """Return color i of `count` colors that differ even after JPEG compression."""
    red, green, blue = colorsys.hsv_to_rgb(i / count, 0.9, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def images(root: Path, per_class: int = 0, count: int = 0) -> Path:
    """Write images of one color each: root/CLASS/N.png, or with `count` root/N.png. One name is markup."""
    names = [f"{each}/{i}.png" for each in CLASSES for i in range(per_class)] + [f"{i}.png" for i in range(count)]
    names[-1] = str(Path(names[-1]).with_name(EVIL))
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), color(i, len(names))).save(path)
    return root


VIT: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 3, "img_size": 16, "patch_size": 4}


def run(
    folder: Path,
    root: Path | None,
    eval_root: Path | None = None,
    epochs: int = 2,
    done: int = 20,
    backbone: str = "convnet",
    saved: bool = True,
    **method: Any,
) -> Path:
    """Write a run with ten steps per epoch, with metrics of every second step.

    Args:
        folder: the run.
        root: its images, with labels if `eval_root` contains held-out images of the same classes; None: digits.
        eval_root: see `root`.
        epochs: configured epochs.
        done: completed steps.
        backbone: "convnet" or "vit".
        saved: whether there is a checkpoint.
        **method: fields of the method.
    """
    config = TrainConfig(method=MoCoConfig(), run=str(folder), epochs=epochs, batch_size=4, seed=3)
    options = VIT if backbone == "vit" else {"width": 4, "pool": 2}
    config.model.backbone, config.model.options, config.model.dim = backbone, options, 8
    config.augment.size, config.augment.mean, config.augment.std = 16, [0.5] * 3, [0.25] * 3
    config.augment.eval_resize = 16 if root else 0
    config.data.workers = 0
    if root is not None:
        config.data.name, config.data.root = "folder", str(root)
    if eval_root is not None:
        config.data.labels, config.data.eval_root = "folder", str(eval_root)
    for name, value in {"queue_size": 16, **method}.items():
        setattr(config.method, name, value)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    lines = [_record(step) for step in range(2, done + 1, 2)]
    scores = [{"step": 0, "accuracy/knn": 40.0, "accuracy/untrained": 40.0}] * (eval_root is not None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*scores, *lines]))
    if saved:
        torch.manual_seed(config.seed)
        network = MoCo(build_encoder(backbone, options, 2, 0, 8, "grouped", 4), KeyQueue(16, 8))
        history = [
            {"step": 0, "epoch": 0.0, "knn": [40.0, 2.0, 5]},
            {"step": done, "epoch": done / 10, "knn": [55.5, 1.0, 5]},
        ]
        state = {
            "config": asdict(config),
            "step": done,
            "method": network.state_dict(),
            "history": history if eval_root is not None else [],
            "seconds": 61.0,
            "versions": {"moco": "0.1.0", "torch": "2.12.0"},
            "world_size": 2,
            "data": {"length": 43},  # ten steps of 4 leave three out
        }
        checkpoint.save(folder / "checkpoints", done, state, keep_last=2)
    return folder


def _record(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        "train/loss": 1.5 + math.exp(-step / 10),
        "train/chance": math.log1p(16),
        "train/negatives": 16.0,
        "train/contrast_accuracy": step / 40,
        "train/positive_similarity": 0.5,
        "train/gradient_norm": None if step == 4 else 1.0 + step % 3,
        "train/lr": 0.06,
        "train/momentum": 0.99,
        "train/epoch": step / 10,
        "train/queue_fill": 1.0,
        "speed/images_per_second": 100.0 + step,
        "speed/data_wait": 0.1,
        "analysis/effective_rank": 5.0 + step,
    }
