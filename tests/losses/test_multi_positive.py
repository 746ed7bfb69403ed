"""Positives in the queue: against loops, closed forms, and InfoNCE where there are none."""

import math

import pytest
import torch
from torch import Tensor

from moco.losses import info_nce, multi_positive_info_nce
from tests.losses.loops import coins, cross_entropy, dot, mean, unit

N, C, K, T = 5, 6, 9, 0.3


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        unit(N, C, seed=0, dtype=dtype).requires_grad_(),
        unit(N, C, seed=1, dtype=dtype),
        unit(K, C, seed=2, dtype=dtype),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_the_loops(masked: bool) -> None:
    query, key, queue = inputs()
    positives, negatives = coins(N, K, seed=3, share=0.3), coins(N, K, seed=4, share=0.7)
    loss, logits = multi_positive_info_nce(query, key, queue, T, positives, negatives if masked else None)
    expected = []
    for n in range(N):
        row, own = [dot(query[n].tolist(), key[n].tolist()) / T], [0]
        for j in range(K):
            if not masked or negatives[n, j]:
                if positives[n, j]:
                    own.append(len(row))
                row.append(dot(query[n].tolist(), queue[j].tolist()) / T)
        expected.append(cross_entropy(row, own))
    assert loss.item() == pytest.approx(mean(expected), rel=1e-5)
    assert torch.equal(logits, info_nce(query, key, queue, T, negatives if masked else None)[1])


def test_without_positives_in_the_queue_it_is_info_nce() -> None:
    query, key, queue = inputs()
    none, negatives = torch.zeros(1, K, dtype=torch.bool), coins(N, K, seed=4)
    a = multi_positive_info_nce(query, key, queue, T, none, negatives)[0]
    b = info_nce(query, key, queue, T, negatives)[0]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(a, query), torch.autograd.grad(b, query), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [0, 1, K])
def test_uniform_logits_give_log_1_plus_k_however_many_are_positive(count: int) -> None:
    one = torch.eye(C)[:1]
    positives = (torch.arange(K) < count)[None]
    loss, _ = multi_positive_info_nce(one.expand(3, -1), one.expand(3, -1), one.expand(K, -1), T, positives)
    assert loss.item() == pytest.approx(math.log(1 + K), rel=1e-6)


def test_perfect_positives_share_the_probability() -> None:
    """Key and two entries equal to the query, the rest opposite: log 3 and a remainder is the floor."""
    query = torch.eye(C)[:1]
    queue = torch.cat([query, query, -query, -query])
    loss, _ = multi_positive_info_nce(query, query, queue, T, torch.tensor([[True, True, False, False]]))
    assert loss.item() == pytest.approx(math.log(3 + 2 * math.exp(-2 / T)), rel=1e-6)


def test_gradient_passes_gradcheck_and_attracts_the_positive() -> None:
    query, key, queue = inputs(torch.float64)
    positives, negatives = coins(N, K, seed=3), coins(N, K, seed=4, share=0.7)
    assert torch.autograd.gradcheck(
        lambda q: multi_positive_info_nce(q, key, queue, T, positives, negatives)[0], (query,)
    )
    entry = torch.zeros(1, K, dtype=torch.bool)
    entry[0, 0] = True
    attracted, pushed = multi_positive_info_nce(query, key, queue, T, entry)[0], info_nce(query, key, queue, T)[0]
    toward = [-(torch.autograd.grad(loss, query)[0] @ queue[0]).mean() for loss in (attracted, pushed)]
    assert toward[0] > toward[1]  # a step down the gradient goes more toward the entry


def test_order_of_the_queue_does_not_matter_if_the_mask_follows() -> None:
    query, key, queue = inputs()
    positives, order = coins(N, K, seed=3), torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    a = multi_positive_info_nce(query, key, queue, T, positives)[0]
    b = multi_positive_info_nce(query, key, queue[order], T, positives[:, order])[0]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [torch.zeros(N, K), torch.zeros(N, K + 1, dtype=torch.bool)])
def test_an_invalid_mask_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"positives is .* it must be bool of shape \(5, 9\) or \(1, 9\)"):
        multi_positive_info_nce(*inputs(), T, mask)
