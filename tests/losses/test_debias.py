"""The debiased loss: loops, InfoNCE at tau+ = 0, and that it corrects a mixture of known classes."""

import math

import pytest
import torch

from moco.losses import debiased_cross_entropy, info_nce, info_nce_logits
from tests.losses.loops import coins, dot, mean, unit

N, C, K, T = 5, 6, 9, 0.5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tau", "temperature"), [(0.0, T), (0.1, T), (0.4, T), (0.1, 0.05), (0.1, 0.01)])
def test_loss_equals_the_loops(tau: float, temperature: float, masked: bool) -> None:
    query, key, queue = (unit(rows, C, seed=i, dtype=torch.float64) for i, rows in enumerate((N, N, K)))
    negatives = coins(N, K, seed=3) if masked else None
    loss = debiased_cross_entropy(info_nce_logits(query, key, queue, temperature, negatives), temperature, tau)
    expected = []
    for n in range(N):
        positive = math.exp(dot(query[n].tolist(), key[n].tolist()) / temperature)
        terms = [
            math.exp(dot(query[n].tolist(), queue[j].tolist()) / temperature)
            for j in range(K)
            if negatives is None or negatives[n, j]
        ]
        g = max((mean(terms) - tau * positive) / (1 - tau), math.exp(-1 / temperature))
        expected.append(-math.log(positive / (positive + len(terms) * g)))
    assert loss.item() == pytest.approx(mean(expected), rel=1e-9, abs=1e-12)


def test_tau_zero_is_info_nce() -> None:
    query, key, queue = unit(N, C, seed=0).requires_grad_(), unit(N, C, seed=1), unit(K, C, seed=2)
    negatives = coins(N, K, seed=3)
    a = debiased_cross_entropy(info_nce_logits(query, key, queue, T, negatives), T, 0.0)
    b = info_nce(query, key, queue, T, negatives)[0]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(a, query), torch.autograd.grad(b, query), rtol=1e-5, atol=1e-7)


def test_the_true_prior_recovers_the_loss_over_true_negatives() -> None:
    """A queue of which a tenth is the query's class, at the similarity of its key: the bias goes away as K grows.

    Negatives are drawn from the data, p = tau p+ + (1 - tau) p-; the loss wanted has as many negatives, all from p-.
    """
    generator, tau, count = torch.Generator().manual_seed(0), 0.1, 200_000
    others = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5  # similarities under p-
    own = torch.rand(count, generator=generator) < tau
    positive = torch.tensor([[0.9]], dtype=torch.float64)

    def logits(negatives: torch.Tensor) -> torch.Tensor:
        return torch.cat([positive, negatives[None]], dim=1) / T

    wanted = debiased_cross_entropy(logits(others), T, 0.0).item()
    mixed = logits(torch.where(own, positive[0], others))
    biased, debiased = debiased_cross_entropy(mixed, T, 0.0).item(), debiased_cross_entropy(mixed, T, tau).item()
    assert biased - wanted > 0.2
    assert debiased == pytest.approx(wanted, abs=5e-3)


def test_the_estimate_has_the_lower_bound_of_unit_vectors() -> None:
    """All negatives opposite and a perfect positive: the estimate would be below 0, the bound is K exp(-1 / T)."""
    logits = torch.tensor([[1.0] + [-1.0] * K]) / T
    loss = debiased_cross_entropy(logits, T, 0.3)
    assert loss.item() == pytest.approx(math.log(1 + K * math.exp(-2 / T)), rel=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_uniform_similarities_give_log_1_plus_k_whatever_the_prior(tau: float) -> None:
    """Then the mean of the negatives is the positive, and g is the same."""
    assert debiased_cross_entropy(torch.ones(2, 1 + K) / T, T, tau).item() == pytest.approx(math.log(1 + K), rel=1e-6)


def test_gradient_passes_gradcheck_and_no_negative_at_all_gives_zero() -> None:
    logits = (unit(N, 1 + K, seed=0, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: debiased_cross_entropy(x, T, 0.05), (logits,))
    empty = torch.full((N, 1 + K), -math.inf)
    empty[:, 0] = 1.0
    empty.requires_grad_()
    loss = debiased_cross_entropy(empty, T, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert empty.grad is not None
    assert empty.grad.abs().max() == 0


@pytest.mark.parametrize("tau", [-0.1, 1.0])
def test_a_prior_out_of_range_is_named(tau: float) -> None:
    with pytest.raises(ValueError, match=f"prior={tau} must be at least 0 and below 1"):
        debiased_cross_entropy(torch.zeros(1, 2), T, tau)
