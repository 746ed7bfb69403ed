"""Training and evaluation mode of a network's layers, and activation checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco.config import require
from moco.models.norm import GroupedBatchNorm


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and each layer back into its own mode at the end."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def set_training(network: nn.Module, frozen_bn: bool) -> None:
    """Put a network into training mode, except torch's BN layers if `frozen_bn`; `GroupedBatchNorm` is never frozen."""
    network.train()
    for layer in network.modules():
        if frozen_bn and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def checkpoint_activations(backbone: nn.Module, name: str) -> None:
    """Let a backbone keep only the inputs of its blocks; the backward pass computes the other activations again.

    Raises:
        ConfigError: if timm does not support this for the backbone, or if the backbone has BN, whose running statistics
            would be updated twice. BN in the stem of a ViT is allowed, because the stem is not computed again.
    """
    switch: Any = getattr(backbone, "set_grad_checkpointing", None)
    norms = [each for each, layer in backbone.named_modules() if isinstance(layer, GroupedBatchNorm | _BatchNorm)]
    if switch is not None and all(each.startswith("patch_embed.") for each in norms):
        with suppress(AssertionError):  # raised by timm for a model that does not support it
            switch()
            return
    fix = "set activation_checkpointing=false, or use a ViT, e.g. model.backbone=vit_base"
    needed = "timm's gradient checkpointing and blocks without BN"
    require(False, f"activation_checkpointing=true needs {needed}, but {name} lacks one of them: {fix}")
