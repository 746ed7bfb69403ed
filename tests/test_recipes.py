"""Recipes that reproduce a published run have its settings, or name each deviation in their header."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moco.composition import register
from moco.config import TrainConfig, config_dir, flatten

# solo-learn, scripts/pretrain/cifar: mocov2plus.yaml with symmetric_weak.yaml, mocov3.yaml with asymmetric.yaml; means
# and standard deviations of its pretrain_dataloader.py.
CIFAR10 = {"augment.mean": [0.4914, 0.4822, 0.4465], "augment.std": [0.2470, 0.2435, 0.2616]}
CIFAR100 = {"augment.mean": [0.5071, 0.4865, 0.4409], "augment.std": [0.2673, 0.2564, 0.2762]}
COMMON = {
    "epochs": 1000,
    "batch_size": 256,
    "augment.crop_scale": [0.08, 1.0],
    "augment.jitter_p": 0.8,
    "augment.gray_p": 0.2,
    "augment.flip_p": 0.5,
    "optim.lr": 0.3,
    "optim.warmup_epochs": 10,
    "optim.warmup_from_zero": True,
    "method.temperature": 0.2,
    "method.momentum": 0.99,
    "model.dim": 256,
}
V2PLUS = COMMON | {
    "augment.blur_p": 0.5,
    "augment.saturation": 0.4,
    "optim.name": "sgd",
    "optim.weight_decay": 1e-4,
    "method.queue_size": 32768,
    "method.momentum_end": 0.999,
    "method.mask_own_keys": False,
    "model.head_hidden": 2048,
}
V3 = COMMON | {
    "augment.blur_p": 0.0,
    "augment.saturation": 0.2,
    "augment.second.solarize_p": 0.2,
    "optim.name": "lars_timm",
    "optim.trust": 0.02,
    "optim.trust_clip": True,
    "optim.weight_decay": 1e-6,
    "method.momentum_end": 1.0,
    "model.head_hidden": 4096,
    "model.predictor_hidden": 4096,
    "model.bn": "sync",
}
NNCLR = (
    V3
    | CIFAR10
    | {
        "method.temperature": 0.2,
        "method.queue_size": 65536,
        "optim.lr": 0.4,
        "optim.weight_decay": 1e-5,
        "model.head_layers": 3,
        "model.head_hidden": 2048,
    }
)
for absent in ("method.momentum", "method.momentum_end"):
    del NNCLR[absent]
OFFICIAL_V3 = {"optim.name": "lars", "optim.trust": 0.001, "optim.trust_clip": False, "optim.warmup_from_zero": True}
RECIPES: dict[str, dict[str, Any]] = {
    "moco_v2plus_cifar10": V2PLUS | CIFAR10,
    "moco_v2plus_cifar100": V2PLUS | CIFAR100,
    "moco_v3_cifar10": V3 | CIFAR10,
    "nnclr_cifar10": NNCLR,
    "ressl_imagenet": {"optim.lr": 0.05, "optim.warmup_epochs": 5, "model.head_hidden": 4096, "model.dim": 512},
    "moco_v3_resnet50_imagenet_100": OFFICIAL_V3 | {"optim.lr": 0.6},
    "moco_v3_resnet50_imagenet_1000": OFFICIAL_V3 | {"optim.lr": 0.3, "optim.weight_decay": 1.5e-6},
    "moco_v3_vit_small_imagenet": {"optim.name": "adamw", "optim.warmup_from_zero": True, "optim.warmup_epochs": 40},
}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_recipe_has_the_published_settings(recipe: str) -> None:
    register("train", TrainConfig)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("train", overrides=[f"experiment={recipe}"]))
    found = flatten(values)
    assert {name: found[name] for name in RECIPES[recipe]} == RECIPES[recipe]


@pytest.mark.parametrize("recipe", ["moco_v1_imagenet", "moco_v2_imagenet", "moco_v2_imagenet_800", "cifar10_notebook"])
def test_a_recipe_names_the_precision_of_the_published_run(recipe: str) -> None:
    assert "float32" in Path(config_dir(), "experiment", f"{recipe}.yaml").read_text().partition("defaults:")[0]
