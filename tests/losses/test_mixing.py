"""MoCHi: each synthetic negative from its numbers, what is harder than what, and who takes part."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses import mix_hard_negatives
from tests.losses.loops import coins, unit

N, C, K, HARDEST, PAIRS, QUERIES = 4, 6, 20, 5, 7, 3


def uniforms(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return unit(N, C, seed=0), unit(K, C, seed=1), uniforms(N, PAIRS, 3), uniforms(N, QUERIES, 2, seed=6)


@pytest.mark.parametrize("masked", [False, True])
def test_mixed_negatives_follow_the_random_numbers(masked: bool) -> None:
    query, queue, pairs, singles = inputs()
    negatives = coins(N, K, seed=3, share=0.2) if masked else None
    mixed = mix_hard_negatives(query, queue, HARDEST, pairs, singles, negatives)
    assert mixed.shape == (N, PAIRS + QUERIES, C)
    counts = set()
    for n in range(N):
        allowed = [k for k in range(K) if negatives is None or negatives[n, k]]
        hard = sorted(allowed, key=lambda k: -float(query[n] @ queue[k]))[:HARDEST]
        counts.add(len(hard))
        for s in range(PAIRS):
            u, v, a = pairs[n, s].tolist()
            i, j = queue[hard[int(u * len(hard))]], queue[hard[int(v * len(hard))]]
            torch.testing.assert_close(mixed[n, s], F.normalize(a * i + (1 - a) * j, dim=0), rtol=1e-5, atol=1e-6)
        for s in range(QUERIES):
            v, b = singles[n, s].tolist()
            expected = F.normalize(b / 2 * query[n] + (1 - b / 2) * queue[hard[int(v * len(hard))]], dim=0)
            torch.testing.assert_close(mixed[n, PAIRS + s], expected, rtol=1e-5, atol=1e-6)
    assert min(counts) < HARDEST if masked else counts == {HARDEST}


def test_mixing_with_the_query_makes_a_negative_harder() -> None:
    query, queue, pairs, _ = inputs()
    singles = uniforms(N, 200, 2)
    mixed = mix_hard_negatives(query, queue, 1, pairs[:, :0], singles)  # from the hardest negative alone
    hardest = (query @ queue.T).amax(dim=1)
    similarity = torch.einsum("nc,nec->ne", query, mixed)
    assert (similarity > hardest[:, None]).all()
    # b is at most a half, so none is closer than the middle of the two: half the angle
    assert (similarity.acos() > hardest.acos()[:, None] / 2 - 1e-4).all()


def test_a_pair_is_at_least_as_hard_as_its_easier_half_and_can_be_harder_than_both() -> None:
    query, queue, _, singles = inputs()
    mixed = mix_hard_negatives(query, queue, HARDEST, uniforms(N, 300, 3), singles[:, :0])
    top = (query @ queue.T).topk(HARDEST, dim=1).values
    assert (top > 0).all()  # so that normalizing moves toward the query, not away
    similarity = torch.einsum("nc,nec->ne", query, mixed)
    assert (similarity >= top[:, -1:] - 1e-6).all()
    assert (similarity > top[:, :1]).any()  # on the chord's arc between two, closer than either end


def test_mixed_negatives_are_unit_vectors_without_gradient() -> None:
    query, queue, pairs, singles = inputs()
    mixed = mix_hard_negatives(query.requires_grad_(), queue, HARDEST, pairs, singles)
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed.norm(dim=2), torch.ones(N, PAIRS + QUERIES))


def test_a_query_without_negatives_gets_zero_vectors() -> None:
    query, queue, pairs, singles = inputs()
    negatives = torch.ones(N, K, dtype=torch.bool)
    negatives[2] = False
    mixed = mix_hard_negatives(query, queue, HARDEST, pairs, singles, negatives)
    assert (mixed[2] == 0).all()
    torch.testing.assert_close(mixed[[0, 1, 3]].norm(dim=2), torch.ones(3, PAIRS + QUERIES))


def test_numbers_next_to_one_stay_within_the_hardest() -> None:
    query, queue, _, _ = inputs()
    last = math.nextafter(1.0, 0.0)  # 1.0 in float32: rounded up by whoever drew it
    mixed = mix_hard_negatives(query, queue, HARDEST, torch.full((N, 1, 3), last), torch.full((N, 1, 2), last))
    easiest = queue[(query @ queue.T).topk(HARDEST, dim=1).indices[:, -1]]
    torch.testing.assert_close(mixed[:, 0], easiest, rtol=1e-5, atol=1e-6)


def test_the_same_numbers_give_the_same_negatives_in_any_batch() -> None:
    query, queue, pairs, singles = inputs()
    global_batch = mix_hard_negatives(query, queue, HARDEST, pairs, singles)
    part = mix_hard_negatives(query[2:], queue, HARDEST, pairs[2:], singles[2:])
    torch.testing.assert_close(global_batch[2:], part, rtol=1e-6, atol=1e-7)


def test_invalid_arguments_are_refused() -> None:
    query, queue, pairs, singles = inputs()
    for hardest in (0, K + 1):
        with pytest.raises(ValueError, match=rf"hardest={hardest} must be 1 \.\.\. 20"):
            mix_hard_negatives(query, queue, hardest, pairs, singles)
    with pytest.raises(ValueError, match=r"pair_uniforms \(4, 3, 2\) must have shape \(4, any number, 3\)"):
        mix_hard_negatives(query, queue, HARDEST, singles, singles)
    with pytest.raises(ValueError, match=r"query_uniforms \(3, 3, 2\) must have shape \(4, any number, 2\)"):
        mix_hard_negatives(query, queue, HARDEST, pairs, singles[1:])
