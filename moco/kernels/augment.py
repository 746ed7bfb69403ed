"""Augmentation of a batch of RGB crops in at most four launches, from the jitter to the normalization.

The results are those of the operations in `moco.data.ops`, bit for bit, because each operation is rounded alone:
products and sums are not fused (`enable_fp_fusion=False`), and divisions are rounded to the nearest number (`div_rn`).

1. `_gray_sums`: for the contrast, sums of the gray image as it is before the contrast changes.
2. `_color`: jitter and grayscale; for samples without blur, also the last operations.
3. `_blur_rows`, 4. `_blur_columns`: the two directions of the blur; after the second one, the last operations.

The last operations (`_finish`) are solarization, normalization, flips and rotation. Each sample has a row of parameters
in a table, float32 (N, 16 + r + 1). Its columns are named below. A turn is a place in the order of the jitter's
operations.

Legend: N samples, S x S pixels, B samples with blur, r the radius of the blur.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 0 ... 3: the operation of each turn of the jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue, 4 none
_FACTOR = tl.constexpr(4)  # 4 ... 7: the factor of each turn
_GRAY_FIRST, _GRAY = tl.constexpr(8), tl.constexpr(9)  # 1 or 0: grayscale before, and after the jitter
_BLUR, _SOLARIZE, _FLIP, _VERTICAL_FLIP = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12), tl.constexpr(13)
_QUARTERS = tl.constexpr(14)  # quarter turns counterclockwise, 0 ... 3
_BLURRED = tl.constexpr(15)  # in row b: the b-th sample with blur
_WEIGHTS = tl.constexpr(16)  # 16 ... 16 + r: weights of the blur at distances 0 ... r

_BLOCK = 1024  # pixels per program


@triton.jit
def _gray(r, g, b):
    return r * 0.2989 + g * 0.587 + b * 0.114


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _grayed(r, g, b, flag):
    if flag == 1.0:
        r = _gray(r, g, b)
        g, b = r, r
    return r, g, b


@triton.jit
def _hue(r, g, b, shift):
    """See `moco.data.ops.hue_`."""
    high = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    hue = g + b - r + high - low - low
    chroma = high - low
    hue = tl.abs(tl.div_rn(hue, tl.maximum(chroma, 1e-20)))
    hue = tl.where(g < b, -hue, hue) + shift * 6.0
    hue = hue - tl.floor(tl.div_rn(hue, 6.0)) * 6.0
    red = _unit(tl.abs(hue - 3.0) - 1.0) * chroma + low
    green = _unit(2.0 - tl.abs(hue - 2.0)) * chroma + low
    blue = _unit(2.0 - tl.abs(hue - 4.0)) * chroma + low
    return red, green, blue


@triton.jit
def _jittered(r, g, b, operation, factor, mean):
    """Apply one operation of the jitter; `mean` is that of the gray image."""
    if operation == 0.0:
        r, g, b = _unit(r * factor), _unit(g * factor), _unit(b * factor)
    elif operation == 1.0:
        added = mean * (1.0 - factor)
        r, g, b = _unit(r * factor + added), _unit(g * factor + added), _unit(b * factor + added)
    elif operation == 2.0:
        gray = _gray(r, g, b) * (1.0 - factor)
        r, g, b = _unit(r * factor + gray), _unit(g * factor + gray), _unit(b * factor + gray)
    elif operation == 3.0:
        r, g, b = _hue(r, g, b, factor)
    return r, g, b


@triton.jit
def _load(crops, sample, at, inside, PIXELS: tl.constexpr, WHITE: tl.constexpr):
    """Load pixels of a sample as red, green and blue: integers are scaled to 0 ... 1, float32 is kept."""
    start = crops + sample.to(tl.int64) * (3 * PIXELS) + at
    r = tl.load(start, inside, 0).to(tl.float32)
    g = tl.load(start + PIXELS, inside, 0).to(tl.float32)
    b = tl.load(start + 2 * PIXELS, inside, 0).to(tl.float32)
    if WHITE > 1:
        r, g, b = tl.div_rn(r, WHITE * 1.0), tl.div_rn(g, WHITE * 1.0), tl.div_rn(b, WHITE * 1.0)
    return r, g, b


@triton.jit
def _gray_sums(crops, table, sums, width, PIXELS: tl.constexpr, WHITE: tl.constexpr, BLOCK: tl.constexpr):
    """Write sums of the gray value + 1 over the blocks of pixels, float64 (N, blocks), for samples with contrast.

    Values in 1 ... 2 are multiples of 2**-23 in float32, so these sums are exact in float64, in any order.
    """
    sample, block = tl.program_id(0), tl.program_id(1)
    row = table + sample * width
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < PIXELS
    before = tl.full((), 4, tl.int32)  # the turn of the contrast
    for turn in tl.static_range(4):
        before = tl.where(tl.load(row + turn) == 1.0, turn, before)
    if before < 4:
        r, g, b = _load(crops, sample, at, inside, PIXELS, WHITE)
        r, g, b = _grayed(r, g, b, tl.load(row + _GRAY_FIRST))
        for turn in tl.static_range(3):
            if turn < before:
                r, g, b = _jittered(r, g, b, tl.load(row + turn), tl.load(row + _FACTOR + turn), 0.0)
        gray = tl.where(inside, _gray(r, g, b) + 1.0, 0.0)
        tl.store(sums + sample * tl.num_programs(1) + block, tl.sum(gray.to(tl.float64), 0))


@triton.jit
def _finish(
    values, out, row, sample, channel, at, inside, mean, std, threshold, SIZE: tl.constexpr, NORMALIZE: tl.constexpr
):
    """Solarize, normalize, and store pixels of one channel where flips and quarter turns bring them."""
    if tl.load(row + _SOLARIZE) == 1.0:
        values = tl.where(values >= threshold, 1.0 - values, values)
    if NORMALIZE:
        values = tl.div_rn(values - tl.load(mean + channel), tl.load(std + channel))
    last: tl.constexpr = SIZE - 1
    y, x = at // SIZE, at % SIZE
    x = tl.where(tl.load(row + _FLIP) == 1.0, last - x, x)
    y = tl.where(tl.load(row + _VERTICAL_FLIP) == 1.0, last - y, y)
    for quarter in tl.static_range(3):
        more = tl.load(row + _QUARTERS) > quarter
        y, x = tl.where(more, last - x, y), tl.where(more, y, x)
    tl.store(out + (sample.to(tl.int64) * 3 + channel) * (SIZE * SIZE) + y * SIZE + x, values, inside)


@triton.jit
def _color(
    crops,
    table,
    sums,
    out,
    mean,
    std,
    width,
    threshold,
    SIZE: tl.constexpr,
    WHITE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Change the color; apply `_finish` to samples without blur, and write the others to `out` for the blur."""
    sample = tl.program_id(0)
    row = table + sample * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE * SIZE
    r, g, b = _load(crops, sample, at, inside, SIZE * SIZE, WHITE)
    r, g, b = _grayed(r, g, b, tl.load(row + _GRAY_FIRST))
    for turn in tl.static_range(4):
        operation, average = tl.load(row + turn), tl.full((), 0.0, tl.float32)
        if operation == 1.0:
            blocks, count = tl.arange(0, BLOCKS), tl.num_programs(1)
            total = tl.sum(tl.load(sums + sample * count + blocks, blocks < count, 0.0), 0)
            average = (total / (SIZE * SIZE) - 1.0).to(tl.float32)
        r, g, b = _jittered(r, g, b, operation, tl.load(row + _FACTOR + turn), average)
    r, g, b = _grayed(r, g, b, tl.load(row + _GRAY))
    if tl.load(row + _BLUR) == 1.0:
        start = out + sample.to(tl.int64) * (3 * SIZE * SIZE) + at
        tl.store(start, r, inside)
        tl.store(start + SIZE * SIZE, g, inside)
        tl.store(start + 2 * SIZE * SIZE, b, inside)
    else:
        _finish(r, out, row, sample, 0, at, inside, mean, std, threshold, SIZE, NORMALIZE)
        _finish(g, out, row, sample, 1, at, inside, mean, std, threshold, SIZE, NORMALIZE)
        _finish(b, out, row, sample, 2, at, inside, mean, std, threshold, SIZE, NORMALIZE)


@triton.jit
def _reflected(x, SIZE: tl.constexpr):
    x = tl.abs(x)
    return tl.where(x < SIZE, x, 2 * (SIZE - 1) - x)


@triton.jit
def _blur_rows(colored, table, halfway, width, SIZE: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Blur along each row: from (N, 3, S, S) to (B, 3, S, S)."""
    slot = tl.program_id(0)
    sample = tl.load(table + slot * width + _BLURRED).to(tl.int64)
    weights = table + sample * width + _WEIGHTS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < 3 * SIZE * SIZE
    x = at % SIZE
    start = colored + sample * (3 * SIZE * SIZE) + (at - x)
    total = tl.load(start + x, inside, 0.0) * tl.load(weights)
    for distance in range(1, RADIUS + 1):
        before = tl.load(start + _reflected(x - distance, SIZE), inside, 0.0)
        after = tl.load(start + _reflected(x + distance, SIZE), inside, 0.0)
        total += (before + after) * tl.load(weights + distance)
    tl.store(halfway + slot.to(tl.int64) * (3 * SIZE * SIZE) + at, total, inside)


@triton.jit
def _blur_columns(
    halfway,
    table,
    out,
    mean,
    std,
    width,
    threshold,
    SIZE: tl.constexpr,
    RADIUS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blur along each column, and apply `_finish`: from (B, 3, S, S) to (N, 3, S, S)."""
    slot, channel = tl.program_id(0), tl.program_id(2)
    sample = tl.load(table + slot * width + _BLURRED).to(tl.int64)
    row = table + sample * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE * SIZE
    y, x = at // SIZE, at % SIZE
    start = halfway + (slot.to(tl.int64) * 3 + channel) * (SIZE * SIZE) + x
    total = tl.load(start + y * SIZE, inside, 0.0) * tl.load(row + _WEIGHTS)
    for distance in range(1, RADIUS + 1):
        before = tl.load(start + _reflected(y - distance, SIZE) * SIZE, inside, 0.0)
        after = tl.load(start + _reflected(y + distance, SIZE) * SIZE, inside, 0.0)
        total += (before + after) * tl.load(row + _WEIGHTS + distance)
    _finish(total, out, row, sample, channel, at, inside, mean, std, threshold, SIZE, NORMALIZE)


def augment(
    crops: Tensor,
    table: Tensor,
    out: Tensor,
    scale: tuple[Tensor, Tensor] | None,
    *,
    threshold: float,
    contrast: bool,
    blurred: int,
) -> None:
    """Augment crops on the device: jitter, grayscale, blur, solarization, flips, quarter turns, normalization.

    Args:
        crops: uint8, uint16 or float32, (N, 3, S, S).
        table: parameters of each sample, float32 (N, 16 + r + 1), see the module.
        out: float32, (N, 3, S, S), is overwritten.
        scale: mean and std of the channels, three numbers each; None: do not normalize.
        threshold: of the solarization.
        contrast: whether the contrast of any sample changes.
        blurred: B, the number of samples with blur.
    """
    count, size, width = len(crops), crops.shape[-1], table.shape[1]
    pixels, radius = size * size, width - _WEIGHTS.value - 1
    crops, blocks = crops.contiguous(), triton.cdiv(pixels, _BLOCK)
    mean, std = scale or (out, out)  # not read without normalization
    white = {torch.uint8: 255, torch.uint16: 65535}.get(crops.dtype, 1)
    exact = {"BLOCK": _BLOCK, "enable_fp_fusion": False}
    last = {"SIZE": size, "NORMALIZE": scale is not None, **exact}
    with torch.cuda.device_of(crops):
        sums = torch.empty(count if contrast else 0, blocks, dtype=torch.float64, device=crops.device)
        if contrast:
            _gray_sums[(count, blocks)](crops, table, sums, width, pixels, white, **exact)
        color = {"WHITE": white, "BLOCKS": triton.next_power_of_2(blocks), **last}
        _color[(count, blocks)](crops, table, sums, out, mean, std, width, threshold, **color)
        if blurred:
            halfway = torch.empty(blurred, 3, size, size, device=crops.device)
            _blur_rows[(blurred, triton.cdiv(3 * pixels, _BLOCK))](out, table, halfway, width, size, radius, **exact)
            grid = (blurred, blocks, 3)
            _blur_columns[grid](halfway, table, out, mean, std, width, threshold, RADIUS=radius, **last)
