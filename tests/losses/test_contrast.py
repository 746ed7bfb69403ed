"""InfoNCE with switches: equal to info_nce without any, each switch alone, all together, and refused combinations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moco.losses import (
    Switches,
    contrast,
    debiased_cross_entropy,
    info_nce,
    info_nce_logits,
    logit_measures,
    mix_hard_negatives,
    multi_positive_info_nce,
)
from tests.losses.loops import coins, cross_entropy, dot, mean, unit

N, C, K, T = 5, 6, 9, 0.3
POSITIVES, NEGATIVES = coins(N, K, seed=3, share=0.3), coins(N, K, seed=4, share=0.7)
MIX: dict[str, Any] = {"mix_hardest": 4, "mix_pairs": 2, "mix_query": 1}
UNIFORMS = torch.rand(N, 8, generator=torch.Generator().manual_seed(7))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        unit(N, C, seed=0, dtype=dtype).requires_grad_(),
        unit(N, C, seed=1, dtype=dtype),
        unit(K, C, seed=2, dtype=dtype),
    )


@pytest.mark.parametrize("negatives", [None, NEGATIVES])
def test_without_a_switch_it_is_info_nce_bit_for_bit(negatives: Tensor | None) -> None:
    query, key, queue = inputs()
    (a, found), (b, logits) = (
        contrast(query, key, queue, T, Switches(), negatives),
        info_nce(query, key, queue, T, negatives),
    )
    assert torch.equal(a, b)
    assert found | logit_measures(logits, T) == found
    assert torch.equal(torch.autograd.grad(a, query)[0], torch.autograd.grad(b, query)[0])


@pytest.mark.parametrize("positives", [None, POSITIVES])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("margin", "kind"), [(0.0, "arc"), (0.25, "cosine")])
def test_all_switches_together_equal_the_loops(positives: Tensor | None, mixed: bool, margin: float, kind: Any) -> None:
    query, key, queue = inputs()
    switches = Switches(margin=margin, margin_kind=kind, **(MIX if mixed else {}))
    loss, _ = contrast(query, key, queue, T, switches, NEGATIVES, positives, UNIFORMS)
    only = NEGATIVES if positives is None else NEGATIVES & ~positives
    extra = mix_hard_negatives(
        query, queue, 4, UNIFORMS[:, :6].unflatten(1, (2, 3)), UNIFORMS[:, 6:].unflatten(1, (1, 2)), only
    )
    expected = []
    for n in range(N):
        q = query[n].tolist()
        row, own = [(dot(q, key[n].tolist()) - margin) / T], [0]
        for j in range(K):
            if NEGATIVES[n, j]:
                is_positive = positives is not None and bool(positives[n, j])
                own += [len(row)] if is_positive else []
                row.append((dot(q, queue[j].tolist()) - margin * is_positive) / T)
        if mixed:
            row += [dot(q, each) / T for each in extra[n].tolist()]
        expected.append(cross_entropy(row, own))
    assert loss.item() == pytest.approx(mean(expected), rel=1e-5)


def test_each_switch_alone_is_its_own_function() -> None:
    query, key, queue = inputs()
    a = contrast(query, key, queue, T, Switches(), NEGATIVES, POSITIVES)[0]
    torch.testing.assert_close(a, multi_positive_info_nce(query, key, queue, T, POSITIVES, NEGATIVES)[0])
    b = contrast(query, key, queue, T, Switches(debias=0.1), NEGATIVES)[0]
    assert torch.equal(b, debiased_cross_entropy(info_nce_logits(query, key, queue, T, NEGATIVES), T, 0.1))


def test_a_query_without_negatives_has_no_mixed_ones() -> None:
    query, key, queue = inputs()
    loss, _ = contrast(query, key, queue, T, Switches(**MIX), torch.zeros(1, K, dtype=torch.bool), None, UNIFORMS)
    assert loss.item() == 0


@pytest.mark.parametrize("kind", ["arc", "cosine"])
def test_a_larger_margin_raises_the_loss(kind: Any) -> None:
    query, key, queue = inputs()
    losses = [contrast(query, key, queue, T, Switches(m, kind))[0].item() for m in (0.0, 0.1, 0.3, 0.6)]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.1


@pytest.mark.parametrize(("margin", "kind"), [(0.0, "arc"), (0.4, "arc"), (0.4, "cosine")])
@pytest.mark.parametrize("positives", [None, POSITIVES])
@pytest.mark.parametrize("decoupled", [False, True])
def test_chance_is_the_loss_of_orthogonal_embeddings(
    margin: float, kind: Any, positives: Tensor | None, decoupled: bool
) -> None:
    eye = torch.eye(3)
    query, key, queue = (eye[row].expand(count, 3) for row, count in enumerate((N, N, K)))
    switches = Switches(margin=margin, margin_kind=kind, decoupled=decoupled)
    loss, measures = contrast(query, key, queue, T, switches, NEGATIVES, positives)
    assert measures["chance"].item() == pytest.approx(loss.item(), rel=1e-6)


ALONE_AND_TOGETHER = [
    (Switches(), None),
    (Switches(margin=0.2), None),
    (Switches(margin=0.3, **MIX), POSITIVES),
    (Switches(debias=0.05), None),
]


@pytest.mark.parametrize(("switches", "positives"), ALONE_AND_TOGETHER[:2] + ALONE_AND_TOGETHER[3:])
def test_gradient_passes_gradcheck(switches: Switches, positives: Tensor | None) -> None:
    query, key, queue = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda q: contrast(q, key, queue, T, switches, NEGATIVES, positives)[0], (query,))


@pytest.mark.parametrize(("switches", "positives"), ALONE_AND_TOGETHER)
def test_order_of_the_batch_does_not_matter(switches: Switches, positives: Tensor | None) -> None:
    query, key, queue = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = None if positives is None else positives[order]
    a = contrast(query, key, queue, T, switches, NEGATIVES, positives, UNIFORMS)[0]
    b = contrast(query[order], key[order], queue, T, switches, NEGATIVES[order], moved, UNIFORMS[order])[0]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_autocast_changes_nothing() -> None:
    query, key, queue = inputs()
    switches = Switches(margin=0.2, **MIX)
    plain = contrast(query, key, queue, T, switches, None, POSITIVES, UNIFORMS)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrast(query, key, queue, T, switches, None, POSITIVES, UNIFORMS)[0], plain)


@pytest.mark.parametrize(
    ("switches", "positives", "uniforms", "message"),
    [
        (Switches(debias=0.1, margin=0.2), None, None, r"debias=0.1 excludes margin: "),
        (Switches(debias=0.1, **MIX), POSITIVES, UNIFORMS, "debias=0.1 .* mixed negatives, positives"),
        (Switches(**MIX), None, UNIFORMS[1:], r"\(5, 8\)"),
        (Switches(), POSITIVES[1:], None, r"positives is bool of shape \(4, 9\)"),
        (Switches(margin=-1.0), None, None, "margin=-1.0"),
        (Switches(debias=1.0), None, None, "prior=1.0"),
        (Switches(debias=0.1, false_negatives="eliminate", false_top=2), None, None, "debias=0.1 .*false_negatives"),
        (Switches(debias=0.1, decoupled=True), None, None, "debias=0.1 excludes decoupled"),
        (Switches(false_negatives="drop", false_top=2), None, None, "false_negatives='drop'"),  # type: ignore[arg-type]
        (Switches(positives_mean="middle"), None, None, "positives_mean='middle'"),  # type: ignore[arg-type]
        (Switches(mix_hardest=4, mix_pairs=-1, mix_query=2), None, UNIFORMS, "mix_pairs=-1"),
    ],
)
def test_invalid_switches_are_refused(
    switches: Switches, positives: Tensor | None, uniforms: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        contrast(*inputs(), T, switches, None, positives, uniforms)
