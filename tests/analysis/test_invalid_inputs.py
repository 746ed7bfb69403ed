"""Measures of features that are not finite are nan, and invalid arguments are refused by a ValueError."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moco.analysis import (
    alignment,
    alpha_req,
    covariance_spectrum,
    duplicate_share,
    explain_temperature,
    feature_std,
    hardness,
    own_key_share,
    rank_me,
    relative_penalty,
    same_label_share,
    similar_share,
    spread,
    tolerance,
    uniformity,
)

M, C = 12, 8
LABELS = torch.arange(M) % 3
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "alignment": lambda x: alignment(x, x.flip(0)),
    "uniformity": uniformity,
    "tolerance": lambda x: tolerance(x, LABELS),
    "rank_me": rank_me,
    "covariance_spectrum": covariance_spectrum,
    "alpha_req": lambda x: alpha_req(x, 1, 6),
    "feature_std": feature_std,
    "spread": spread,
    "hardness": lambda x: hardness(x)[2],
}


def features() -> Tensor:
    return torch.randn(M, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(st.sampled_from(sorted(MEASURES)), st.data())
def test_measures_of_features_that_are_not_finite_are_nan(name: str, data: st.DataObject) -> None:
    x = features()
    assert MEASURES[name](x).isfinite().all()
    at = data.draw(st.integers(0, M - 1)), data.draw(st.integers(0, C - 1))
    x[at] = math.nan if name == "hardness" else data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    assert MEASURES[name](x).isnan().any()


@given(st.sampled_from(sorted(MEASURES)), st.sampled_from([(0, C), (M, 0), (C,)]))
def test_empty_and_flat_features_are_refused(name: str, shape: tuple[int, ...]) -> None:
    if shape == (M, 0) and name not in ("rank_me", "hardness"):
        return  # no dimension: zero distances, well defined
    with pytest.raises(ValueError, match=r"\("):
        MEASURES[name](torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_invalid_numbers_are_named(value: float) -> None:
    x = features()
    calls: dict[str, Callable[[], object]] = {
        "alpha": lambda: alignment(x, x, value),
        "t": lambda: uniformity(x, value),
        "epsilon": lambda: rank_me(x, value),
        "temperature": lambda: relative_penalty(x, value),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            call()
    with pytest.raises(ValueError, match=r"temperatures \[.*\] must be above 0 and finite"):
        explain_temperature(x[0], 0, torch.tensor([0.1, value]))


def test_float_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels are float32; they must be integers"):
        tolerance(features(), LABELS.float())


def test_an_empty_queue_is_refused() -> None:
    key, none = torch.eye(3), torch.zeros(0, 3)
    calls: list[Callable[[], object]] = [
        lambda: similar_share(key, none, 0.5),
        lambda: duplicate_share(key, none),
        lambda: own_key_share(torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long)),
        lambda: same_label_share(LABELS, LABELS[:0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must hold at least one key"):
            call()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_any_finite_logits_are_explained(logits: list[float]) -> None:
    """The classical example is [1, 2, 3]."""
    found = explain_temperature(torch.tensor(logits, dtype=torch.float64), 1, torch.tensor([0.01, 1.0]))
    assert all(part.isfinite().all() for part in found)
    torch.testing.assert_close(found.softmax.sum(dim=1), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be finite"):
        explain_temperature(torch.tensor([*logits, math.nan]), 1, torch.tensor([0.1]))
