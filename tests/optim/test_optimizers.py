"""Schedules compared with closed forms, parameter groups, and the optimizers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moco.config import ConfigError, OptimConfig, TrainConfig, check
from moco.methods.moco_config import MoCoConfig
from moco.models.norm import GroupedBatchNorm
from moco.optim.optimizers import build_optimizer, parameter_groups
from moco.optim.schedules import lr_factor, momentum_at, scaled_lr

PER_EPOCH, EPOCHS = 5, 20  # steps
TOTAL = PER_EPOCH * EPOCHS


def cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


# ---- learning rate ----


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (TOTAL // 4, (1 + math.sqrt(0.5)) / 2), (TOTAL // 2, 0.5), (TOTAL, 0.0)]
)
@pytest.mark.parametrize("per_epoch", [False, True])
def test_cosine_at_known_points(step: int, expected: float, per_epoch: bool) -> None:
    factor = lr_factor(step, PER_EPOCH, EPOCHS, OptimConfig(per_epoch=per_epoch))
    assert factor == pytest.approx(expected, abs=1e-12)


def test_cosine_changes_per_step_or_per_epoch() -> None:
    for step in range(TOTAL):
        assert lr_factor(step, PER_EPOCH, EPOCHS, OptimConfig()) == pytest.approx(cosine(step / TOTAL))
        # facebookresearch/moco, adjust_learning_rate: 0.5 * (1 + cos(pi * epoch / epochs))
        held = lr_factor(step, PER_EPOCH, EPOCHS, OptimConfig(per_epoch=True))
        assert held == pytest.approx(0.5 * (1.0 + math.cos(math.pi * (step // PER_EPOCH) / EPOCHS)))


def test_cosine_ends_at_a_fraction_of_the_peak() -> None:
    factors = [lr_factor(step, PER_EPOCH, EPOCHS, OptimConfig(lr_end=0.2)) for step in (0, TOTAL // 2, TOTAL)]
    assert factors == pytest.approx([1.0, 0.6, 0.2])


@pytest.mark.parametrize("per_epoch", [False, True])
def test_step_schedule_multiplies_at_each_milestone(per_epoch: bool) -> None:
    def factor(step: int) -> float:
        return lr_factor(
            step, PER_EPOCH, EPOCHS, OptimConfig(schedule="step", milestones=[12, 16], per_epoch=per_epoch)
        )

    at = [12 * PER_EPOCH - 1, 12 * PER_EPOCH, 16 * PER_EPOCH - 1, 16 * PER_EPOCH, TOTAL - 1]
    assert [factor(step) for step in at] == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])


def test_constant_stays_at_one() -> None:
    assert {lr_factor(step, PER_EPOCH, EPOCHS, OptimConfig(schedule="constant")) for step in range(TOTAL)} == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_warm_up_is_linear_and_the_schedule_follows(schedule: str) -> None:
    def factor(step: int) -> float:
        return lr_factor(step, PER_EPOCH, EPOCHS, OptimConfig(schedule=schedule, milestones=[15], warmup_epochs=4))

    warm = 4 * PER_EPOCH
    assert [factor(step) for step in range(warm)] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert factor(warm) == pytest.approx(1.0)
    if schedule == "cosine":  # over the remaining epochs
        for step in range(warm, TOTAL):
            assert factor(step) == pytest.approx(cosine((step - warm) / (TOTAL - warm)))


def test_warm_up_from_zero_is_moco_v3s() -> None:
    def official(epoch: float) -> float:  # main_moco.py, adjust_learning_rate(epoch + i / iters_per_epoch)
        if epoch < 4:
            return epoch / 4
        return 0.5 * (1.0 + math.cos(math.pi * (epoch - 4) / (EPOCHS - 4)))

    optim = OptimConfig(warmup_epochs=4, warmup_from_zero=True)
    for step in range(TOTAL):
        assert lr_factor(step, PER_EPOCH, EPOCHS, optim) == pytest.approx(official(step / PER_EPOCH), abs=1e-14)
    assert lr_factor(0, PER_EPOCH, EPOCHS, optim) == 0.0


def test_warm_up_from_zero_per_epoch_is_refused() -> None:
    optim = OptimConfig(warmup_epochs=1, warmup_from_zero=True, per_epoch=True)
    with pytest.raises(ConfigError, match=r"optim\.warmup_from_zero=true.*optim\.per_epoch=true"):
        check(TrainConfig(method=MoCoConfig(), optim=optim))


def test_warm_up_per_epoch_rises_once_per_epoch() -> None:
    factors = [
        lr_factor(step, PER_EPOCH, EPOCHS, OptimConfig(warmup_epochs=4, per_epoch=True)) for step in range(0, TOTAL, 2)
    ]
    firsts = [(step // PER_EPOCH + 1) / 4 for step in range(0, 4 * PER_EPOCH, 2)]
    assert factors[: len(firsts)] == pytest.approx(firsts)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.25, 1.0, 1.3, 3.0, 19.9])
@pytest.mark.parametrize("per_epoch", [False, True])
def test_factor_stays_in_0_to_1_for_any_warm_up(warmup: float, per_epoch: bool) -> None:
    for schedule in ("cosine", "step", "constant"):
        optim = OptimConfig(schedule=schedule, milestones=[10], warmup_epochs=warmup, per_epoch=per_epoch)
        factors = [lr_factor(step, PER_EPOCH, EPOCHS, optim) for step in range(TOTAL)]
        assert min(factors) > 0
        assert max(factors) <= 1
        assert max(factors) == pytest.approx(1.0, abs=0.1)


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match=r"optim\.schedule='linear' must be cosine, step or constant"):
        lr_factor(0, PER_EPOCH, EPOCHS, OptimConfig(schedule="linear"))


@pytest.mark.parametrize(("batch", "base", "expected"), [(256, 256, 0.03), (4096, 256, 0.48), (64, None, 0.03)])
def test_linear_scaling_rule(batch: int, base: int | None, expected: float) -> None:
    assert scaled_lr(0.03, batch, base) == pytest.approx(expected)


# ---- momentum of the key encoder ----


def test_momentum_goes_from_start_to_end_along_half_a_cosine() -> None:
    assert momentum_at(0, TOTAL, 0.99, 1.0) == pytest.approx(0.99)
    assert momentum_at(TOTAL // 2, TOTAL, 0.99, 1.0) == pytest.approx(0.995)
    assert momentum_at(TOTAL, TOTAL, 0.99, 1.0) == pytest.approx(1.0)
    for step in range(TOTAL):
        # moco-v3, adjust_moco_momentum: 1 - 0.5 * (1 + cos(pi * epoch / epochs)) * (1 - moco_m)
        expected = 1.0 - 0.5 * (1.0 + math.cos(math.pi * step / TOTAL)) * (1.0 - 0.99)
        assert momentum_at(step, TOTAL, 0.99, 1.0) == pytest.approx(expected)


def test_momentum_without_an_end_is_constant() -> None:
    assert {momentum_at(step, TOTAL, 0.999, None) for step in range(TOTAL)} == {0.999}


# ---- parameter groups ----


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        GroupedBatchNorm(4, 2),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
    )


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        ((), set()),
        (("bias",), {"0.bias", "1.bias", "2.bias", "3.bias", "4.bias", "5.bias"}),
        (("norm",), {f"{layer}.{name}" for layer in (1, 2, 4, 5) for name in ("weight", "bias")}),
        (
            ("bias", "norm"),
            {f"{layer}.{name}" for layer in (1, 2, 4, 5) for name in ("weight", "bias")} | {"0.bias", "3.bias"},
        ),
    ],
)
def test_excluded_parameters_have_no_weight_decay_and_none_is_missing(
    exclude: tuple[str, ...], left_out: set[str], network: nn.Module
) -> None:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decay: dict[str, object] = {}
    for group in parameter_groups(network, 0.1, exclude):
        assert isinstance(group["params"], list)
        for parameter in group["params"]:
            assert names[id(parameter)] not in decay
            decay[names[id(parameter)]] = group["weight_decay"]
    assert decay == {name: 0.0 if name in left_out else 0.1 for name in names.values()}


def test_frozen_parameters_are_in_no_group(network: nn.Module) -> None:
    network[0].requires_grad_(False)  # type: ignore[index]
    grouped = [parameter for group in parameter_groups(network, 0.1, ("bias",)) for parameter in group["params"]]  # type: ignore[attr-defined]
    assert len(grouped) == len(list(network.parameters())) - 2
    assert all(parameter.requires_grad for parameter in grouped)


# ---- optimizers ----


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.1), ("adamw", 0.1), ("lars", 0.1), ("lars_timm", 50.0)])
def test_each_optimizer_reduces_a_quadratic(name: str, lr: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    target = torch.randn(3, 4)

    def distance() -> Tensor:
        return (layer.weight - target).square().sum() + layer.bias.square().sum()

    optimizer = build_optimizer(layer, OptimConfig(name=name, momentum=0.5, trust=0.5 if name == "lars" else 0.001), lr)
    start = distance().item()
    for _ in range(60):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    assert distance().item() < 0.05 * start


def test_sgd_step_is_momentum_and_decay_by_hand() -> None:
    layer = nn.Linear(2, 1)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer(layer, OptimConfig(weight_decay=0.01, exclude=["bias"]), lr=0.1)
    velocity_w, velocity_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(3):
        layer.weight.grad, layer.bias.grad = torch.full_like(weight, step + 1), torch.full_like(bias, 2.0)
        optimizer.step()
        velocity_w = 0.9 * velocity_w + (step + 1) + 0.01 * weight
        velocity_b = 0.9 * velocity_b + 2.0
        weight, bias = weight - 0.1 * velocity_w, bias - 0.1 * velocity_b
        torch.testing.assert_close(layer.weight.detach(), weight)
        torch.testing.assert_close(layer.bias.detach(), bias)


def test_lars_adapts_only_weights_of_two_or_more_dimensions() -> None:
    def moved(scale: float) -> tuple[Tensor, Tensor]:
        layer = nn.Linear(2, 2)
        nn.init.ones_(layer.weight)
        nn.init.ones_(layer.bias)
        optimizer = build_optimizer(
            layer, OptimConfig(name="lars", momentum=0.0, weight_decay=1e-6, exclude=["bias"]), lr=1.0
        )
        layer.weight.grad, layer.bias.grad = torch.full((2, 2), scale), torch.full((2,), scale)
        optimizer.step()
        return 1 - layer.weight.detach(), 1 - layer.bias.detach()

    weight, bias = moved(1.0)
    weight_10, bias_10 = moved(10.0)
    torch.testing.assert_close(weight_10, weight, rtol=1e-3, atol=0)  # trust 0.001 x |w| / |g| takes the scale out
    torch.testing.assert_close(weight, torch.full((2, 2), 1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(bias, torch.ones(2))
    torch.testing.assert_close(bias_10, 10 * torch.ones(2))


@pytest.mark.parametrize(("name", "kind"), [("sgd", lambda: torch.optim.SGD), ("adamw", lambda: torch.optim.AdamW)])
def test_names_select_torch_optimizers(name: str, kind: Callable[[], type], network: nn.Module) -> None:
    optimizer = build_optimizer(
        network, OptimConfig(name=name, momentum=0.8, betas=[0.7, 0.95], weight_decay=0.1, exclude=["norm"]), lr=0.5
    )
    assert type(optimizer) is kind()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    expected = {"sgd": ("momentum", 0.8), "adamw": ("betas", (0.7, 0.95))}[name]
    assert all(group[expected[0]] == expected[1] for group in optimizer.param_groups)


def test_unknown_optimizer_is_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"optim\.name='lion' must be sgd, lars, lars_timm or adamw"):
        build_optimizer(network, OptimConfig(name="lion"))
