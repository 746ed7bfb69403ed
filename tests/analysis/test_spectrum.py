"""Effective rank, power law and standard deviation against known spectra, numpy and invariances."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.analysis import alpha_req, covariance_spectrum, feature_std, power_law_exponent, rank_me, spread
from tests.losses.loops import unit

C = 8


def with_spectrum(sigma: Tensor, samples: int, seed: int = 0) -> Tensor:
    """Centered (samples, R) features with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(samples, len(sigma), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(dim=0))[0]  # columns stay centered
    right = torch.linalg.qr(torch.randn(len(sigma), len(sigma), generator=generator, dtype=torch.float64))[0]
    features: Tensor = left * sigma @ right.T
    return features


@pytest.mark.parametrize("samples", [40, C])
def test_rank_me_of_a_known_spectrum_is_exp_of_its_entropy(samples: int) -> None:
    sigma = torch.tensor([5.0, 3.0, 1.0, 0.5, 0.25, 0.1, 0.1], dtype=torch.float64)
    share = (sigma / sigma.sum()).tolist()
    entropy = -sum(p * math.log(p) for p in share)
    assert rank_me(with_spectrum(sigma, samples)).item() == pytest.approx(math.exp(entropy), rel=1e-4)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (1, 8)])
def test_rank_me_equals_the_papers_equation_on_the_svd(shape: tuple[int, int]) -> None:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    sigma = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rank_me(features).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)


@pytest.mark.parametrize("equal", [1, 3, C])
def test_rank_me_counts_equal_directions(equal: int) -> None:
    assert rank_me(torch.eye(C)[:equal].repeat(5, 1)).item() == pytest.approx(equal, rel=1e-4)


def test_rank_me_of_a_collapse_is_one() -> None:
    assert rank_me(unit(1, C, seed=0).expand(20, C)).item() == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.zeros(20, C)).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize(("size", "first", "last"), [(128, 4, 100), (20, 4, 100), (128, 1, 128)])
def test_an_exact_power_law_gives_its_exponent(alpha: float, size: int, first: int, last: int) -> None:
    eigenvalues = torch.arange(1, size + 1, dtype=torch.float64) ** -alpha
    assert power_law_exponent(3 * eigenvalues, first, last).item() == pytest.approx(alpha, abs=1e-5)
    features = with_spectrum(eigenvalues.sqrt(), 200) + 4.0  # the mean is removed
    assert alpha_req(features, first, last).item() == pytest.approx(alpha, abs=1e-4)


def test_the_fit_equals_numpys_weighted_one_without_the_first_ranks() -> None:
    eigenvalues = covariance_spectrum(torch.randn(300, 60, generator=torch.Generator().manual_seed(0)).cumsum(dim=1))
    eigenvalues[:3] = 1e6
    rank = np.arange(4, 51)
    y = eigenvalues.log().numpy()[3:50]
    slope = np.polyfit(np.log(rank), y, 1, w=rank**-0.5)[0]  # numpy squares its weights
    assert power_law_exponent(eigenvalues, last=50).item() == pytest.approx(-slope, rel=1e-5)


def test_the_covariance_spectrum_equals_numpys() -> None:
    features = torch.randn(30, C, generator=torch.Generator().manual_seed(1)) + 2
    expected = np.linalg.eigvalsh(np.cov(features.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(covariance_spectrum(features).numpy(), expected, rtol=1e-8)


def test_std_equals_numpys_and_is_one_over_root_c_for_uniform_points() -> None:
    features = torch.randn(40, C, generator=torch.Generator().manual_seed(0)) + 1
    x = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(feature_std(features).numpy(), x.std(axis=0), rtol=1e-5)
    many = unit(20_000, 128, seed=0)
    assert feature_std(many).mean().item() == pytest.approx(1 / math.sqrt(128), rel=0.01)
    assert spread(many).item() == pytest.approx(1, abs=0.01)
    assert spread(many).item() <= 1


def test_std_of_a_collapse_is_zero() -> None:
    assert feature_std(unit(1, C, seed=0).expand(5, C)).abs().max().item() < 1e-7
    assert spread(torch.zeros(5, C)).item() == 0


def test_rotation_order_and_scale_do_not_change_spectra() -> None:
    features = torch.randn(30, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(C, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for measure in (rank_me, lambda x: alpha_req(x, 1)):
        torch.testing.assert_close(measure(features @ turn), measure(features))
        torch.testing.assert_close(measure(5 * features[order]), measure(features))
    torch.testing.assert_close(spread(features[order]), spread(features))


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: feature_std(unit(1, C, seed=0)), r"features \(1, 8\)"),
        (lambda: covariance_spectrum(unit(1, C, seed=0)), r"features \(1, 8\)"),
        (lambda: rank_me(unit(1, C, seed=0)[:0]), r"features \(0, 8\)"),
        (lambda: rank_me(unit(1, C, seed=0), epsilon=0), "epsilon=0"),
        (lambda: alpha_req(unit(1, C, seed=0).expand(9, C)), "first=4"),
        (lambda: power_law_exponent(torch.ones(9), 0, 5), "first=0 and last=5"),
    ],
)
def test_invalid_input_is_refused(measure: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure()
