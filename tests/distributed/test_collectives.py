"""Collectives on four processes, compared with what one process computes from the global batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import OptimConfig
from moco.data.decode import ImageError
from moco.data.folder import FolderSource
from moco.data.keyed import permutation
from moco.data.loader import batches
from moco.data.plan import Plan
from moco.data.sources import ArraySource
from moco.data.view import View
from moco.distributed import (
    all_gather_object,
    average_gradients,
    averaged_running_statistics,
    broadcast_module,
    gather,
    gather_with_gradient,
    in_lockstep,
    mean_over_ranks,
    on_rank_zero,
    permute,
    rank,
    restore_running_statistics,
    sum_over_ranks,
    world_size,
)
from moco.evaluation.cache import cached
from moco.evaluation.features import EvalTransform, Inference, extract, pixels, stream
from moco.evaluation.finetuning import TrainSettings, train
from moco.evaluation.linear_probe import new_head, train_head
from moco.models.norm import GroupedBatchNorm
from tests.distributed.launch import run_ranks

CPU = torch.device("cpu")


def collectives(batch: int) -> dict[str, Any]:
    share = batch // world_size()
    everything = torch.arange(batch * 6, dtype=torch.float32).view(batch, 2, 3)
    mine = everything[rank() * share : (rank() + 1) * share]
    order = permutation(0, 0, batch, 0)
    shuffled = permute(mine, order)
    x = torch.full((3,), float(rank() + 1), requires_grad=True)
    (sum_over_ranks(x) * (rank() + 1)).sum().backward()
    assert x.grad is not None
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(rank())  # type: ignore[union-attr]
    with averaged_running_statistics(layer) as statistics:
        averaged = layer.running_mean.tolist()  # type: ignore[union-attr]
    restored = layer.running_mean.tolist()  # type: ignore[union-attr]
    of_ranks = statistics.get("statistics")
    restore_running_statistics(layer, None if of_ranks is None else of_ranks.flip(0))
    with averaged_running_statistics(nn.Linear(1, 1)) as of_no_layer:
        restore_running_statistics(nn.Linear(1, 1), of_no_layer.get("statistics"))
    weights = nn.Linear(2, 2)
    nn.init.constant_(weights.weight, rank() + 5.0)
    broadcast_module(weights)
    images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = images[rank() * share : (rank() + 1) * share].requires_grad_()
    sync = GroupedBatchNorm(3, group_size=0)
    normalized = sync(images)
    scale = torch.arange(16.0)[rank() * share : (rank() + 1) * share].view(-1, 1, 1, 1)
    (normalized * scale).sum().backward()
    try:
        on_rank_zero(_fail)
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
        "running_mean": {"averaged": averaged, "restored": restored, "from_ranks": layer.running_mean.tolist()},  # type: ignore[union-attr]
        "weight": weights.weight.detach(),
        "sync_out": normalized.detach(),
        "sync_gradient": images.grad,
        "without_bn": of_no_layer,
        "sync_running": sync.state_dict(),
        "main": on_rank_zero(lambda: rank()),
        "failure": failure,
    }


def _fail() -> None:
    raise ValueError("not a directory")


BATCH, T = 8, 0.5


def parameter_gradient(encoder: nn.Linear, x: Tensor, y: Tensor, with_gradient: bool) -> Tensor:
    """Gradient of a loss that is the mean over this rank's queries, against the keys of all ranks."""
    share = len(x)
    keys = F.normalize(encoder(y), dim=1)
    keys = gather_with_gradient(keys) if with_gradient else gather(keys)
    labels = rank() * share + torch.arange(share)
    loss = F.cross_entropy(F.normalize(encoder(x), dim=1) @ keys.T / T, labels)
    return torch.autograd.grad(loss, encoder.weight)[0]


def gradients() -> dict[str, Tensor]:
    share = BATCH // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    rows = torch.arange(BATCH * 6.0).view(BATCH, 2, 3)[mine].requires_grad_()
    gathered = gather_with_gradient(rows)
    # rank r weights global row i by (r + 1) (i + 1); transposed, so that the gradient is not contiguous
    weight = (rank() + 1) * torch.arange(1.0, BATCH + 1)
    (gathered.transpose(0, 2) * weight).sum().backward()
    assert rows.grad is not None
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, BATCH, 5, generator=generator)
    torch.manual_seed(1)
    encoder = nn.Linear(5, 4, bias=False)
    return {
        "gathered": gathered.detach(),
        "row_gradient": rows.grad,
        "average": mean_over_ranks(parameter_gradient(encoder, x[mine], y[mine], with_gradient=True)),
        "without": mean_over_ranks(parameter_gradient(encoder, x[mine], y[mine], with_gradient=False)),
    }


def averaged_gradients() -> list[Tensor]:
    """Give each rank other gradients, (r + 1) times those of rank 0; one is stored with the channels last."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Linear(2, 2))
    for number, parameter in enumerate(network.parameters()):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * (rank() + 1)
        parameter.grad = values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values
    network[2].zero_grad()  # it was not used: it has no gradient
    average_gradients(list(network.parameters()))
    return [each.grad for each in network.parameters() if each.grad is not None]


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    source = ArraySource(torch.randint(256, (37, 3, 4, 4), generator=generator, dtype=torch.uint8), [""] * 37)
    return extract(pixels, source, EvalTransform(4), Inference(CPU, batch_size=8))


LABELS = np.arange(8) % 2


class OneUnreadable(FolderSource):
    """Eight images without files; the sixth is unreadable."""

    def __init__(self) -> None:
        super().__init__("", np.array([b"missing"] * 8), LABELS, ("a", "b"))

    def image(self, i: int) -> torch.Tensor:
        if i == 5:
            raise ImageError("five.png: not an image")
        return torch.full((3, 4, 4), i, dtype=torch.uint8)

    def name(self, i: int) -> str:
        return str(i)


def raised(function: Callable[[], object]) -> str:
    try:
        function()
    except ImageError as error:
        return str(error)
    return "none"


def errors(folder: Path) -> tuple[list[int], list[int], list[str]]:
    """What `all_gather_object` and `in_lockstep` return, and the errors of each way to read image five."""
    shown = (EvalTransform(4), Inference(CPU, 2))
    plan, views = Plan(8, 4, 2, 0, rank(), world_size()), [View(4)]
    labels = torch.from_numpy(LABELS)

    def of_rank() -> Iterator[int]:
        yield 10 * rank()
        if rank() == 1:
            raise ImageError("second of rank 1")
        yield 10 * rank() + 1

    with patch("torch.distributed.all_gather_object", side_effect=AssertionError("a collective of objects")):
        assert list(in_lockstep(range(3), CPU)) == [0, 1, 2]
        assert not list(in_lockstep([], CPU))
    seen: list[int] = []
    attempts: list[Callable[[], object]] = [
        lambda: seen.extend(in_lockstep(of_rank(), CPU)),
        lambda: extract(pixels, OneUnreadable(), *shown),
        lambda: cached(folder, "key", 8, 48, lambda rows: stream(pixels, OneUnreadable(), rows, *shown)),
        lambda: train_head(
            nn.Flatten(),
            new_head(48, 2, 0.01, 0),
            batches(OneUnreadable(), plan, views, CPU, 0),
            labels,
            plan,
            OptimConfig(lr=0.1),
        ),
        lambda: train(
            (network := nn.Sequential(nn.Flatten(), nn.Linear(48, 2))),
            torch.optim.SGD([{"params": network.parameters(), "lr_scale": 1.0}]),
            batches(OneUnreadable(), plan, views, CPU, 0),
            labels,
            plan,
            TrainSettings(0.1),
        ),
    ]
    return all_gather_object(lambda: rank()), seen, [raised(each) for each in attempts]


@dataclass
class Found:
    """The results of one rank."""

    collectives: dict[str, Any]
    features: torch.Tensor
    gradients: dict[str, Tensor]
    errors: tuple[list[int], list[int], list[str]]
    averaged: list[Tensor]


def all_checks(folder: Path) -> Found:
    return Found(collectives(16), features(), gradients(), errors(folder), averaged_gradients())


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """All checks in one start of four processes."""
    return run_ranks(4, all_checks, tmp_path_factory.mktemp("cache"))


def test_collectives(four: list[Found]) -> None:
    results = [found.collectives for found in four]
    everything = torch.arange(16 * 6, dtype=torch.float32).view(16, 2, 3)
    order = permutation(0, 0, 16, 0)
    for r, result in enumerate(results):
        assert torch.equal(result["gathered"], everything)
        assert torch.equal(result["shuffled"], everything[order[4 * r : 4 * r + 4]])
        assert torch.equal(result["back"], result["mine"])
        assert torch.equal(result["sum_gradient"], torch.full((3,), 1.0 + 2 + 3 + 4))  # every rank's loss sees x
        assert result["mean"] == 1.5
        assert result["running_mean"] == {"averaged": [1.5] * 2, "restored": [r] * 2, "from_ranks": [3 - r] * 2}
        assert result["without_bn"] == {}
        assert torch.equal(result["weight"], torch.full((2, 2), 5.0))
        assert result["main"] == 0
        assert result["failure"] == "not a directory"  # on every rank, so that none is left waiting


def test_synchronized_bn_equals_batch_norm_over_all_images(four: list[Found]) -> None:
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = nn.BatchNorm2d(3)
    out = layer(x)
    (out * torch.arange(16.0).view(-1, 1, 1, 1)).sum().backward()
    assert x.grad is not None
    for r, found in enumerate(four):
        result = found.collectives
        rows = slice(4 * r, 4 * r + 4)
        torch.testing.assert_close(result["sync_out"], out[rows].detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["sync_gradient"], x.grad[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["sync_running"]["running_mean"], layer.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["sync_running"]["running_var"], layer.running_var, rtol=1e-5, atol=1e-6)


def test_collectives_in_one_process() -> None:
    result = collectives(16)
    assert torch.equal(result["gathered"], result["mine"])
    assert torch.equal(result["back"], result["mine"])
    assert result["failure"] == "not a directory"


def test_features_of_an_odd_number_of_images_equal_those_of_one_process(four: list[Found]) -> None:
    alone = features()
    assert alone.shape == (37, 48)
    for found in four:
        assert torch.equal(found.features, alone)  # in order, none dropped, none twice


def test_gathered_rows_are_in_order_and_their_gradient_is_the_sum_over_ranks(four: list[Found]) -> None:
    for r, found in enumerate(four):
        result = found.gradients
        assert torch.equal(result["gathered"], torch.arange(BATCH * 6.0).view(BATCH, 2, 3))
        expected = (1 + 2 + 3 + 4) * torch.arange(1.0, BATCH + 1)[2 * r : 2 * r + 2]
        assert torch.equal(result["row_gradient"], expected[:, None, None].expand(2, 2, 3))


def test_the_average_over_ranks_is_the_gradient_of_one_process(four: list[Found]) -> None:
    alone = gradients()
    for found in four:
        torch.testing.assert_close(found.gradients["average"], alone["average"], rtol=1e-5, atol=1e-7)
        # the plain gather loses the keys' part of the gradient
        assert (found.gradients["without"] - alone["average"]).abs().max() > 1e-2


def test_gradients_are_averaged_over_ranks(four: list[Found]) -> None:
    alone = averaged_gradients()
    assert len(alone) == 4
    for found in four:
        for mean, own in zip(found.averaged, alone, strict=True):
            assert mean.stride() == own.stride()
            torch.testing.assert_close(mean, own * 2.5)


def test_gather_with_gradient_in_one_process_returns_its_argument() -> None:
    x = torch.zeros(2, 3)
    assert gather_with_gradient(x) is x


def test_an_error_of_one_rank_is_raised_on_all(four: list[Found], tmp_path: Path) -> None:
    for r, found in enumerate(four):
        ranks, seen, met = found.errors
        assert ranks == [0, 1, 2, 3]
        assert seen == [10 * r]
        assert met == ["second of rank 1", *["five.png: not an image"] * 4]
    assert errors(tmp_path)[2] == ["none", *["five.png: not an image"] * 4]  # one process, which has no rank 1
    assert not (tmp_path / "key.npy").exists()
