"""nt_xent and sup_con: loops, closed forms, symmetries, and what one is of the other."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moco.losses import nt_xent, sup_con
from tests.losses.loops import coins, cross_entropy, dot, mean, unit

V, N, M, C, T = 3, 4, 6, 5, 0.4
OFFSET = 1
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])  # sample 3 is alone in its class


def global_batch(views: int = V, dtype: torch.dtype = torch.float32) -> Tensor:
    return unit(views, M, C, seed=0, dtype=dtype)


def looped(embeddings: Tensor, others: Tensor, offset: int, same: list[list[bool]], anchor_views: int) -> float:
    """Eq. 2 of SupCon, an anchor and a positive at a time; an anchor without positives has no term."""
    losses = []
    for v in range(anchor_views):
        for n in range(embeddings.shape[1]):
            row: list[float] = []
            positives: list[int] = []
            for w in range(len(others)):
                for m in range(others.shape[1]):
                    if (w, m) == (v, offset + n):
                        continue
                    if same[n][m]:
                        positives.append(len(row))
                    row.append(dot(embeddings[v, n].tolist(), others[w, m].tolist()) / T)
            if positives:
                losses.append(cross_entropy(row, positives))
    return mean(losses)


def classes(labels: Tensor, samples: int, offset: int) -> list[list[bool]]:
    return [[bool(labels[offset + n] == label) for label in labels] for n in range(samples)]


# ---- nt_xent ----


@pytest.mark.parametrize("views", [2, 3, 4])
def test_nt_xent_equals_the_loops(views: int) -> None:
    others = global_batch(views)
    mine = others[:, OFFSET : OFFSET + N]
    loss, logits = nt_xent(mine, others, OFFSET, T)
    assert loss.item() == pytest.approx(
        looped(mine, others, OFFSET, classes(torch.arange(M), N, OFFSET), views), rel=1e-5
    )
    assert logits.shape == (views * N, views * M)
    assert not logits.requires_grad


def test_simclr_equation_1_with_two_views() -> None:
    """The paper's own numbering: 2k - 1 and 2k are the views of sample k; the loss of both orders, over 2N."""
    both = global_batch(2)
    rows = [both[v, m].tolist() for m in range(M) for v in range(2)]
    total = 0.0
    for i, a in enumerate(rows):
        j = i ^ 1
        denominator = sum(math.exp(dot(a, b) / T) for k, b in enumerate(rows) if k != i)
        total -= math.log(math.exp(dot(a, rows[j]) / T) / denominator)
    assert nt_xent(both, both, 0, T)[0].item() == pytest.approx(total / (2 * M), rel=1e-5)


@pytest.mark.parametrize(("views", "samples"), [(2, 1), (2, 8), (3, 5), (2, 512)])
def test_uniform_logits_give_log_of_all_others(views: int, samples: int) -> None:
    same = torch.eye(C)[:1].expand(views, samples, C)
    assert nt_xent(same, same, 0, T)[0].item() == pytest.approx(math.log(views * samples - 1), abs=1e-5)


def test_perfect_views_of_orthogonal_samples() -> None:
    both = torch.eye(6).expand(2, 6, 6)
    assert nt_xent(both, both, 0, T)[0].item() == pytest.approx(math.log(1 + 10 * math.exp(-1 / T)), rel=1e-5)


def test_order_of_samples_and_views_does_not_matter() -> None:
    others = global_batch()
    loss = nt_xent(others, others, 0, T)[0]
    for changed in (others[:, torch.tensor([3, 0, 5, 1, 4, 2])], others[torch.tensor([2, 0, 1])]):
        torch.testing.assert_close(nt_xent(changed, changed, 0, T)[0], loss, rtol=1e-6, atol=0)


def test_parts_of_the_batch_average_to_the_batch() -> None:
    others = global_batch()
    parts = [nt_xent(others[:, r : r + 2], others, r, T)[0] for r in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), nt_xent(others, others, 0, T)[0], rtol=1e-6, atol=0)


def test_gradient_passes_gradcheck() -> None:
    embeddings = global_batch(dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: nt_xent(e, e, 0, T)[0], (embeddings,))
    mine = unit(V, N, C, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda e, o: sup_con(e, o, OFFSET, T, LABELS)[0], (mine, embeddings))


# ---- sup_con ----


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_sup_con_equals_the_loops(views: int, mode: Any) -> None:
    others = global_batch(views)
    mine = others[:, OFFSET : OFFSET + N]
    loss, logits = sup_con(mine, others, OFFSET, T, LABELS, contrast_mode=mode)
    anchor_views = views if mode == "all" else 1
    expected = looped(mine, others, OFFSET, classes(LABELS, N, OFFSET), anchor_views)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits.shape == (anchor_views * N, views * M)


@pytest.mark.parametrize("mode", ["all", "one"])
def test_a_mask_equals_the_loops(mode: Any) -> None:
    others = global_batch()
    mine, mask = others[:, OFFSET : OFFSET + N], coins(N, M, seed=2)
    loss, _ = sup_con(mine, others, OFFSET, T, mask=mask, contrast_mode=mode)
    expected = looped(mine, others, OFFSET, mask.tolist(), V if mode == "all" else 1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_mask_of_the_labels_equals_the_labels() -> None:
    others = global_batch()
    a = sup_con(others, others, 0, T, LABELS)[0]
    assert torch.equal(a, sup_con(others, others, 0, T, mask=LABELS[:, None] == LABELS)[0])


def test_unique_labels_give_nt_xent() -> None:
    others = global_batch()
    unique = torch.tensor([7, 3, 11, 0, 5, 2])
    assert torch.equal(sup_con(others, others, 0, T, unique)[0], nt_xent(others, others, 0, T)[0])
    assert torch.equal(sup_con(others, others, 0, T)[0], nt_xent(others, others, 0, T)[0])


def test_renaming_the_classes_changes_nothing() -> None:
    others = global_batch()
    renamed = torch.tensor([5, -3, 9])[LABELS]
    assert torch.equal(sup_con(others, others, 0, T, LABELS)[0], sup_con(others, others, 0, T, renamed)[0])


@pytest.mark.parametrize("samples", [2, 8])
def test_one_class_at_one_point_gives_log_of_all_others(samples: int) -> None:
    same, labels = torch.eye(C)[:1].expand(2, samples, C), torch.zeros(samples, dtype=torch.long)
    assert sup_con(same, same, 0, T, labels)[0].item() == pytest.approx(math.log(2 * samples - 1), abs=1e-5)


def test_collapsed_orthogonal_classes_are_the_minimum() -> None:
    """Two classes of two samples, two views: 3 positives at 1, 4 negatives at 0."""
    labels = torch.tensor([0, 0, 1, 1])
    both = torch.eye(4)[labels].expand(2, 4, 4)
    assert sup_con(both, both, 0, T, labels)[0].item() == pytest.approx(math.log(3 + 4 * math.exp(-1 / T)), rel=1e-5)


def test_an_anchor_without_a_positive_is_excluded() -> None:
    others = global_batch(1).requires_grad_()
    loss = sup_con(others, others, 0, T, LABELS)[0]
    (gradient,) = torch.autograd.grad(loss, others)
    assert gradient.isfinite().all()
    mask = (LABELS[:, None] == LABELS) & ~torch.eye(M, dtype=torch.bool)
    kept = [looped(others[:, n : n + 1], others, n, [mask[n].tolist()], 1) for n in range(M) if mask[n].any()]
    assert len(kept) == M - 1
    assert loss.item() == pytest.approx(mean(kept), rel=1e-5)


def test_without_any_positive_loss_and_gradient_are_zero() -> None:
    others = global_batch(1).requires_grad_()
    loss = sup_con(others, others, 0, T)[0]
    (gradient,) = torch.autograd.grad(loss, others)
    assert loss.item() == 0
    assert gradient.abs().max() == 0


def test_base_temperature_is_a_factor() -> None:
    others = global_batch()
    plain = sup_con(others, others, 0, T, LABELS)[0]
    torch.testing.assert_close(sup_con(others, others, 0, T, LABELS, base_temperature=0.1)[0], plain * 4)


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"embeddings": unit(2, N, C, seed=0)}, r"embeddings \(2, 4, 5\), others \(3, 6, 5\) must have"),
        ({"offset": 3}, r"offset=3 must be 0 \.\.\. 2: the position of the first sample"),
        ({"offset": -1}, r"offset=-1 must be 0 \.\.\. 2"),
        ({"labels": LABELS[:N]}, r"labels \(4,\) must have shape \(6,\): one per sample of the global batch"),
        ({"labels": LABELS, "mask": coins(N, M, seed=0)}, "labels and mask"),
        ({"mask": coins(M, M, seed=0)}, r"mask \(6, 6\) of torch.bool must be bool of shape \(4, 6\)"),
        ({"contrast_mode": "two"}, "contrast_mode='two' must be 'all' or 'one'"),
        ({"base_temperature": 0.0}, "base_temperature=0.0 must be above 0"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "embeddings": global_batch()[:, :N],
        "others": global_batch(),
        "offset": 0,
        "temperature": T,
    }
    with pytest.raises(ValueError, match=message):
        sup_con(**(arguments | change))


def test_one_view_or_one_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="have 1 view"):
        nt_xent(global_batch(1), global_batch(1), 0, T)
    with pytest.raises(ValueError, match="a single embedding"):
        sup_con(global_batch(1)[:, :1], global_batch(1)[:, :1], 0, T)
