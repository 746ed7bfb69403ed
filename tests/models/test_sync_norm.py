"""The synchronized BN of GPUs, with torch's kernels in their plain form: equal to the BN of the global batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.distributed import rank, world_size
from moco.models.norm import GroupedBatchNorm
from moco.models.sync_norm import sync_batch_norm
from tests.distributed.launch import run_ranks
from tests.rehearsal import kernels

N, C = 8, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}  # relative and absolute


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_kernels(monkeypatch.setattr)


def use_plain_kernels(set_attribute: Callable[..., None]) -> None:
    for name in kernels.BATCH_NORM:
        set_attribute(torch, name, getattr(kernels, name))


def images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return (2 * noise + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)


def trained(call: Callable[[nn.BatchNorm2d, Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Two steps of one layer: outputs, gradients and running statistics."""
    wide = torch.promote_types(dtype, torch.float32)  # of weights and statistics
    layer = nn.BatchNorm2d(C).to(wide)
    found: dict[str, Any] = {}
    nn.init.uniform_(layer.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        x = (x + step).detach().requires_grad_()
        out = call(layer, x)
        (out.to(wide).square() * torch.linspace(0.5, 1, out.numel(), dtype=wide).view(out.shape)).sum().backward()
        found |= {f"out {step}": out.detach(), f"gradient {step}": x.grad}
    found |= {f"{name} gradient": p.grad for name, p in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def ours(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return sync_batch_norm(x, layer.weight, layer.bias, layer.running_mean, layer.running_var, 0.1, layer.eps)


def compare(found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name in found.keys() - {"num_batches_tracked"}:
        tolerance, scale = TOLERANCE[dtype], expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_process_equals_batch_norm(dtype: torch.dtype, channels_last: bool) -> None:
    x = images((N, C, 3, 2), dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    found = trained(ours, x, dtype)
    compare(found, trained(lambda layer, x: layer(x), x, dtype), dtype)
    assert found["out 1"].is_contiguous(memory_format=torch.channels_last) == channels_last


def test_weights_that_are_not_trained_get_no_gradient() -> None:
    x, mean, var = images((N, C, 3, 2), torch.float32), torch.zeros(C), torch.ones(C)
    weight, bias = torch.ones(C, requires_grad=True), torch.zeros(C)
    sync_batch_norm(x, weight, bias, mean, var, 0.1, 1e-5).sum().backward()
    assert weight.grad is not None
    out = sync_batch_norm(x.requires_grad_(), None, None, mean, var, 0.1, 1e-5)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-5  # the sum of normalized values is constant


def layers_of_a_rank() -> dict[str, Any]:
    """A GPU's layer and a CPU's, on this rank's share of the global batch."""
    use_plain_kernels(setattr)
    import moco.models.norm as norm

    share = N // world_size()
    results = {}
    devices: tuple[str, ...]
    for devices in ((), ("cpu",)):
        norm.FUSED_DEVICES = devices
        layer = GroupedBatchNorm(C, 0).double()
        found: dict[str, Any] = {}
        for step in range(2):
            x = images((N, C, 3, 2), torch.float64)[rank() * share : (rank() + 1) * share] + step
            x.requires_grad_()
            out = layer(x)
            (out.square() * (1 + rank())).sum().backward()
            found |= {f"out {step}": out.detach(), f"gradient {step}": x.grad}
        gradients = {f"{name} gradient": p.grad for name, p in layer.named_parameters()}
        results["fused" if devices else "plain"] = found | gradients | layer.state_dict()
    return results


def test_two_processes_equal_the_form_of_a_cpu() -> None:
    for results in run_ranks(2, layers_of_a_rank):
        compare(results["fused"], results["plain"], torch.float64)
        assert results["fused"]["num_batches_tracked"] == results["plain"]["num_batches_tracked"] == 2
