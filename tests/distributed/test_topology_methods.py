"""Law 3 for methods without a file of their own: two processes, or micro-batches, compute the steps of one process."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo
from moco.data.loader import Batch
from moco.distributed import averaged_running_statistics, broadcast_module, rank, world_size, wrap_ddp
from moco.methods.densecl import DenseCL
from moco.methods.distill import Distill
from moco.methods.moco_v3 import MoCoV3
from moco.methods.nnclr import NNCLR
from moco.methods.ressl import ReSSL
from moco.models.dense import build_dense_encoder
from moco.models.encoder import build_encoder, build_predictor
from moco.models.norm import BatchNormKind
from moco.runs.checkpoint import copy_to_host
from moco.training.build import set_batch_norm_calls
from moco.training.step import StepSettings, train_step
from tests.distributed.launch import run_ranks
from tests.distributed.test_topology import largest_difference, smooth

STEPS, BATCH, GROUP, C = 4, 32, 8, 8


def encoder(bn: BatchNormKind) -> nn.Module:
    return smooth(build_encoder("convnet", {"width": 4}, 2, 24, C, bn, GROUP, head_norm=True))


def nnclr(bn: BatchNormKind) -> nn.Module:
    return NNCLR(encoder(bn), smooth(build_predictor(C, 24, 2, False, bn, GROUP)), KeyQueue(80, C), 0.3)


def ressl(bn: BatchNormKind) -> nn.Module:
    return ReSSL(encoder(bn), KeyQueue(80, C))


def distill(bn: BatchNormKind, queue: bool = False) -> nn.Module:
    student = encoder(bn)
    torch.manual_seed(5)  # every rank has the same teacher
    return Distill(student, encoder("batch"), KeyQueue(80, C) if queue else None, teacher_temperature=0.1, views=2)


def densecl(bn: BatchNormKind, by_crops: bool = False) -> nn.Module:
    base = build_encoder("convnet", {"width": 4}, 2, 24, C, bn, GROUP)
    dense = smooth(build_dense_encoder(base, 2, 24, C, size=12, channels=3, grid=0))
    return DenseCL(dense, KeyQueue(80, C), KeyQueue(80, C), by_crops=by_crops)  # type: ignore[arg-type] # smoothed


def moco_v2(bn: BatchNormKind) -> nn.Module:
    return MoCo(encoder(bn), KeyQueue(80, C), symmetric=True)


def moco_v3(bn: BatchNormKind) -> nn.Module:
    return MoCoV3(encoder(bn), smooth(build_predictor(C, 24, 2, False, bn, GROUP)), 0.3)


METHODS: dict[str, Callable[[BatchNormKind], nn.Module]] = {
    "densecl": densecl,
    "densecl by crops": partial(densecl, by_crops=True),
    "distill": distill,
    "distill with a queue": partial(distill, queue=True),
    "moco with small views": moco_v2,
    "moco_v3 with small views": moco_v3,
    "nnclr": nnclr,
    "ressl": ressl,
}
SCENARIOS: dict[str, tuple[BatchNormKind, int]] = {  # bn, accumulate
    "grouped": ("grouped", 1),
    "2 micro-batches": ("grouped", 2),
    "sync": ("sync", 1),
    "batch": ("batch", 1),
}


def crops(generator: torch.Generator) -> Tensor:
    """Return random places of two views, (2, BATCH, 3, 3); the images have different numbers of matched cells."""
    places = torch.eye(3, dtype=torch.float64).repeat(2, BATCH, 1, 1)
    sides = 0.3 + 0.6 * torch.rand(2, BATCH, 2, generator=generator, dtype=torch.float64)
    places[:, :, 0, 0], places[:, :, 1, 1] = sides.unbind(2)
    places[:, :, :2, 2] = (1 - sides) * torch.rand(2, BATCH, 2, generator=generator, dtype=torch.float64)
    return places


def trajectory(name: str, bn: BatchNormKind, accumulate: int) -> dict[str, Any]:
    """Return measures and gradients of a few steps, and the state at their end."""
    torch.manual_seed(rank())  # the broadcast copies the weights of rank 0
    method: Any = METHODS[name](bn)
    broadcast_module(method)
    set_batch_norm_calls(method, accumulate)
    forward = wrap_ddp(method, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    local = BATCH // world_size()
    mine = slice(rank() * local, (rank() + 1) * local)
    measures, gradients = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        sizes = [12, 12, 8, 8] if "small views" in name else [12, 12]
        views = [torch.randn(BATCH, 3, size, size, generator=generator)[mine] for size in sizes]
        orders = [torch.randperm(BATCH, generator=generator).numpy() for _ in sizes]
        index = (torch.arange(BATCH) + step * BATCH)[mine]
        places = crops(generator)[:, mine] if "crops" in name else None
        settings = StepSettings(0.01, 0.9, accumulate)
        measures.append(train_step(method, forward, optimizer, scaler, Batch(index, views, places), orders, settings))
        gradients.append({name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None})
    with averaged_running_statistics(method):
        state = copy_to_host(method.state_dict())
    return {"measures": measures, "gradients": gradients, "state": state}


def everything() -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {each: trajectory(name, *SCENARIOS[each]) for each in SCENARIOS} for name in METHODS}


@cache
def on(world: int) -> list[dict[str, dict[str, dict[str, Any]]]]:
    return run_ranks(world, everything)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_and_micro_batches_equal_one_process(name: str) -> None:
    alone = on(1)[0][name]["grouped"]
    assert max(float(each.abs().max()) for step in alone["gradients"] for each in step.values()) > 1e-2
    for world in (1, 2):
        for of_rank in on(world):
            for scenario in ("grouped", "2 micro-batches"):
                assert largest_difference(of_rank[name][scenario], alone) < 1e-4, (world, scenario)


@pytest.mark.parametrize("name", METHODS)
def test_synchronized_bn_over_two_processes_equals_one(name: str) -> None:
    """Compare the first step: the formula is not that of F.batch_norm, and rounding grows from step to step."""
    alone = on(1)[0][name]["sync"]
    for of_rank in on(2):
        for part in ("measures", "gradients"):
            assert largest_difference(of_rank[name]["sync"][part][:1], alone[part][:1]) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_the_comparison_notices_another_computation(name: str) -> None:
    """With BN over the images of a process, two processes compute something else."""
    assert largest_difference(on(2)[0][name]["batch"]["gradients"], on(1)[0][name]["batch"]["gradients"]) > 1e-3
