"""The switches of InfoNCE in MoCo by name, and training steps of a small MoCo with one of them.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moco.builder import KeyQueue, MoCo
from moco.data.loader import Batch
from moco.distributed import rank, world_size, wrap_ddp
from moco.losses import LearnedTemperature, Switches
from moco.training.step import StepSettings, train_step

N, C, K, P, T = 4, 5, 12, 12, 0.3
SAMPLES = 9

SWITCHES: dict[str, dict[str, Any]] = {
    "arc margin": {"switches": Switches(margin=0.3)},
    "cosine margin": {"switches": Switches(margin=0.2, margin_kind="cosine")},
    "mixing": {"switches": Switches(mix_hardest=4, mix_pairs=3, mix_query=2)},
    "mixing with the query": {"switches": Switches(mix_hardest=4, mix_query=2)},
    "debias": {"switches": Switches(debias=0.2)},
    "elimination": {"switches": Switches(false_negatives="eliminate", false_top=2)},
    "attraction": {"switches": Switches(false_negatives="attract", false_threshold=0.3)},
    "decoupled": {"switches": Switches(decoupled=True)},
    "mean inside": {"switches": Switches(false_negatives="attract", false_top=2, positives_mean="inside")},
    "labels": {"labels": torch.arange(SAMPLES) % 2},
    "several": {
        "switches": Switches(0.1, "arc", 0.0, "attract", 0.3, 3, mix_hardest=4, mix_pairs=2, mix_query=1),
        "symmetric": True,
    },
    "learned temperature": {"temperature": LearnedTemperature(T, 0.1, 1.0)},
}


def made(**options: Any) -> MoCo:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, C, bias=False))
    return MoCo(encoder, KeyQueue(K, C), **{"temperature": T, **copy.deepcopy(options)})


def images(seed: int) -> Tensor:
    return torch.randn(2, N, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def indices(seed: int) -> Tensor:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:N]


def step(
    method: MoCo, optimizer: torch.optim.Optimizer, number: int, forward: nn.Module | None = None, accumulate: int = 1
) -> dict[str, Tensor]:
    """Run one step on this rank's share of the batch."""
    share = N // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    method.step = number
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = Batch(indices(number)[mine], [view[mine] for view in images(number)])
    return train_step(method, forward or method, optimizer, scaler, batch, None, StepSettings(0.5, 0.8, accumulate))


def sgd(method: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9)


def steps_with_switch(name: str, accumulate: int = 1) -> dict[str, Tensor]:
    """Return measures and gradients of three steps."""
    method = made(**SWITCHES[name])
    optimizer, forward = sgd(method), wrap_ddp(method, torch.device("cpu"))
    result: dict[str, Tensor] = {}
    for number in range(3):
        measures = step(method, optimizer, number, forward, accumulate)
        gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
        result |= {f"{number} {key}": value for key, value in (measures | gradients).items()}
    return result
