"""Any fault in the input of a loss is refused by a ValueError or makes the loss non-finite; it never hides."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moco.losses import (
    LearnedTemperature,
    Switches,
    contrast,
    decoupled_info_nce,
    in_batch_info_nce,
    info_nce,
    info_nce_streamed,
    multi_positive_info_nce,
    multi_positive_nt_xent,
    nt_xent,
    sup_con,
    temperature_at,
)
from tests.losses.loops import unit

N, C, K, T = 4, 3, 7, 0.3
Loss = Callable[..., Tensor]  # (N, C), (N, C), (K, C) and T to ()


def in_batch(q: Tensor, k: Tensor, queue: Tensor, t: float, **options: Any) -> Tensor:
    return in_batch_info_nce(q, torch.cat([k, queue]), torch.arange(len(q)), t, **options)[0]


def in_views(loss: Any, *options: Any) -> Loss:
    def of(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
        z = torch.stack([q, k])
        value: Tensor = loss(z, z, 0, t, *options)[0]
        return value

    return of


def switched(**switches: Any) -> Loss:
    def of(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
        uniforms = torch.rand(len(q), Switches(**switches).draws, generator=torch.Generator().manual_seed(0))
        return contrast(q, k, queue, t, Switches(**switches), uniforms=uniforms)[0]

    return of


NO_POSITIVE = torch.zeros(N, N, dtype=torch.bool)
LOSSES: dict[str, Loss] = {
    "info_nce": lambda q, k, queue, t: info_nce(q, k, queue, t)[0],
    "info_nce_streamed": lambda q, k, queue, t: info_nce_streamed(q, k, queue, t, chunk=2).loss,
    "decoupled_info_nce": lambda q, k, queue, t: decoupled_info_nce(q, k, queue, t)[0],
    "multi_positive_info_nce": lambda q, k, queue, t: multi_positive_info_nce(
        q, k, queue, t, (torch.arange(len(queue)) < 2)[None]
    )[0],
    "mean inside": lambda q, k, queue, t: multi_positive_info_nce(
        q, k, queue, t, (torch.arange(len(queue)) < 2)[None], mean="inside"
    )[0],
    "in_batch_info_nce": in_batch,
    "in_batch_info_nce with margin": lambda *inputs: in_batch(*inputs, margin=0.2),
    "in_batch_info_nce decoupled": lambda *inputs: in_batch(*inputs, decoupled=True),
    "nt_xent": in_views(nt_xent),
    "sup_con": in_views(sup_con, torch.zeros(N, dtype=torch.long)),
    "sup_con without a positive": in_views(sup_con, None, NO_POSITIVE),
    "multi_positive_nt_xent": in_views(multi_positive_nt_xent, None, "one", "inside", True),
    "margin": switched(margin=0.2),
    "debias": switched(debias=0.1),
    "mixing": switched(mix_hardest=4, mix_pairs=2, mix_query=2),
}
IN_VIEWS = ("nt_xent", "sup_con", "sup_con without a positive", "multi_positive_nt_xent")


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "query": unit(N, C, seed=0, dtype=dtype),
        "key": unit(N, C, seed=1, dtype=dtype),
        "queue": unit(K, C, seed=2, dtype=dtype),
    }


@given(st.sampled_from(sorted(LOSSES)), st.data())
def test_a_value_that_is_not_finite_never_yields_a_finite_loss(name: str, data: st.DataObject) -> None:
    given = inputs(data.draw(st.sampled_from([torch.float32, torch.float64])))
    part = data.draw(st.sampled_from(["query", "key"] if name in IN_VIEWS else ["query", "key", "queue"]))
    # -inf as the similarity of a negative means that it is absent, so an infinite key in the queue is not noticed.
    value = data.draw(st.sampled_from([math.nan] if part == "queue" else [math.nan, math.inf, -math.inf]))
    tensor = given[part]
    tensor[data.draw(st.integers(0, len(tensor) - 1)), data.draw(st.integers(0, C - 1))] = value
    assert not LOSSES[name](*given.values(), T).isfinite()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_positive_at_minus_infinity_is_not_hidden_by_the_others(value: float) -> None:
    """Found with 20,000 random faults: the mean inside the logarithm dropped it."""
    query, key, queue = inputs().values()
    key[:, 0] = value * query[:, 0].sign()
    assert not LOSSES["mean inside"](query, -key, queue, T).isfinite()


@given(st.sampled_from(sorted(LOSSES)), st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf]))
def test_an_invalid_temperature_is_named(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        LOSSES[name](*inputs().values(), temperature)


@given(st.sampled_from(sorted(LOSSES)), st.sampled_from([torch.int64, torch.bool, torch.complex64]))
def test_numbers_that_are_not_floating_point_are_named(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        LOSSES[name](*(each.to(dtype) for each in inputs().values()), T)


@given(st.sampled_from(sorted(LOSSES)), st.integers(0, 1))
def test_an_empty_batch_is_named(name: str, dimension: int) -> None:
    given = [each.narrow(dimension, 0, 0) for each in inputs().values()]
    with pytest.raises(ValueError, match=r"\(.*0.*\)"):
        LOSSES[name](*given, T)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(IN_VIEWS) - {n for n in LOSSES if n.startswith("in_batch")}))
def test_an_empty_queue_is_named(name: str) -> None:
    query, key, queue = inputs().values()
    with pytest.raises(ValueError, match=r"queue \(0, 3\)|must be 1 \.\.\. 0"):
        LOSSES[name](query, key, queue[:0], T)


@given(st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_positives_must_be_columns(position: int, with_margin: bool) -> None:
    positives = torch.tensor([0, position])
    arguments = unit(2, C, seed=0), unit(K, C, seed=1), positives, T
    if 0 <= position < K:
        assert in_batch_info_nce(*arguments, margin=0.1 * with_margin)[0].isfinite()
    else:
        with pytest.raises(ValueError, match=rf"positives hold {position}; .* 0 \.\.\. 6"):
            in_batch_info_nce(*arguments, margin=0.1 * with_margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_positives_and_labels_must_be_integers(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"positives are .*int64"):
        in_batch_info_nce(unit(2, C, seed=0), unit(K, C, seed=1), torch.zeros(2, dtype=dtype), T)
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match="labels are float32"):
            sup_con(unit(2, N, C, seed=0), unit(2, N, C, seed=0), 0, T, torch.zeros(N, dtype=dtype))


@pytest.mark.parametrize("base", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_base_temperature_is_named(base: float) -> None:
    z = unit(2, N, C, seed=0)
    with pytest.raises(ValueError, match=f"base_temperature={base}"):
        sup_con(z, z, 0, T, base_temperature=base)


@pytest.mark.parametrize(
    "values",
    [(math.nan, 9.0, 0.1, 1.0), (0.0, math.nan, 0.1, 1.0), (0.0, math.inf, 0.1, 1.0), (0.0, 9.0, 0.1, math.inf)],
)
def test_temperature_schedules_refuse_what_is_not_finite(values: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        temperature_at(*values)
    with pytest.raises(ValueError, match="high=inf"):
        LearnedTemperature(0.1, 0.01, math.inf)
