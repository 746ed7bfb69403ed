"""InfoNCE within the batch, MoCo v3's: loops, closed forms, symmetries."""

import math

import pytest
import torch

from moco.losses import in_batch_info_nce
from tests.losses.loops import cross_entropy, dot, mean, unit

N, M, C, T = 4, 10, 6, 0.3


def test_loss_equals_the_loops() -> None:
    query, keys, positives = unit(N, C, seed=0), unit(M, C, seed=1), torch.tensor([4, 5, 6, 7])
    loss, logits = in_batch_info_nce(query, keys, positives, T)
    rows = [[dot(q, k) / T for k in keys.tolist()] for q in query.tolist()]
    expected = mean([cross_entropy(row, [p]) for row, p in zip(rows, positives.tolist(), strict=True)])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits, torch.tensor(rows), rtol=1e-4, atol=1e-5)
    assert not logits.requires_grad


def test_half_precision_is_compared_in_float32() -> None:
    query, keys = unit(N, C, seed=0).bfloat16(), unit(M, C, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, logits = in_batch_info_nce(query, keys, torch.arange(N), 0.07)
    torch.testing.assert_close(logits.double(), query.double() @ keys.double().T / 0.07, rtol=0, atol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 512])
def test_uniform_logits_give_log_m(m: int) -> None:
    one = torch.eye(C)[:1]
    loss, _ = in_batch_info_nce(one, one.expand(m, -1), torch.zeros(1, dtype=torch.long), T)
    assert loss.item() == pytest.approx(math.log(m), abs=1e-6)


def test_orthogonal_samples_and_perfect_positives() -> None:
    eye, index = torch.eye(6), torch.arange(6)
    loss, _ = in_batch_info_nce(eye, eye, index, T)
    assert loss.item() == pytest.approx(math.log(1 + 5 * math.exp(-1 / T)), rel=1e-5)


def test_gradient_reaches_queries_and_keys() -> None:
    query, keys = (unit(n, C, seed=n, dtype=torch.float64).requires_grad_() for n in (N, M))
    assert torch.autograd.gradcheck(lambda q, k: in_batch_info_nce(q, k, torch.arange(N), T)[0], (query, keys))
    assert torch.autograd.gradcheck(
        lambda q, k: in_batch_info_nce(q, k, torch.arange(N), T, margin=0.4)[0], (query, keys)
    )


def test_order_of_samples_does_not_matter_and_both_directions_are_symmetric_in_the_views() -> None:
    a, b, index = unit(N, C, seed=0), unit(N, C, seed=1), torch.arange(N)
    order = torch.tensor([2, 0, 3, 1])

    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (in_batch_info_nce(a, b, index, T)[0] + in_batch_info_nce(b, a, index, T)[0]) / 2

    assert torch.equal(both(a, b), both(b, a))
    torch.testing.assert_close(both(a, b), both(a[order], b[order]), rtol=1e-6, atol=0)
    assert in_batch_info_nce(a, b, index, T)[0] != in_batch_info_nce(b, a, index, T)[0]


@pytest.mark.parametrize("kind", ["arc", "cosine"])
def test_a_margin_lowers_the_positive_alone(kind: str) -> None:
    query, keys, positives, m = unit(N, C, seed=0), unit(M, C, seed=1), torch.tensor([9, 0, 3, 3]), 0.2
    loss, logits = in_batch_info_nce(query, keys, positives, T, margin=m, margin_kind=kind)  # type: ignore[arg-type]
    expected = []
    for q, p in zip(query.tolist(), positives.tolist(), strict=True):
        row = [dot(q, k) for k in keys.tolist()]
        row[p] = row[p] - m if kind == "cosine" else math.cos(math.acos(row[p]) + m)
        expected.append(cross_entropy([x / T for x in row], [p]))
    assert loss.item() == pytest.approx(mean(expected), rel=1e-5)
    plain, same = in_batch_info_nce(query, keys, positives, T)
    assert loss > plain
    assert torch.equal(logits, same)


def test_invalid_arguments_are_refused() -> None:
    query, keys = unit(N, C, seed=0), unit(M, C, seed=1)
    with pytest.raises(ValueError, match=r"positives \(3,\)"):
        in_batch_info_nce(query, keys, torch.arange(3), T)
    with pytest.raises(ValueError, match=r"keys \(10, 5\)"):
        in_batch_info_nce(query, keys[:, 1:], torch.arange(N), T)
    with pytest.raises(ValueError, match=r"temperature=0 must be above 0"):
        in_batch_info_nce(query, keys, torch.arange(N), 0)
