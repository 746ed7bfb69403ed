"""BN over groups of a batch: two launches forward and two launches backward, whatever the number of groups.

A batch (N, C, H, W) in torch's channels_last format is a matrix of N H W rows and C columns, of which each group holds
L consecutive rows. The first kernel of each pass sums parts of each group's rows, the second one combines the parts and
computes the result. Sums are in float32. The variance is computed from squared differences from the mean.

Legend: G groups, L rows per group, C channels, P parts of a group.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 528  # approximate number to launch; an H200 has 132 multiprocessors
_MOST_PARTS = 32  # per group
_ROWS, _CHANNELS = 32, 64  # rows and channels that a program loads at once
_TILES = 8  # tiles of _ROWS rows that a program normalizes, one after the other


@triton.jit
def _place(C, COLUMNS: tl.constexpr):
    """Return a program's group, its number within the group, its channels, and which of these channels exist."""
    channels = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    return tl.program_id(0), tl.program_id(1), channels, channels < C


@triton.jit
def _at(group, rows, end, L, channels, is_channel, C):
    """Return the offsets of rows of a group, and which elements exist and come before row `end`."""
    return (group.to(tl.int64) * L + rows)[:, None] * C + channels, (rows < end)[:, None] & is_channel


@triton.jit
def _per_channel(values, channels, is_channel, default, GIVEN: tl.constexpr, COLUMNS: tl.constexpr):
    """Load weight or bias; if there is none, return the default."""
    result = tl.zeros((COLUMNS,), tl.float32) + default
    if GIVEN:
        result = tl.load(values + channels, is_channel, 0.0)
    return result


@triton.jit
def _moments(x, parts, L, C, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the mean of each part and its sum of squared differences from the mean: (2, G, P, C)."""
    group, number, channels, is_channel = _place(C, COLUMNS)
    mean, squares = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    begin, end = number * part, tl.minimum(number * part + part, L)
    for start in range(begin, end, ROWS):
        at, inside = _at(group, start + tl.arange(0, ROWS), end, L, channels, is_channel, C)
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        count = tl.minimum(end - start, ROWS).to(tl.float32)
        own = tl.sum(values, 0) / count
        apart = tl.where(inside, values - own, 0.0)
        # Chan et al., 1983: the moments of the union of two sets, from the moments of each set.
        before = (start - begin).to(tl.float32)
        change = own - mean
        squares += tl.sum(apart * apart, 0) + change * change * (before * count / (before + count))
        mean += change * (count / (before + count))
    to = parts + (group * tl.num_programs(1) + number) * C + channels
    tl.store(to, mean, is_channel)
    tl.store(to + tl.num_programs(0) * tl.num_programs(1) * C, squares, is_channel)


@triton.jit
def _combined(parts, group, L, part, channels, is_channel, G, P, C, PARTS: tl.constexpr):
    """Return mean and variance of a group from the `_moments` of its parts, (COLUMNS,) each."""
    number = tl.arange(0, PARTS)
    inside = (number < P)[:, None] & is_channel
    at = parts + (group * P + number)[:, None] * C + channels
    means, squares = tl.load(at, inside, 0.0), tl.load(at + G * P * C, inside, 0.0)
    counts = tl.maximum(tl.minimum(L - number * part, part), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * counts, 0) / L
    apart = tl.where(inside, means - mean, 0.0)
    return mean, tl.sum(squares + apart * apart * counts, 0) / L


@triton.jit
def _normalize(
    x, parts, weight, bias, running_mean, running_var, saved, out, G, L, C, P, part, chunk, momentum, eps,
    AFFINE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalize `chunk` rows of a group; one program per block of channels also updates the running statistics.

    Writes the groups' means and inverse standard deviations, (2, G, C), to `saved`.
    """
    group, number, channels, is_channel = _place(C, COLUMNS)
    mean, var = _combined(parts, group, L, part, channels, is_channel, G, P, C, PARTS)
    inverse = tl.rsqrt(var + eps)
    if number == 0:
        tl.store(saved + group * C + channels, mean, is_channel)
        tl.store(saved + (G + group) * C + channels, inverse, is_channel)
    if number + group == 0:
        means, variances = mean, var
        for other in range(1, G):
            another, spread = _combined(parts, other, L, part, channels, is_channel, G, P, C, PARTS)
            means += another
            variances += spread
        old_mean = tl.load(running_mean + channels, is_channel, 0.0)
        old_var = tl.load(running_var + channels, is_channel, 0.0)
        unbiased = variances / G * (L / (L - 1.0))
        tl.store(running_mean + channels, old_mean + momentum * (means / G - old_mean), is_channel)
        tl.store(running_var + channels, old_var + momentum * (unbiased - old_var), is_channel)
    scale = _per_channel(weight, channels, is_channel, 1.0, AFFINE, COLUMNS)
    shift = _per_channel(bias, channels, is_channel, 0.0, AFFINE, COLUMNS)
    end = tl.minimum(number * chunk + chunk, L)
    for start in range(number * chunk, end, ROWS):
        at, inside = _at(group, start + tl.arange(0, ROWS), end, L, channels, is_channel, C)
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        tl.store(out + at, (values - mean) * inverse * scale + shift, inside)


@triton.jit
def _gradient_sums(x, grad, saved, parts, L, C, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write each part's sums of the gradient, and of the gradient times the normalized value: (2, G, P, C)."""
    group, number, channels, is_channel = _place(C, COLUMNS)
    G = tl.num_programs(0)
    mean = tl.load(saved + group * C + channels, is_channel, 0.0)
    inverse = tl.load(saved + (G + group) * C + channels, is_channel, 0.0)
    total, weighted = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    end = tl.minimum(number * part + part, L)
    for start in range(number * part, end, ROWS):
        at, inside = _at(group, start + tl.arange(0, ROWS), end, L, channels, is_channel, C)
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        slopes = tl.load(grad + at, inside, 0.0).to(tl.float32)
        total += tl.sum(slopes, 0)
        weighted += tl.sum(slopes * (values - mean) * inverse, 0)
    to = parts + (group * tl.num_programs(1) + number) * C + channels
    tl.store(to, total, is_channel)
    tl.store(to + G * tl.num_programs(1) * C, weighted, is_channel)


@triton.jit
def _total(parts, group, channels, is_channel, G, P, C, PARTS: tl.constexpr):
    """Return the sums of a group over its parts, (COLUMNS,) each."""
    number = tl.arange(0, PARTS)
    inside = (number < P)[:, None] & is_channel
    at = parts + (group * P + number)[:, None] * C + channels
    return tl.sum(tl.load(at, inside, 0.0), 0), tl.sum(tl.load(at + G * P * C, inside, 0.0), 0)


@triton.jit
def _gradients(
    x, grad, saved, parts, weight, by_affine, out, G, L, C, P, chunk,
    AFFINE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient with respect to `chunk` rows of a group.

    One program per block of channels also writes the gradients with respect to weight and bias, (2, C).
    """
    group, number, channels, is_channel = _place(C, COLUMNS)
    total, weighted = _total(parts, group, channels, is_channel, G, P, C, PARTS)
    if AFFINE and number + group == 0:
        by_bias, by_weight = total, weighted
        for other in range(1, G):
            more, more_weighted = _total(parts, other, channels, is_channel, G, P, C, PARTS)
            by_bias += more
            by_weight += more_weighted
        tl.store(by_affine + channels, by_weight, is_channel)
        tl.store(by_affine + C + channels, by_bias, is_channel)
    mean = tl.load(saved + group * C + channels, is_channel, 0.0)
    inverse = tl.load(saved + (G + group) * C + channels, is_channel, 0.0)
    scale = _per_channel(weight, channels, is_channel, 1.0, AFFINE, COLUMNS)
    end = tl.minimum(number * chunk + chunk, L)
    for start in range(number * chunk, end, ROWS):
        at, inside = _at(group, start + tl.arange(0, ROWS), end, L, channels, is_channel, C)
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        slopes = tl.load(grad + at, inside, 0.0).to(tl.float32)
        normalized = (values - mean) * inverse
        tl.store(out + at, (slopes - total / L - normalized * (weighted / L)) * (inverse * scale), inside)


class _Sizes(NamedTuple):
    """How the rows of a batch are divided among programs."""

    channels: int
    rows: int  # L
    part: int  # rows per part
    parts: int  # P
    chunk: int  # rows that a program normalizes
    sums: tuple[int, int, int]  # the grid of the first kernel
    all: tuple[int, int, int]  # the grid of the second kernel
    tile: dict[str, int]  # the constants ROWS and COLUMNS of the kernels


@functools.lru_cache(maxsize=1024)  # computing the sizes takes the host longer than launching a kernel
def _sizes(shape: torch.Size, groups: int) -> _Sizes:
    channels, rows = shape[1], shape.numel() // shape[1] // groups
    columns = min(_CHANNELS, triton.next_power_of_2(channels))
    blocks, tiles = triton.cdiv(channels, columns), triton.cdiv(rows, _ROWS)
    part = _ROWS * triton.cdiv(tiles, min(_MOST_PARTS, triton.cdiv(_PROGRAMS, groups * blocks), tiles))
    parts, chunk = triton.cdiv(rows, part), _ROWS * min(_TILES, tiles)
    grids = (groups, parts, blocks), (groups, triton.cdiv(rows, chunk), blocks)
    return _Sizes(channels, rows, part, parts, chunk, *grids, {"ROWS": _ROWS, "COLUMNS": columns})


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor],
    groups: int,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalize each of G groups of consecutive images, without autograd, and update the running statistics.

    Args:
        x: (N, C), or (N, C, H, W) in the format channels_last; float32, bfloat16 or float16.
        weight, bias: float32 (C,), or both None.
        running: the running mean and variance, float32 (C,) each; updated with the mean over the groups.

    Returns:
        The result, of the shape and type of `x`; and the groups' means and inverse standard deviations, float32
        (2, G, C), for `batch_norm_backward`.
    """
    sizes = _sizes(x.shape, groups)
    parts = torch.empty(2, groups, sizes.parts, sizes.channels, device=x.device)
    saved = torch.empty(2, groups, sizes.channels, device=x.device)
    out = torch.empty_like(x)
    affine = (x, x) if weight is None else (weight, bias)  # without weight and bias, these arguments are not read
    with torch.cuda.device_of(x):
        _moments[sizes.sums](x, parts, sizes.rows, sizes.channels, sizes.part, **sizes.tile)
        _normalize[sizes.all](
            x, parts, *affine, *running, saved, out,
            groups, sizes.rows, sizes.channels, sizes.parts, sizes.part, sizes.chunk, float(momentum), float(eps),
            AFFINE=weight is not None, PARTS=_MOST_PARTS, **sizes.tile,
        )  # fmt: skip
    return out, saved


def batch_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and of weight and bias; the latter: float32 (2, C), or (2, 0) if `weight` is None."""
    groups = saved.shape[1]
    sizes = _sizes(x.shape, groups)
    parts = torch.empty(2, groups, sizes.parts, sizes.channels, device=x.device)
    by_affine = torch.empty(2, 0 if weight is None else sizes.channels, device=x.device)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _gradient_sums[sizes.sums](x, grad, saved, parts, sizes.rows, sizes.channels, sizes.part, **sizes.tile)
        _gradients[sizes.all](
            x, grad, saved, parts, x if weight is None else weight, by_affine, out,
            groups, sizes.rows, sizes.channels, sizes.parts, sizes.chunk,
            AFFINE=weight is not None, PARTS=_MOST_PARTS, **sizes.tile,
        )  # fmt: skip
    return out, by_affine
