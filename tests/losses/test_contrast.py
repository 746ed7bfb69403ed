"""The composed loss: info_nce bit for bit without switches, each switch alone, together, and what cannot be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moco.losses import contrast, debiased_cross_entropy, info_nce, info_nce_logits, multi_positive_info_nce
from tests.losses.loops import coins, cross_entropy, dot, mean, unit

N, C, K, E, T = 5, 6, 9, 3, 0.3
EXTRA, POSITIVES, NEGATIVES = unit(N, E, C, seed=7), coins(N, K, seed=3, share=0.3), coins(N, K, seed=4, share=0.7)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        unit(N, C, seed=0, dtype=dtype).requires_grad_(),
        unit(N, C, seed=1, dtype=dtype),
        unit(K, C, seed=2, dtype=dtype),
    )


@pytest.mark.parametrize("negatives", [None, NEGATIVES])
def test_without_a_switch_it_is_info_nce_bit_for_bit(negatives: Tensor | None) -> None:
    query, key, queue = inputs()
    (a, logits), (b, same) = contrast(query, key, queue, T, negatives), info_nce(query, key, queue, T, negatives)
    assert torch.equal(a, b)
    assert torch.equal(logits, same)
    assert torch.equal(torch.autograd.grad(a, query)[0], torch.autograd.grad(b, query)[0])


@pytest.mark.parametrize("positives", [None, POSITIVES])
@pytest.mark.parametrize("extra", [None, EXTRA])
@pytest.mark.parametrize(("margin", "kind"), [(0.0, "arc"), (0.25, "cosine")])
def test_all_that_go_together_equal_the_loops(
    positives: Tensor | None, extra: Tensor | None, margin: float, kind: Any
) -> None:
    query, key, queue = inputs()
    switches: dict[str, Any] = dict(margin=margin, margin_kind=kind, extra_negatives=extra, positives=positives)
    loss, logits = contrast(query, key, queue, T, NEGATIVES, **switches)
    expected = []
    for n in range(N):
        q = query[n].tolist()
        row, own = [(dot(q, key[n].tolist()) - margin) / T], [0]
        for j in range(K):
            if NEGATIVES[n, j]:
                is_positive = positives is not None and bool(positives[n, j])
                own += [len(row)] if is_positive else []
                row.append((dot(q, queue[j].tolist()) - margin * is_positive) / T)
        if extra is not None:
            row += [dot(q, e) / T for e in extra[n].tolist()]
        expected.append(cross_entropy(row, own))
    assert loss.item() == pytest.approx(mean(expected), rel=1e-5)
    assert torch.equal(logits, info_nce(query, key, queue, T, NEGATIVES)[1])  # whatever the switches


def test_each_switch_alone_is_its_own_function() -> None:
    query, key, queue = inputs()
    a = contrast(query, key, queue, T, NEGATIVES, positives=POSITIVES)[0]
    torch.testing.assert_close(a, multi_positive_info_nce(query, key, queue, T, POSITIVES, NEGATIVES)[0])
    b = contrast(query, key, queue, T, NEGATIVES, debias=0.1)[0]
    assert torch.equal(b, debiased_cross_entropy(info_nce_logits(query, key, queue, T, NEGATIVES), T, 0.1))


@pytest.mark.parametrize("kind", ["arc", "cosine"])
def test_a_margin_raises_the_loss_the_more_the_larger(kind: Any) -> None:
    query, key, queue = inputs()
    losses = [contrast(query, key, queue, T, margin=m, margin_kind=kind)[0].item() for m in (0.0, 0.1, 0.3, 0.6)]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.1


def test_extra_negatives_are_as_if_in_the_queue_and_zero_ones_are_absent() -> None:
    query, key, queue = inputs()
    shared = unit(E, C, seed=8)
    a = contrast(query, key, queue, T, extra_negatives=shared.expand(N, E, C))[0]
    torch.testing.assert_close(a, info_nce(query, key, torch.cat([queue, shared]), T)[0], rtol=1e-6, atol=0)
    b = contrast(query, key, queue, T, extra_negatives=torch.zeros(N, E, C))[0]
    torch.testing.assert_close(b, info_nce(query, key, queue, T)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "switches",
    [
        {"margin": 0.3},
        {"margin": 0.3, "positives": POSITIVES, "extra_negatives": EXTRA.double()},
        {"debias": 0.05},
    ],
)
def test_gradient_passes_gradcheck(switches: dict[str, Any]) -> None:
    query, key, queue = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda q: contrast(q, key, queue, T, NEGATIVES, **switches)[0], (query,))


@pytest.mark.parametrize(
    "switches", [{}, {"margin": 0.2, "positives": POSITIVES, "extra_negatives": EXTRA}, {"debias": 0.1}]
)
def test_order_of_the_batch_does_not_matter(switches: dict[str, Any]) -> None:
    query, key, queue = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved: dict[str, Any] = {
        name: value[order] if isinstance(value, Tensor) else value for name, value in switches.items()
    }
    a = contrast(query, key, queue, T, NEGATIVES, **switches)[0]
    b = contrast(query[order], key[order], queue, T, NEGATIVES[order], **moved)[0]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_autocast_changes_nothing() -> None:
    query, key, queue = inputs()
    switches: dict[str, Any] = {"margin": 0.2, "positives": POSITIVES, "extra_negatives": EXTRA}
    plain = contrast(query, key, queue, T, **switches)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrast(query, key, queue, T, **switches)[0], plain)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"debias": 0.1, "margin": 0.2}, r"debias=0.1 together with margin: .* use one or the other"),
        ({"debias": 0.1, "positives": POSITIVES, "extra_negatives": EXTRA}, "with extra_negatives, positives"),
        ({"extra_negatives": EXTRA[1:]}, r"extra_negatives \(4, 3, 6\) must have shape \(5, any number, 6\)"),
        ({"positives": POSITIVES[1:]}, r"positives is bool of shape \(4, 9\)"),
        ({"margin": -1.0}, "margin=-1.0 must be 0 or more"),
        ({"debias": 1.0}, "prior=1.0 must be"),
    ],
)
def test_what_cannot_be_is_named(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrast(*inputs(), T, **switches)
