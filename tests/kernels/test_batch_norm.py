"""BN in groups by kernels against a batch norm of each group in float64: on a GPU if there is one, else interpreted."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.models import fused_norm
from moco.models.fused_norm import has_kernel
from moco.models.norm import GroupedBatchNorm, set_calls_per_step, untracked
from tests.interpreter import needs_interpreter

pytest.importorskip("triton")
pytestmark = needs_interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative to the largest number: float32's rounding, and that of results in half precision.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moco.models.fused_norm.fused", lambda device: True)
    monkeypatch.setattr("moco.models.norm.FUSED_DEVICES", (DEVICE.type,))


def batch(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 3.0) -> Tensor:
    """A batch with the channels last, with another mean and spread in each image and channel."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    x = x * torch.linspace(0.5, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = x + torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2)) % 5
    return x.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format)


def layer(channels: int, group_size: int, dtype: torch.dtype, affine: str = "trained") -> GroupedBatchNorm:
    new = GroupedBatchNorm(channels, group_size, momentum=0.3, affine=affine != "none")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*new.parameters(), new.running_mean, new.running_var):
            tensor.copy_(torch.rand(channels, generator=generator) + 0.5)
    return new.to(dtype).requires_grad_(affine == "trained")


def results_of(x: Tensor, norm: GroupedBatchNorm) -> dict[str, Tensor]:
    """Return output, gradients and statistics, with an activation in place, as in a ResNet."""
    x = x.detach().requires_grad_()
    out = torch.relu_(norm(x))
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
    (out * weights).sum().backward()
    assert x.grad is not None
    gradients = {f"gradient of {name}": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "gradient of x": x.grad, **gradients, **norm.state_dict()}


def compare(x: Tensor, group_size: int, affine: str = "trained", backend: str = "") -> None:
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = layer(x.shape[1], group_size, exact, affine).to(DEVICE)
    if backend:
        torch.compiler.reset()
        norm.compile(backend=backend, fullgraph=True)
    found = results_of(x.to(DEVICE), norm)
    expected = results_of(x.double(), layer(x.shape[1], group_size, torch.float64, affine))
    assert found.keys() == expected.keys()
    assert found["out"].stride() == found["gradient of x"].stride() == x.stride()
    for name, theirs in expected.items():
        in_half = x.dtype != torch.float32 and "running" not in name
        tolerance = TOLERANCE[x.dtype if in_half else torch.float32] * max(1, theirs.abs().max().item())
        torch.testing.assert_close({name: found[name].cpu().double()}, {name: theirs.double()}, rtol=0, atol=tolerance)


@pytest.mark.parametrize("affine", ["trained", "frozen", "none"])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((12, 5, 3, 2), 4),
        ((12, 5), 4),
        ((8, 70, 5, 5), 4),  # two blocks of channels
        ((6, 8, 12, 12), 3),  # several parts per group
    ],
)
def test_outputs_gradients_and_statistics(shape: tuple[int, ...], group_size: int, affine: str) -> None:
    compare(batch(*shape), group_size, affine)


@pytest.mark.parametrize("affine", ["trained", "frozen", "none"])
def test_compiled_layers(affine: str) -> None:
    compare(batch(12, 5, 3, 2), 4, affine, "aot_eager")
    compare(batch(12, 5), 4, affine, "aot_eager")


@pytest.mark.long
def test_layers_compiled_by_inductor() -> None:
    compare(batch(12, 5, 3, 2), 4, backend="inductor")


def test_compiled_calls_are_counted_in_every_layer() -> None:
    network = nn.Sequential(layer(5, 4, torch.float32), layer(5, 4, torch.float32)).to(DEVICE)
    set_calls_per_step(network, 2)
    compiled = copy.deepcopy(network)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for mean in range(4):  # two steps of two views
        x = batch(12, 5, 3, 2, mean=mean).to(DEVICE)
        torch.testing.assert_close(compiled(x), network(x), rtol=0, atol=0)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in compiled.state_dict().items())
    assert network.state_dict()["1.num_batches_tracked"] == 4


def test_the_operations_of_compiled_code_are_declared_correctly() -> None:
    x, norm = batch(12, 5, 3, 2).to(DEVICE), layer(5, 4, torch.float32).to(DEVICE).requires_grad_(False)
    arguments = norm.weight, norm.bias, norm.running_mean, norm.running_var, 3, 0.3, 1e-5
    torch.library.opcheck(fused_norm._batch_norm, (x, *arguments))
    saved = fused_norm._batch_norm(x, *arguments)[1]
    torch.library.opcheck(fused_norm._batch_norm_backward, (x - 1, x, norm.weight, saved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    compare(batch(8, 16, 6, 6, dtype=dtype), 4)


def test_a_part_of_a_group_may_be_short_and_a_program_may_have_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from moco.kernels import batch_norm as kernels

    monkeypatch.setattr(kernels, "_MOST_PARTS", 4)
    monkeypatch.setattr(kernels, "_TILES", 3)
    kernels._sizes.cache_clear()
    compare(batch(4, 8, 9, 13), 2)  # 234 rows per group, in parts of 64 rows
    kernels._sizes.cache_clear()


def test_a_large_mean_does_not_cancel() -> None:
    x = batch(4, 4, 8, 8, mean=1000.0)
    found = layer(4, 2, torch.float32).to(DEVICE)(x.to(DEVICE)).cpu().double()
    expected = layer(4, 2, torch.float64)(x.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)  # rounding of x: 6e-5 in units of 0.5


def test_calls_are_counted_and_untracked_calls_leave_the_statistics_unchanged() -> None:
    norm = layer(5, 4, torch.float32).to(DEVICE)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with untracked(norm, backward=True):
        norm(batch(12, 5, 3, 2).to(DEVICE))
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    norm(batch(12, 5, 3, 2).to(DEVICE))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("x", "affine", "groups"),
    [
        (batch(4, 3, 2, 2), torch.float32, 1),
        (batch(4, 3, 2, 2).contiguous(), torch.float32, 4),
        (batch(4, 3, 2), torch.float32, 4),
        (batch(4, 3, 2, 2).double(), torch.float64, 4),
        (batch(4, 3, 2, 2), torch.float64, 4),
        (batch(4, 3), torch.float32, 4),  # one number per channel of a group: torch refuses it
    ],
    ids=["one group", "channels first", "sequences", "float64", "weights in float64", "one number"],
)
def test_other_batches_are_left_to_torch(x: Tensor, affine: torch.dtype, groups: int) -> None:
    assert not has_kernel(x.to(DEVICE), torch.ones(3, dtype=affine, device=DEVICE), groups)
    assert has_kernel(batch(4, 3, 2, 2).to(DEVICE), torch.ones(3, device=DEVICE), 4)


def test_micro_batches_and_evaluation_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel updates the running statistics by a whole view."""

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("moco.models.norm.fused_batch_norm", fail)
    norm, x = layer(5, 4, torch.float32).to(DEVICE), batch(12, 5, 3, 2).to(DEVICE)
    norm.micro_batches = 2
    norm(x)
    norm.eval()(x)
    norm.micro_batches = 1
    with pytest.raises(AssertionError):
        norm.train()(x)
