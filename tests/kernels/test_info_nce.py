"""InfoNCE by a kernel against torch's operations in float64: on a GPU if there is one, else interpreted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.builder import KeyQueue, MoCo
from moco.losses.streamed import MEASURES, Streamed, info_nce_streamed
from tests.interpreter import needs_interpreter
from tests.losses.loops import coins, unit

tl = pytest.importorskip("triton.language")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = 0.1
# Relative to the largest number, or to 1: float32's rounding; that of the gradient, and of the weights for it, in half
# precision, in which the loss is as exact as in float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EXACT = ("losses", "positive", "hardest", "log_sum", "negatives", "chance", "push")  # in any number type
# NumPy warns because kernels compute with infinities.
pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def tf32(x: Any) -> Any:
    """Round float32 numbers to the 10 bits of TF32."""
    return ((x.view(np.int32) + 0x1000) & -0x2000).view(np.float32)


def wide(x: Any) -> Any:
    """Return the numbers of a tensor of the interpreter, which holds bfloat16 as integers."""
    return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels run on a CPU, and the interpreter compute products as tensor cores do."""
    monkeypatch.setattr("moco.losses.streamed.fused", lambda device: True)
    if DEVICE.type == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def product(self: Any, a: Any, b: Any, d: Any, precision: Any, _: Any) -> Any:
        x, y = wide(a), wide(b)
        if "TF32x3" in str(precision) and x.dtype == np.float32:
            (x, dx), (y, dy) = ((tf32(each), tf32(each - tf32(each))) for each in (x, y))
            return TensorHandle(x @ y + (x @ dy + dx @ y) + d.data, d.dtype.scalar)
        return TensorHandle(np.matmul(x, y, dtype=np.float32) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)


def inputs(n: int, c: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query, noise, queue = unit(n, c, seed=0), unit(n, c, seed=1), unit(k, c, seed=2)
    return query.to(dtype), F.normalize(query + 0.5 * noise, dim=1).to(dtype), queue.to(dtype)


def compared(query: Tensor, key: Tensor, queue: Tensor, **how: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield names and values of the kernel on `DEVICE`, and of torch's operations in float64 on a CPU."""
    found: list[tuple[Streamed, Tensor, Tensor]] = []
    for device, dtype, chunk in ((DEVICE, query.dtype, None), (torch.device("cpu"), torch.float64, len(queue))):
        q, k, each = (x.detach().to(device, dtype) for x in (query, key, queue))
        exact = torch.promote_types(dtype, torch.float32)
        temperature = torch.tensor(T, dtype=exact, device=device, requires_grad=True)
        there = {name: _on(value, device) for name, value in how.items()}
        streamed = info_nce_streamed(q.requires_grad_(), k, each, temperature, chunk=chunk, **there)
        (streamed.losses * torch.arange(1, len(q) + 1, device=device)).sum().backward()
        assert q.grad is not None
        assert temperature.grad is not None
        found.append((streamed, q.grad, temperature.grad))
    (ours, *our_grads), (theirs, *their_grads) = found
    assert ours.each is not None
    assert theirs.each is None
    for name in Streamed._fields[:6]:
        yield name, getattr(ours, name), getattr(theirs, name)
    decoupled = how.get("decoupled", False)
    expected, measured = theirs.measures(T, decoupled), ours.measures(T, decoupled)
    assert list(expected) == list(measured) == list(MEASURES)
    for name in MEASURES:
        yield name, measured[name], expected[name]
    for name, a, b in zip(("by query", "by temperature"), our_grads, their_grads, strict=True):
        yield name, a, b


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(each.to(device) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value


def check(given: tuple[Tensor, Tensor, Tensor], **how: Any) -> None:
    for name, ours, theirs in compared(*given, **how):
        tolerance = TOLERANCE[torch.float32 if name in EXACT else given[0].dtype]
        finite = theirs[theirs.isfinite()]
        largest = max(1.0, finite.abs().max().item()) if len(finite) else 1.0
        a, b = ours.detach().cpu().double(), theirs.detach().double()
        torch.testing.assert_close({name: a}, {name: b}, rtol=0, atol=tolerance * largest)


INDEX, QUEUE_INDEX = torch.arange(20) % 7, torch.arange(300) % 11
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "unfilled": {"negatives": torch.arange(300)[None] < 130},
    "each": {"negatives": coins(20, 300, seed=3)},
    "own and unfilled": {"samples": (INDEX, QUEUE_INDEX), "negatives": torch.arange(300)[None] < 130},
    "nothing": {"negatives": torch.zeros(1, 300, dtype=torch.bool)},
    "one query without negatives": {"negatives": torch.arange(20)[:, None] * torch.ones(300) > 0},
}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, decoupled: bool) -> None:
    check(inputs(20, 24, 300), decoupled=decoupled, **MASKS[mask])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_number_types(dtype: torch.dtype) -> None:
    check(inputs(20, 32, 300, dtype), samples=(INDEX, QUEUE_INDEX))


@pytest.mark.parametrize(("n", "c", "k"), [(1, 1, 1), (5, 128, 70), (40, 16, 65), (33, 100, 40)])
def test_sizes(n: int, c: int, k: int) -> None:
    check(inputs(n, c, k))


def test_solved_queries_keep_a_small_loss() -> None:
    """Where the loss is far below float32's rounding of 1, log(1 + x) must not become 0."""
    query = torch.eye(4, 16)
    found = info_nce_streamed(query.to(DEVICE), query.to(DEVICE), -query.to(DEVICE), 0.05)
    expected = info_nce_streamed(query.double(), query.double(), -query.double(), 0.05, chunk=4)
    torch.testing.assert_close(found.losses.cpu().double(), expected.losses, rtol=1e-5, atol=0)


def test_an_infinite_logit_gives_nan() -> None:
    query, key, queue = (x.to(DEVICE) for x in inputs(3, 16, 10))
    assert info_nce_streamed(query * torch.inf, key, queue, T).losses.isnan().all()


@pytest.mark.parametrize(("dim", "dtype"), [(129, torch.float32), (16, torch.float64)])
def test_other_inputs_use_torchs_operations(dim: int, dtype: torch.dtype) -> None:
    assert info_nce_streamed(*inputs(3, dim, 10, dtype), T).each is None


def test_moco_uses_the_kernel_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = KeyQueue(40, 16, start="empty").to(DEVICE)
    queue.enqueue(unit(20, 16, seed=5).to(DEVICE), torch.arange(20, device=DEVICE))
    model = MoCo(torch.nn.Identity(), queue)
    query, key, _ = (x.to(DEVICE) for x in inputs(8, 16, 1))
    index = torch.arange(8, device=DEVICE)
    loss, measures = model._contrast(query, key, index, T, None)
    monkeypatch.undo()
    monkeypatch.setattr("moco.losses.streamed.fused", lambda device: False)
    expected, others = model._contrast(query, key, index, T, None)
    torch.testing.assert_close(loss, expected)
    assert measures.keys() == others.keys()
    for name, value in measures.items():
        torch.testing.assert_close(value, others[name].to(value.dtype))
