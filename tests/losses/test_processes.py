"""Each in-batch loss on two processes is that of one process with the whole batch: value and parameter gradient."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.distributed import gather, gather_with_gradient, mean_over_ranks, rank, world_size
from moco.losses import in_batch_info_nce, nt_xent, sup_con
from tests.distributed.launch import run_ranks

V, M, C, T = 3, 6, 5, 0.3
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
NAMES = ["in_batch", "in_batch_keys_fixed", "nt_xent", "sup_con", "sup_con_one"]


def loss_of(name: str, z: Tensor) -> Tensor:
    """The mean over this rank's samples z, (V, n, C)."""
    share = z.shape[1]
    offset = rank() * share
    index = offset + torch.arange(share)
    # rows are gathered, so the samples lead: (V, n, C) -> (n, V, C) -> (M, V, C) -> (V, M, C)
    others = gather_with_gradient(z.transpose(0, 1)).transpose(0, 1)
    if name == "in_batch":
        return in_batch_info_nce(z[0], others[1], index, T)[0]
    if name == "in_batch_keys_fixed":
        return in_batch_info_nce(z[0], gather(z[1].detach()), index, T)[0]
    if name == "nt_xent":
        return nt_xent(z, others, offset, T)[0]
    return sup_con(
        z, others, offset, T, gather(LABELS[index]), contrast_mode="one" if name == "sup_con_one" else "all"
    )[0]


def losses() -> dict[str, tuple[Tensor, Tensor]]:
    """Of each loss the mean over ranks and the parameter gradient, averaged over ranks as DDP does it."""
    share = M // world_size()
    images = torch.randn(V, M, 8, generator=torch.Generator().manual_seed(0))[:, rank() * share : (rank() + 1) * share]
    torch.manual_seed(1)
    encoder = nn.Linear(8, C)
    result = {}
    for name in NAMES:
        loss = loss_of(name, F.normalize(encoder(images), dim=2))
        gradients = torch.autograd.grad(loss, list(encoder.parameters()))
        result[name] = mean_over_ranks(loss.detach()), mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
    return result


@cache
def on(world: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
    return run_ranks(world, losses)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name: str) -> None:
    (alone,) = on(1)
    loss, gradient = alone[name]
    assert gradient.abs().max() > 1e-2
    for each in on(2):
        torch.testing.assert_close(each[name][0], loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(each[name][1], gradient, rtol=1e-4, atol=1e-6)
