"""BN of all groups in one call, as on a GPU, equals one call per group."""

import pytest
import torch
from torch import Tensor

from moco.models.norm import GroupedBatchNorm
from tests.models.norm_layers import GROUP, C, N, official

FORMATS = [torch.contiguous_format, torch.channels_last]
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]  # products of bf16 sum in float32


def results_of(x: Tensor, layer: GroupedBatchNorm) -> dict[str, Tensor]:
    """Return outputs, gradients and statistics of a layer and an activation in place, as in a ResNet."""
    x = x.clone().requires_grad_()
    out = torch.relu_(layer(x))
    (out * torch.linspace(-1, 1, len(x), dtype=x.dtype).view([-1] + [1] * (x.dim() - 1))).sum().backward()
    assert x.grad is not None
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "gradient of x": x.grad, **gradients, **layer.state_dict()}


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(N, C, 3, 2), (N, C), (N, C, 7)])
@pytest.mark.parametrize("affine", ["trained", "frozen", "none"])
def test_one_call_for_all_groups_equals_one_call_per_group(
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    tolerance: float,
    affine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values, gradients, running statistics and memory format, relative to the largest number of each."""
    monkeypatch.setattr("moco.models.norm.FUSED_DEVICES", ("cpu",))
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 1
    x = x.to(dtype, memory_format=memory_format if len(shape) == 4 else torch.preserve_format)
    found = []
    for largest in (2**22, 0):
        monkeypatch.setattr("moco.models.norm.LARGEST_TOGETHER", largest)
        layer = GroupedBatchNorm(C, GROUP, affine=affine != "none").to(torch.promote_types(dtype, torch.float32))
        layer.load_state_dict(official().state_dict(), strict=affine != "none")
        found.append(results_of(x, layer.requires_grad_(affine == "trained")))
    together, each = found
    assert together.keys() == each.keys()
    for name in each:
        largest_number = each[name].abs().max().item()
        torch.testing.assert_close(together[name], each[name], rtol=0, atol=tolerance * largest_number)
        assert together[name].stride() == each[name].stride(), name
