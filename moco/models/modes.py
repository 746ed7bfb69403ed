"""Training and evaluation mode of a network's layers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
    """Put a network into training mode, except torch's BN layers if they are frozen; `GroupedBatchNorm` never is."""
    network.train()
    for layer in network.modules():
        if frozen_bn and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
