"""Finding false negatives: planted ones are found, and taking them out or in does to the loss what it should."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses import find_false_negatives, info_nce, multi_positive_info_nce
from tests.losses.loops import coins, unit

N, C, K, T = 4, 32, 40, 0.2
PLANTED = torch.zeros(N, K, dtype=torch.bool)
for n in range(N):
    PLANTED[n, [3 * n, 3 * n + 1]] = True


def planted() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and a queue that holds two near copies of each key."""
    key, queue = unit(N, C, seed=0), unit(K, C, seed=1)
    noise = unit(2 * N, C, seed=2)
    for n in range(N):
        for i in range(2):
            queue[3 * n + i] = F.normalize(key[n] + 0.3 * noise[2 * n + i], dim=0)
    query = F.normalize(key + 0.5 * unit(N, C, seed=3), dim=1)
    return query, key, queue


@pytest.mark.parametrize("how", [{"threshold": 0.8}, {"top": 2}, {"threshold": 0.8, "top": 2}])
def test_planted_ones_are_found_and_only_they(how: dict[str, Any]) -> None:
    _, key, queue = planted()
    assert torch.equal(find_false_negatives(key, queue, **how), PLANTED)


def test_threshold_and_top_equal_the_loops() -> None:
    _, key, queue = planted()
    candidates = coins(N, K, seed=4)
    found = find_false_negatives(key, queue, threshold=0.1, top=6, candidates=candidates)
    for n in range(N):
        similarity = {k: float(key[n] @ queue[k]) for k in range(K) if candidates[n, k]}
        expected = {k for k in sorted(similarity, key=lambda k: -similarity[k])[:6] if similarity[k] > 0.1}
        assert set(found[n].nonzero().flatten().tolist()) == expected


def test_only_candidates_are_found_even_if_too_few() -> None:
    _, key, queue = planted()
    candidates = torch.zeros(N, K, dtype=torch.bool)
    candidates[:, 7] = True
    assert torch.equal(find_false_negatives(key, queue, top=5, candidates=candidates), candidates)


def test_they_are_judged_by_the_key_not_by_the_query() -> None:
    """Queries that lost their way do not change what is found, since they are not asked."""
    _, key, queue = planted()
    lost = unit(N, C, seed=9)
    assert torch.equal(find_false_negatives(key, queue, top=2), PLANTED)
    assert not torch.equal(find_false_negatives(lost, queue, top=2), PLANTED)


def test_elimination_lowers_the_loss_and_stops_the_push() -> None:
    query, key, queue = planted()
    query.requires_grad_()
    found = find_false_negatives(key, queue, threshold=0.8)
    plain, eliminated = info_nce(query, key, queue, T)[0], info_nce(query, key, queue, T, ~found)[0]
    assert eliminated < plain - 0.3
    without = [torch.cat([queue[~found[n]]]) for n in range(N)]
    expected = torch.stack([info_nce(query[n : n + 1], key[n : n + 1], without[n], T)[0] for n in range(N)]).mean()
    torch.testing.assert_close(eliminated, expected, rtol=1e-5, atol=0)


def test_attraction_moves_the_query_toward_what_was_found() -> None:
    query, key, queue = planted()
    query.requires_grad_()
    found = find_false_negatives(key, queue, threshold=0.8)
    plain, attracted = info_nce(query, key, queue, T)[0], multi_positive_info_nce(query, key, queue, T, found)[0]
    closer = []
    for loss in (plain, attracted):
        (gradient,) = torch.autograd.grad(loss, query)
        moved = F.normalize(query.detach() - 0.5 * gradient, dim=1)
        closer.append(((moved - query.detach()) @ queue.T)[found].mean())
    assert closer[1] > closer[0]
    assert closer[1] > 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "threshold=None and top=None"),
        ({"threshold": 1.2}, "threshold=1.2 must be a cosine"),
        ({"top": 0}, r"top=0 must be 1 \.\.\. 40"),
        ({"top": K + 1}, r"top=41 must be 1 \.\.\. 40"),
        ({"top": 1, "candidates": torch.ones(K, dtype=torch.bool)}, r"candidates is bool of shape \(40,\)"),
    ],
)
def test_invalid_arguments_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_false_negatives(*planted()[1:], **how)
