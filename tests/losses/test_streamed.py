"""InfoNCE in one pass against the materialized form, finite differences, float64, and what it allocates."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moco.analysis import hardness
from moco.builder import KeyQueue
from moco.losses import LearnedTemperature, Switches, contrast, decoupled_info_nce, info_nce
from moco.losses import streamed as module
from moco.losses.streamed import Streamed, info_nce_streamed, logit_measures
from tests.losses import loops
from tests.losses.loops import coins

N, C, K, T = 5, 6, 23, 0.3  # batch, embedding, queue, temperature
CHUNKS = [1, 7, K, K + 40]


def unit(rows: int, seed: int, dtype: torch.dtype = torch.float32, dim: int = C) -> Tensor:
    return loops.unit(rows, dim, seed=seed, dtype=dtype)


INDEX = torch.tensor([3, 8, 100, 3, 0])  # the samples that the queries show: 100 is not in the queue
QUEUE_INDEX = torch.cat([torch.tensor([-1, 8, 3, 0, 8]), torch.arange(K - 5)])  # -1: of no image; 8, 3 and 0 repeat
UNFILLED = torch.arange(K)[None] < 11
NO_MASK, OWN = torch.ones(1, K, dtype=torch.bool), INDEX[:, None] != QUEUE_INDEX
# Arguments of the streamed form, and the equivalent mask.
MASKS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "none": ({}, NO_MASK),
    "unfilled": ({"negatives": UNFILLED}, UNFILLED),
    "each": ({"negatives": coins(N, K, seed=3)}, coins(N, K, seed=3)),
    "own": ({"samples": (INDEX, QUEUE_INDEX)}, OWN),
    "own and unfilled": ({"negatives": UNFILLED, "samples": (INDEX, QUEUE_INDEX)}, OWN & UNFILLED),
    "own and each": (
        {"negatives": coins(N, K, seed=4), "samples": (INDEX, QUEUE_INDEX)},
        OWN & coins(N, K, seed=4),
    ),
}


def both(
    given: dict[str, Any],
    mask: Tensor,
    chunk: int,
    dtype: torch.dtype = torch.float64,
    temperature: float = T,
    decoupled: bool = False,
) -> tuple[Streamed, Tensor, list[Tensor], list[Tensor]]:
    """Streamed, the materialized logits, and the gradients by query and temperature of either."""
    gradients = []
    for streamed in (True, False):
        query, learned = unit(N, 0, dtype).requires_grad_(), torch.tensor(temperature, dtype=dtype, requires_grad=True)
        if streamed:
            how: dict[str, Any] = {"decoupled": decoupled, "chunk": chunk, **given}
            found = info_nce_streamed(query, unit(N, 1, dtype), unit(K, 2, dtype), learned, **how)
            loss = found.loss
        else:
            materialized = decoupled_info_nce if decoupled else info_nce
            loss, logits = materialized(query, unit(N, 1, dtype), unit(K, 2, dtype), learned, mask)
            torch.testing.assert_close(found.loss, loss, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
        (loss * 3).backward()  # backward scales
        assert query.grad is not None
        assert learned.grad is not None
        gradients.append([query.grad, learned.grad])
    return found, logits, gradients[0], gradients[1]


# ---- the materialized form ----


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mask", MASKS)
def test_loss_and_gradients_equal_the_materialized_form(mask: str, chunk: int, decoupled: bool) -> None:
    _, _, streamed, expected = both(*MASKS[mask], chunk, decoupled=decoupled)
    for a, b in zip(streamed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mask", MASKS)
def test_statistics_equal_those_of_the_logits(mask: str, chunk: int) -> None:
    given, allowed = MASKS[mask]
    found, logits, _, _ = both(given, allowed, chunk)
    torch.testing.assert_close(found.positive, logits[:, 0])
    torch.testing.assert_close(found.hardest, logits[:, 1:].amax(dim=1))
    torch.testing.assert_close(found.log_sum, logits[:, 1:].logsumexp(dim=1))
    assert found.negatives.tolist() == allowed.expand(N, -1).sum(dim=1).tolist()
    measures, expected = found.measures(T), hardness(logits)
    for name, value in logit_measures(logits, T).items():
        torch.testing.assert_close(measures[name], value)
    torch.testing.assert_close(measures["effective_negatives"], expected.effective_negatives)
    torch.testing.assert_close(measures["push"], expected.push)
    assert measures["contrast_accuracy"] == (logits[:, :1] > logits[:, 1:]).all(dim=1).double().mean()
    for decoupled in (False, True):
        _, counted = contrast(unit(N, 0), unit(N, 1), unit(K, 2), T, Switches(decoupled=decoupled), allowed)
        for name in ("negatives", "chance"):
            torch.testing.assert_close(found.measures(T, decoupled)[name].float(), counted[name])
    assert not any(value.requires_grad for value in (*found[1:6], *measures.values()))


def test_indices_equal_the_mask_of_the_queue() -> None:
    queue = KeyQueue(K, C, start="empty")
    for seed in range(3):
        queue.enqueue(unit(4, seed), torch.arange(seed * 2, seed * 2 + 4))
    mask = queue.negatives(INDEX)
    assert mask is not None
    assert set(mask.sum(dim=1).tolist()) == {10, 11, 12}  # 12 filled, less the own ones
    loss, _ = info_nce(unit(N, 7), unit(N, 8), queue.keys, T, mask)
    found = info_nce_streamed(unit(N, 7), unit(N, 8), queue.keys, T, queue.filled_mask(), samples=(INDEX, queue.index))
    torch.testing.assert_close(found.loss, loss)
    assert found.negatives.tolist() == mask.sum(dim=1).tolist()


@pytest.mark.parametrize("rows", [1, 2, N, N + 1])
def test_blocks_of_queries_equal_all_queries(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", {"cpu": rows})
    for given, mask in MASKS.values():
        found, _, streamed, expected = both(given, mask, chunk=7)
        assert found.negatives.tolist() == mask.expand(N, -1).sum(dim=1).tolist()
        for a, b in zip(streamed, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_learned_temperature_trains_as_with_info_nce() -> None:
    slopes = []
    for streamed in (True, False):
        temperature = LearnedTemperature(initial=0.2)
        given = unit(N, 0), unit(N, 1), unit(K, 2), temperature()
        torch.autograd.backward(info_nce_streamed(*given).loss if streamed else info_nce(*given)[0])
        slopes.append(temperature.log_scale.grad)
    assert slopes[1] is not None
    assert slopes[1].abs() > 1e-2
    torch.testing.assert_close(slopes[0], slopes[1])


# ---- finite differences ----


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_pass_gradcheck_in_float64(mask: str, decoupled: bool) -> None:
    key, queue = unit(N, 1, torch.float64), unit(K, 2, torch.float64)

    def loss(query: Tensor, temperature: Tensor) -> Tensor:
        how: dict[str, Any] = {"decoupled": decoupled, "chunk": 7, **MASKS[mask][0]}
        return info_nce_streamed(query, key, queue, temperature, **how).loss

    inputs = (unit(N, 0, torch.float64).requires_grad_(), torch.tensor(T, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(loss, inputs)


def test_a_second_derivative_is_refused() -> None:
    query = unit(N, 0).requires_grad_()
    loss = info_nce_streamed(query, unit(N, 1), unit(K, 2), T).loss
    with pytest.raises(RuntimeError, match="can be differentiated once; use info_nce"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_key_and_queue_get_no_gradient() -> None:
    query, key, queue = (unit(rows, seed).requires_grad_() for seed, rows in enumerate((N, N, K)))
    info_nce_streamed(query, key, queue, T).loss.backward()
    assert query.grad is not None
    assert key.grad is None
    assert queue.grad is None


# ---- precision ----


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_float32_is_as_accurate_as_the_materialized_form(temperature: float) -> None:
    n, k, dim = 64, 8192, 128
    query, key, queue = unit(n, 0, dim=dim), unit(n, 1, dim=dim), unit(k, 2, dim=dim)

    def slope(loss: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        q = query.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(q, key.to(dtype), queue.to(dtype), temperature), q)[0].double()

    exact = slope(lambda *x: info_nce(*x)[0], torch.float64)
    error = [
        (float((slope(loss, torch.float32) - exact).norm() / exact.norm()))
        for loss in (lambda *x: info_nce_streamed(*x).loss, lambda *x: info_nce(*x)[0])
    ]
    assert error[0] < max(error[1], torch.finfo(torch.float32).eps)  # or one unit in the last place


@pytest.mark.parametrize("chunk", CHUNKS)
def test_extreme_logits_do_not_overflow(chunk: int) -> None:
    found, _, streamed, expected = both({}, NO_MASK, chunk, torch.float32, temperature=1e-3)
    assert found.hardest.max() > 500
    for a, b in zip(streamed, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("order", [1, -1])
def test_logits_that_rise_or_fall_along_the_queue(order: int) -> None:
    """Each chunk has a new maximum, or is far below it."""
    angle = torch.linspace(0, math.pi, K, dtype=torch.float64)
    queue = torch.stack([angle.cos(), angle.sin()], dim=1)
    queue = queue.flip(0) if order < 0 else queue
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = info_nce_streamed(query, query.flip(0), queue, 1e-3, chunk=2)
    loss, logits = info_nce(query, query.flip(0), queue, 1e-3)
    torch.testing.assert_close(found.loss, loss, rtol=1e-13, atol=0)
    assert found.hardest.tolist() == pytest.approx(logits[:, 1:].amax(dim=1).tolist())


def test_a_very_small_loss_and_gradient_are_not_rounded_to_zero() -> None:
    """log(1 + 5 exp(-1 / T)) is too small for 1 + x in float32, where cross entropy returns 0."""
    query, queue = torch.eye(8)[:3].requires_grad_(), torch.eye(8)[3:]
    found = info_nce_streamed(query, query.detach(), queue, 0.05)
    assert found.loss.item() == pytest.approx(math.log1p(5 * math.exp(-20)), rel=1e-5)
    (slope,) = torch.autograd.grad(found.loss, query)
    assert slope[0, 0].item() == pytest.approx(-5 * math.exp(-20) / 0.05 / 3, rel=1e-5)


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    query, key, queue = (x.bfloat16() for x in (unit(N, 0), unit(N, 1), unit(K, 2)))
    half, full = query.clone().requires_grad_(), query.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce_streamed(half, key, queue, 0.07)
    expected = info_nce_streamed(full, key.float(), queue.float(), 0.07)
    for a, b in zip(found[:6], expected[:6], strict=True):
        assert torch.equal(a, b)
    found.loss.backward()
    expected.loss.backward()
    assert half.grad is not None
    assert full.grad is not None
    assert torch.equal(half.grad, full.grad.bfloat16())


# ---- closed forms ----


@pytest.mark.parametrize("k", [1, 2, 512, 65536])
def test_uniform_logits_give_log_1_plus_k_and_k_effective_negatives(k: int) -> None:
    one = torch.eye(C)[:1]
    found = info_nce_streamed(one.expand(3, -1), one.expand(3, -1), one.expand(k, -1), T)
    assert found.loss.item() == pytest.approx(math.log(1 + k), rel=1e-6)
    measures = {name: float(value) for name, value in found.measures(T).items()}
    assert measures["effective_negatives"] == pytest.approx(k, rel=1e-4)
    assert measures["chance"] == pytest.approx(math.log(1 + k))
    assert measures["push"] == pytest.approx(k / (1 + k))
    assert measures["contrast_accuracy"] == 0.0  # a tie is no success


@pytest.mark.parametrize("k", [1, 2, 512])
def test_the_decoupled_loss_of_uniform_logits_is_log_k_and_opposite_negatives_lower_it_by_2_over_t(k: int) -> None:
    one = torch.eye(C)[:1]
    keys = one.expand(3, -1), one.expand(3, -1)
    assert info_nce_streamed(*keys, one.expand(k, -1), T, decoupled=True).loss.item() == pytest.approx(math.log(k))
    opposite = info_nce_streamed(*keys, -one.expand(k, -1), T, decoupled=True).loss
    assert opposite.item() == pytest.approx(math.log(k) - 2 / T, rel=1e-6)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_without_any_negative_loss_and_gradient_are_zero(chunk: int, decoupled: bool) -> None:
    nothing = torch.zeros(1, K, dtype=torch.bool)
    query = unit(N, 0).requires_grad_()
    temperature = torch.tensor(T, requires_grad=True)
    how: dict[str, Any] = {"decoupled": decoupled, "chunk": chunk}
    found = info_nce_streamed(query, unit(N, 1), unit(K, 2), temperature, nothing, **how)
    slopes = torch.autograd.grad(found.loss, (query, temperature))
    assert found.loss.item() == 0.0
    assert [slope.abs().max().item() for slope in slopes] == [0.0, 0.0]
    assert found.hardest.tolist() == [-math.inf] * N
    measures = found._replace(positive=torch.zeros(N)).measures(T)
    assert {name: value.item() for name, value in measures.items()} == {
        "negatives": 0.0,
        "chance": 0.0,
        "contrast_accuracy": 1.0,
        "positive_similarity": 0.0,
        "effective_negatives": 0.0,
        "push": 0.0,
    }


def test_a_query_without_negatives_does_not_change_the_others() -> None:
    mask = torch.ones(N, K, dtype=torch.bool)
    mask[2] = False
    found, _, streamed, expected = both({"negatives": mask}, mask, chunk=7)
    assert streamed[0][2].abs().max() == 0
    torch.testing.assert_close(streamed[0], expected[0], rtol=1e-12, atol=1e-14)
    assert found.hardest.isinf().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("decoupled", [False, True])
def test_nan_propagates(decoupled: bool) -> None:
    query = unit(N, 0)
    query[1, 0] = math.nan
    found = info_nce_streamed(query, unit(N, 1), unit(K, 2), T, decoupled=decoupled)
    assert found.loss.isnan()
    assert found.hardest.isnan().tolist() == [False, True, False, False, False]


# ---- memory ----


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return out


def test_no_tensor_has_the_size_of_the_logits() -> None:
    n, k = 600, 4096
    query, key, queue = unit(n, 0).requires_grad_(), unit(n, 1), unit(k, 2)
    mask, index, queue_index = torch.arange(k)[None] < 3000, torch.arange(n), torch.arange(k) % 1500
    streamed, materialized = Largest(), Largest()
    with streamed:
        info_nce_streamed(query, key, queue, T, mask, samples=(index, queue_index)).loss.backward()
    assert streamed.elements <= module.BLOCK["cpu"]
    with materialized:
        info_nce(query, key, queue, T, mask & (index[:, None] != queue_index))[0].backward()
    assert materialized.elements >= n * k  # the measure sees what it is for


@pytest.mark.parametrize("mask", [name for name in MASKS if "own" in name])
def test_masks_of_a_gpu_equal_the_places_of_a_cpu(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU no search for places, which the host would wait for: the same numbers, bit for bit."""
    given: dict[str, Any] = MASKS[mask][0]
    call = partial(info_nce_streamed, unit(N, 0), unit(N, 1), unit(K, 2), T, chunk=7)
    expected = call(**given)
    find = module._OwnKeys.find
    monkeypatch.setattr(module._OwnKeys, "find", lambda *given: find(*given)._replace(places=None))
    for a, b in zip(call(**given)[:6], expected[:6], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("queries", "chunk"), [(32, 2**20), (256, 2**17), (512, 2**16), (4096, 8192), (10_000, 8192)])
def test_a_block_of_a_gpu_has_128_mib(queries: int, chunk: int) -> None:
    assert module._chunk(queries, "cuda") == chunk
    assert module._chunk(queries, "cpu") == 512


def test_forward_saves_only_tensors_of_the_size_of_the_queries() -> None:
    n, k = 64, 1024
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        info_nce_streamed(unit(n, 0).requires_grad_(), unit(n, 1), unit(k, 2), torch.tensor(T, requires_grad=True))
    assert max(kept) == n * C
    assert sum(kept) <= n * C + 3 * n  # the rest is of shape (N,)


# ---- errors ----


@pytest.mark.parametrize("temperature", [0.0, -0.2])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature={temperature} must be above 0"):
        info_nce_streamed(unit(N, 0), unit(N, 1), unit(K, 2), temperature)


@pytest.mark.parametrize(("key", "queue"), [((N + 1, C), (K, C)), ((N, C + 1), (K, C)), ((N, C), (K, C + 1))])
def test_invalid_shapes_are_refused(key: tuple[int, int], queue: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"key \({key[0]}, {key[1]}\), queue \({queue[0]}, {queue[1]}\)"):
        info_nce_streamed(unit(N, 0), torch.zeros(key), torch.zeros(queue), T)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"negatives": torch.ones(N, K)}, "negatives is float32"),
        ({"negatives": torch.ones(N, K + 1, dtype=torch.bool)}, r"negatives is bool of shape \(5, 24\)"),
        (
            {"samples": (INDEX[:2], QUEUE_INDEX)},
            r"samples\[0\] \(2,\), samples\[1\] \(23,\) must have the shapes \(N, C\), \(K, C\), \(N\), \(K\)",
        ),
        ({"samples": (INDEX, QUEUE_INDEX[:2])}, r"samples\[0\] \(5,\), samples\[1\] \(2,\)"),
    ],
)
def test_invalid_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce_streamed(unit(N, 0), unit(N, 1), unit(K, 2), T, **given)
