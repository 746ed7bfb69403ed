"""Shares of the negatives against autograd of the loss, effective negatives, histograms, explained temperatures."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.analysis import (
    bin_edges,
    effective_negatives,
    explain_temperature,
    hardness,
    relative_penalty,
    similarity_histogram,
    top_share,
)
from moco.analysis import histogram as histogram_module
from moco.analysis import negatives as negatives_module
from moco.losses import info_nce
from tests.losses.loops import coins, mean, unit

N, C, K = 5, 6, 17
THREE = (0.8, 0.5, 0.1)  # similarities of three candidates
TEMPERATURES = [0.05, 0.2, 1.0]


def inputs(t: float, negatives: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key, queue, each query's gradients by them (N, C) and (N, K, C), and the logits (N, 1 + K)."""
    query, key, queue = (unit(rows, C, seed=i, dtype=torch.float64) for i, rows in enumerate((N, N, K)))
    by_key, by_queue = [], []
    for n in range(N):
        k, q = key[n : n + 1].clone().requires_grad_(), queue.clone().requires_grad_()
        loss, _ = info_nce(query[n : n + 1], k, q, t, None if negatives is None else negatives[n : n + 1])
        one, many = torch.autograd.grad(loss, (k, q))
        by_key.append(one[0])
        by_queue.append(many)
    return torch.stack(by_key), torch.stack(by_queue), query, info_nce(query, key, queue, t, negatives)[1]


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("masked", [False, True])
def test_penalties_are_ratios_of_info_nces_gradients(t: float, masked: bool) -> None:
    """The gradient by a key is a unit query times dL/ds, so the ratio of lengths is Wang & Liu's r."""
    by_key, by_queue, _, logits = inputs(t, coins(N, K, seed=3) if masked else None)
    share = by_queue.norm(dim=2) / by_key.norm(dim=1, keepdim=True)
    torch.testing.assert_close(relative_penalty(logits[:, 1:], 1.0), share)
    torch.testing.assert_close(relative_penalty(logits[:, 1:] * t, t), share)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("top", [1, 4, K])
def test_top_share_is_that_of_the_largest_gradients(t: float, top: int) -> None:
    _, by_queue, _, logits = inputs(t)
    lengths = by_queue.norm(dim=2)
    expected = lengths.sort(dim=1, descending=True).values[:, :top].sum(dim=1) / lengths.sum(dim=1)
    torch.testing.assert_close(top_share(relative_penalty(logits[:, 1:], 1.0), top), expected)


@pytest.mark.parametrize("equal", [1, 3, K])
def test_equal_shares_are_counted(equal: int) -> None:
    logits = torch.full((2, K), -math.inf)
    logits[:, :equal] = 0.7
    weights = relative_penalty(logits, 0.1)
    torch.testing.assert_close(effective_negatives(weights), torch.full((2,), float(equal)))
    torch.testing.assert_close(top_share(weights, 1), torch.full((2,), 1 / equal))


def test_the_effective_number_is_exp_of_the_entropy() -> None:
    r = relative_penalty(unit(K, seed=0), 0.3).tolist()
    expected = math.exp(-sum(p * math.log(p) for p in r))
    assert effective_negatives(torch.tensor(r)).item() == pytest.approx(expected, rel=1e-5)


def test_a_lower_temperature_uses_fewer_negatives() -> None:
    similarity = torch.linspace(-1, 1, 201)
    temperatures = torch.tensor([1e-4, 0.07, 0.2, 1.0, 1e4])
    weights = relative_penalty(similarity, temperatures[:, None])
    assert weights.shape == (5, 201)
    counts = effective_negatives(weights).tolist()
    assert counts == sorted(counts)
    assert counts[0] == pytest.approx(1, rel=1e-4)
    assert counts[-1] == pytest.approx(201, rel=1e-4)
    assert (weights.diff(dim=1) >= -1e-9).all()  # harder negatives have larger shares


@pytest.mark.parametrize("at_once", [1, 40, 2**21])
@pytest.mark.parametrize("masked", [False, True])
def test_hardness_equals_its_parts(at_once: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negatives_module, "ENTRIES_AT_ONCE", at_once)
    *_, logits = inputs(0.2, coins(N, K, seed=3) if masked else None)
    measured = hardness(logits, top=3)
    weights = relative_penalty(logits[:, 1:], 1.0)
    torch.testing.assert_close(measured.effective_negatives, effective_negatives(weights).mean())
    torch.testing.assert_close(measured.top_share, top_share(weights, 3).mean())
    torch.testing.assert_close(measured.push, (1 - logits.softmax(dim=1)[:, 0]).mean())
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0)) + 1
    moved = torch.cat([logits[:, :1], logits[:, order]], dim=1).flip(0)
    for a, b in zip(hardness(moved, top=3), measured, strict=True):
        torch.testing.assert_close(a, b)


def test_a_solved_query_has_no_push_and_top_share_is_1_with_few_negatives() -> None:
    logits = torch.tensor([[20.0, -20.0, -20.0]])
    assert hardness(logits).push.item() == pytest.approx(2 * math.exp(-40), rel=1e-4)
    assert hardness(logits, top=10).top_share.item() == pytest.approx(1)


# ---- histograms ----


@pytest.mark.parametrize("bins", [1, 7, 100])
@pytest.mark.parametrize("at_once", [10, 2**21])
def test_histogram_equals_numpy(bins: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram_module, "ENTRIES_AT_ONCE", at_once)
    values = unit(40, 5, seed=0, dtype=torch.float64)
    counts = similarity_histogram(values, bins)
    expected, edges = np.histogram(values.numpy(), bins=bins, range=(-1, 1))
    assert counts.tolist() == expected.tolist()
    np.testing.assert_allclose(bin_edges(bins).numpy(), edges, atol=1e-15)


@pytest.mark.parametrize("at_once", [10, 2**21])
def test_a_weighted_histogram_equals_numpy(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram_module, "ENTRIES_AT_ONCE", at_once)
    values = unit(40, 5, seed=0, dtype=torch.float64)
    weights = relative_penalty(values, 0.1)
    sums = similarity_histogram(values, 7, weights)
    expected, _ = np.histogram(values.numpy(), bins=7, range=(-1, 1), weights=weights.numpy())
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12)
    assert sums.sum().item() == pytest.approx(40)  # each row's shares are 1
    values[:, 1] = -math.inf
    present = torch.ones(5, dtype=torch.bool)
    present[1] = False
    weights = relative_penalty(values, 0.1)
    weights[:, 1] = math.nan
    expected, _ = np.histogram(values[:, present].numpy(), 7, (-1, 1), weights=weights[:, present].numpy())
    np.testing.assert_allclose(similarity_histogram(values, 7, weights).numpy(), expected, rtol=1e-12)


def test_histogram_of_edges_rounding_and_absent_entries() -> None:
    values = torch.tensor([-1.0, -1.0000002, -0.5, 0.0, 0.5, 1.0, 1.0000001, -math.inf])
    assert similarity_histogram(values, 4).tolist() == [2, 1, 1, 3]
    assert similarity_histogram(values.bfloat16(), 4).tolist() == [2, 1, 1, 3]
    assert similarity_histogram(values[:0], 4).tolist() == [0, 0, 0, 0]


# ---- explained temperatures ----


@pytest.mark.parametrize("answer", [0, 1, 2])
def test_explained_values_are_cross_entropy_and_its_gradient(answer: int) -> None:
    grid = torch.logspace(-1.5, 0.5, 9, dtype=torch.float64)
    explained = explain_temperature(torch.tensor(THREE), answer, grid)
    for i, t in enumerate(grid.tolist()):
        s = torch.tensor(THREE).double().requires_grad_()  # the same float32 values
        loss = torch.nn.functional.cross_entropy(s[None] / t, torch.tensor([answer]))
        assert explained.loss[i].item() == pytest.approx(loss.item(), rel=1e-9)
        torch.testing.assert_close(explained.gradient[i], torch.autograd.grad(loss, s)[0])
        weights = [math.exp(value / t) for value in s.tolist()]
        assert explained.softmax[i].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-9)


def test_low_temperatures_solve_a_right_answer_and_amplify_a_wrong_one() -> None:
    grid = torch.tensor([0.01, 0.1, 1.0])
    right, wrong = (explain_temperature(torch.tensor(THREE), answer, grid) for answer in (0, 1))
    assert right.loss[0] < 1e-9
    assert right.gradient[0].abs().max() < 1e-6
    assert wrong.loss[0].item() == pytest.approx(30, rel=1e-4)  # (0.8 - 0.5) / T
    assert wrong.gradient[0].tolist() == pytest.approx([100, -100, 0], rel=1e-4, abs=1e-6)
    assert mean(wrong.gradient.sum(dim=1).tolist()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: top_share(torch.ones(2, K), 18), r"top=18 .* 17"),
        (lambda: hardness(torch.ones(2, 1)), r"logits \(2, 1\)"),
        (lambda: similarity_histogram(torch.ones(2), 0), "bins=0"),
        (lambda: similarity_histogram(torch.ones(2), 5, torch.ones(3)), r"weights \(3,\) .* \(2,\)"),
        (lambda: explain_temperature(torch.tensor(THREE), 3, torch.ones(1)), r"answer=3 .* 2"),
        (lambda: explain_temperature(torch.tensor(THREE), 0, torch.zeros(1)), "temperatures .*0"),
    ],
)
def test_invalid_input_is_refused(measure: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure()
