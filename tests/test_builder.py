"""The queue, the momentum encoder and steps of the global batch against loops.

Legend: N batch, C embedding, K queue length, P pixels of an image.
"""

import copy
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco.builder import UNKNOWN, KeyQueue, MoCo, Output
from moco.models.norm import GroupedBatchNorm
from tests.algorithm_1 import (
    C,
    K,
    N,
    P,
    T,
    check_ring,
    check_steps_are_algorithm_1,
    images,
    indices,
    linear_encoder,
    sgd,
    step,
    weight,
)

# ---- the queue ----


@pytest.mark.parametrize(
    "batches",
    [
        [1] * 23,
        [5] * 5,  # divides K
        [4, 4, 4, 4, 4, 4],  # wraps around in the middle of a batch
        [3, 7, 2, 9, 1, 8, 0, 10, 6],
        [10, 10],
        [11],  # more than K
        [3, 25, 4, 40],
    ],
)
def test_queue_is_a_ring_for_any_batch(batches: list[int]) -> None:
    check_ring(KeyQueue, batches)


def test_queue_of_one_key_holds_the_newest() -> None:
    check_ring(KeyQueue, [1, 3, 2], size=1)


def test_a_random_queue_holds_unit_vectors_without_sample() -> None:
    queue = KeyQueue(K, C, mask_own_keys=False)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(K))
    assert queue.index.tolist() == [UNKNOWN] * K
    assert queue.filled() == 0
    assert queue.negatives(torch.arange(N)) is None


def test_in_an_empty_queue_only_filled_entries_are_negatives() -> None:
    queue = KeyQueue(K, C, "empty", mask_own_keys=False)
    for filled in (0, 4, 8, 10, 10):
        allowed = queue.negatives(torch.arange(N))
        assert allowed is not None
        assert allowed.tolist() == [[slot < filled for slot in range(K)]]
        queue.enqueue(torch.randn(4, C), torch.arange(4))


@pytest.mark.parametrize("start", ["random", "empty"])
def test_own_stale_keys_are_no_negatives_of_a_query(start: str) -> None:
    queue = KeyQueue(K, C, start)
    queue.enqueue(torch.randn(7, C), torch.tensor([5, 1, 5, 2, 9, 1, 3]))
    query = [1, 5, 8, 9]
    allowed = queue.negatives(torch.tensor(query))
    assert allowed is not None
    stored = [5, 1, 5, 2, 9, 1, 3]
    expected = [[stored[slot] != i if slot < 7 else start == "random" for slot in range(K)] for i in query]
    assert allowed.tolist() == expected


@pytest.mark.parametrize(("size", "start", "sentence"), [(0, "random", "method.queue_size=0"), (4, "zeros", "'zeros'")])
def test_queue_refuses_invalid_values(size: int, start: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        KeyQueue(size, C, start)


# ---- a step ----


@pytest.mark.parametrize("start", ["random", "empty"])
@pytest.mark.parametrize("mask_own_keys", [True, False])
@pytest.mark.parametrize(("symmetric", "reduction"), [(False, "mean"), (True, "mean"), (True, "sum")])
@pytest.mark.parametrize("streamed", [False, True])
def test_steps_are_algorithm_1(
    start: str,
    mask_own_keys: bool,
    symmetric: bool,
    reduction: Literal["sum", "mean"],
    streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if streamed:
        monkeypatch.setattr("moco.builder.STREAM_FROM", 1)
    check_steps_are_algorithm_1(MoCo, start, mask_own_keys, symmetric, reduction)


# ---- state ----


def test_state_dict_resumes_bit_for_bit() -> None:
    torch.manual_seed(0)
    first = MoCo(linear_encoder(), KeyQueue(K, C, "empty"), T, symmetric=True)
    optimizer = sgd(first)
    for number in range(2):
        step(first, optimizer, [images(number), images(number + 50)], indices(number))
    second = MoCo(linear_encoder(), KeyQueue(K, C, "empty"), T, symmetric=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = sgd(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {"queue.keys", "queue.index", "queue.count"} <= set(first.state_dict())
    for number in range(2, 5):
        views, index = [images(number), images(number + 50)], indices(number)
        assert torch.equal(step(first, optimizer, views, index).loss, step(second, resumed, views, index).loss)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_momentum_encoder_starts_as_an_independent_copy() -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C))
    assert torch.equal(weight(method.encoder), weight(method.momentum_encoder))
    assert weight(method.encoder).data_ptr() != weight(method.momentum_encoder).data_ptr()
    assert not any(parameter.requires_grad for parameter in method.momentum_encoder.parameters())
    assert all(parameter.requires_grad for parameter in method.encoder.parameters())


@pytest.mark.parametrize("reduction", ["max", ""])
def test_unknown_reduction_is_refused(reduction: Any) -> None:
    with pytest.raises(ValueError, match=f"method.reduction='{reduction}' must be 'sum' or 'mean'"):
        MoCo(linear_encoder(), KeyQueue(K, C), reduction=reduction)


# ---- momentum update ----


@pytest.mark.parametrize(("momentum", "moves"), [(1.0, 0.0), (0.0, 1.0)])
def test_momentum_1_keeps_and_0_copies(momentum: float, moves: float) -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C))
    start = weight(method.momentum_encoder).clone()
    with torch.no_grad():
        next(method.encoder.parameters()).add_(1.0)
    method.update_momentum_encoder(momentum)
    torch.testing.assert_close(weight(method.momentum_encoder), start + moves)


# ---- shuffled keys ----


def test_shuffle_changes_the_batch_norm_groups_of_the_keys_and_nothing_else() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, C), GroupedBatchNorm(C, 2))
    method = MoCo(encoder, KeyQueue(K, C), symmetric=True)
    views = [images(0, 6), images(1, 6)]
    shuffles = [np.array([3, 0, 5, 1, 4, 2]), np.array([2, 4, 0, 3, 5, 1])]
    keys = method.encode_keys(views, shuffles, 6)
    for view, order in enumerate(shuffles):
        for start in range(0, 6, 2):
            members = order[start : start + 2].tolist()  # those that BN sees together
            together = F.normalize(method.momentum_encoder(views[view][members]), dim=1)
            torch.testing.assert_close(keys[view][members], together, rtol=1e-4, atol=1e-5)
    assert (method.encode_keys(views, None, 6)[0] - keys[0]).abs().max() > 0.1


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_without_batch_norm_neither_shuffle_nor_micro_batches_change_the_keys(micro_batch: int) -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C))
    views = [images(0, 6), images(1, 6)]
    order = np.array([3, 0, 5, 1, 4, 2])
    keys = method.encode_keys(views, [order, order], micro_batch)
    assert list(keys) == [1]
    expected = F.normalize(views[1].flatten(1) @ weight(method.encoder).T, dim=1)
    torch.testing.assert_close(keys[1], expected)


# ---- at the start ----


@pytest.mark.parametrize("symmetric", [False, True])
def test_at_initialization_the_loss_is_near_chance(symmetric: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, 128))
    reductions: list[Literal["mean", "sum"]] = ["mean", "sum"]
    for reduction in reductions:
        method = MoCo(encoder, KeyQueue(1024, 128), 1.0, symmetric, reduction)
        views = [images(0, 64), images(1, 64)]  # unrelated images, so no positive is easy
        loss = method(views, method.encode_keys(views, None, 64), torch.arange(64)).loss.item()
        directions = 2 if symmetric and reduction == "sum" else 1
        assert loss / directions == pytest.approx(math.log(1 + 1024), abs=0.1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_an_empty_queue_the_first_loss_and_gradient_are_zero(symmetric: bool) -> None:
    method = MoCo(linear_encoder(), KeyQueue(K, C, "empty"), T, symmetric)
    views = [images(0), images(1)]
    output: Output = method(views, method.encode_keys(views, None, N), indices(0))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.measures["negatives"].item() == 0.0
    for parameter in method.encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max().item() == 0.0
