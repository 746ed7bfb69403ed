"""Sharding: steps, states and results of FSDP equal those of DDP, and each process holds its share of the memory."""

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo
from moco.config import ConfigError, OptimConfig, TrainConfig, check
from moco.data.loader import Batch
from moco.distributed import broadcast_module, rank, world_size, wrap_ddp
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3 import MoCoV3
from moco.methods.simclr import SimCLR
from moco.models.encoder import Encoder, build_encoder, build_predictor
from moco.models.modes import checkpoint_activations
from moco.optim.optimizers import build_optimizer
from moco.runs.checkpoint import copy_to_host
from moco.runtime.precision import PRECISIONS
from moco.runtime.sharding import full_state, is_sharded, shard, whole_weights
from moco.training.build import distribute, set_batch_norm_calls
from moco.training.step import StepSettings, train_step
from tests.distributed.launch import run_ranks
from tests.distributed.test_topology import largest_difference, smooth
from tests.distributed.test_topology_methods import METHODS as OTHERS
from tests.distributed.test_topology_methods import encoder as convnet

CPU = torch.device("cpu")
STEPS, BATCH, SIZE, C = 5, 32, 16, 8
VIT = {"dim": 32, "depth": 2, "heads": 2, "img_size": SIZE, "patch_size": 8}


def vit(bn: Any) -> nn.Module:
    encoder = smooth(build_encoder("vit", VIT, 3, 64, C, bn, 8, head_norm=True))
    return MoCoV3(encoder, smooth(build_predictor(C, 64, 2, True, bn, 8)))


METHODS: dict[str, Callable[[Any], nn.Module]] = OTHERS | {"vit": vit, "simclr": lambda bn: SimCLR(convnet(bn), 0.3)}
# The method, its BN, the optimizer, and what differs from float32 without micro-batches.
SCENARIOS: dict[str, tuple[Any, ...]] = {
    "vit": ("vit", "sync", "adamw", {}),
    "activations": ("vit", "sync", "adamw", {"activations": True}),
    "clip": ("vit", "grouped", "adamw", {"clip": 0.5, "accumulate": 2}),
    "fp16": ("vit", "sync", "adamw", {"precision": "fp16"}),
    "moco": ("moco with small views", "grouped", "sgd", {"accumulate": 2}),
    "moco_v3": ("moco_v3 with small views", "sync", "lars", {}),
    "nnclr": ("nnclr", "grouped", "lars_timm", {}),
    **{name: (name, "grouped", "sgd", {}) for name in ("densecl", "distill with a queue", "ressl", "simclr")},
}


def steps(
    method: nn.Module,
    forward: nn.Module,
    optimizer: torch.optim.Optimizer,
    sizes: list[int],
    accumulate: int = 1,
    clip: float = 0.0,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Return measures of a few steps, and whole states at their end, which rank 0 holds."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, enabled=precision == "fp16")  # overflows at first
    dtype = next(method.parameters()).dtype
    local = BATCH // world_size()
    mine = slice(rank() * local, (rank() + 1) * local)
    measures = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(BATCH, 3, size, size, generator=generator)[mine] for size in sizes]
        orders = [torch.randperm(BATCH, generator=generator).numpy() for _ in sizes]
        batch = Batch((torch.arange(BATCH) + step * BATCH)[mine], [each.to(dtype) for each in views])
        settings = StepSettings(0.01, 0.9, accumulate, PRECISIONS[precision], clip)
        measured = train_step(method, forward, optimizer, scaler, batch, orders, settings)  # type: ignore[arg-type]
        measures.append(measured | {"scale": scaler.get_scale()})
    weights, moments = full_state(method, optimizer)
    return copy_to_host({"measures": measures, "weights": weights, "moments": moments})  # type: ignore[no-any-return]


def held(tensors: list[Any]) -> tuple[int, int]:
    """Return how many numbers this process holds of sharded tensors, and how many there are."""
    whole = [each for each in tensors if each.dim() > 0]
    return sum(each.to_local().numel() for each in whole), sum(each.numel() for each in whole)


def trajectories(name: str) -> dict[str, Any]:
    """Train with DDP and sharded from the same weights."""
    kind, bn, optim, settings = SCENARIOS[name]
    sizes = [12, 12, 8, 8] if "small views" in kind else [SIZE, SIZE]
    found: dict[str, Any] = {}
    for sharded in (False, True):
        torch.manual_seed(rank())  # the broadcast copies the weights of rank 0
        method: Any = METHODS[kind](bn)
        if settings.get("precision") != "fp16":
            method.double()  # so that only mistakes make a difference
        broadcast_module(method)
        set_batch_norm_calls(method, settings.get("accumulate", 1))
        if settings.get("activations"):
            checkpoint_activations(method.encoder.backbone, "vit")
        forward = method if sharded else wrap_ddp(method, CPU)
        if sharded:
            originals = [weakref.ref(parameter) for parameter in method.parameters()]
            shard(method, CPU)
            found["freed"] = all(each() is None for each in originals)
        optimizer = build_optimizer(method, OptimConfig(name=optim, weight_decay=0.01))
        options = {key: value for key, value in settings.items() if key != "activations"}
        found["sharded" if sharded else "ddp"] = steps(method, forward, optimizer, sizes, **options)
        images = torch.ones(2, 3, SIZE, SIZE) if "small views" not in kind else torch.ones(2, 3, 12, 12)
        dtype = next(method.parameters()).dtype
        with torch.no_grad(), whole_weights(method.encoder):  # rank 0 alone: a collective would wait for the others
            features = method.encoder.backbone.eval()(images.to(dtype)) if rank() == 0 else None
        found["sharded" if sharded else "ddp"]["features"] = {} if features is None else features
    found["weights"] = held(list(method.parameters()))
    found["moments"] = held([each for values in optimizer.state.values() for each in values.values()])
    return found


def several(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: trajectories(name) for name in names}


@cache
def on(world: int, names: tuple[str, ...]) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(world, several, names)


FAST = ("vit", "moco", "moco_v3")
SLOW = ("vit", *(name for name in SCENARIOS if name not in FAST))
FOUR = ("vit",)


@pytest.mark.parametrize(
    ("world", "names", "name"),
    [
        *((2, FAST, name) for name in FAST),
        *(pytest.param(2, SLOW, name, marks=pytest.mark.slow) for name in SLOW[1:]),
        *(pytest.param(4, FOUR, name, marks=pytest.mark.long) for name in FOUR),
    ],
)
def test_sharded_steps_equal_those_of_ddp(world: int, names: tuple[str, ...], name: str) -> None:
    found = on(world, names)[0][name]
    assert found["sharded"]["weights"].keys() == found["ddp"]["weights"].keys()
    assert found["sharded"]["moments"]["state"].keys() == found["ddp"]["moments"]["state"].keys()
    for part in ("measures", "weights", "features"):
        assert largest_difference(found["sharded"][part], found["ddp"][part]) < 1e-5
    assert largest_difference(found["sharded"]["moments"]["state"], found["ddp"]["moments"]["state"]) < 1e-5
    assert len({float(each["loss"]) for each in found["ddp"]["measures"]}) == STEPS


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing() -> None:
    """With DDP; the test above compares DDP with sharding."""
    checkpointed, plain = (on(2, SLOW)[0][name]["ddp"] for name in ("activations", "vit"))
    assert largest_difference(checkpointed["measures"], plain["measures"]) == 0
    assert largest_difference(checkpointed["weights"], plain["weights"]) == 0


@pytest.mark.parametrize(("world", "names"), [(2, FAST), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_each_process_holds_its_share(world: int, names: tuple[str, ...]) -> None:
    """Tensors whose first dimension is 1, such as the class token, are not divided: rank 0 holds them."""
    for of_rank in on(world, names):
        assert of_rank["vit"]["freed"]
        for part in ("weights", "moments"):
            here, total = of_rank["vit"][part]
            assert total > 20_000
            assert here / total == pytest.approx(1 / world, abs=0.01)


class Scaled(nn.Module):
    """A plug-in's method with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))


class Direct(nn.Module):
    """A backbone that calls the forward of a layer, not the layer, as timm's HRNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers[0].forward(images).mean(dim=(2, 3))
        return out


def refused() -> tuple[str, str]:
    with pytest.raises(ConfigError) as outside:
        shard(Scaled(), CPU)
    config = TrainConfig(method=MoCoConfig(), shard=True)
    with pytest.raises(ConfigError) as direct:
        distribute(config, MoCo(Encoder(Direct(), nn.Linear(4, C)), KeyQueue(8, C)), CPU)
    return str(outside.value), str(direct.value)


@pytest.mark.slow
def test_weights_that_cannot_be_divided_are_refused() -> None:
    for outside, direct in run_ranks(2, refused):
        assert outside == "shard=true cannot divide the parameter scale: set shard=false"
        assert direct == "model.backbone=resnet50 does not work with shard=true: set shard=false"


@pytest.mark.parametrize("name", ["shard", "activation_checkpointing"])
@pytest.mark.parametrize("other", ["compile", "cuda_graph"])
def test_compilation_and_graphs_are_refused(name: str, other: str) -> None:
    config = TrainConfig(method=MoCoConfig(), device="cuda")
    for each in (name, other):
        setattr(config, each, True)
    with pytest.raises(ConfigError, match=rf"{other}=true with {name}=true .* {other}=false"):
        check(config)


def test_a_learned_temperature_is_refused() -> None:
    method = MoCoConfig(temperature_schedule="learned")
    with pytest.raises(ConfigError, match=r"temperature_schedule=learned .* shard=true .* or shard=false"):
        check(TrainConfig(method=method, shard=True))
    check(TrainConfig(method=method))


def test_one_process_is_not_sharded() -> None:
    method = MoCo(convnet("grouped"), KeyQueue(8, C))
    shard(method, CPU)
    assert not is_sharded(method)
