"""Several positives: the mean outside and inside the logarithm, and the decoupled contrast, against loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moco.losses import (
    Switches,
    contrast,
    cross_entropy_over_positives,
    decoupled_info_nce,
    in_batch_info_nce,
    info_nce,
    multi_positive_info_nce,
    multi_positive_nt_xent,
    sup_con,
)
from tests.losses.loops import coins, dot, mean, unit

N, C, K, T = 5, 6, 9, 0.3
FORMS = [("outside", False), ("outside", True), ("inside", False), ("inside", True)]


def looped(row: list[float], positives: list[int], place: str, decoupled: bool) -> float:
    """One anchor's loss: L_out or L_in, with or without the positives in the denominator."""
    own = [row[p] for p in positives]
    below = [logit for j, logit in enumerate(row) if not (decoupled and j in positives)]
    if not below:
        return 0.0
    inside = math.log(sum(math.exp(each) for each in own) / len(own))
    above = sum(own) / len(own) if place == "outside" else inside
    return math.log(sum(math.exp(each) for each in below)) - above


@pytest.mark.parametrize(("place", "decoupled"), FORMS)
def test_any_number_of_positives_equals_the_loops(place: Any, decoupled: bool) -> None:
    logits = torch.randn(8, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    absent, positive = coins(8, K, seed=1, share=0.3), coins(8, K, seed=2, share=0.4)
    absent[:, 0] = False
    positive[3], positive[4], absent[4] = False, True, False  # none is positive, all are
    positive &= ~absent
    logits = logits.masked_fill(absent, -math.inf).requires_grad_()
    loss = cross_entropy_over_positives(logits, positive, place, decoupled)
    expected = []
    for n in range(8):
        present = [j for j in range(K) if not absent[n, j]]
        own = [at for at, j in enumerate(present) if positive[n, j]]
        if own:
            expected.append(looped([logits[n, j].item() for j in present], own, place, decoupled))
    assert loss.item() == pytest.approx(mean(expected), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert (gradient[3] == 0).all()  # no positive, no term


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_one_positive_inside_and_outside_are_cross_entropy(dtype: torch.dtype) -> None:
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=dtype)
    positive = torch.zeros(N, K, dtype=torch.bool)
    positive[:, 2] = True
    expected = torch.nn.functional.cross_entropy(logits, torch.full((N,), 2))
    for place in ("outside", "inside"):
        torch.testing.assert_close(cross_entropy_over_positives(logits, positive, place), expected)


def test_the_mean_inside_is_at_most_the_mean_outside() -> None:
    logits = torch.randn(50, K, generator=torch.Generator().manual_seed(0))
    positive = coins(50, K, seed=2, share=0.4)
    for decoupled in (False, True):
        one, other = (cross_entropy_over_positives(logits, positive, each, decoupled) for each in ("inside", "outside"))
        assert one < other


def test_without_any_positive_loss_and_gradient_are_zero() -> None:
    logits = torch.randn(N, K).requires_grad_()
    for place, decoupled in FORMS:
        loss = cross_entropy_over_positives(logits, torch.zeros(N, K, dtype=torch.bool), place, decoupled)  # type: ignore[arg-type]
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, logits)[0] == 0).all()


@pytest.mark.parametrize(("place", "decoupled"), FORMS[1:])
def test_gradient_passes_gradcheck(place: Any, decoupled: bool) -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    positive = coins(4, 6, seed=5, share=0.4)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_over_positives(x, positive, place, decoupled), logits)


# ---- decoupled ----


def queue_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return unit(N, C, seed=0).requires_grad_(), unit(N, C, seed=1), unit(K, C, seed=2)


@pytest.mark.parametrize("masked", [False, True])
def test_decoupled_info_nce_equals_the_loops(masked: bool) -> None:
    query, key, queue = queue_inputs()
    negatives = coins(N, K, seed=4, share=0.6)
    negatives[2] = False  # nothing to compare with: loss 0
    loss, logits = decoupled_info_nce(query, key, queue, T, negatives if masked else None)
    expected = []
    for n in range(N):
        row = [dot(query[n].tolist(), queue[j].tolist()) / T for j in range(K) if not masked or negatives[n, j]]
        own = dot(query[n].tolist(), key[n].tolist()) / T
        expected.append(math.log(sum(map(math.exp, row))) - own if row else 0.0)
    assert loss.item() == pytest.approx(mean(expected), rel=1e-5)
    assert torch.equal(logits, info_nce(query, key, queue, T, negatives if masked else None)[1])
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient.isfinite().all()
    assert (gradient[2] == 0).all() == masked
    by_switch, measures = contrast(query, key, queue, T, Switches(decoupled=True), negatives if masked else None)
    assert torch.equal(by_switch, loss)
    counts = negatives.sum(dim=1).tolist() if masked else [K] * N
    assert measures["chance"].item() == pytest.approx(mean([math.log(max(1, count)) for count in counts]), rel=1e-6)


def test_decoupled_values_in_closed_form() -> None:
    """Uniform: log K. Key equal to the query and K opposite keys: log K - 2 / T, below 0: no floor."""
    one = torch.eye(C)[:1]
    loss, _ = decoupled_info_nce(one, one, one.expand(K, -1), T)
    assert loss.item() == pytest.approx(math.log(K), rel=1e-6)
    loss, _ = decoupled_info_nce(one, one, -one.expand(K, -1), T)
    assert loss.item() == pytest.approx(math.log(K) - 2 / T, rel=1e-6)


def test_decoupling_removes_the_positives_coupling() -> None:
    """The gradient is InfoNCE's divided by 1 - p(positive), per query (Yeh et al., 2022, Proposition 1)."""
    query, key, queue = queue_inputs()
    for n in range(N):
        rows = query[n : n + 1], key[n : n + 1], queue
        loss, logits = info_nce(*rows, T)
        (coupled,) = torch.autograd.grad(loss, query)
        (decoupled,) = torch.autograd.grad(decoupled_info_nce(*rows, T)[0], query)
        left = 1 - logits.softmax(dim=1)[0, 0]
        torch.testing.assert_close(decoupled * left, coupled, rtol=1e-4, atol=1e-6)


def test_switches_together_equal_the_loops() -> None:
    query, key, queue = queue_inputs()
    positives, negatives = coins(N, K, seed=3, share=0.3), coins(N, K, seed=4, share=0.8)
    for place, decoupled in FORMS:
        switches = Switches(margin=0.2, margin_kind="cosine", decoupled=decoupled, positives_mean=place)  # type: ignore[arg-type]
        loss, _ = contrast(query, key, queue, T, switches, negatives, positives)
        expected = []
        for n in range(N):
            row, own = [(dot(query[n].tolist(), key[n].tolist()) - 0.2) / T], [0]
            for j in range(K):
                if negatives[n, j]:
                    own += [len(row)] if positives[n, j] else []
                    row.append((dot(query[n].tolist(), queue[j].tolist()) - 0.2 * bool(positives[n, j])) / T)
            expected.append(looped(row, own, place, decoupled))
        assert loss.item() == pytest.approx(mean(expected), rel=1e-5)
    inside = contrast(query, key, queue, T, Switches(positives_mean="inside"), negatives, positives)[0]
    assert torch.equal(inside, multi_positive_info_nce(query, key, queue, T, positives, negatives, "inside")[0])


# ---- n views in a batch ----


@pytest.mark.parametrize(("place", "decoupled"), FORMS)
@pytest.mark.parametrize("views", [2, 3, 4])
def test_n_views_equal_the_loops(views: int, place: Any, decoupled: bool) -> None:
    z, others, offset = unit(views, 3, C, seed=0), unit(views, 7, C, seed=1), 2
    others[:, offset : offset + 3] = z
    loss, _ = multi_positive_nt_xent(z, others, offset, T, None, "all", place, decoupled)
    expected = []
    for v in range(views):
        for n in range(3):
            row: list[float] = []
            own: list[int] = []
            for w in range(views):
                for m in range(7):
                    if (w, m) != (v, offset + n):
                        own += [len(row)] if m == offset + n else []
                        row.append(dot(z[v, n].tolist(), others[w, m].tolist()) / T)
            expected.append(looped(row, own, place, decoupled))
    assert loss.item() == pytest.approx(mean(expected), rel=1e-5)
    if (place, decoupled) == ("outside", False):
        assert torch.equal(loss, sup_con(z, others, offset, T)[0])


@pytest.mark.parametrize(("place", "decoupled"), FORMS)
@pytest.mark.parametrize(("views", "samples"), [(2, 4), (3, 5)])
def test_uniform_views_in_closed_form(views: int, samples: int, place: Any, decoupled: bool) -> None:
    same = torch.eye(C)[0].expand(views, samples, C)
    candidates = views * samples - (views if decoupled else 1)
    loss, _ = multi_positive_nt_xent(same, same, 0, T, None, "all", place, decoupled)
    assert loss.item() == pytest.approx(math.log(candidates), rel=1e-5)


def test_decoupled_in_batch_equals_the_loops() -> None:
    query, keys, positives = unit(N, C, seed=0), unit(K, C, seed=1), torch.tensor([3, 0, 8, 8, 1])
    loss, logits = in_batch_info_nce(query, keys, positives, T, decoupled=True)
    rows = [[dot(query[n].tolist(), keys[m].tolist()) / T for m in range(K)] for n in range(N)]
    assert loss.item() == pytest.approx(
        mean([looped(row, [int(positives[n])], "outside", True) for n, row in enumerate(rows)]), rel=1e-5
    )
    assert torch.equal(logits, in_batch_info_nce(query, keys, positives, T)[1])
