"""Alignment, uniformity and tolerance against loops, closed forms and invariances."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moco.analysis import alignment, geometry, tolerance, uniformity
from tests.losses.loops import dot, mean, unit

M, C = 23, 6
LABELS = torch.arange(M) % 4


def rotation(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turn: Tensor = torch.linalg.qr(torch.randn(C, C, generator=generator, dtype=torch.float64))[0]
    return turn


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_equals_the_loops(alpha: float) -> None:
    query, key = unit(M, C, seed=0), unit(M, C, seed=1)
    distances = [math.dist(q, k) for q, k in zip(query.tolist(), key.tolist(), strict=True)]
    assert alignment(query, key, alpha).item() == pytest.approx(mean([d**alpha for d in distances]), rel=1e-5)
    assert alignment(3 * query, 0.1 * key, alpha).item() == pytest.approx(alignment(query, key, alpha).item(), rel=1e-5)


def test_alignment_of_equal_opposite_and_orthogonal_views() -> None:
    x = torch.eye(C)
    assert alignment(x, x).item() == 0
    assert alignment(x, -x).item() == 4
    assert alignment(x, x.roll(1, dims=0)).item() == pytest.approx(2)
    similar = unit(M, C, seed=0), unit(M, C, seed=1)
    assert alignment(*similar).item() == pytest.approx(2 - 2 * (similar[0] * similar[1]).sum(dim=1).mean().item())


@pytest.mark.parametrize("at_once", [1, 40, 100, 2**22])
@pytest.mark.parametrize("t", [0.5, 2.0, 20.0])
def test_uniformity_equals_the_loops_in_any_chunks(t: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "PAIRS_AT_ONCE", at_once)
    features = unit(M, C, seed=0)
    x = features.tolist()
    potentials = [math.exp(-t * math.dist(x[i], x[j]) ** 2) for i in range(M) for j in range(M) if i != j]
    assert uniformity(features, t).item() == pytest.approx(math.log(mean(potentials)), rel=1e-5)


def test_uniformity_of_antipodal_points_and_of_collapse() -> None:
    one = unit(1, C, seed=0)
    assert uniformity(torch.cat([one, -one])).item() == pytest.approx(-8, rel=1e-6)
    assert uniformity(one.expand(9, C)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.zeros(9, C)).item() == 0


@pytest.mark.parametrize("c", [3, 128])
def test_uniformity_of_uniform_points_is_the_integral(c: int) -> None:
    """The density of a cosine on the sphere in C dimensions is proportional to (1 - s^2)^((C - 3) / 2)."""
    s = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    density = (1 - s**2) ** ((c - 3) / 2)
    expected = math.log(float((density * (-2 * (2 - 2 * s)).exp()).sum() / density.sum()))
    points = unit(4000, c, seed=3)
    assert uniformity(points).item() == pytest.approx(expected, abs=0.01)
    if c == 128:
        assert expected == pytest.approx(-4 + 8 / c, abs=0.01)  # the value in the docstring


def test_tolerance_equals_the_loops() -> None:
    features = unit(M, C, seed=0)
    x = features.tolist()
    same = [dot(x[i], x[j]) for i in range(M) for j in range(M) if i != j and LABELS[i] == LABELS[j]]
    assert tolerance(features, LABELS).item() == pytest.approx(mean(same), rel=1e-5)
    assert tolerance(features, LABELS * 7 - 3).item() == tolerance(features, LABELS).item()  # any label values


def test_tolerance_of_pure_classes_and_of_opposite_ones() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    assert tolerance(torch.eye(C)[labels], labels).item() == pytest.approx(1)
    assert tolerance(torch.stack([torch.eye(C)[0], -torch.eye(C)[0]]), torch.tensor([4, 4])).item() == pytest.approx(-1)


def test_rotation_and_order_change_nothing() -> None:
    features, key = unit(M, C, seed=0, dtype=torch.float64), unit(M, C, seed=1, dtype=torch.float64)
    turned, order = features @ rotation(), torch.randperm(M, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(uniformity(turned), uniformity(features))
    torch.testing.assert_close(uniformity(features[order]), uniformity(features))
    torch.testing.assert_close(tolerance(turned, LABELS), tolerance(features, LABELS))
    torch.testing.assert_close(tolerance(features[order], LABELS[order]), tolerance(features, LABELS))
    torch.testing.assert_close(alignment(turned, key @ rotation()), alignment(features, key))


def test_half_precision_is_accepted() -> None:
    features = unit(M, C, seed=0)
    for measure in (uniformity, lambda x: tolerance(x, LABELS)):
        half = measure(features.half())
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(measure(features).item(), abs=1e-2)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: uniformity(unit(1, C, seed=0)), r"features \(1, 6\)"),
        (lambda: uniformity(unit(3, C, seed=0), 0), r"t=0 .* 20"),
        (lambda: tolerance(unit(3, C, seed=0), torch.arange(3)), "3 classes"),
        (lambda: tolerance(unit(3, C, seed=0), torch.arange(2)), r"labels \(2,\)"),
        (lambda: alignment(unit(3, C, seed=0)[:0], unit(3, C, seed=0)[:0]), r"query \(0, 6\)"),
        (lambda: alignment(unit(3, C, seed=0), unit(3, C, seed=0), 0), "alpha=0"),
    ],
)
def test_invalid_input_is_refused(measure: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure()
