"""BN in groups is BN on each group, and `convert_batch_norm` puts it into a network."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from moco.models.norm import BatchNormKind, GroupedBatchNorm, convert_batch_norm
from tests.models.norm_layers import GROUP, C, N, close, grouped, images, of, official

pytestmark = pytest.mark.usefixtures("norm_devices")


# ---- one call ----


@pytest.mark.parametrize("group_size", [2, 4, 6, 12])
def test_outputs_and_gradients_equal_a_batch_norm_on_each_group(group_size: int) -> None:
    layer = official()
    ours, x = grouped(layer, group_size), images(0).requires_grad_()
    weights = torch.randn(N, C, 3, 2, generator=torch.Generator().manual_seed(1))
    out = ours(x)
    (out * weights).sum().backward()

    copies = [copy.deepcopy(layer) for _ in range(N // group_size)]
    y = images(0).requires_grad_()
    expected = torch.cat([each(part) for each, part in zip(copies, y.split(group_size), strict=True)])
    (expected * weights).sum().backward()

    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        gradients = [of(each, name).grad for each in copies]
        total = torch.stack([gradient for gradient in gradients if gradient is not None]).sum(dim=0)
        actual = of(ours, name).grad
        assert actual is not None
        torch.testing.assert_close(actual, total, rtol=1e-4, atol=1e-4)


def test_one_group_of_the_batch_differs_from_smaller_groups() -> None:
    layer = official()
    assert (grouped(layer)(images(0)) - grouped(layer, N)(images(0))).abs().max() > 0.1


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
def test_running_statistics_are_updated_once_with_the_mean_over_groups(momentum: float) -> None:
    layer, x = official(momentum), images(0)
    ours = grouped(layer)
    before_mean, before_var = of(ours, "running_mean").clone(), of(ours, "running_var").clone()
    ours(x)
    copies = [nn.BatchNorm2d(C, momentum=1.0) for _ in range(N // GROUP)]  # each ends with its group's statistics
    for each, part in zip(copies, x.split(GROUP), strict=True):
        each(part)
    mean = torch.stack([of(each, "running_mean") for each in copies]).mean(dim=0)
    var = torch.stack([of(each, "running_var") for each in copies]).mean(dim=0)  # unbiased, as nn.BatchNorm2d keeps it
    torch.testing.assert_close(of(ours, "running_mean"), (1 - momentum) * before_mean + momentum * mean)
    torch.testing.assert_close(of(ours, "running_var"), (1 - momentum) * before_var + momentum * var)
    assert of(ours, "num_batches_tracked").item() == 1


@pytest.mark.parametrize("group_size", [0, N])
def test_one_group_of_the_batch_is_batch_norm(group_size: int) -> None:
    layer = official()
    ours = grouped(layer, group_size)
    for seed in range(3):
        x, y = images(seed).requires_grad_(), images(seed).requires_grad_()
        out, expected = ours(x), layer(y)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
        close(ours, layer)


def test_eval_mode_is_batch_norm_for_any_batch_and_changes_nothing() -> None:
    layer = official().eval()
    ours = grouped(layer).eval()
    before = copy.deepcopy(ours.state_dict())
    for n in (1, 3, 7):  # the group size does not divide these
        torch.testing.assert_close(ours(images(n, n)), layer(images(n, n)))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("n", [3, 5, 11])
def test_a_group_size_must_divide_the_batch(n: int) -> None:
    ours = grouped(official())
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=f"model.bn_group_size=4 does not divide a batch of {n} images"):
        ours(images(0, n))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("shape", [(N, C), (N, C, 7)])
def test_vectors_and_sequences_equal_batch_norm_1d(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = GroupedBatchNorm(C, GROUP)
    expected = torch.cat([nn.BatchNorm1d(C)(part) for part in x.split(GROUP)])
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_type_and_float32_statistics() -> None:
    ours, exact = grouped(official()), grouped(official())
    out = ours(images(0).bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact(images(0)), rtol=0.02, atol=0.05)
    assert of(ours, "running_mean").dtype == torch.float32
    torch.testing.assert_close(of(ours, "running_var"), of(exact, "running_var"), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["grouped", "sync", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_have_the_wider_of_float32_and_the_type_of_the_input(
    kind: BatchNormKind, dtype: torch.dtype
) -> None:
    """A network in float64 trains and is evaluated in float64: exact to 1e-12, not to float32's 1e-7."""
    network = convert_batch_norm(nn.Sequential(official()), kind, N).to(dtype)
    exact = official().double()
    for seed in range(2):
        x = images(seed).to(dtype)
        out, expected = network(x), exact(x.double())
        assert out.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        out.square().sum().backward()
    layer = next(iter(network.children()))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(of(layer, name).double(), of(exact, name), rtol=tolerance, atol=tolerance)
    out, expected = network.eval()(images(5).to(dtype)), exact.eval()(images(5).double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_synchronized_statistics_keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for several processes, in one; for a GPU's see test_sync_norm.py."""
    monkeypatch.setattr("moco.models.norm.FUSED_DEVICES", ())
    ours, exact = grouped(official(), 0).double(), official().double()
    torch.testing.assert_close(
        ours._normalize_sync(images(0).double()), exact(images(0).double()), rtol=1e-12, atol=1e-12
    )
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(of(ours, name), of(exact, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("group_size", [0, 4])
def test_compiled_code_has_no_loop_over_groups(group_size: int, dtype: torch.dtype, tolerance: float) -> None:
    """Values, gradients and statistics are those of the loop; relative to the largest number of each."""
    wide = torch.promote_types(dtype, torch.float32)
    results = []
    for compiled in (True, False):
        layer = grouped(official(), group_size).to(wide)
        call = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
        x = images(0).to(dtype).requires_grad_()
        out = call(x)
        (out.to(wide).square() * torch.linspace(0.5, 1, N, dtype=wide).view(-1, 1, 1, 1)).sum().backward()
        gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        results.append([of(layer, "running_mean"), of(layer, "running_var"), out, *gradients])
    torch.compiler.reset()
    for number, (found, expected) in enumerate(zip(*results, strict=True)):
        assert found is not None
        assert expected is not None
        error = max(tolerance, 1e-7) if number < 2 else tolerance  # compiled factors of the statistics are float32
        torch.testing.assert_close(found, expected, rtol=0, atol=error * expected.abs().max().item())


def test_groups_with_one_number_per_channel_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GroupedBatchNorm(C, 1)(torch.randn(N, C))


# ---- conversion ----


def shake(network: nn.Module) -> None:
    """Statistics and parameters that are not the initial ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if "var" in name else 0.0))


def check_conversion(network: nn.Module, x: Tensor, layers: int) -> None:
    """Same names, same values, the same function in eval mode, and in training mode on one group."""
    shake(network)
    original = copy.deepcopy(network)
    assert convert_batch_norm(network, "grouped", len(x)) is network
    assert sum(isinstance(layer, GroupedBatchNorm) for layer in network.modules()) == layers
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    assert list(network.state_dict()) == list(original.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in original.named_parameters()]
    for name, value in original.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    for training in (False, True):
        network.train(training)
        original.train(training)
        torch.testing.assert_close(network(x), original(x), rtol=1e-4, atol=1e-4)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def test_torchvision_resnet18_converts() -> None:
    check_conversion(torchvision.models.resnet18(weights=None), torch.randn(4, 3, 32, 32), 20)


def test_timm_layers_with_their_activation_inside_convert() -> None:
    network = timm.create_model("mobilenetv3_small_050", num_classes=0)
    fused = [layer for layer in network.modules() if isinstance(layer, BatchNormAct2d)]
    assert any(not isinstance(layer.act, nn.Identity) for layer in fused)
    check_conversion(network, torch.randn(4, 3, 64, 64), len(fused))


def test_batch_norm_1d_converts_with_its_options() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=0.5, momentum=0.3), nn.BatchNorm1d(8, affine=False))
    check_conversion(network, torch.randn(6, 6), 2)


def test_a_layer_by_itself_is_replaced() -> None:
    layer = official()
    new = convert_batch_norm(layer, "sync", 4)
    assert isinstance(new, GroupedBatchNorm)
    assert new.group_size == 0
    torch.testing.assert_close(new(images(0)), layer(images(0)), rtol=1e-5, atol=1e-5)


def test_kind_batch_leaves_the_layers() -> None:
    network = torchvision.models.resnet18(weights=None)
    layers = list(network.modules())
    convert_batch_norm(network, "batch", 4)
    assert all(a is b for a, b in zip(network.modules(), layers, strict=True))
