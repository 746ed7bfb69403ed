"""Margins: what they do to an angle, that they are monotone and have a gradient everywhere."""

import math
from typing import Any

import pytest
import torch

from moco.losses import add_margin


@pytest.mark.parametrize("m", [0.1, 0.5, 1.0])
def test_arc_adds_to_the_angle(m: float) -> None:
    angle = torch.linspace(0.02, math.pi - m - 0.02, 200)
    torch.testing.assert_close(add_margin(angle.cos(), m, "arc"), (angle + m).cos(), rtol=0, atol=1e-5)


def test_cosine_is_a_subtraction_and_zero_changes_nothing() -> None:
    cosine = torch.linspace(-1, 1, 11)
    assert torch.equal(add_margin(cosine, 0.35, "cosine"), cosine - 0.35)
    assert torch.equal(add_margin(cosine, 0.0, "arc"), cosine)
    assert torch.equal(add_margin(cosine, 0.0, "cosine"), cosine)


@pytest.mark.parametrize("m", [0.1, 0.5, 1.6, 3.0])
def test_arc_is_monotone_continuous_and_lower_on_the_whole_circle(m: float) -> None:
    angle = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    lowered = add_margin(angle.cos(), m, "arc")
    steps = lowered.diff()
    assert (steps <= 0).all()  # a larger angle never counts as closer, pi - m or not
    assert steps.abs().max() < 2 * math.pi / 20000
    assert (lowered <= angle.cos() + 1e-7).all()


def test_arc_asks_for_an_angle_smaller_by_the_margin() -> None:
    """What counts as a similarity of 0.8 under the margin is closer by just this angle."""
    wanted, m = 0.8, 0.3
    angle = torch.linspace(0.01, math.pi - m, 100001, dtype=torch.float64)
    reached = angle[(add_margin(angle.cos(), m, "arc") - wanted).abs().argmin()]
    assert reached.item() == pytest.approx(math.acos(wanted) - m, abs=1e-4)


@pytest.mark.parametrize("value", [1.0, 1.0 + 1e-6, -1.0, -1.0 - 1e-6])
def test_the_poles_have_finite_values_and_gradients(value: float) -> None:
    cosine = torch.tensor([value], requires_grad=True)
    lowered = add_margin(cosine, 0.5, "arc")
    lowered.sum().backward()
    assert lowered.isfinite().all()
    assert cosine.grad is not None
    assert 0 < cosine.grad.item() < math.inf


@pytest.mark.parametrize("kind", ["arc", "cosine"])
def test_gradient_passes_gradcheck(kind: Any) -> None:
    cosine = torch.linspace(-0.99, 0.99, 23, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: add_margin(s, 0.5, kind), (cosine,))


@pytest.mark.parametrize(
    ("margin", "kind", "message"),
    [
        (-0.1, "cosine", "margin=-0.1 must be 0 or more$"),
        (math.pi, "arc", r"margin=3.14.* below pi"),
        (math.nan, "arc", "margin=nan"),
        (0.1, "sphere", "margin_kind='sphere' must be 'arc' or 'cosine'"),
    ],
)
def test_invalid_arguments_are_refused(margin: float, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_margin(torch.zeros(1), margin, kind)
