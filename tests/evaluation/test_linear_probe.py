"""The official probe is plain SGD on a frozen backbone; a saved head reproduces the scores."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import OptimConfig
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import ArraySource
from moco.data.view import View
from moco.distributed import rank, world_size
from moco.evaluation.linear_probe import (
    BackboneChanged,
    LinearHead,
    fitting_batch,
    load_head,
    new_head,
    save_head,
    train_head,
)
from moco.evaluation.subject import labels_of
from moco.models.backbones import build_backbone

CPU = torch.device("cpu")
VIEW = View(size=8, crop_scale=(0.5, 1.0), flip_p=0.5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def source(count: int = 21) -> ArraySource:
    """Return images whose class is their brightest channel."""
    labels = np.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for i, label in enumerate(labels):
        images[i, label] += 100
    return ArraySource(images, [str(i) for i in range(count)], labels.astype(np.int64), ("a", "b", "c"))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    network = build_backbone("convnet", {"width": 2})
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.mul_(4)  # untrained features fade from layer to layer: a head would learn for long
    return network


OPTIM = OptimConfig(lr=3.0, schedule="step", milestones=[3], gamma=0.1, per_epoch=True, momentum=0.9, weight_decay=1e-3)


def fit(network: nn.Module, head: nn.Linear, plan: Plan, optim: OptimConfig = OPTIM) -> list[tuple[float, float]]:
    images, lines = source(), list[str]()
    labels = torch.from_numpy(labels_of(images))
    stream = batches(images, plan, [VIEW], CPU, 0)
    epochs = train_head(network, head, stream, labels, plan, optim, lines.append)
    assert lines == [f"loss {loss:.3f} · training accuracy {accuracy:.1f} %" for loss, accuracy in epochs]
    return epochs


def trained(seed: int = 4, epochs: int = 4) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    head = new_head(16, 3, 0.01, seed)
    epoch_log = fit(backbone(), head, Plan(21, 8, epochs, seed, rank(), world_size()))
    return head.weight.detach(), head.bias.detach(), epoch_log


def test_the_loop_is_sgd_on_frozen_features() -> None:
    """Compare with momentum and weight decay written out, on the same batches."""
    network, images, head = backbone().eval(), source(), new_head(16, 3, 0.01, 4)
    weight, bias = head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    losses = []
    for step, batch in enumerate(batches(images, Plan(21, 8, 4, 4), [VIEW], CPU, 0)):
        with torch.no_grad():
            features = network(batch.views[0])
        loss = F.cross_entropy(features @ weight.T + bias, torch.from_numpy(labels_of(images))[batch.index])
        losses.append(loss.item())
        for number, (parameter, slope) in enumerate(
            zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True)
        ):
            speed[number] = 0.9 * speed[number] + slope + 1e-3 * parameter.detach()
            parameter.data -= (3.0 if step < 6 else 0.3) * speed[number]
    got_weight, got_bias, epoch_log = trained()
    torch.testing.assert_close(got_weight, weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_bias, bias.detach(), rtol=1e-4, atol=1e-5)
    assert len(epoch_log) == 4
    assert epoch_log[0][0] == pytest.approx(np.mean(losses[:2]), rel=1e-5)


def test_it_learns_to_separate_the_classes() -> None:
    _, _, epoch_log = trained(epochs=40)
    assert epoch_log[0][1] < 50
    assert epoch_log[-1][1] > 85


def test_the_first_weights_are_those_of_the_official_code() -> None:
    head = new_head(400, 300, 0.01, 0)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(head.weight.mean().item()) < 1e-4
    assert not head.bias.any()
    assert torch.equal(new_head(400, 300, 0.01, 0).weight, head.weight)
    assert not torch.equal(new_head(400, 300, 0.01, 1).weight, head.weight)


class Drifting(nn.Module):
    """A backbone whose buffer changes in each forward, like those of batch normalization in training mode."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = backbone()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.seen + 1e-7
        return self.inner(images)  # type: ignore[no-any-return]


def test_a_backbone_that_changes_by_a_bit_is_refused() -> None:
    with pytest.raises(BackboneChanged, match=r"changed .*: seen"):
        fit(Drifting(), new_head(16, 3, 0.01, 0), Plan(21, 8, 1, 0))


def test_the_backbone_sees_evaluation_mode_and_keeps_its_statistics() -> None:
    network = backbone().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fit(network, new_head(16, 3, 0.01, 0), Plan(21, 8, 1, 0))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_non_finite_loss_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match=r"lower official\.lr"):
        fit(backbone(), new_head(16, 3, 0.01, 0), Plan(21, 8, 3, 0), replace(OPTIM, lr=1e38))


@pytest.mark.parametrize(("wanted", "count", "expected"), [(256, 1297, 256), (1024, 1000, 512), (8, 8, 8), (256, 3, 2)])
def test_a_batch_larger_than_the_data_becomes_a_power_of_two(wanted: int, count: int, expected: int) -> None:
    assert fitting_batch(wanted, count) == expected
    assert math.log2(fitting_batch(wanted, count)).is_integer()


@pytest.mark.parametrize("unit", [False, True])
def test_a_head_in_a_file_gives_the_same_scores(unit: bool, tmp_path: Path) -> None:
    weight, bias, features = torch.randn(3, 5), torch.randn(3), torch.randn(4, 5)
    about = {"unit": unit, "classes": ["a", "ü", 'c"'], "layer": "layer3"}
    save_head(tmp_path / "linear.safetensors", LinearHead(weight, bias, about))
    head = load_head(tmp_path / "linear.safetensors")
    assert head.about == about
    expected = (features / features.norm(dim=1, keepdim=True) if unit else features) @ weight.T + bias
    torch.testing.assert_close(head(features), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["linear.safetensors"]
