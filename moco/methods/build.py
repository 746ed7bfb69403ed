"""Build a method from a configuration."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moco.config import MethodConfig, ModelConfig, TrainConfig, require
from moco.losses import LearnedTemperature
from moco.models.backbones import with_channels
from moco.models.encoder import Encoder, build_encoder, build_predictor
from moco.models.probe import output_error


def build_method(config: TrainConfig, labels: NDArray[np.int64] | None = None, teacher: nn.Module | None = None) -> Any:
    """Return the method of `config.method`, a `moco.builder.Method`, with a new encoder.

    Args:
        config: the configuration of the run.
        labels: the class of each training image, (images,), or None; used only if `method.labels` is true.
        teacher: the frozen network of `method.teacher`; None if that field is not set.

    Raises:
        ConfigError: if `method.labels` is set and there are no labels; or if the backbone does not take images of
            `augment.size` or `augment.small_size`, or does not return features (N, D).
    """
    method = config.method
    require(
        not method.labels or labels is not None,
        f"method.labels=true, but the training images of data.name={config.data.name} have no labels: set "
        "data.labels=folder for a folder with one subfolder per class, or method.labels=false",
    )
    encoder, model, size = encoder_of(config.model, config.data.channels), config.model, config.augment.size
    sizes = {"size": (size, _size_fix(encoder.backbone, size))}
    if config.augment.small_views:
        sizes["small_size"] = (config.augment.small_size, _small_size_fix(encoder.backbone))
    for name, (pixels, fix) in sizes.items():
        error = output_error(encoder.backbone, pixels, config.data.channels)
        require(
            not error,
            f"model.backbone={model.backbone} with model.options={model.options} does not fit augment.{name}={pixels}: "
            f"{error}{fix}",
        )
    classes = torch.from_numpy(labels) if method.labels and labels is not None else None
    more = {} if teacher is None else {"teacher": teacher}
    return method.build(config, encoder, classes, **more)


def encoder_of(model: ModelConfig, channels: int) -> Encoder:
    """Return a new encoder for images with this number of channels."""
    head = model.head_layers, model.head_hidden, model.dim
    bn: Any = model.bn
    return build_encoder(
        model.backbone, with_channels(model.options, channels), *head, bn, model.bn_group_size, model.head_norm
    )


def predictor_of(model: ModelConfig) -> nn.Module:
    """Return a new predictor; the identity for `predictor_layers=0`."""
    bn: Any = model.bn
    layers = model.predictor_hidden, model.predictor_layers, model.predictor_last_norm
    return build_predictor(model.dim, *layers, bn, model.bn_group_size)


def _size_fix(backbone: Any, size: int) -> str:
    """Return the fix for a ViT that is built for another size than that of the images; "" for other networks."""
    built_for = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if not isinstance(built_for, tuple) or built_for == (size, size):
        return ""
    return f"; set +model.options.img_size={size}, or augment.size={built_for[0]}"


def _small_size_fix(backbone: Any) -> str:
    """Return the fix for a ViT, which needs an option to take images of several sizes; "" for other networks."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple):
        return ""
    return f"; set +model.options.dynamic_img_size=true, and augment.small_size to a multiple of {patch[0]}"


def build_temperature(method: MethodConfig) -> float | LearnedTemperature:
    """Return the initial temperature as a number, or a module that learns it if temperature_schedule=learned."""
    if method.temperature_schedule != "learned":
        return method.temperature
    return LearnedTemperature(method.temperature, method.temperature_low, method.temperature_high)
