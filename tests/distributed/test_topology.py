"""Law 3: one process with batch B, two with B/2 and four with B/4 compute the same steps, and so does accumulation."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import ArraySource
from moco.data.view import View
from moco.distributed import averaged_running_statistics, broadcast_module, gather, rank, world_size, wrap_ddp
from moco.models.encoder import build_encoder
from moco.runs.checkpoint import copy_to_host
from moco.training.build import set_batch_norm_calls
from moco.training.step import StepSettings, train_step
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")
STEPS, BATCH, GROUP = 5, 32, 4


def smooth(module: nn.Module) -> nn.Module:
    """SiLU for ReLU: at ReLU's kink one rounding of 1e-7 flips a gradient, and the comparison would be of luck."""
    for name, child in module.named_children():
        setattr(module, name, nn.SiLU() if isinstance(child, nn.ReLU) else smooth(child))
    return module


# Of each number of channels: the type of the images, and the view.
COLORS: dict[str, Any] = dict(jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, gray_p=0.2)
BANDS: dict[str, Any] = dict(jitter_p=0.8, brightness=0.4, contrast=0.4, per_channel=True, channel_dropout_p=0.2)
BANDS |= dict(noise=(0.0, 0.1), quarter_turn_p=0.75, mean=(0.5,) * 4, std=(0.3,) * 4)
IMAGES = {
    3: (torch.uint8, View(16, (0.3, 1.0), flip_p=0.5, **COLORS)),
    4: (torch.uint16, View(16, (0.3, 1.0), flip_p=0.5, **BANDS)),
}


def trajectory(
    symmetric: bool, accumulate: int, bn: str, shuffle: bool, channels: int = 3, double: bool = False
) -> dict[str, Any]:
    """Five steps of a small MoCo, with SiLU or in float64 with ReLU; what every rank holds at their end."""
    generator = torch.Generator().manual_seed(0)
    dtype, view = IMAGES[channels]
    images = torch.randint(torch.iinfo(dtype).max + 1, (70, channels, 16, 16), generator=generator)
    source = ArraySource(images.to(dtype), [str(i) for i in range(70)])
    plan = Plan(70, BATCH, 3, seed=1, rank=rank(), processes=world_size())
    # Ranks start from different weights on purpose: the broadcast must make them rank 0's.
    torch.manual_seed(rank())
    encoder = build_encoder("convnet", {"width": 4, "channels": channels}, 2, 0, 16, bn, GROUP)  # type: ignore[arg-type]
    if not double:
        smooth(encoder)
    method = MoCo(encoder, KeyQueue(80, 16), 0.2, symmetric)  # 80: the ring wraps around within a batch
    method.to(torch.float64 if double else torch.float32)
    broadcast_module(method)
    set_batch_norm_calls(method, accumulate)
    forward = wrap_ddp(method, CPU)
    optimizer = torch.optim.SGD(method.encoder.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses, gradients, seen = [], [], []
    stream = batches(source, plan, (view, view), CPU, workers=0)
    for step in range(STEPS):
        batch = next(stream)
        seen.append([gather(each) for each in (batch.index, *batch.views)])
        if double:
            batch = replace(batch, views=[each.double() for each in batch.views])
        shuffles = plan.shuffles(step, 2) if shuffle else None
        settings = StepSettings(0.05, 0.9, accumulate)
        measures = train_step(method, forward, optimizer, scaler, batch, shuffles, settings)
        losses.append(measures["loss"].item())
        gradients.append({name: p.grad.clone() for name, p in method.encoder.named_parameters() if p.grad is not None})
    with averaged_running_statistics(method):
        state = copy_to_host(method.state_dict())
    return {"views": seen, "losses": losses, "gradients": gradients, "method": state}


SCENARIOS: dict[str, tuple[Any, ...]] = {  # symmetric, accumulate, bn, shuffle, channels if not 3
    "asymmetric": (False, 1, "grouped", True),
    "symmetric": (True, 1, "grouped", True),
    "symmetric, 2 micro-batches": (True, 2, "grouped", True),
    "symmetric, 4 micro-batches": (True, 4, "grouped", True),
    "sync": (False, 1, "sync", False),
    "batch": (False, 1, "batch", False),
    "4 channels of 16 bits": (False, 1, "grouped", True, 4),
    "float64": (False, 1, "grouped", True, 3, True),
}


def all_scenarios(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: trajectory(*SCENARIOS[name]) for name in names}


@cache
def on(world: int) -> list[dict[str, dict[str, Any]]]:
    """Each rank's scenarios; starting processes is what costs time, so each world starts once."""
    names = ("asymmetric", "symmetric", "4 channels of 16 bits") if world == 4 else tuple(SCENARIOS)
    return run_ranks(world, all_scenarios, names)


def largest_difference(a: Any, b: Any) -> float:
    if isinstance(a, Tensor):
        return float((a.double() - b.double()).abs().max())
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(largest_difference(a[key], b[key]) for key in a)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max(largest_difference(x, y) for x, y in zip(a, b, strict=True))
    return float(abs(a - b))


@pytest.mark.parametrize("scenario", ["asymmetric", "symmetric", "4 channels of 16 bits"])
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one(world: int, scenario: str) -> None:
    alone = on(1)[0][scenario]
    for results in on(world):
        assert torch.equal(results[scenario]["method"]["queue.index"], alone["method"]["queue.index"])
        assert largest_difference(results[scenario], alone) < 1e-5


def test_the_difference_is_rounding() -> None:
    """In float64, steps with ReLU agree far better than float32 could: what is left is the order of sums."""
    alone = on(1)[0]["float64"]
    for results in on(2):
        assert largest_difference(results["float64"]["losses"], alone["losses"]) < 1e-12
        assert largest_difference(results["float64"]["gradients"], alone["gradients"]) < 1e-12
        assert largest_difference(results["float64"]["method"], alone["method"]) < 1e-12


@pytest.mark.parametrize("scenario", ["asymmetric", "4 channels of 16 bits"])
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_views_of_one_bit_for_bit(world: int, scenario: str) -> None:
    alone = on(1)[0][scenario]["views"]
    for results in on(world):
        together = results[scenario]["views"]
        assert len(together) == len(alone) == STEPS
        for step, expected in zip(together, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))


@pytest.mark.parametrize("scenario", ["symmetric, 2 micro-batches", "symmetric, 4 micro-batches"])
@pytest.mark.parametrize("world", [1, 2])
def test_accumulation_changes_nothing(world: int, scenario: str) -> None:
    for results in on(world):
        assert largest_difference(results[scenario], on(1)[0]["symmetric"]) < 1e-5


def test_synchronized_bn_over_two_processes_equals_one() -> None:
    """The first step: the formula is another one than F.batch_norm's, and rounding grows fast from step to step."""
    alone = on(1)[0]["sync"]
    for results in on(2):
        assert largest_difference(results["sync"]["losses"][:1], alone["losses"][:1]) < 1e-5
        assert largest_difference(results["sync"]["gradients"][:1], alone["gradients"][:1]) < 1e-5


def test_the_comparison_notices_plain_bn() -> None:
    """BN over whatever a process sees is the topology in the mathematics: the check above must be able to fail."""
    assert largest_difference(on(2)[0]["batch"]["losses"], on(1)[0]["batch"]["losses"]) > 1e-3


def test_the_losses_are_not_trivial() -> None:
    losses = np.array(on(1)[0]["asymmetric"]["losses"])
    assert np.isfinite(losses).all()
    assert len(set(losses.round(6))) == STEPS
