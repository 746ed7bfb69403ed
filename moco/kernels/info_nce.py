"""InfoNCE against a queue in two launches: loss, gradient and measures of each query, without any logit in memory.

The mathematics is that of `moco.losses.streamed`. As in Flash-Decoding (Dao et al., 2023), a few queries against a long
queue fill a GPU because each program takes one part of the queue; a second kernel combines the parts.

1. `_parts`: for each part, the largest logit, the sum of the exponentials relative to it, and the sum of the keys
   weighted by these exponentials.
2. `_combine`: for each query, the sums over the parts, the loss, its derivatives and the measures.

Half precision is multiplied as it is, and summed in float32. Tensor cores compute products of float32 numbers as three
products of TF32 numbers, whose error is about that of float32. If TF32 is allowed, they compute only one product of
TF32 numbers.

Legend: N queries, C dimension, K queue length, P parts of the queue.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_DIM = 128  # of C; a larger C needs more registers and shared memory than a multiprocessor has
_PROGRAMS = 256  # approximate number to launch; an H200 has 132 multiprocessors
# Queries and keys per product, and warps: 64 KiB of shared memory, and almost no spilled registers, on sm_80 and sm_90.
_ROWS, _COLUMNS, _WARPS = 32, 64, 8
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: -inf - -inf is nan


class Fused(NamedTuple):
    """The results for each query, (N,), and the gradient."""

    losses: Tensor
    positive: Tensor  # the key's logit
    hardest: Tensor  # the largest logit of a negative; -inf without any
    log_sum: Tensor  # log of the sum of the negatives' exponentials; -inf without any
    negatives: Tensor  # the number of negatives
    effective_negatives: Tensor
    measures: Tensor  # (6, N), in the order of `moco.losses.streamed.MEASURES`
    by_query: Tensor  # the gradient with respect to the query is this times `apart`
    by_temperature: Tensor  # the derivative with respect to the temperature
    apart: Tensor  # (N, C), softmax-weighted mean key of the negatives - own key


@triton.jit
def _temperature(value, LEARNED: tl.constexpr):
    if LEARNED:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def _load(vectors, rows, inside, C, dims, HALF: tl.constexpr):
    """Load rows of vectors (..., C); with `HALF` in their own type, else in float32."""
    values = tl.load(vectors + rows[:, None].to(tl.int64) * C + dims, inside[:, None] & (dims < C), 0.0)
    if not HALF:
        values = values.to(tl.float32)
    return values


@triton.jit
def _parts(
    query,
    queue,
    temperature,
    negatives,
    sample,
    queue_sample,
    sums,
    pulled,
    N,
    C,
    K,
    part,
    stride,
    LEARNED: tl.constexpr,
    MASKED: tl.constexpr,
    SAMPLES: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Write largest logit, sum of exponentials, number of negatives, (P, 3, N), and sum of weighted keys, (P, N, C)."""
    number = tl.program_id(1)
    rows, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    is_query, is_dim = rows < N, dims < C
    factor = 1.0 / _temperature(temperature, LEARNED)
    q = _load(query, rows, is_query, C, dims, HALF)
    if SAMPLES:
        own = tl.load(sample + rows, is_query, 0)
    top = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.int32)
    keys_sum = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(number * part, tl.minimum(number * part + part, K), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_key = columns < K
        keys = _load(queue, columns, is_key, C, dims, HALF)  # (COLUMNS, DIM)
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * factor  # (ROWS, COLUMNS)
        allowed = is_query[:, None] & is_key
        if MASKED:
            allowed &= tl.load(negatives + rows[:, None].to(tl.int64) * stride + columns, allowed, 0) != 0
        if SAMPLES:
            allowed &= own[:, None] != tl.load(queue_sample + columns, is_key, 0)
        logits = tl.where(allowed, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - higher)
        weights = tl.exp(logits - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        count += tl.sum(allowed.to(tl.int32), 1)
        keys_sum = keys_sum * shrink[:, None] + tl.dot(weights.to(keys.dtype), keys, input_precision=PRECISION)
        top = higher
    to = sums + number * 3 * N + rows
    tl.store(to, top, is_query)
    tl.store(to + N, total, is_query)
    tl.store(to + 2 * N, count.to(tl.float32), is_query)
    tl.store(pulled + (number * N + rows[:, None]).to(tl.int64) * C + dims, keys_sum, is_query[:, None] & is_dim)


@triton.jit
def _sum_over_parts(sums, pulled, n, N, C, P, PARTS: tl.constexpr, DIM: tl.constexpr):
    """Return a query's largest logit, sum of exponentials relative to it, number of negatives and mean key, (DIM,)."""
    parts, dims = tl.arange(0, PARTS), tl.arange(0, DIM)
    is_part = parts < P
    tops = tl.load(sums + parts * 3 * N + n, is_part, _LOWEST)
    top = tl.max(tops, 0)
    total = tl.sum(tl.exp(tops - top) * tl.load(sums + parts * 3 * N + N + n, is_part, 0.0), 0)
    count = tl.sum(tl.load(sums + parts * 3 * N + 2 * N + n, is_part, 0.0), 0)
    mean_key = tl.zeros((DIM,), tl.float32)
    for number in range(P):
        share = tl.exp(tl.load(sums + number * 3 * N + n) - top)
        mean_key += share * tl.load(pulled + (number * N + n).to(tl.int64) * C + dims, dims < C, 0.0)
    # If there is a negative, the total is 1 or more: the largest logit adds exp(0).
    return top, total, count, mean_key / tl.maximum(total, 1.0)


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x >= 0, accurate also where 1 + x is rounded."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / (sum - 1.0)))


@triton.jit
def _combine(
    query,
    key,
    temperature,
    sums,
    pulled,
    out,
    apart,
    N,
    C,
    P,
    LEARNED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Write the results of one query to `out`, (12, N), in the order in which `info_nce` unpacks it, and to `apart`."""
    n = tl.program_id(0)
    t = _temperature(temperature, LEARNED)
    dims = tl.arange(0, DIM)
    is_dim = dims < C
    top, total, count, mean_key = _sum_over_parts(sums, pulled, n, N, C, P, PARTS, DIM)
    scaled = tl.load(query + n * C + dims, is_dim, 0.0).to(tl.float32) / t
    own = tl.load(key + n * C + dims, is_dim, 0.0).to(tl.float32)
    positive, mean_logit = tl.sum(scaled * own, 0), tl.sum(scaled * mean_key, 0)
    has_negative = top != _LOWEST
    hardest = tl.where(has_negative, top, float("-inf"))
    log_sum = tl.where(has_negative, top + tl.log(total), float("-inf"))
    excess = log_sum - positive
    push = 1.0 / (1.0 + tl.exp(-excess))
    if DECOUPLED:
        loss, factor = tl.where(has_negative, excess, 0.0), tl.where(has_negative, 1.0, 0.0)
        chance = tl.log(tl.maximum(count, 1.0))
    else:
        loss, factor = tl.maximum(excess, 0.0) + _log1p(tl.exp(-tl.abs(excess))), push
        chance = tl.log(1.0 + count)
    effective = tl.exp(log_sum - mean_logit)
    tl.store(out + n, loss + (positive - positive))  # nan for an infinite logit
    tl.store(out + N + n, positive)
    tl.store(out + 2 * N + n, hardest)
    tl.store(out + 3 * N + n, log_sum)
    tl.store(out + 4 * N + n, count)
    tl.store(out + 5 * N + n, chance)
    tl.store(out + 6 * N + n, tl.where(positive > hardest, 1.0, 0.0))
    tl.store(out + 7 * N + n, positive * t)
    tl.store(out + 8 * N + n, effective)
    tl.store(out + 9 * N + n, push)
    tl.store(out + 10 * N + n, factor / t)
    tl.store(out + 11 * N + n, -factor / t * (mean_logit - positive))
    tl.store(apart + n * C + dims, mean_key - own, is_dim)


def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    negatives: Tensor | None,
    samples: tuple[Tensor, Tensor] | None,
    decoupled: bool,
) -> Fused:
    """Compute InfoNCE of each query, without a graph for autograd.

    Arguments are those of `moco.losses.info_nce_streamed`, in float32, bfloat16 or float16 and with C <= `LARGEST_DIM`.
    """
    count, dim, length = len(query), query.shape[1], len(queue)
    blocks = triton.cdiv(count, _ROWS)
    part = triton.cdiv(length, triton.cdiv(_PROGRAMS, blocks))
    part = _COLUMNS * triton.cdiv(part, _COLUMNS)
    parts = triton.cdiv(length, part)
    query, key, queue = query.detach().contiguous(), key.detach().contiguous(), queue.detach().contiguous()
    sums = torch.empty(parts, 3, count, device=query.device)
    pulled = torch.empty(parts, count, dim, device=query.device)
    out, apart = torch.empty(12, count, device=query.device), torch.empty(count, dim, device=query.device)
    learned = isinstance(temperature, Tensor)
    value = temperature if isinstance(temperature, Tensor) else float(temperature)
    # Without a mask or samples, any tensor takes their place: it is not read.
    mask = query if negatives is None else negatives.contiguous()
    own, others = (query, query) if samples is None else (each.contiguous() for each in samples)
    with torch.cuda.device_of(query):
        _parts[(blocks, parts)](
            query, queue, value, mask, own, others, sums, pulled,
            count, dim, length, part, length if len(mask) > 1 else 0,
            LEARNED=learned, MASKED=negatives is not None, SAMPLES=samples is not None,
            HALF=query.dtype == queue.dtype != torch.float32,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
            ROWS=_ROWS, COLUMNS=_COLUMNS, DIM=max(16, triton.next_power_of_2(dim)), num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
        _combine[(count,)](
            query, key, value, sums, pulled, out, apart, count, dim, parts,
            LEARNED=learned, DECOUPLED=decoupled,
            PARTS=triton.next_power_of_2(parts), DIM=triton.next_power_of_2(dim),
        )  # fmt: skip
    losses, positive, hardest, log_sum, number, *_, by_query, by_temperature = out.unbind()
    return Fused(losses, positive, hardest, log_sum, number, out[8], out[4:10], by_query, by_temperature, apart)
