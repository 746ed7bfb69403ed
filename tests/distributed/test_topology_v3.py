"""Law 3 for MoCo v3: keys, losses and gradients of two processes, or of micro-batches, are those of one."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moco.data.loader import Batch
from moco.distributed import averaged_running_statistics, broadcast_module, rank, world_size, wrap_ddp
from moco.methods.moco_v3 import MoCoV3
from moco.models.encoder import build_encoder, build_predictor
from moco.runs.checkpoint import copy_to_host
from moco.training.build import set_batch_norm_calls
from moco.training.step import StepSettings, train_step
from tests.distributed.launch import run_ranks
from tests.distributed.test_topology import largest_difference, smooth

LR = 0.01  # BN over a few vectors amplifies rounding from step to step; larger steps would do so sooner
STEPS, BATCH, GROUP = 4, 32, 8
CLOSE = 1e-4  # absolute: gradients have norms of 20 and losses are 14; keys differ by at most 2e-6


class Recording(MoCoV3):
    seen: dict[int, Tensor]

    def encode_keys(self, *arguments: Any) -> dict[int, Tensor]:
        self.seen = super().encode_keys(*arguments)
        return self.seen


def trajectory(bn: Any, accumulate: int, shuffle: bool) -> dict[str, Any]:
    torch.manual_seed(rank())  # each rank has other weights until the broadcast copies those of rank 0
    encoder = smooth(build_encoder("convnet", {"width": 4}, 2, 24, 8, bn, GROUP, head_norm=True))
    method = Recording(encoder, smooth(build_predictor(8, 24, 2, True, bn, GROUP)), temperature=1.0)
    broadcast_module(method)
    set_batch_norm_calls(method, accumulate)
    forward = wrap_ddp(method, torch.device("cpu"))
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    local = BATCH // world_size()
    mine = slice(rank() * local, (rank() + 1) * local)
    losses, gradients, keys = [], [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(BATCH, 3, 12, 12, generator=generator) for _ in range(2)]
        orders = [torch.randperm(BATCH, generator=generator).numpy() for _ in range(2)] if shuffle else None
        index = torch.arange(BATCH)[mine]
        measures = train_step(
            method,
            forward,
            optimizer,
            scaler,
            Batch(index, [v[mine] for v in views]),
            orders,
            StepSettings(LR, 0.9, accumulate),
        )
        keys.append(method.seen)
        losses.append({name: value.item() for name, value in measures.items()})
        gradients.append({name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None})
    with averaged_running_statistics(method):
        state = copy_to_host(method.state_dict())
    return {"keys": keys, "losses": losses, "gradients": gradients, "method": state}


SCENARIOS: dict[str, tuple[str, int, bool]] = {  # bn, accumulate, shuffle
    "grouped": ("grouped", 1, False),
    "shuffled": ("grouped", 1, True),
    "2 micro-batches": ("grouped", 2, False),
    "sync": ("sync", 1, False),
    "batch": ("batch", 1, False),
}


def all_scenarios() -> dict[str, dict[str, Any]]:
    return {name: trajectory(*scenario) for name, scenario in SCENARIOS.items()}


@cache
def on(world: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(world, all_scenarios)


@pytest.mark.parametrize("scenario", ["grouped", "shuffled"])
def test_two_processes_equal_one(scenario: str) -> None:
    alone = on(1)[0][scenario]
    assert alone["keys"][0][0].shape == (BATCH, 8)
    assert {name.split(".")[0] for name in alone["gradients"][0]} == {"encoder", "predictor"}
    for results in on(2):
        assert largest_difference(results[scenario], alone) < CLOSE


@pytest.mark.parametrize("world", [1, 2])
def test_accumulation_changes_nothing(world: int) -> None:
    for results in on(world):
        assert largest_difference(results["2 micro-batches"], on(1)[0]["grouped"]) < CLOSE


def test_synchronized_bn_over_two_processes_equals_one() -> None:
    """Only the first step: the formula differs from F.batch_norm's, and rounding errors grow from step to step."""
    alone = on(1)[0]["sync"]
    for results in on(2):
        for part in ("keys", "losses", "gradients"):
            assert largest_difference(results["sync"][part][:1], alone[part][:1]) < 2e-5


def test_the_comparison_notices_plain_bn_and_the_shuffle() -> None:
    assert largest_difference(on(2)[0]["batch"]["losses"], on(1)[0]["batch"]["losses"]) > 1e-3
    assert largest_difference(on(1)[0]["shuffled"]["keys"], on(1)[0]["grouped"]["keys"]) > 1e-3
