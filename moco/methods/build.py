"""From a configuration to a method."""

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moco.config import TrainConfig, require
from moco.losses import LearnedTemperature, Switches
from moco.methods import METHODS, AnyMethod
from moco.models.encoder import build_encoder, build_predictor


def build_method(config: TrainConfig, labels: NDArray[np.int64] | None = None) -> AnyMethod:
    """The method that `method.name` names, on a new encoder.

    Args:
        config: the run's.
        labels: of the training images, (samples,); None where there are none. Only `method.labels` makes use of them.

    Raises:
        ConfigError: for a name that is none, a predictor for a method that has none, or labels that are missing.
        ValueError: see `moco.models.encoder.build_encoder`.
    """
    model, method = config.model, config.method
    require(method.name in METHODS, f"method.name={method.name!r} must be one of {', '.join(METHODS)}")
    require(
        model.predictor_layers == 0 or method.name == "moco_v3",
        f"model.predictor_layers={model.predictor_layers}: {method.name} has no predictor; "
        "set model.predictor_layers=0 or method=moco_v3",
    )
    require(
        not method.labels or labels is not None,
        f"method.labels=true, but the training images of data.name={config.data.name} have no labels: set "
        "data.labels=folder for a folder with a subfolder a class, or method.labels=false",
    )
    bn: Any = model.bn
    encoder = build_encoder(
        model.backbone,
        model.options,
        model.head_layers,
        model.head_hidden,
        model.dim,
        bn,
        model.bn_group_size,
        model.head_norm,
    )
    parts: dict[str, Any] = {"encoder": encoder, "temperature": method.temperature}
    if method.name in ("moco", "simclr"):
        parts["labels"] = torch.from_numpy(labels) if method.labels and labels is not None else None
        if method.temperature_schedule == "learned":
            parts["learned_temperature"] = LearnedTemperature(
                method.temperature, method.temperature_low, method.temperature_high
            )
    if method.name == "simclr":
        parts |= {
            "candidates": method.candidates,
            "contrast_mode": method.contrast_mode,
            "base_temperature": method.base_temperature,
            "margin": method.margin,
            "margin_kind": method.margin_kind,
        }
    if method.name == "moco":
        parts |= {
            "dim": model.dim,
            "queue_size": method.queue_size,
            "queue_start": method.queue_start,
            "mask_own_keys": method.mask_own_keys,
            "symmetric": method.symmetric,
            "reduction": method.reduction,
            "switches": Switches(**{each.name: getattr(method, each.name) for each in fields(Switches)}),
            "seed": config.seed,
        }
    if method.name == "moco_v3":
        parts["predictor"] = build_predictor(
            model.dim,
            model.predictor_hidden,
            model.predictor_layers,
            model.predictor_last_norm,
            bn,
            model.bn_group_size,
        )
    return METHODS[method.name](**parts)
