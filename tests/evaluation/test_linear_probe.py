"""The official probe's loop is plain SGD on a frozen backbone; the head in a file gives the same scores."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from moco.models.backbones import build_backbone
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")
VIEW = View(size=8, crop_scale=(0.5, 1.0), flip_p=0.5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def source(count: int = 21) -> ArraySource:
    """Pictures of three classes, told apart by their brightest channel."""
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


def lr_at(step: int) -> float:
    return 3.0 if step < 6 else 0.3


def trained(seed: int = 4, epochs: int = 4) -> tuple[Tensor, Tensor, list[tuple[int, float, float]]]:
    told: list[tuple[int, float, float]] = []
    head = new_head(16, 3, 0.01, seed)
    plan = Plan(21, 8, epochs, seed, rank(), world_size())
    train_head(
        backbone(), head, source(), plan, VIEW, lr_at, 0.9, 1e-3, CPU, on_epoch=lambda *values: told.append(values)
    )
    return head.weight.detach(), head.bias.detach(), told


def test_the_loop_is_sgd_on_frozen_features() -> None:
    """Against momentum and weight decay written out, on the same batches."""
    network, pictures, head = backbone().eval(), source(), new_head(16, 3, 0.01, 4)
    weight, bias = head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    assert pictures.labels is not None
    losses = []
    for step, batch in enumerate(batches(pictures, Plan(21, 8, 4, 4), [VIEW], CPU, 0)):
        with torch.no_grad():
            features = network(batch.views[0])
        loss = F.cross_entropy(features @ weight.T + bias, torch.from_numpy(pictures.labels)[batch.index])
        losses.append(loss.item())
        for number, (parameter, slope) in enumerate(
            zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True)
        ):
            speed[number] = 0.9 * speed[number] + slope + 1e-3 * parameter.detach()
            parameter.data -= lr_at(step) * speed[number]
    got_weight, got_bias, told = trained()
    torch.testing.assert_close(got_weight, weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_bias, bias.detach(), rtol=1e-4, atol=1e-5)
    assert [done for done, _, _ in told] == [1, 2, 3, 4]
    assert told[0][1] == pytest.approx(np.mean(losses[:2]), rel=1e-5)


def test_it_learns_what_there_is_to_learn() -> None:
    _, _, told = trained(epochs=40)
    assert told[0][2] < 50
    assert told[-1][2] > 85


def test_two_processes_train_the_same_head_and_tell_the_same_figures() -> None:
    weight, bias, told = trained()
    for other_weight, other_bias, others_told in run_ranks(2, trained):
        torch.testing.assert_close(other_weight, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other_bias, bias, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(others_told), torch.tensor(told), rtol=1e-4, atol=1e-5)


def test_the_first_weights_are_those_of_the_official_code() -> None:
    head = new_head(400, 300, 0.01, 0)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(head.weight.mean().item()) < 1e-4
    assert not head.bias.any()
    assert torch.equal(new_head(400, 300, 0.01, 0).weight, head.weight)
    assert not torch.equal(new_head(400, 300, 0.01, 1).weight, head.weight)


class Drifting(nn.Module):
    """A backbone that does not hold still: a buffer moves in each forward, as BN's in training mode would."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = backbone()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.seen + 1e-7
        return self.inner(images)  # type: ignore[no-any-return]


def test_a_backbone_that_changes_by_a_bit_is_noticed() -> None:
    with pytest.raises(BackboneChanged, match="changed while its head was trained: seen"):
        train_head(Drifting(), new_head(16, 3, 0.01, 0), source(), Plan(21, 8, 1, 0), VIEW, lr_at, 0.9, 0.0, CPU)


def test_the_backbone_sees_evaluation_mode_and_keeps_its_statistics() -> None:
    network = backbone().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train_head(network, new_head(16, 3, 0.01, 0), source(), Plan(21, 8, 1, 0), VIEW, lr_at, 0.9, 0.0, CPU)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_loss_that_leaves_the_numbers_stops() -> None:
    with pytest.raises(FloatingPointError, match=r"lower official\.lr"):
        train_head(
            backbone(), new_head(16, 3, 0.01, 0), source(), Plan(21, 8, 3, 0), VIEW, lambda _: 1e38, 0.9, 0.0, CPU
        )


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
