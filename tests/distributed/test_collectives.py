"""gather, permute, on_main and the rest against what one process would compute from the whole batch."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from moco.data.keyed import permutation
from moco.data.sources import ArraySource
from moco.distributed import (
    average_running_statistics,
    broadcast_module,
    gather,
    mean_over_ranks,
    on_main,
    permute,
    rank,
    sum_over_ranks,
    world_size,
)
from moco.evaluation.features import extract, pixels
from moco.models.norm import GroupedBatchNorm
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")


def collectives(batch: int) -> dict[str, Any]:
    share = batch // world_size()
    whole = torch.arange(batch * 6, dtype=torch.float32).view(batch, 2, 3)
    mine = whole[rank() * share : (rank() + 1) * share]
    order = permutation(0, 0, batch, 0)
    shuffled = permute(mine, order)
    x = torch.full((3,), float(rank() + 1), requires_grad=True)
    (sum_over_ranks(x) * (rank() + 1)).sum().backward()
    assert x.grad is not None
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(rank())  # type: ignore[union-attr]
    average_running_statistics(layer)
    weights = nn.Linear(2, 2)
    nn.init.constant_(weights.weight, rank() + 5.0)
    broadcast_module(weights)
    images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = images[rank() * share : (rank() + 1) * share].requires_grad_()
    sync = GroupedBatchNorm(3, group_size=0)
    normalised = sync(images)
    scale = torch.arange(16.0)[rank() * share : (rank() + 1) * share].view(-1, 1, 1, 1)
    (normalised * scale).sum().backward()
    try:
        on_main(_fail)
        failure = "none"
    except ValueError as error:
        failure = str(error)
    return {
        "gathered": gather(mine),
        "shuffled": shuffled,
        "back": permute(shuffled, np.argsort(order)),
        "mine": mine,
        "sum_gradient": x.grad,
        "mean": mean_over_ranks(torch.tensor(float(rank()))),
        "running_mean": layer.running_mean,
        "weight": weights.weight.detach(),
        "sync_out": normalised.detach(),
        "sync_gradient": images.grad,
        "sync_running": sync.state_dict(),
        "main": on_main(lambda: rank()),
        "failure": failure,
    }


def _fail() -> None:
    raise ValueError("a bad directory")


def test_collectives_on_four_processes() -> None:
    results = [result for result, _ in four()]
    whole = torch.arange(16 * 6, dtype=torch.float32).view(16, 2, 3)
    order = permutation(0, 0, 16, 0)
    for r, result in enumerate(results):
        assert torch.equal(result["gathered"], whole)
        assert torch.equal(result["shuffled"], whole[order[4 * r : 4 * r + 4]])
        assert torch.equal(result["back"], result["mine"])
        assert torch.equal(result["sum_gradient"], torch.full((3,), 1.0 + 2 + 3 + 4))  # every rank's loss sees x
        assert result["mean"] == 1.5
        assert torch.equal(result["running_mean"], torch.full((2,), 1.5))
        assert torch.equal(result["weight"], torch.full((2, 2), 5.0))
        assert result["main"] == 0
        assert result["failure"] == "a bad directory"  # on every rank, so that none is left waiting


def test_synchronised_bn_equals_batch_norm_over_all_images() -> None:
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = nn.BatchNorm2d(3)
    out = layer(x)
    (out * torch.arange(16.0).view(-1, 1, 1, 1)).sum().backward()
    assert x.grad is not None
    for r, (result, _) in enumerate(four()):
        rows = slice(4 * r, 4 * r + 4)
        torch.testing.assert_close(result["sync_out"], out[rows].detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["sync_gradient"], x.grad[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["sync_running"]["running_mean"], layer.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["sync_running"]["running_var"], layer.running_var, rtol=1e-5, atol=1e-6)


def test_one_process_is_no_special_case() -> None:
    (result,) = run_ranks(1, collectives, 16)
    assert torch.equal(result["gathered"], result["mine"])
    assert torch.equal(result["back"], result["mine"])
    assert result["failure"] == "a bad directory"


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    source = ArraySource(torch.randint(256, (37, 3, 4, 4), generator=generator, dtype=torch.uint8), [""] * 37)
    return extract(pixels, source, 4, 0, (0.0,) * 3, (1.0,) * 3, CPU, batch_size=8)


def collectives_and_features() -> tuple[dict[str, Any], torch.Tensor]:
    return collectives(16), features()


@cache
def four() -> list[tuple[dict[str, Any], torch.Tensor]]:
    return run_ranks(4, collectives_and_features)


def test_features_of_an_odd_number_of_images_are_the_same_on_four_processes() -> None:
    alone = features()
    assert alone.shape == (37, 48)
    for _, each in four():
        assert torch.equal(each, alone)  # in order, none dropped, none twice
