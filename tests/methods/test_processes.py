"""Losses and methods on two processes equal one process with the global batch. The processes start only once.

MoCo v2+ and MoCo v3 with BN and shuffled keys are in tests/distributed.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.loader import Batch
from moco.distributed import (
    broadcast_module,
    gather,
    gather_with_gradient,
    mean_over_ranks,
    rank,
    world_size,
    wrap_ddp,
)
from moco.losses import in_batch_info_nce, nt_xent, sup_con
from moco.methods.simclr import SimCLR
from moco.models.encoder import build_encoder
from moco.training.step import StepSettings, train_step
from tests.distributed.launch import run_ranks
from tests.distributed.test_topology import smooth
from tests.methods.switches import SWITCHES, steps_with_switch

Results = dict[str, dict[str, Tensor]]  # named tensors of each loss or method

V, M, C, T = 3, 6, 5, 0.3  # views, global batch, embedding, temperature
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
LOSSES = ["in_batch", "in_batch_keys_fixed", "nt_xent", "sup_con", "sup_con_one"]
SIMCLR: dict[str, dict[str, Any]] = {
    "simclr": {},
    "simclr, 3 views": {},
    "supcon": {"labels": torch.arange(64) % 3},
    "one direction": {"candidates": "other_view", "contrast_mode": "one"},
}
BATCH = 16


def loss_of(name: str, z: Tensor) -> Tensor:
    """Return the mean loss over this rank's samples z, (V, n, C)."""
    share = z.shape[1]
    offset = rank() * share
    index = offset + torch.arange(share)
    # The first dimension is gathered: (V, n, C) -> (n, V, C) -> (M, V, C) -> (V, M, C)
    others = gather_with_gradient(z.transpose(0, 1)).transpose(0, 1)
    if name == "in_batch":
        return in_batch_info_nce(z[0], others[1], index, T)[0]
    if name == "in_batch_keys_fixed":
        return in_batch_info_nce(z[0], gather(z[1].detach()), index, T)[0]
    if name == "nt_xent":
        return nt_xent(z, others, offset, T)[0]
    mode: Any = "one" if name == "sup_con_one" else "all"
    return sup_con(z, others, offset, T, gather(LABELS[index]), contrast_mode=mode)[0]


def losses() -> Results:
    """Return the mean loss over ranks, and the parameter gradient averaged over ranks as in DDP."""
    share = M // world_size()
    images = torch.randn(V, M, 8, generator=torch.Generator().manual_seed(0))[:, rank() * share : (rank() + 1) * share]
    torch.manual_seed(1)
    encoder = nn.Linear(8, C)
    result = {}
    for name in LOSSES:
        loss = loss_of(name, F.normalize(encoder(images), dim=2))
        gradients = torch.autograd.grad(loss, list(encoder.parameters()))
        gradient = mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
        result[name] = {"loss": mean_over_ranks(loss.detach()), "gradient": gradient}
    return result


def simclr() -> Results:
    """Return measures and gradients of two steps with synchronized BN."""
    share = BATCH // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    result: Results = {}
    for name, options in SIMCLR.items():
        torch.manual_seed(rank())  # the broadcast copies the weights of rank 0
        method = SimCLR(smooth(build_encoder("convnet", {"width": 4}, 2, 0, 8, "sync", 1)), 0.3, **options)
        broadcast_module(method)
        forward = wrap_ddp(method, torch.device("cpu"))
        optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        result[name] = {}
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            views = torch.randn(3, BATCH, 3, 8, 8, generator=generator)[: 3 if "3" in name else 2]
            index = torch.randperm(64, generator=generator)[:BATCH]
            batch = Batch(index[mine], [v[mine] for v in views])
            measures = train_step(method, forward, optimizer, scaler, batch, None, StepSettings(0.05, 0.9))
            gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
            result[name] |= {f"{step} {key}": value for key, value in (measures | gradients).items()}
    return result


def everything() -> dict[str, Results]:
    switches = {name: steps_with_switch(name) for name in SWITCHES}
    return {"losses": losses(), "simclr": simclr(), "switches": switches}


@cache
def on(world: int) -> list[dict[str, Results]]:
    return run_ranks(world, everything)


def check_two_processes(part: str, name: str, rtol: float, atol: float) -> Results:
    (one,) = on(1)
    for each in on(2):
        assert each[part][name].keys() == one[part][name].keys()
        for key, value in one[part][name].items():
            torch.testing.assert_close(each[part][name][key], value, rtol=rtol, atol=atol, msg=key)
    return one[part]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_on_two_processes(name: str) -> None:
    expected = check_two_processes("losses", name, rtol=1e-4, atol=1e-6)[name]
    assert expected["gradient"].abs().max() > 1e-2


@pytest.mark.parametrize("name", SIMCLR)
def test_simclr_on_two_processes(name: str) -> None:
    expected = check_two_processes("simclr", name, rtol=1e-4, atol=2e-5)[name]
    assert expected["0 encoder.head.2.weight"].abs().max() > 1e-2


@pytest.mark.parametrize("name", SWITCHES)
def test_moco_with_a_switch_on_two_processes(name: str) -> None:
    check_two_processes("switches", name, rtol=1e-4, atol=1e-5)
