"""Batches, and batch norms with the parameters and statistics of a trained network, for the tests of BN in groups."""

import torch
from torch import Tensor, nn

from moco.models.norm import GroupedBatchNorm

N, C, GROUP = 12, 5, 4


def images(seed: int, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, C, 3, 2, generator=generator) + torch.arange(n).view(n, 1, 1, 1)


def official(momentum: float = 0.1) -> nn.BatchNorm2d:
    """Return a batch norm whose parameters and statistics are not the initial ones."""
    layer = nn.BatchNorm2d(C, momentum=momentum)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand(C, generator=generator) + 0.5)
    return layer


def grouped(layer: nn.BatchNorm2d, group_size: int = GROUP) -> GroupedBatchNorm:
    new = GroupedBatchNorm(C, group_size, layer.eps, 0.1 if layer.momentum is None else layer.momentum)
    new.load_state_dict(layer.state_dict())
    return new


def of(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, Tensor)
    return tensor


def close(a: nn.Module, b: nn.Module) -> None:
    """Check that the running statistics agree."""
    torch.testing.assert_close(of(a, "running_mean"), of(b, "running_mean"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of(a, "running_var"), of(b, "running_var"), rtol=1e-5, atol=1e-6)
    assert torch.equal(of(a, "num_batches_tracked"), of(b, "num_batches_tracked"))
