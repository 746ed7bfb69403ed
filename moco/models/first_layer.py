"""The first layer of a network: its number of input channels, and how to change that number in pretrained weights."""

from collections.abc import Mapping

from torch import Tensor, nn


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Return the name and the module of the convolution that sees the image; None for a network without one."""
    return next(((name, each) for name, each in network.named_modules() if isinstance(each, nn.Conv2d)), None)


def input_channels(network: nn.Module) -> int:
    """Return the number of channels of a network's images; 3 for a network without a convolution."""
    found = first_convolution(network)
    return 3 if found is None else found[1].in_channels


def with_channels_of(network: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return weights whose first convolution has as many input channels as that of a network.

    The weights of each new channel are the sum of the old channels' weights, divided by the number of new channels. So
    the sum of the weights over the channels is preserved: an image with equal channels gives the same features before
    and after. Other weights are unchanged.

    Args:
        network: the network that is to load the weights.
        weights: its state dict, possibly with another number of channels.

    Returns:
        The weights, and a sentence about the change; "" without one.
    """
    found = first_convolution(network)
    key = f"{found[0]}.weight" if found else ""
    before = weights.get(key)
    if found is None or before is None or before.dim() != 4 or before.shape[1] == found[1].in_channels:
        return dict(weights), ""
    wanted = found[1].in_channels
    total = before.double().sum(dim=1, keepdim=True)  # (D, 1, kernel, kernel)
    after = (total / wanted).to(before.dtype).repeat(1, wanted, 1, 1)
    note = f"first layer adapted from {before.shape[1]} to {wanted} channels"
    return {**weights, key: after}, f"{note} (equal weights, with the same sum over the channels)"
