"""InfoNCE against a loop-written reference, closed forms, symmetries and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from moco.losses import info_nce, info_nce_logits
from tests.losses import loops
from tests.losses.loops import coins, dot

N, C, K, T = 5, 6, 9, 0.3  # batch, embedding, queue, temperature


def unit(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return loops.unit(rows, C, seed=seed, dtype=dtype)


def looped(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, negatives: Tensor | None = None
) -> tuple[float, list[list[float]]]:
    """Eq. 1 of the paper in plain python: the mean loss, and its gradient with respect to the queries."""
    queries, keys, entries = query.tolist(), key.tolist(), queue.tolist()
    total, gradient = 0.0, []
    for n, (q, k) in enumerate(zip(queries, keys, strict=True)):
        against = [k]
        for j, entry in enumerate(entries):
            if negatives is None or bool(negatives.expand(len(queries), -1)[n, j]):
                against.append(entry)
        logits = [dot(q, other) / temperature for other in against]
        top = max(logits)
        log_sum = top + math.log(sum(math.exp(logit - top) for logit in logits))
        total += log_sum - logits[0]
        row = [-value / temperature / len(queries) for value in k]
        for logit, other in zip(logits, against, strict=True):
            weight = math.exp(logit - log_sum) / temperature / len(queries)
            row = [value + weight * part for value, part in zip(row, other, strict=True)]
        gradient.append(row)
    return total / len(queries), gradient


# ---- reference ----


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("n", "k"), [(N, K), (1, K), (N, 1), (1, 1)])
def test_loss_and_gradient_equal_the_loops(n: int, k: int, temperature: float) -> None:
    query, key, queue = unit(n, 0).requires_grad_(), unit(n, 1), unit(k, 2)
    loss, logits = info_nce(query, key, queue, temperature)
    loss.backward()
    expected, gradient = looped(query, key, queue, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert query.grad is not None
    torch.testing.assert_close(query.grad, torch.tensor(gradient), rtol=1e-4, atol=1e-6)
    assert logits.shape == (n, 1 + k)
    assert not logits.requires_grad


def test_logits_hold_the_positive_first_and_the_queue_in_its_order() -> None:
    query, key, queue = unit(N, 0), unit(N, 1), unit(K, 2)
    logits = info_nce_logits(query, key, queue, T)
    for n in range(N):
        assert logits[n, 0].item() == pytest.approx(dot(query[n].tolist(), key[n].tolist()) / T, abs=1e-5)
        for j in range(K):
            assert logits[n, 1 + j].item() == pytest.approx(dot(query[n].tolist(), queue[j].tolist()) / T, abs=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_passes_gradcheck_in_float64(masked: bool) -> None:
    query = unit(N, 0, dtype=torch.float64).requires_grad_()
    key, queue = unit(N, 1, dtype=torch.float64), unit(K, 2, dtype=torch.float64)
    negatives = coins(N, K, seed=3, share=0.6) if masked else None
    assert torch.autograd.gradcheck(lambda q: info_nce(q, key, queue, T, negatives)[0], (query,))


def test_half_precision_inputs_are_compared_in_float32() -> None:
    query, key, queue = (x.bfloat16() for x in (unit(N, 0), unit(N, 1), unit(K, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = info_nce_logits(query, key, queue, 0.07)
    assert logits.dtype == torch.float32
    exact = torch.cat([(query.double() * key.double()).sum(1, keepdim=True), query.double() @ queue.double().T], 1)
    torch.testing.assert_close(logits.double(), exact / 0.07, rtol=0, atol=1e-5)


def test_gradient_of_half_precision_queries_is_rounded_once() -> None:
    query, key, queue = (x.bfloat16() for x in (unit(N, 0), unit(N, 1), unit(K, 2)))
    half, full = query.clone().requires_grad_(), query.float().requires_grad_()
    for q in (half, full):
        info_nce(q, key, queue, T)[0].backward()
    assert half.grad is not None
    assert full.grad is not None
    assert torch.equal(half.grad, full.grad.bfloat16())


# ---- closed forms ----


@pytest.mark.parametrize("k", [1, 2, 512, 65536])
def test_uniform_logits_give_log_1_plus_k(k: int) -> None:
    one = torch.eye(C)[:1]  # every similarity is 1
    loss, _ = info_nce(one.expand(3, -1), one.expand(3, -1), one.expand(k, -1), T)
    assert loss.item() == pytest.approx(math.log(1 + k), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_perfect_positive_and_orthogonal_queue(temperature: float) -> None:
    query, queue = torch.eye(8)[:3], torch.eye(8)[3:]  # K = 5
    loss, _ = info_nce(query, query, queue, temperature)
    assert loss.item() == pytest.approx(math.log(1 + 5 * math.exp(-1 / temperature)), rel=1e-5, abs=1e-6)


def test_opposite_positive_and_aligned_queue_is_the_worst_case() -> None:
    query = torch.eye(4)[:2]
    loss, _ = info_nce(query[:1], -query[:1], query[:1], T)
    assert loss.item() == pytest.approx(2 / T + math.log(1 + math.exp(-2 / T)), rel=1e-6)


def test_a_positive_among_the_negatives_puts_the_floor_at_log_2() -> None:
    query = torch.eye(8)[:1]
    loss, _ = info_nce(query, query, query, 0.01)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_low_temperature_does_not_overflow() -> None:
    loss, _ = info_nce(torch.eye(4)[:2], torch.eye(4)[:2], -torch.eye(4), 1e-3)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


# ---- symmetries ----


def test_order_of_the_queue_does_not_matter() -> None:
    query, key, queue = unit(N, 0), unit(N, 1), unit(K, 2)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    a, b = info_nce(query, key, queue, T)[0], info_nce(query, key, queue[order], T)[0]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_order_of_the_batch_does_not_matter_but_pairs_do() -> None:
    query, key, queue = unit(N, 0), unit(N, 1), unit(K, 2)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = info_nce(query, key, queue, T)[0]
    torch.testing.assert_close(loss, info_nce(query[order], key[order], queue, T)[0], rtol=1e-6, atol=0)
    assert abs(loss.item() - info_nce(query, key[order], queue, T)[0].item()) > 1e-2


def test_rotating_all_embeddings_changes_nothing() -> None:
    query, key, queue = unit(N, 0), unit(N, 1), unit(K, 2)
    rotation, _ = torch.linalg.qr(torch.randn(C, C, generator=torch.Generator().manual_seed(3)))
    a, b = info_nce(query, key, queue, T)[0], info_nce(query @ rotation, key @ rotation, queue @ rotation, T)[0]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


# ---- masks ----


def test_masked_entries_are_as_if_they_were_not_there() -> None:
    query, key, queue = unit(N, 0).requires_grad_(), unit(N, 1), unit(K, 2)
    keep = torch.tensor([True, False, True, True, False, True, True, False, True])
    masked = info_nce(query, key, queue, T, keep[None])[0]
    without = info_nce(query, key, queue[keep], T)[0]
    torch.testing.assert_close(masked, without, rtol=1e-6, atol=0)
    (a,), (b,) = torch.autograd.grad(masked, query), torch.autograd.grad(without, query)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_mask_of_each_query_equals_the_loops() -> None:
    query, key, queue = unit(N, 0), unit(N, 1), unit(K, 2)
    negatives = coins(N, K, seed=3)
    assert 0 < negatives.sum() < N * K
    loss = info_nce(query, key, queue, T, negatives)[0]
    assert loss.item() == pytest.approx(looped(query, key, queue, T, negatives)[0], rel=1e-5)


def test_without_any_negative_loss_and_gradient_are_zero() -> None:
    query = unit(N, 0).requires_grad_()
    loss, _ = info_nce(query, unit(N, 1), unit(K, 2), T, torch.zeros(1, K, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, query)
    assert loss.item() == 0.0
    assert gradient.abs().max().item() == 0.0


# ---- errors ----


@pytest.mark.parametrize("temperature", [0.0, -0.2])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature={temperature} must be above 0"):
        info_nce(unit(N, 0), unit(N, 1), unit(K, 2), temperature)


@pytest.mark.parametrize(("key", "queue"), [((N + 1, C), (K, C)), ((N, C + 1), (K, C)), ((N, C), (K, C + 1))])
def test_invalid_shapes_are_refused(key: tuple[int, int], queue: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"key \({key[0]}, {key[1]}\), queue \({queue[0]}, {queue[1]}\)"):
        info_nce(unit(N, 0), torch.zeros(key), torch.zeros(queue), T)
