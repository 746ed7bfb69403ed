"""Refuse configurations that do not fit the data set, and warn of probable mistakes, before training."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moco.config import RunWarning, TrainConfig, require
from moco.config.recommended import FEW_IMAGES, batch_for, crop_advice, queue_advice
from moco.config.train import bn_sync_fields
from moco.data.base import Sources
from moco.data.opening import build_views
from moco.data.plan import Plan
from moco.distributed import world_size
from moco.models.backbones import published_preprocessing
from moco.models.norm import GroupedBatchNorm

GRADIENT_ERROR = 0.2  # largest relative error; float32 and float64 differ by 0.02, measured for a ResNet-50 at 224 px
MAX_BRIGHTNESS_SHIFT = 4  # largest shift of the mean in standard deviations; it is 0.85 to 1.7 in published recipes


def check_against_data(config: TrainConfig, plan: Plan, sources: Sources | None = None) -> None:
    """Refuse a configuration that does not fit the data set; warn if it can run but is probably a mistake.

    Raises:
        ConfigError: if an epoch has less than one batch, or if a field needs labels that the images do not have.
    """
    _, smaller = batch_for(plan.samples_per_epoch, *_divisors(config))
    fix = f"set {smaller}" if smaller else "add images"
    samples = f"{plan.length} images of data.name={config.data.name}"
    if plan.draws:
        samples = f"{plan.samples_per_epoch} samples of an epoch (data.weights={config.data.weights})"
    error = f"batch_size={config.batch_size} exceeds the {samples}"
    if plan.length < FEW_IMAGES and not config.starts_trained:
        error += ", which are too few to train an encoder from random weights"
        fix = f"use published weights (docs/howto/own_images.md), or to train nevertheless, {fix}"
    require(plan.steps_per_epoch > 0, f"{error}: {fix}")
    _check_labels(config, sources)
    if config.optim.warmup_epochs >= config.epochs:
        _warn(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is not below epochs={config.epochs}: the learning rate "
            "rises until the end of the run; set optim.warmup_epochs=0"
        )
    late = [each for each in config.optim.milestones if each >= config.epochs]
    if late and config.optim.schedule == "step":
        _warn(
            f"optim.milestones={config.optim.milestones} has values that are not below epochs={config.epochs}, so the "
            "learning rate is not lowered there: reduce or remove them"
        )
    for sentence in config.method.advice(config):
        _warn(sentence)
    if config.model.options.get("pretrained"):
        warn_of_other_normalization(
            config, "model.options.pretrained=true", published_preprocessing(config.model.backbone)
        )
    augment = config.augment
    if advice := crop_advice("augment.size", augment.size, "augment.eval_resize", augment.eval_resize):
        _warn(advice)
    _check_brightness(config)
    _check_queue(config, plan)
    _check_batch_norm(config)


def check_gradients(config: TrainConfig, encoder: nn.Module, device: torch.device) -> None:
    """Compare an encoder's gradients on MPS with those on the CPU, on 16 images of noise in two BN groups.

    Some versions of torch compute wrong gradients on MPS and raise no error:
    https://github.com/pytorch/pytorch/issues/175189.

    Raises:
        ConfigError: if the two gradients differ by more than `GRADIENT_ERROR`.
    """
    size, noise = config.augment.size, torch.Generator().manual_seed(0)
    x = torch.randn(16, config.data.channels, size, size, generator=noise)
    found = []
    for each in (torch.device("cpu"), device):
        network = copy.deepcopy(encoder).to(each).eval()  # without dropout, which differs between devices
        for layer in network.modules():
            layer.training = isinstance(layer, GroupedBatchNorm | nn.modules.batchnorm._BatchNorm)
            if isinstance(layer, GroupedBatchNorm):
                layer.group_size = 8
        out = network(x.to(each))
        out.backward(torch.randn(out.shape, generator=noise.manual_seed(1)).to(each))
        found.append(torch.cat([p.grad.cpu().flatten() for p in network.parameters() if p.grad is not None]))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    wrong = f"gradients on {device.type} differ by {100 * error:.2g} % from those on the CPU"
    require(error <= GRADIENT_ERROR, f"device={device.type}: {wrong}: set device=cpu, or use another version of torch")


def _divisors(config: TrainConfig) -> tuple[int, int]:
    """Return the number of parts of a batch, and the size of the BN groups that divide each part; see `batch_for`."""
    return world_size() * config.accumulate, config.model.bn_group_size if config.model.bn == "grouped" else 1


def _check_labels(config: TrainConfig, sources: Sources | None) -> None:
    """Refuse fields that need labels if there are none, or if images have several."""
    if sources is None:
        return
    fields_with_labels = {
        "method.labels": config.method.labels,
        "evaluate.online_probe": config.evaluate.online_probe,
        "checkpoint.keep_best": config.checkpoint.keep_best,
    }
    for name in [name for name, on in fields_with_labels.items() if on]:
        require(
            sources.train.multi_labels is None,
            f"{name}=true needs one class per image, and the images of data.name={config.data.name} can have several "
            f"labels: set {name}=false",
        )
    require(
        sources.held_out is not None or not config.checkpoint.keep_best,
        f"checkpoint.keep_best=true needs the live kNN accuracy, and data.name={config.data.name} has no labeled "
        "held-out images: set checkpoint.keep_best=false",
    )
    labels = sources.train.labels
    require(
        not config.evaluate.online_probe or (labels is not None and bool((labels >= 0).any())),
        f"evaluate.online_probe=true, but the training images of data.name={config.data.name} have no labels: set "
        "data.labels=folder for a folder with one subfolder per class, or evaluate.online_probe=false",
    )


def warn_of_other_normalization(config: TrainConfig, trained: str, images: Mapping[str, Any]) -> None:
    """Warn if the start weights were trained on images with another mean or standard deviation.

    Args:
        config: the configuration of the run.
        trained: the field that names the weights, with its value.
        images: "mean" and "std" of the images on which the weights were trained, if known. Values for another number of
            channels are ignored.
    """
    known = [name for name in ("mean", "std") if len(images.get(name, ())) == config.data.channels]
    named = ((name, list(images[name])) for name in known)
    other = [f"augment.{name}={value}" for name, value in named if value != list(getattr(config.augment, name))]
    if other:
        fixes = " ".join(other).replace(", ", ",")
        _warn(f"the weights of {trained} were trained on images with another mean or standard deviation: set {fixes}")


def _check_brightness(config: TrainConfig) -> None:
    shift = max(view.brightness_shift for view in build_views(config.augment, config.data))
    if shift > MAX_BRIGHTNESS_SHIFT:
        _warn(
            f"augment.brightness={config.augment.brightness:g} multiplies pixel values whose mean is much larger than "
            f"their standard deviation: it moves the mean by up to {shift:.0f} standard deviations; set "
            "augment.brightness=0"
        )


def _check_queue(config: TrainConfig, plan: Plan) -> None:
    method = config.method
    if method.queue_size >= plan.length * method.keys_per_image:
        per_step = config.batch_size * method.keys_per_image
        roles = {True: "excluded from its negatives (method.mask_own_keys=true)", False: "a negative"}
        masked = f", {roles[method.mask_own_keys]}" if hasattr(method, "mask_own_keys") else ""
        _warn(
            f"method.queue_size={method.queue_size} holds each of the {plan.length} images at least once: the queue "
            f"contains very old keys and each query's own image{masked}; "
            f"set {queue_advice(plan.length, per_step, method.keys_per_image, *_divisors(config))}"
        )


def _check_batch_norm(config: TrainConfig) -> None:
    model = config.model
    if not config.method.compares_views:  # BN cannot reveal the positive
        return
    if not config.method.has_momentum_encoder:
        if model.bn == "grouped":
            _warn(
                "model.bn=grouped normalizes the views of an image in groups of the same images, which reveals the "
                "positive, and a method without a momentum encoder has no keys to shuffle: "
                f"set {bn_sync_fields(config, world_size())}"
            )
        return
    micro_batch = config.batch_size // world_size() // config.accumulate
    group = model.bn_group_size if model.bn == "grouped" else micro_batch
    if model.shuffle_keys and model.bn != "sync" and group >= config.batch_size:
        even = max(4, config.batch_size // 2 * 2)  # for two groups, each of at least two images
        fix = f"model.bn_group_size={even // 2}" + f" batch_size={even}" * (even != config.batch_size)
        _warn(
            f"model.shuffle_keys=true has no effect: BN normalizes all {config.batch_size} images as one group, which "
            f"query and key of an image share; set model.bn=grouped {fix}"
        )


def _warn(message: str) -> None:
    warnings.warn(message, RunWarning, stacklevel=4)
